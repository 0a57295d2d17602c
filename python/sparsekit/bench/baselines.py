"""What attention is measured against, each on the problem it can express. Absent ones say why.

A dense baseline does all the work of its mask; its effective FLOP/s count that work, ours only the listed blocks.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import sparsekit

from .cases import AttentionInputs, visible_pairs


class Unavailable(Exception):
    """Why a baseline cannot run a problem here."""


@dataclasses.dataclass
class Contender:
    name: str
    call: Callable[[], object]
    pairs: int  # (head, query, key) triples it computes


def flop(inputs: AttentionInputs, pairs: int, backward: bool) -> float:
    """Forward: two products of the listed pairs. Backward: five, one of them a recomputation."""
    d, dv = inputs.case.head_dim, inputs.case.value_dim
    return pairs * (2 * (3 * d + 2 * dv) if backward else 2 * (d + dv))


def _timed(forward: Callable, tensors: tuple, backward: bool) -> Callable:
    """`forward`, or the backward of one forward that has run. `forward` takes the three tensors and returns out."""
    if not backward:
        return lambda: forward(*tensors)
    leaves = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    out = forward(*leaves)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def ours(inputs: AttentionInputs, backward: bool) -> Contender:
    # The transpose belongs to the pattern: a model's layers share it, so it is not part of a backward's time.
    pattern = inputs.pattern
    if backward:
        offsets, slots = pattern.transpose()
        pattern = dataclasses.replace(pattern, transpose_offsets=offsets, transpose_slots=slots)

    def forward(query, key, value):
        return sparsekit.block_sparse_attention(query, key, value, pattern, **inputs.kwargs)

    tensors = (inputs.query, inputs.key, inputs.value)
    return Contender("sparsekit", _timed(forward, tensors, backward), visible_pairs(inputs))


def one_thread(inputs: AttentionInputs, backward: bool) -> Contender:
    """Ours on one thread: its time over ours is what threads gain."""
    if inputs.query.device.type != "cpu":
        raise Unavailable("threads are the CPU's")
    contender, threads = ours(inputs, backward), torch.get_num_threads()

    def call():
        torch.set_num_threads(1)
        try:
            return contender.call()
        finally:
            torch.set_num_threads(threads)

    return Contender("sparsekit, one thread", call, contender.pairs)


def _dense_pairs(inputs: AttentionInputs) -> int:
    """What a dense kernel computes of this problem; it knows causality and nothing else."""
    case = inputs.case
    if case.softcap or case.key_bias or case.sinks or case.window != (-1, -1):
        raise Unavailable("it computes no window, softcap, key_bias or sinks")
    if not case.causal:
        return case.batch * case.heads_q * case.len_q * case.len_k
    if case.len_q != case.len_k:
        raise Unavailable("causality with Sq != Sk is aligned elsewhere")
    return case.batch * case.heads_q * case.len_q * (case.len_q + 1) // 2


def _sdpa(inputs: AttentionInputs, backward: bool, name: str, backend: str | None) -> Contender:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case, pairs = inputs.case, _dense_pairs(inputs)
    options = {"is_causal": case.causal, "enable_gqa": case.heads_q != case.heads_kv}

    def forward(query, key, value):
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, **options)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(query, key, value, **options)

    try:
        forward(inputs.query[..., :128, :], inputs.key[..., :128, :], inputs.value[..., :128, :])
    except RuntimeError as error:
        raise Unavailable(str(error).splitlines()[0]) from None
    return Contender(name, _timed(forward, (inputs.query, inputs.key, inputs.value), backward), pairs)


def sdpa(inputs: AttentionInputs, backward: bool) -> Contender:
    return _sdpa(inputs, backward, "sdpa (torch's choice, dense)", None)


def cudnn(inputs: AttentionInputs, backward: bool) -> Contender:
    _needs_cuda(inputs)
    return _sdpa(inputs, backward, "sdpa cuDNN (dense)", "CUDNN_ATTENTION")


def flash(inputs: AttentionInputs, backward: bool) -> Contender:
    return _sdpa(inputs, backward, "sdpa flash (dense)", "FLASH_ATTENTION")


def flex(inputs: AttentionInputs, backward: bool) -> Contender:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    case = inputs.case
    if backward and inputs.query.device.type == "cpu":
        raise Unavailable("FlexAttention has no backward on the CPU")
    if case.softcap or case.key_bias or case.sinks or case.window != (-1, -1):
        raise Unavailable("only causal and unmasked cases are translated")
    columns = math.ceil(case.len_k / case.block_size[1])
    repeat = case.heads_q // inputs.pattern.kv_indices.shape[1] if case.lists == "kv" else 1

    def lists(counts, indices):
        indices = F.pad(indices, (0, columns - indices.shape[-1]))
        return counts.repeat_interleave(repeat, 1), indices.repeat_interleave(repeat, 1)

    pattern = inputs.pattern
    mask = BlockMask.from_kv_blocks(
        *lists(pattern.kv_num_blocks, pattern.kv_indices),
        *lists(pattern.full_kv_num_blocks, pattern.full_kv_indices),
        BLOCK_SIZE=case.block_size,
        mask_mod=(lambda b, h, q, k: q + (case.len_k - case.len_q) >= k) if case.causal else None,
        seq_lengths=(case.len_q, case.len_k),
    )
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward(query, key, value):
        return compiled(query, key, value, block_mask=mask, enable_gqa=case.heads_q != case.heads_kv)

    try:
        call = _timed(forward, (inputs.query, inputs.key, inputs.value), backward)
        call()
    except Exception as error:  # its compiler raises many kinds
        raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from None
    return Contender("FlexAttention", call, visible_pairs(inputs))


def fa4(inputs: AttentionInputs, backward: bool) -> Contender:
    _needs_cuda(inputs)
    _needs_package("flash_attn.cute", "flash-attn-4")
    import flash_attn.cute.interface as interface
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    _needs_full_blocks(inputs, "FlashAttention-4")
    case, pattern = inputs.case, inputs.pattern
    repeat = case.heads_q // pattern.full_kv_indices.shape[1]

    def sparse(counts, indices):
        nothing = torch.zeros_like(counts), torch.zeros_like(indices)
        return BlockSparseTensorsTorch(*nothing, counts, indices, block_size=case.block_size)

    counts = pattern.full_kv_num_blocks.repeat_interleave(repeat, 1)
    indices = pattern.full_kv_indices.repeat_interleave(repeat, 1)
    lists = sparse(counts, indices)
    query, key, value = (x.transpose(1, 2).contiguous() for x in (inputs.query, inputs.key, inputs.value))
    if not backward:
        return Contender(
            "FlashAttention-4",
            lambda: interface._flash_attn_fwd(query, key, value, block_sparse_tensors=lists),
            visible_pairs(inputs),
        )
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    columns = math.ceil(case.len_k / case.block_size[1])
    block_map = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    block_map = block_map.scatter_(-1, indices.where(listed, columns).long(), True)[..., :columns].transpose(-1, -2)
    order = block_map.int().sort(-1, descending=True, stable=True).indices.int().contiguous()
    transposed = sparse(block_map.sum(-1).int().contiguous(), order)
    out, lse = interface._flash_attn_fwd(query, key, value, return_lse=True, block_sparse_tensors=lists)[:2]
    grad = torch.randn_like(out)
    return Contender(
        "FlashAttention-4",
        lambda: interface._flash_attn_bwd(query, key, value, out, grad, lse, block_sparse_tensors=transposed),
        visible_pairs(inputs),
    )


def flashinfer(inputs: AttentionInputs, backward: bool) -> Contender:
    _needs_cuda(inputs)
    _needs_package("flashinfer", "flashinfer-python")
    if backward:
        raise Unavailable("FlashInfer has no backward")
    import flashinfer

    _needs_full_blocks(inputs, "FlashInfer")
    case, pattern = inputs.case, inputs.pattern
    # It takes one list for all heads: head 0's. Every head lists as many blocks, so the work is the same.
    counts, indices = pattern.full_kv_num_blocks[0, 0], pattern.full_kv_indices[0, 0]
    if not torch.equal(pattern.full_kv_num_blocks, counts.expand_as(pattern.full_kv_num_blocks)) or case.batch != 1:
        raise Unavailable("it takes one list for all heads, and these heads list unequal numbers of blocks")
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    listed = indices[torch.arange(indices.shape[-1], device=indices.device) < counts[:, None]].contiguous()
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (inputs.query, inputs.key, inputs.value))
    workspace = torch.empty(384 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BlockSparseAttentionWrapper(workspace)
    heads = (case.heads_q, case.heads_kv, case.head_dim)
    wrapper.plan(offsets, listed, case.len_q, case.len_k, *case.block_size, *heads, q_data_type=case.dtype)
    return Contender("FlashInfer (one list)", lambda: wrapper.run(query, key, value), visible_pairs(inputs))


def zentorch(inputs: AttentionInputs, backward: bool) -> Contender:
    if inputs.query.device.type != "cpu":
        raise Unavailable("zentorch runs on the CPU")
    _needs_package("zentorch", "zentorch")
    if backward:
        raise Unavailable("zentorch has no backward")
    import zentorch  # noqa: F401  registers its ops

    case, pairs = inputs.case, _dense_pairs(inputs)
    repeat = case.heads_q // case.heads_kv
    key, value = (x.repeat_interleave(repeat, 1) for x in (inputs.key, inputs.value))
    op = torch.ops.zentorch.zentorch_sdpa
    return Contender("zentorch (dense)", lambda: op(inputs.query, key, value, 0.0, case.causal), pairs)


BASELINES = {
    "one-thread": one_thread,
    "sdpa": sdpa,
    "cudnn": cudnn,
    "flash": flash,
    "flex": flex,
    "fa4": fa4,
    "flashinfer": flashinfer,
    "zentorch": zentorch,
}


def _needs_cuda(inputs: AttentionInputs):
    if inputs.query.device.type != "cuda":
        raise Unavailable("it runs on CUDA")


def _needs_package(module: str, package: str):
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the parent
        found = None
    if found is None:
        raise Unavailable(f"not installed (pip install {package})")


def _needs_full_blocks(inputs: AttentionInputs, name: str):
    if int(inputs.pattern.kv_num_blocks.sum()):
        raise Unavailable(f"{name}'s masks inside blocks are not translated")
