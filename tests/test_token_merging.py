"""The Token Merging recipe, and its way into models of transformers and timm: tiny, with random weights."""

import pytest
import torch

from sparsekit import reference_tokens as reference
from sparsekit.recipes.tome import TokenMerging

# ---- the recipe


@pytest.mark.parametrize("r, left", [(3, [17, 14, 11, 8]), (0.25, [15, 12, 9, 7]), ([0, 5, 0.5, 2], [20, 15, 8, 6])])
def test_lengths(r, left):
    merging, x = TokenMerging(r, protect=1), torch.randn(2, 20, 8)
    for tokens in left:
        x = merging(x, x)
        assert x.shape == (2, tokens, 8)
    assert merging.sizes.sum(1).tolist() == [20.0, 20.0]
    assert merging.key_bias().shape == (2, 1, left[-1])


def test_rows_follow_through_layers():
    """After several layers every token's row holds the mean of exactly the tokens that say they are in it."""
    x = torch.randn(2, 24, 6)
    merging, merged = TokenMerging(5), x
    for _ in range(3):
        merged = merging(merged, merged)
    want, totals = reference.scatter_tokens(x, merging.row, merged.shape[1], reduce="mean")
    torch.testing.assert_close(merged.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(merging.sizes.double(), totals)
    assert torch.equal(merging.row[:, 0], torch.zeros(2, dtype=torch.int32)), "the protected token is the first row"
    torch.testing.assert_close(merging.mean(merged), x.mean(1))
    assert merging.unmerge(merged).shape == x.shape


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("r", [4, 0.3])
def test_padding_changes_nothing(trim, r):
    """A padded sample merges as it does alone."""
    x, lengths = torch.randn(3, 20, 6), [20, 11, 5]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    batch = TokenMerging(r, trim=trim)
    batch.begin(mask)
    together = x.masked_fill(~mask[..., None], torch.nan)
    for _ in range(2):
        together = batch(together, together)
    for b, length in enumerate(lengths):
        alone = TokenMerging(r)
        merged = x[b : b + 1, :length]
        for _ in range(2):
            merged = alone(merged, merged)
        count = merged.shape[1]
        assert batch.counts[b] == count
        assert torch.equal(together[b, :count], merged[0])
        assert torch.equal(batch.row[b, :length], alone.row[0])
        assert not batch.sizes[b, count:].any() and not together[b, count:].any()
    assert together.shape[1] == (int(batch.counts.max()) if trim else 20)


def test_refuses_r():
    for r in (-1, 1.0, [3, -0.5]):
        with pytest.raises(ValueError, match="r: found"):
            TokenMerging(r)


# ---- in models


def vit():
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers >= 5 is not installed")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=4,
        initializer_range=0.2,
    )
    return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}, 65


def bert():
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers >= 5 is not installed")
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return transformers.BertModel(config).eval(), {"input_ids": torch.randint(0, 61, (2, 40))}, 40


def timm_vit():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=0, global_pool=""
    )
    return model.eval(), {"x": torch.randn(2, 3, 32, 32)}, 65


MODELS = [vit, bert, timm_vit]


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


@pytest.mark.parametrize("make", MODELS)
def test_models_merge(make):
    from sparsekit.integrations.token_merging import merge_tokens_in

    model, inputs, tokens = make()
    before = run(model, inputs)
    assert before.shape[1] == tokens
    merging = merge_tokens_in(model, r=0)
    torch.testing.assert_close(run(model, inputs), before)
    merging.remove()

    merging = merge_tokens_in(model, r=6)
    for _ in range(2):
        out = run(model, inputs)
        assert out.shape == (2, tokens - 18, 32)
        assert merging.sizes.sum(1).tolist() == [tokens, tokens]
        assert merging.unmerge(out).shape == before.shape
    merging.remove()
    assert torch.equal(run(model, inputs), before), "the model is as it was"


@pytest.mark.parametrize("make", MODELS)
def test_equal_tokens_merge_without_a_trace(make):
    """Where tokens come in equal pairs, merging them, with proportional attention, changes nothing that a model computes:
    every step (keys, sizes, bias, the order of the steps) must be right for that."""
    from sparsekit.integrations.token_merging import merge_tokens_in

    model, inputs, tokens = make()
    blocks = next(
        module for module in model.modules() if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
    )

    def pair_up(module, args, kwargs):
        x = args[0].clone()
        x[:, 2::2] = x[:, 1:-1:2][:, : x[:, 2::2].shape[1]]
        return (x, *args[1:]), kwargs

    layers = [m for m in blocks if hasattr(m, "mlp") or hasattr(m, "feed_forward_chunk")]
    hook = layers[0].register_forward_pre_hook(pair_up, with_kwargs=True)
    before = run(model, inputs)
    merging = merge_tokens_in(model, r=[tokens // 2 - 5, 4, 0])
    out = run(model, inputs)
    assert out.shape[1] < tokens * 0.55
    torch.testing.assert_close(merging.unmerge(out), before, rtol=1e-3, atol=1e-4)
    merging.remove()
    hook.remove()


@pytest.mark.parametrize("trim", [False, True])
def test_padding_of_a_batch(trim):
    from sparsekit.integrations.token_merging import merge_tokens_in

    model, inputs, _ = bert()
    ids, lengths = inputs["input_ids"], [40, 23]
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    merging = merge_tokens_in(model, r=0.2, trim=trim)
    out = run(model, {"input_ids": ids, "attention_mask": mask})
    counts, mean = merging.counts.tolist(), merging.mean(out)
    for b, length in enumerate(lengths):
        alone = run(model, {"input_ids": ids[b : b + 1, :length]})
        assert alone.shape[1] == counts[b]
        torch.testing.assert_close(out[b, : counts[b]], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean[b], merging.mean(alone)[0], rtol=1e-4, atol=1e-5)
    left = {"input_ids": ids, "attention_mask": mask.flip(1)}
    with pytest.raises(ValueError, match="padding before a token"):
        model(**left)


def test_gradients_flow():
    from sparsekit.integrations.token_merging import merge_tokens_in

    model, inputs, _ = vit()
    merge_tokens_in(model, r=8)
    model(**inputs).last_hidden_state.square().mean().backward()
    grads = [parameter.grad for name, parameter in model.named_parameters() if "pooler" not in name]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads if grad is not None)
    assert sum(grad is not None for grad in grads) > 30


def test_refusals():
    from sparsekit.integrations.token_merging import merge_tokens_in

    with pytest.raises(TypeError, match="without a layer of a known kind"):
        merge_tokens_in(torch.nn.Sequential(torch.nn.Linear(2, 2)), r=1)
    model, _, _ = vit()
    with pytest.raises(ValueError, match="found 2 entries, supported is one per layer, 3"):
        merge_tokens_in(model, r=[1, 2])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation"):
        merge_tokens_in(model, r=1)


def test_static_merging_compiles():
    """r as an int: shapes known in advance, one graph."""

    def block(x):
        merging = TokenMerging(4, protect=1)
        for _ in range(2):
            x = merging(x, x)
        return x, merging.sizes, merging.row

    x = torch.randn(2, 20, 8)
    for got, want in zip(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x), strict=True):
        torch.testing.assert_close(got, want)
