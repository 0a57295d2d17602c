"""sparsekit.integrations.transformers on small random models, against dense attention with the masks written out."""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers >= 5 is not installed")

import sparsekit  # noqa: E402
from sparsekit import recipes  # noqa: E402
from sparsekit.integrations.transformers import (  # noqa: E402
    TopKBlocks,
    pooled_scores,
    recency_scores,
    register,
)

BLOCK = 16
SPARSE = TopKBlocks(0.4, BLOCK, sink_blocks=1, local_blocks=1)
EVERY = TopKBlocks(1.0, BLOCK)


def make_model(implementation="sdpa", config=None, **changes):
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    config = (config or transformers.LlamaConfig)(**{**sizes, **heads, **changes}, attn_implementation=implementation)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # the initial weights attend almost uniformly: every choice of blocks would do
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def ids():
    return torch.randint(0, 97, (1, 200))


def logits(model, implementation, ids, **inputs):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(ids, **inputs).logits


def counted(select):
    """select, and the list of the layers it was called for."""
    layers = []

    @functools.wraps(select.__call__)
    def wrapper(module, *arguments):
        layers.append(module.layer_idx)
        return select(module, *arguments)

    return wrapper, layers


def expanded(select, sparse_from=32):
    """The same attention by scaled_dot_product_attention with the token mask written out; registered as "expanded"."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        len_q, len_k = query.shape[2], key.shape[2]
        mask = torch.arange(len_k) <= torch.arange(len_q)[:, None] + len_k - len_q
        if len_q >= sparse_from:
            keep = None if attention_mask is None else attention_mask[:, 0] == 0
            blocks = select.block_map(query, key, keep, scaling)
            mask = mask & blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :len_q, :len_k]
        if attention_mask is not None:
            mask = mask & (attention_mask == 0)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return out.nan_to_num(0).transpose(1, 2).contiguous(), None

    register(select)  # for the mask function, which is the same
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    transformers.AttentionInterface.register("expanded", attention)
    transformers.AttentionMaskInterface.register("expanded", masks["sparsekit"])
    return "expanded"


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- what runs


def test_every_block_is_dense_attention(model, ids):
    select, layers = counted(EVERY)
    assert_close(logits(model, register(select), ids), logits(model, "sdpa", ids))
    assert layers == [0, 1]


def test_prompt_is_block_sparse(model, ids):
    select, layers = counted(SPARSE)
    got = logits(model, register(select), ids)
    assert layers == [0, 1]
    assert_close(got, logits(model, expanded(SPARSE), ids))
    assert (got - logits(model, "sdpa", ids)).abs().max() > 0.01  # sparse, not dense by accident


def test_decode_steps_are_exact(model, ids):
    select, layers = counted(SPARSE)
    name = register(select, sparse_from=32)
    model.set_attn_implementation(name)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert layers == [0, 1]
    for step in (ids[:, :1], ids[:, 1:6]):  # one token, and several at once
        got = logits(model, name, step, past_key_values=copy.deepcopy(cache))
        assert_close(got, logits(model, "sdpa", step, past_key_values=copy.deepcopy(cache)))
    assert layers == [0, 1], "decode steps choose no blocks"


def test_generate(model, ids):
    def tokens(name):
        model.set_attn_implementation(name)
        return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)

    assert torch.equal(tokens(register(EVERY)), tokens("sdpa"))
    assert torch.equal(tokens(register(SPARSE, sparse_from=32)), tokens(expanded(SPARSE)))


def test_prompt_in_chunks(model, ids):
    """A later chunk sees the cache: its queries are the last tokens, and its rows of the block map are the same."""
    name = register(SPARSE, sparse_from=32)
    whole = logits(model, name, ids)
    cache = transformers.DynamicCache(config=model.config)
    parts = [logits(model, name, part, past_key_values=cache) for part in ids.split(4 * BLOCK, dim=1)]
    parts[-1] = whole[:, 192:]  # 8 tokens: fewer than sparse_from, so exact where the whole prompt is sparse
    assert_close(torch.cat(parts, 1), whole)


def test_gradients(model, ids):
    def gradients(name):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for got, want in zip(gradients(register(SPARSE)), gradients(expanded(SPARSE)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_two_names_side_by_side(model, ids):
    sparse, every = register(SPARSE, name="sparsekit_40"), register(EVERY, name="sparsekit_all")
    assert_close(logits(model, every, ids), logits(model, "sdpa", ids))
    assert_close(logits(model, sparse, ids), logits(model, expanded(SPARSE), ids))


# ---- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [2 * BLOCK, 2 * BLOCK + 5])
def test_padding(model, ids, side, pad):
    mask = torch.ones(2, 200, dtype=torch.long)
    valid = slice(pad, None) if side == "left" else slice(None, -pad)
    mask[1] = 0
    mask[1, valid] = 1
    batch = ids.repeat(2, 1)
    for select, reference in ((EVERY, "sdpa"), (SPARSE, expanded(SPARSE))):
        got, want = (logits(model, name, batch, attention_mask=mask) for name in (register(select), reference))
        assert_close(got[0], want[0])
        assert_close(got[1, valid], want[1, valid])


def test_padding_changes_no_choice(model, ids):
    """Two whole blocks of padding before the prompt: the same blocks are chosen, and the logits stay what they were."""
    name, pad = register(SPARSE), 2 * BLOCK
    padded = torch.nn.functional.pad(ids, (pad, 0), value=3)
    mask = torch.ones_like(padded)
    mask[:, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, name, padded, attention_mask=mask, position_ids=positions)
    assert_close(got[:, pad:], logits(model, name, ids))


def test_padding_is_never_chosen():
    query, key = torch.randn(2, 4, 128, 32), torch.randn(2, 2, 128, 32)
    keep = torch.ones(2, 128, dtype=torch.bool)
    keep[1, : 3 * BLOCK] = False
    key[1, :, : 3 * BLOCK] = 1e4  # would win every comparison
    chosen = SPARSE.block_map(query, key, keep)
    assert not chosen[1, :, :, :3].any()
    assert not chosen[1, :, :3].any(), "rows that see only padding list nothing"
    assert chosen[1, :, 3:, 3].all(), "the sink is the first block that has a key"
    assert torch.equal(chosen[0], SPARSE.block_map(query[:1], key[:1])[0])


# ---- choosing blocks


@pytest.mark.parametrize("score", [pooled_scores, recency_scores])
@pytest.mark.parametrize("block", [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize("len_q, len_k", [(256, 256), (100, 100), (70, 203)])
def test_block_map(len_q, len_k, block, score):
    query, key = torch.randn(2, 4, len_q, 32), torch.randn(2, 2, len_k, 32)
    select = TopKBlocks(0.3, block, sink_blocks=1, local_blocks=2, score=score)
    got = select.block_map(query, key).expand(2, 4, -1, -1)
    for row in range(-(-len_q // block[0])):
        first = row * block[0] + len_k - len_q
        last = min((row + 1) * block[0], len_q) - 1 + len_k - len_q
        visible = last // block[1] + 1
        local = list(range(max(0, first // block[1] - 1), visible))
        assert got[:, :, row, local].all() and got[:, :, row, 0].all() and not got[:, :, row, visible:].any()
        budget = max(round(0.3 * visible), len(set(local) | {0}))
        assert (got[:, :, row].sum(-1) == budget).all()
        if score is recency_scores:
            assert got[:, :, row, max(1, visible - budget + 1) : visible].all()


def test_pooled_scores_are_mean_scores():
    """Against the mean over all pairs of tokens; ragged query blocks, padding inside and at the end."""
    query, key = torch.randn(1, 4, 40, 32, dtype=torch.float64), torch.randn(1, 2, 56, 32, dtype=torch.float64)
    keep = torch.rand(1, 56) < 0.7
    keep[:, 48:] = False
    got = pooled_scores(query.float(), key.float(), (16, 16), keep, 0.3)
    products = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    for m in range(3):
        for n in range(4):
            tokens = keep[0, n * 16 : (n + 1) * 16]
            block = products[:, :, m * 16 : (m + 1) * 16, n * 16 : (n + 1) * 16][..., tokens]
            want = block.mean((-1, -2)) if tokens.any() else torch.zeros(1, 4, dtype=torch.float64)
            torch.testing.assert_close(got[:, :, m, n].double(), want, rtol=1e-5, atol=1e-5)


def test_heads_choose_for_themselves(model, ids):
    patterns = []

    def select(*arguments):
        patterns.append(SPARSE(*arguments))
        return patterns[-1]

    logits(model, register(select), ids)
    for pattern in patterns:
        assert isinstance(pattern, sparsekit.BlockPattern)
        dense = pattern.to_dense()
        assert dense.shape == (1, 4, 13, 13)
        assert not torch.equal(dense[0, 0], dense[0, 1])


# ---- refusals name the reason


def test_refuses_prepared_mask(model, ids):
    with pytest.raises(NotImplementedError, match=r"attention_mask: found a prepared mask \[1, 1, 200, 200\]"):
        logits(model, register(), ids, attention_mask=torch.ones(1, 1, 200, 200, dtype=torch.bool))


def test_refuses_packed_sequences(model, ids):
    positions = torch.cat([torch.arange(120), torch.arange(80)])[None]
    with pytest.raises(NotImplementedError, match="packed sequences"):
        logits(model, register(), ids, position_ids=positions, use_cache=False)


def test_refuses_sliding_window(ids):
    model = make_model(config=transformers.MistralConfig, sliding_window=32)
    with pytest.raises(NotImplementedError, match="sliding window"):
        logits(model, register(), ids)


def test_refuses_static_cache(model, ids):
    cache = transformers.StaticCache(config=model.config, max_cache_len=256)
    with pytest.raises(NotImplementedError, match="DynamicCache"):
        logits(model, register(), ids, past_key_values=cache)


def test_refuses_dropout(ids):
    model = make_model(attention_dropout=0.1).train()
    with pytest.raises(NotImplementedError, match="dropout: found 0.1"):
        logits(model, register(), ids)


def test_refuses_bidirectional(model, ids):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(NotImplementedError, match="is_causal"):
        logits(model, register(), ids)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_refuses_density(density):
    with pytest.raises(ValueError, match="density: found"):
        TopKBlocks(density)


# ---- recipes


@pytest.mark.parametrize(
    "name, everything, little",
    [
        ("x_attention", recipes.XAttention(1.0, 8, BLOCK), recipes.XAttention(0.1, 8, BLOCK)),
        (
            "sample_attention",
            recipes.SampleAttention(window_ratio=1.0),
            recipes.SampleAttention(0.1, window_ratio=0.05),
        ),
        (
            "minference",
            recipes.MInference(default=recipes.BlockSparse(99), block_size=BLOCK),
            recipes.MInference(default=recipes.BlockSparse(2), block_size=BLOCK),
        ),
    ],
)
def test_recipe(model, ids, name, everything, little):
    dense = logits(model, "sdpa", ids)
    assert register(everything) == f"sparsekit_{name}"
    torch.testing.assert_close(logits(model, f"sparsekit_{name}", ids), dense, rtol=1e-4, atol=1e-4)
    register(little)
    sparse = logits(model, f"sparsekit_{name}", ids)
    assert sparse.isfinite().all() and (sparse - dense).abs().max() > 1e-2
    model.generate(ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(NotImplementedError, match=f"sparsekit_{name}.*padding"):
        mask = torch.ones_like(ids)
        mask[:, :5] = 0
        logits(model, f"sparsekit_{name}", ids, attention_mask=mask)


def test_recipe_knows_its_layer(model, ids):
    wide, narrow = (recipes.AShape(0, n) for n in (999, 16))
    by_layer = recipes.MInference({0: (narrow,) * 4, 1: (wide,) * 4}, block_size=BLOCK)
    one_by_one = [
        logits(model, register(recipes.MInference(default=shape, block_size=BLOCK)), ids) for shape in (wide, narrow)
    ]
    mixed = logits(model, register(by_layer), ids)
    assert all((mixed - other).abs().max() > 1e-2 for other in one_by_one)
