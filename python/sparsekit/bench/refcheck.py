"""Results against float64: some query rows of one head for the forward, one whole key head for the backward."""

import dataclasses
import math

import torch
import torch.nn.functional as F

import sparsekit
from sparsekit import reference

from .cases import AttentionInputs

_ROWS = 1024  # query rows at once: [rows, Sk] float64 scores of a few heads


@dataclasses.dataclass
class Errors:
    """Relative errors (norms) against float64, and for the forward the verdict of docs/semantics.md."""

    out: float
    out_max: float
    baseline_max: float  # of dense attention in the same dtype under the same mask
    lse_max: float
    passed: bool
    query: float | None = None
    key: float | None = None
    value: float | None = None


def _head(inputs: AttentionInputs, head: int):
    """One key head with its query heads, as a problem of its own."""
    case, pattern = inputs.case, inputs.pattern
    group = case.heads_q // case.heads_kv
    first = head * group
    lists = {}
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "partial_bits_index"):
        tensor = getattr(pattern, name)
        if tensor is None:
            continue
        heads = tensor.shape[1]
        cut = {1: slice(0, 1), case.heads_q: slice(first, first + group)}.get(heads, slice(head, head + 1))
        lists[name] = tensor[:1, cut].contiguous()
    pattern = dataclasses.replace(pattern, **lists, transpose_offsets=None, transpose_slots=None)
    kwargs = dict(inputs.kwargs)
    if "sinks" in kwargs:
        kwargs["sinks"] = kwargs["sinks"][first : first + group]
    if "key_bias" in kwargs:
        kwargs["key_bias"] = kwargs["key_bias"][:1, :1]
    query = inputs.query[:1, first : first + group]
    return pattern, query, inputs.key[:1, head : head + 1], inputs.value[:1, head : head + 1], kwargs


def check(inputs: AttentionInputs, *, backward: bool = False, seed: int = 0) -> Errors:
    case = inputs.case
    generator = torch.Generator().manual_seed(seed)
    head = int(torch.randint(case.heads_kv, (), generator=generator))
    group = slice(head * case.heads_q // case.heads_kv, (head + 1) * case.heads_q // case.heads_kv)
    grad_out = None
    tensors = [inputs.query, inputs.key, inputs.value]
    if backward:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = sparsekit.block_sparse_attention(*tensors, inputs.pattern, **inputs.kwargs, return_lse=True)
    if backward:
        grad_out = torch.randn(out.shape, generator=generator).to(out)
        grads = torch.autograd.grad(out, tensors, grad_out)
    pattern, query, key, value, kwargs = _head(inputs, head)
    block_q = case.block_size[0]
    rows = pattern.kv_indices.shape[-2]
    step = max(1, _ROWS // block_q)
    chunks = [(m, min(m + step, rows)) for m in range(0, rows, step)]
    if not backward:  # a few are enough: the first, the last, two between
        chunks = sorted({chunks[0], chunks[-1], chunks[len(chunks) // 3], chunks[2 * len(chunks) // 3]})

    exact_key, exact_value = (x.double().requires_grad_(backward) for x in (key, value))
    grad_key, grad_value = torch.zeros_like(exact_key), torch.zeros_like(exact_value)
    sums = {name: [0.0, 0.0] for name in ("out", "query", "baseline")}  # squared error, squared size
    worst = {"out": 0.0, "baseline": 0.0, "lse": 0.0, "size": 0.0}

    def add(name: str, found: torch.Tensor, wanted: torch.Tensor):
        sums[name][0] += float((found.double() - wanted).square().sum())
        sums[name][1] += float(wanted.square().sum())

    for first, last in chunks:
        part = slice(first * block_q, min(last * block_q, case.len_q))
        cut = pattern.slice_rows(first, last)
        options = dict(kwargs)
        if "query_positions" in options:
            options["query_positions"] = options["query_positions"][:1, part]
            options["key_positions"] = options["key_positions"][:1]
        exact_query = query[:, :, part].double().requires_grad_(backward)
        wanted, wanted_lse = reference.block_sparse_attention(exact_query, exact_key, exact_value, cut, **options)
        if backward:
            dq, dk, dv = torch.autograd.grad(
                wanted, (exact_query, exact_key, exact_value), grad_out[:1, group, part].double()
            )
            grad_key += dk
            grad_value += dv
            add("query", grads[0][:1, group, part], dq)
        with torch.no_grad():
            found = out[:1, group, part].detach()
            add("out", found, wanted)
            worst["out"] = max(worst["out"], float((found.double() - wanted).abs().max()))
            worst["size"] = max(worst["size"], float(wanted.abs().max()))
            seen = wanted_lse > -math.inf
            lse_error = (lse[:1, group, part].double() - wanted_lse)[seen].abs()
            worst["lse"] = max(worst["lse"], float(lse_error.max()) if lse_error.numel() else 0.0)
            if not (case.softcap or case.sinks or case.key_bias):
                mask = reference.token_mask(cut, options.get("query_positions"), options.get("key_positions"))
                dense = F.scaled_dot_product_attention(
                    query[:, :, part], key, value, attn_mask=mask, enable_gqa=query.shape[1] != 1
                ).nan_to_num(0.0)
                add("baseline", dense, wanted)
                worst["baseline"] = max(worst["baseline"], float((dense.double() - wanted).abs().max()))

    def relative(error: float, size: float) -> float:
        return math.sqrt(error / size) if size else 0.0

    slack = 1e-6 if case.dtype == torch.float32 else 1e-4
    errors = Errors(
        out=relative(*sums["out"]),
        out_max=worst["out"],
        baseline_max=worst["baseline"],
        lse_max=worst["lse"],
        passed=worst["out"] <= 2 * worst["baseline"] + torch.finfo(case.dtype).eps * worst["size"]
        and relative(*sums["out"]) <= 2 * relative(*sums["baseline"]) + slack,
    )
    if backward:
        errors.query = relative(*sums["query"])
        for name, found, wanted in (("key", grads[1], grad_key), ("value", grads[2], grad_value)):
            found = found[:1, head : head + 1].double()
            setattr(errors, name, relative(float((found - wanted).square().sum()), float(wanted.square().sum())))
    return errors
