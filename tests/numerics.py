"""How a test decides: a result against float64, measured by what dense attention loses in the same dtype.

    max|e| <= 2 max|b| + eps(dtype) max|ref|      and      ||e|| / ||ref|| <= 2 ||b|| / ||ref|| + 1e-4   (float32: 1e-6)

e is the error of the result, b that of the baseline. `Problem` brings an attention case, its float64 reference and its
baseline together; `check_forward` and `check_backward` run a backend on it.
"""

import contextlib
import dataclasses
import functools
import math

import torch
import torch.nn.functional as F

import sparsekit
from backends import Backend
from sparsekit import reference
from sparsekit.bench.cases import AttentionCase, AttentionInputs, make_inputs

GRADIENTS = ("query", "key", "value", "key_bias", "sinks")


# ---- the criterion


SEARCHED = 4.0  # instead of 2, where hypothesis looks through hundreds of problems for one whose baseline was lucky


def failure(got, ref, bases, dtype: torch.dtype, terms: float = 0.0, times: float = 2.0) -> str | None:
    """Why `got` does not pass, or None. `bases`: results of the baseline, the worst of which counts. `terms`: how large the
    terms are whose sum may cancel; their rounding in float32 is granted."""
    got, ref, *bases = (x.detach().cpu().double() for x in (got, ref, *bases))
    if got.shape != ref.shape:
        return f"shape {tuple(got.shape)} for {tuple(ref.shape)}"
    if not got.isfinite().all():
        return f"{int((~got.isfinite()).sum())} of {got.numel()} elements are not finite"
    if got.numel() == 0:
        return None
    error = got - ref
    errors = [(base - ref).nan_to_num(0, 0, 0) for base in bases]  # where a baseline fails it excuses nothing
    largest = error.abs().max()
    bound = times * max(e.abs().max() for e in errors) + torch.finfo(dtype).eps * ref.abs().max()
    bound += torch.finfo(torch.float32).eps * terms
    if not largest <= bound:
        return f"max|e| = {largest:.3g} > {bound:.3g}"
    if got.numel() < 256 or ref.abs().max() < 1e-5 * terms:
        return None  # a norm over so few numbers, or of what cancels to nothing, is the luck of the baseline
    norm = error.norm()
    bound = times * max(e.norm() for e in errors) + (1e-6 if dtype.itemsize >= 4 else 1e-4) * ref.norm()
    if not norm <= bound:
        return f"||e|| / ||ref|| = {norm / ref.norm():.3g} > {bound / ref.norm():.3g}"
    return None


def assert_passes(name: str, got, ref, bases, dtype: torch.dtype, terms: float = 0.0, times: float = 2.0):
    reason = failure(got, ref, bases, dtype, terms, times)
    assert reason is None, f"{name}: {reason}"


def assert_lse_passes(lse, ref, base, dtype: torch.dtype):
    """lse is float32 whatever the inputs are, a sum of scores near 0 can cancel, and matrix units round each step: the
    error may be twice the baseline's and a few units of the last place of 4 + max|ref|. A key of 8,192 is worth 1e-4."""
    lse, ref, base = (x.detach().cpu().double() for x in (lse, ref, base))
    finite = ref.isfinite()
    assert torch.equal(lse[~finite], ref[~finite]), "lse: rows that see no key must be -inf"
    if not finite.any():
        return
    lse, ref, base = lse[finite], ref[finite], base[finite]
    units = 8 if dtype.itemsize == 2 else 3  # float32: the maximum in units of log 2, its product with ln 2, the sum
    bound = 2 * (base - ref).abs().max() + units * torch.finfo(torch.float32).eps * (4 + ref.abs().max())
    largest = (lse - ref).abs().max()
    assert largest <= bound, f"lse: max|e| = {largest:.3g} > {bound:.3g}"  # NaN too


# ---- the mask, block by block: not shared with the library


def visible(inputs: AttentionInputs) -> torch.Tensor:
    """bool [B, Hq, Sq, Sk] (packed: [1, Hq, Tq, Tk]), which query sees which key: the semantics in loops."""
    case, p = inputs.case, inputs.pattern.to("cpu")
    (block_q, block_k), (left, right) = p.block_size, p.window
    list_batch, list_heads, _ = p.kv_num_blocks.shape
    bits_index = (p.kv_indices * 0 - 1 if p.partial_bits_index is None else p.partial_bits_index).tolist()
    lists = [(p.kv_num_blocks.tolist(), p.kv_indices.tolist(), False)]
    if p.full_kv_num_blocks is not None:
        lists.append((p.full_kv_num_blocks.tolist(), p.full_kv_indices.tolist(), True))
    mask = torch.zeros(case.batch, list_heads, case.len_q, case.len_k, dtype=torch.bool)
    for b in range(case.batch):
        lb = min(b, list_batch - 1)
        row = q0 = k0 = 0
        for len_q, len_k in case.sequences:
            at_q, at_k = torch.arange(len_q) + len_k - len_q, torch.arange(len_k)
            if inputs.query_positions is not None:
                at_q = inputs.query_positions.cpu().expand(case.batch, -1)[b, q0 : q0 + len_q].long()
            if inputs.key_positions is not None:
                at_k = inputs.key_positions.cpu().expand(case.batch, -1)[b, k0 : k0 + len_k].long()
            ahead = at_k[None] - at_q[:, None]
            allowed = torch.ones(len_q, len_k, dtype=torch.bool)
            allowed &= (ahead <= 0) | (not p.causal)
            allowed &= (ahead >= -left) | (left < 0)
            allowed &= (ahead <= right) | (right < 0)
            blocks = [(m, lh) for m in range(math.ceil(len_q / block_q)) for lh in range(list_heads)]
            for m, lh in blocks:
                rows = slice(m * block_q, min((m + 1) * block_q, len_q))
                for counts, indices, full in lists:
                    for slot, n in enumerate(indices[lb][lh][row + m][: counts[lb][lh][row + m]]):
                        if not 0 <= n < math.ceil(len_k / block_k):
                            continue
                        columns = slice(n * block_k, min((n + 1) * block_k, len_k))
                        block = allowed[rows, columns] | full
                        if not full and (number := bits_index[lb][lh][row + m][slot]) >= 0:
                            block &= _bits(p.partial_bits[number], block_k)[: block.shape[0], : block.shape[1]]
                        mask[b, lh, q0:, k0:][rows, columns] |= block
            row += math.ceil(len_q / block_q)
            q0, k0 = q0 + len_q, k0 + len_k
    return mask.repeat_interleave(case.heads_q // list_heads, 1)


def _bits(words: torch.Tensor, keys: int) -> torch.Tensor:
    """bool [rows, keys] of int32 words [rows, ceil(keys / 32)]."""
    key = torch.arange(keys)
    return (words.long()[:, key // 32] >> (key % 32)) & 1 == 1


# ---- dense attention in the dtype of its inputs


class _DenseAttention(torch.autograd.Function):
    """Dense attention with the arithmetic of a flash kernel: scores and sums in float32 (float64 for float64), what is
    multiplied and what is returned in the inputs' dtype. Backward knows out and lse as they were stored, and computes the
    scores again, summed in another order."""

    @staticmethod
    def scores(query, key, bias, mask, scale, softcap, wide):
        product = scale * (query.to(wide) @ key.to(wide).transpose(-1, -2))
        if softcap:
            product = softcap * torch.tanh(product / softcap)
        score = product if bias is None else product + bias[:, :, None].to(wide)
        return product, score.masked_fill(~mask, -math.inf)

    @staticmethod
    def forward(ctx, query, key, value, bias, sinks, mask, scale, softcap):
        dtype, wide = query.dtype, torch.float64 if query.dtype == torch.float64 else torch.float32
        ctx.settings = dtype, wide, query.shape[1] // key.shape[1], scale, softcap
        key_of_head, value_of_head = (x.repeat_interleave(ctx.settings[2], 1) for x in (key, value))
        _, score = _DenseAttention.scores(query, key_of_head, bias, mask, scale, softcap, wide)
        blind = (score == -math.inf).all(-1, keepdim=True)
        lse = score.masked_fill(blind, 0).logsumexp(-1, keepdim=True)
        normaliser = lse if sinks is None else torch.logaddexp(lse, sinks[None, :, None, None].to(wide))
        weight = (score - normaliser).exp().masked_fill(blind, 0).to(dtype)
        out = (weight.to(wide) @ value_of_head.to(wide)).to(dtype)
        ctx.save_for_backward(query, key, value, bias, sinks, mask, out, lse, normaliser, blind)
        return out, lse.masked_fill(blind, -math.inf).squeeze(-1)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, bias, sinks, mask, out, lse, normaliser, blind = ctx.saved_tensors
        dtype, wide, group, scale, softcap = ctx.settings
        grad_out, (key_of_head, value_of_head) = (
            grad_out.to(wide),
            (x.repeat_interleave(group, 1) for x in (key, value)),
        )
        flipped = query.flip(-1), key_of_head.flip(-1)
        product, score = _DenseAttention.scores(*flipped, bias, mask, scale, softcap, wide)
        weight = (score - normaliser).exp().masked_fill(blind, 0)
        delta = (grad_out * out.to(wide)).sum(-1, keepdim=True)
        grad_score = weight * (grad_out @ value_of_head.to(wide).transpose(-1, -2) - delta)
        grad_score = grad_score + (score - lse).exp().masked_fill(blind, 0) * grad_lse[..., None]
        grad_product = grad_score * scale * (1 - (product / softcap) ** 2 if softcap else 1)
        grad_product, weight = grad_product.to(dtype).to(wide), weight.to(dtype).to(wide)

        def over_group(gradient):
            return gradient.unflatten(1, (-1, group)).sum(2).to(dtype)

        grad_bias = grad_sinks = None
        if bias is not None:
            grad_bias = grad_score.sum(2).sum_to_size(bias.shape).to(bias.dtype)
        if sinks is not None:
            share = (sinks[None, :, None, None].to(wide) - normaliser).exp().masked_fill(blind, 0)
            grad_sinks = -(share * delta).sum((0, 2, 3)).to(sinks.dtype)
        return (
            (grad_product @ key_of_head.to(wide)).to(dtype),
            over_group(grad_product.transpose(-1, -2) @ query.to(wide)),
            over_group(weight.transpose(-1, -2) @ grad_out),
            *(grad_bias, grad_sinks, None, None, None),
        )


def dense_attention(query, key, value, mask, *, scale=None, softcap=None, key_bias=None, sinks=None):
    """(out, lse) of dense attention in the dtype of its inputs. Rows that see nothing give 0 and -inf."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _DenseAttention.apply(query, key, value, key_bias, sinks, mask, scale, softcap)


def dense_draws(query, key, value, mask, draws: int = 4, **options) -> list:
    """[(out, lse), ...] of dense attention, each one draw of its rounding errors: in the order of the inputs, and with rows,
    keys and dimensions shuffled. One draw of a number that is small by chance (the gradient of a sink is a single
    number) would condemn a good kernel."""
    results = [dense_attention(query, key, value, mask, **options)]
    bias = options.get("key_bias")
    for _ in range(draws - 1):
        sizes = query.shape[2], key.shape[2], query.shape[3], value.shape[3]
        rows, keys, dims, columns = (torch.randperm(n, device=query.device) for n in sizes)
        out, lse = dense_attention(
            query[:, :, rows][..., dims],
            key[:, :, keys][..., dims],
            value[:, :, keys][..., columns],
            mask[:, :, rows][..., keys],
            **options | {"key_bias": None if bias is None else bias[..., keys]},
        )
        results.append((out[..., columns.argsort()][:, :, rows.argsort()], lse[:, :, rows.argsort()]))
    return results


def sdpa(query, key, value, mask, scale=None):
    """torch's dense attention with the mask; rows that see nothing give 0."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    blind = ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | blind, scale=scale)
    return out.masked_fill(blind, 0)


# ---- a problem with its reference and its baseline


@dataclasses.dataclass
class Problem:
    """Inputs of a call, on the device of the backend; `scale` None is the default. grad_lse may be left out."""

    inputs: AttentionInputs
    scale: float | None = None
    grad_lse: bool = False

    @property
    def case(self) -> AttentionCase:
        return self.inputs.case

    @property
    def about(self) -> tuple:
        """What decides which implementation runs."""
        return self.case.dtype, self.case.head_dim, self.case.value_dim, self.case.block_size

    @property
    def kind(self) -> dict:
        """And what decides it besides."""
        return {"packed": self.case.packed}

    @property
    def options(self) -> dict:
        return dict(self.inputs.kwargs, **({} if self.scale is None else {"scale": self.scale}))

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        return visible(self.inputs).to(self.inputs.query.device)

    @functools.cached_property
    def upstream(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of out and lse that backward starts from."""
        case = self.case
        rows = (case.len_q, case.heads_q) if case.packed else (case.batch, case.heads_q, case.len_q)
        grad_lse = torch.randn(rows[::-1] if case.packed else rows)
        device = self.inputs.query.device
        return torch.randn(*rows, case.value_dim).to(device, case.dtype), grad_lse.to(device)

    def leaves(self, dtype: torch.dtype | None = None, device=None) -> dict[str, torch.Tensor]:
        """The differentiable inputs as fresh leaves, cast where a dtype is given."""
        tensors = {name: getattr(self.inputs, name) for name in GRADIENTS}
        return {
            name: x.detach().to(device=device, dtype=dtype).clone().requires_grad_(x.is_floating_point())
            for name, x in tensors.items()
            if x is not None
        }

    def run(self, attend, leaves: dict, **options):
        """`attend` of this problem on other leaves: (out, lse)."""
        changed = dataclasses.replace(self.inputs, **leaves)
        named = {**self.options, **{name: leaves[name] for name in ("key_bias", "sinks") if name in leaves}}
        return attend(*changed.args, **named, **options)

    def sparse(self, leaves: dict, **options):
        attend = sparsekit.block_sparse_attention_varlen if self.case.packed else sparsekit.block_sparse_attention
        return self.run(attend, leaves, return_lse=True, **options)

    def reference(self, leaves: dict):
        """In float64 on the CPU."""
        moved = {
            field.name: value.to("cpu")
            for field in dataclasses.fields(self.inputs)
            if hasattr(value := getattr(self.inputs, field.name), "to")
        }
        host = Problem(dataclasses.replace(self.inputs, **moved), self.scale)
        attend = reference.block_sparse_attention_varlen if self.case.packed else reference.block_sparse_attention
        return host.run(attend, leaves)

    def baselines(self, leaves: dict, draws: int = 4) -> list:
        """Dense attention in the problem's dtype, on its device: [(out, lse), ...], some draws of its rounding errors, and
        torch's own kernel where that can express the problem."""
        q, k, v = (leaves[name] for name in GRADIENTS[:3])
        if self.case.packed:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        options = {name: leaves[name] for name in ("key_bias", "sinks") if name in leaves}
        options |= {"softcap": self.case.softcap, "scale": self.scale}
        results = dense_draws(q, k, v, self.mask, draws, **options)
        if not (self.case.softcap or self.case.sinks or self.case.key_bias or self.grad_lse):
            results.append((sdpa(q, k, v, self.mask, self.scale), results[0][1]))
        return [(out[0].transpose(0, 1), lse[0]) if self.case.packed else (out, lse) for out, lse in results]

    @functools.cached_property
    def rounding(self) -> float:
        """How large the terms are that cancel in out: a score is rounded in units of its own size, its weight with it, and
        one key may hold nearly all of a row's weight or lose it."""
        q, k, v = (x.detach().cpu().double() for x in self.inputs.args[:3])
        if 0 in (q.numel(), k.numel()):
            return 0.0
        if self.case.packed:
            q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
        scale = self.case.head_dim**-0.5 if self.scale is None else self.scale
        k = k.repeat_interleave(self.case.heads_q // self.case.heads_kv, 1)
        return float(scale * (q @ k.mT).abs().max() * v.abs().max())

    def terms(self, out, value) -> dict[str, float]:
        """How large the terms are that cancel in each gradient, given the reference's out and value: scale * dP * key in
        that of query, which is 0 for a row of one key, and so on. A score of 40 is rounded to 40 units, and its weight
        with it. What is made of delta = rowsum(dO * O) has the error of O as stored, in the dtype."""
        case = self.case
        q, k, grad_out = (x.detach().cpu().double() for x in (*self.inputs.args[:2], self.upstream[0]))
        if 0 in (q.numel(), k.numel()):
            return {}
        delta = (grad_out * out.detach()).square().sum(-1, keepdim=True)  # its error, squared, in units of the dtype
        # Column 0 of what value's gradient would be: sum over rows of weight * delta.
        column = torch.nn.functional.pad(delta, (0, case.value_dim - 1))
        (spread,) = torch.autograd.grad(out, value, column, retain_graph=True)
        if case.packed:
            q, k, grad_out, value, delta, spread = (
                x.transpose(0, 1)[None] for x in (q, k, grad_out, value.detach(), delta, spread)
            )
        group = case.heads_q // case.heads_kv
        k, value = (x.detach().repeat_interleave(group, 1) for x in (k, value))
        scale = case.head_dim**-0.5 if self.scale is None else self.scale
        grad_weight = scale * (grad_out @ value.mT).abs().max()
        coarse = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps
        spread = coarse * spread[..., 0].sum((0, 1)).max().sqrt()
        terms = {
            "query": (grad_weight + scale * coarse * delta.max().sqrt()) * k.abs().max(),
            "key": (grad_weight + scale * spread) * q.abs().max(),
            "value": scale * (q @ k.mT).abs().max() * grad_out.abs().max(),
            "key_bias": spread,
            "sinks": coarse * delta.sum((0, 2, 3)).max().sqrt(),
        }
        return {name: float(term) for name, term in terms.items()}


def make_problem(case: AttentionCase, backend: Backend, seed: int, **options) -> Problem:
    torch.manual_seed(seed)
    return Problem(make_inputs(case.with_(seed=seed), backend.device), **options)


@contextlib.contextmanager
def poisoned(device: str = "cpu"):
    """Uninitialised tensors are full of NaN inside: what a kernel does not write shows. (Torch does that for deterministic
    algorithms, so on CUDA kernels are the deterministic ones.)"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(9, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_forward(backend: Backend, problem: Problem, times: float = 2.0):
    """Runs a problem on a backend and holds out and lse to the reference. Returns them."""
    with backend.running(*problem.about, **problem.kind), torch.no_grad():
        leaves = problem.leaves()
        with poisoned(backend.device):
            out, lse = problem.sparse(leaves)
        ref, ref_lse = problem.reference(problem.leaves(torch.float64, "cpu"))
        bases = problem.baselines(leaves)
        assert out.dtype == problem.case.dtype and lse.dtype == bases[0][1].dtype
        assert_passes("out", out, ref, [base for base, _ in bases], problem.case.dtype, problem.rounding, times)
        assert_lse_passes(lse, ref_lse, bases[0][1], problem.case.dtype)
    return out, lse


def check_backward(
    backend: Backend, problem: Problem, wanted=GRADIENTS, fast: bool = False, times: float = 2.0
) -> dict[str, torch.Tensor]:
    """Runs forward and backward of a problem on a backend and holds every gradient to the reference's. `fast`: without
    asking for deterministic algorithms."""
    case, wanted = problem.case, [name for name in wanted if getattr(problem.inputs, name) is not None]

    def gradients(results, leaves):
        out, lse = results
        grad_out, grad_lse = (x.to(out.device) for x in problem.upstream)
        outputs, upstream = [out], [grad_out.to(out.dtype)]
        if problem.grad_lse:  # a row that sees nothing has lse -inf, and no say
            outputs.append(lse)
            upstream.append(grad_lse.to(lse.dtype).where(lse > -math.inf, 0))
        return torch.autograd.grad(outputs, [leaves[name] for name in wanted], upstream, retain_graph=True)

    with backend.running(*problem.about, backward=True, **problem.kind):
        with contextlib.nullcontext() if fast else poisoned(backend.device):
            got = gradients(problem.sparse(leaves := problem.leaves()), leaves)
        results = problem.reference(leaves := problem.leaves(torch.float64, "cpu"))
        ref, terms = gradients(results, leaves), problem.terms(results[0], leaves["value"])
        leaves = problem.leaves()
        bases = [gradients(results, leaves) for results in problem.baselines(leaves)]
        for name, value, exact, *dense in zip(wanted, got, ref, *bases, strict=True):
            assert value.dtype == getattr(problem.inputs, name).dtype
            assert_passes(f"gradient of {name}", value, exact, dense, case.dtype, terms.get(name, 0.0), times)
    return dict(zip(wanted, got, strict=True))
