"""Which attention problems the tests run: a base case, one case per feature, and random ones for hypothesis."""

import pytest
import torch
from hypothesis import strategies as st

from sparsekit.bench.cases import AttentionCase

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
UNCOMMON_DIMS = (8, 20, 24, 40, 72, 100, 160)

# Small: the reference computes one scalar product at a time. Ragged on both sides, more keys than queries.
BASE = AttentionCase(
    batch=1,
    heads_q=2,
    heads_kv=2,
    len_q=140,
    len_k=210,
    head_dim=64,
    dtype=torch.float32,
    block_size=(64, 64),
    density=0.6,
)

FEATURES = {
    "plain": {},
    "causal": dict(causal=True),
    "causal-fewer-keys": dict(causal=True, len_q=210, len_k=140),
    "window": dict(window=(40, 10)),
    "window-left": dict(window=(90, -1)),
    "window-causal": dict(window=(33, 0), causal=True),
    "bits": dict(bits=True),
    "bits-causal": dict(bits=True, causal=True),
    "softcap": dict(softcap=2.5),
    "key-bias": dict(key_bias=True),
    "sinks": dict(sinks=True),
    "positions": dict(positions=True, causal=True, window=(100, -1)),
    "adversarial": dict(adversarial=True, bits=True, causal=True),
    "everything": dict(
        adversarial=True, bits=True, causal=True, window=(120, -1), softcap=3.0, key_bias=True, sinks=True, positions=True
    ),
}  # fmt: skip


def sanitized(names, *chosen: str) -> list:
    """Test parameters; the chosen ones are among the few small cases for compute-sanitizer."""
    return [pytest.param(name, marks=pytest.mark.sanitizer if name in chosen else ()) for name in names]


@st.composite
def problems(draw, packed: bool = False, small: bool = False):
    """(case, seed, options of Problem): any shape, list and feature; about 10 million multiply-adds at most."""
    block_sizes = st.sampled_from([16, 32, 64, 128])
    group, heads_kv = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 2]))
    lengths = st.one_of(
        st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129]), st.integers(1, 100 if small else 200)
    )
    dims = st.sampled_from(HEAD_DIMS[:5] * 2 + HEAD_DIMS + UNCOMMON_DIMS)
    head_dim = draw(dims)
    limit = st.one_of(st.just(-1), st.integers(0, 150))
    case = AttentionCase(
        batch=1 if packed else draw(st.sampled_from([1, 1, 2])),
        heads_q=group * heads_kv,
        heads_kv=heads_kv,
        len_q=0 if packed else draw(lengths),
        len_k=0 if packed else draw(lengths),
        head_dim=head_dim,
        value_dim=draw(st.one_of(st.just(head_dim), st.just(head_dim), dims)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        block_size=(draw(block_sizes), draw(block_sizes)),
        density=draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])),
        lists=draw(st.sampled_from(["q", "kv", "shared"])),
        lists_batch=draw(st.booleans()),
        causal=draw(st.booleans()),
        window=(draw(limit), draw(limit)),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.7, 20.0])),
        key_bias=draw(st.booleans()),
        sinks=draw(st.booleans()),
        positions=draw(st.booleans()),
        bits=draw(st.booleans()),
        adversarial=draw(st.booleans()),
        lens_q=(),
        lens_k=(),
    )
    if packed:
        pairs = draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=5))
        case = case.with_(lens_q=tuple(q for q, _ in pairs), lens_k=tuple(k for _, k in pairs))
    options = dict(scale=draw(st.sampled_from([None, None, 0.05, 1.0])), grad_lse=draw(st.booleans()))
    return case, draw(st.integers(0, 2**31 - 1)), options
