"""SparseKitCache in small random models: what it stores is what attention sees, and nothing is dequantized as a whole."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers >= 5 is not installed")

from sparsekit.integrations.transformers import SparseKitCache  # noqa: E402

EXACT = {"bits": 8, "window": 512}  # every token of these tests stays in the window
LOW = {"bits": 4, "window": 32, "group_size": 32}


def make_model(config=None, **changes):
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
    config = (config or transformers.LlamaConfig)(**{**sizes, **heads, **changes}, eos_token_id=None, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


@pytest.fixture
def models():
    """The same weights with sdpa, and with the cache's attention function."""
    dense = make_model()
    cached = copy.deepcopy(dense)
    cached.set_attn_implementation("sparsekit_cache")
    return dense, cached


@torch.no_grad()
def test_chunks_match_a_cache_in_full_precision(models):
    dense, cached = models
    ids = torch.randint(0, 97, (2, 150))
    want = dense(ids).logits
    cache = SparseKitCache(cached.config, **EXACT)
    got, at = [], 0
    for count in (60, 1, 1, 16, 40, 5, 27):
        got.append(cached(ids[:, at : at + count], past_key_values=cache).logits)
        at += count
        assert cache.get_seq_length() == at
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_step_sees_the_dequantized_cache(models):
    """The logits of a step are those of dense attention over what the cache holds, dequantized."""
    dense, cached = models
    ids = torch.randint(0, 97, (2, 201))
    cache = SparseKitCache(cached.config, **LOW)
    cached(ids[:, :200], past_key_values=cache)
    full = transformers.DynamicCache()
    for index, layer in enumerate(cache.layers):
        full.update(*layer.cache.dequantize(), index)
    exact = transformers.DynamicCache()
    dense(ids[:, :200], past_key_values=exact)
    want = dense(ids[:, 200:], past_key_values=full).logits
    got = cached(ids[:, 200:], past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    truth = dense(ids[:, 200:], past_key_values=exact).logits
    assert (got - truth).abs().max() > 1e-3  # 4 bits are visible: the cache is used


class Largest(TorchDispatchMode):
    """The largest tensor that any op returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes, self.ops = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        self.ops.add(str(func))
        return out


@torch.no_grad()
def test_nothing_as_large_as_the_cache_is_made(models):
    _, cached = models
    ids = torch.randint(0, 97, (1, 901))
    cache = SparseKitCache(cached.config, **LOW, capacity=1024)
    cached(ids[:, :900], past_key_values=cache)
    with Largest() as largest:
        cached(ids[:, 900:], past_key_values=cache)
    keys = 2 * 900 * 32 * 4  # of one layer, in full precision
    assert largest.bytes < keys / 4, largest.bytes
    assert "sparsekit.decode_attention.default" in largest.ops and "sparsekit.dequantize_kv.default" not in largest.ops
    assert cache.nbytes < 2 * 2 * keys  # two layers, keys and values: less than full precision would take


@pytest.mark.parametrize("search", [
    {"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"prompt_lookup_num_tokens": 3, "do_sample": False},
], ids=["greedy", "beam", "assisted"])  # fmt: skip
def test_generate(models, search):
    dense, cached = models
    ids = torch.randint(0, 97, (1, 40)).repeat(1, 2)
    options = dict(max_new_tokens=20, attention_mask=torch.ones_like(ids), **search)
    want = dense.generate(ids, **options)
    got = cached.generate(ids, past_key_values=SparseKitCache(cached.config, **EXACT), **options)
    assert torch.equal(got, want)
    low = SparseKitCache(cached.config, **LOW)
    assert cached.generate(ids, past_key_values=low, **options).shape == want.shape
    if "num_beams" not in search:
        assert low.get_seq_length() in (99, 100)


def test_generate_a_padded_batch(models):
    dense, cached = models
    ids = torch.randint(1, 97, (3, 50))
    mask = torch.ones_like(ids)
    mask[1, :17] = mask[2, :3] = 0  # left padding
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    want = dense.generate(ids, **options)
    got = cached.generate(ids, past_key_values=SparseKitCache(cached.config, **EXACT), **options)
    assert torch.equal(got, want)


@torch.no_grad()
def test_crop_reorder_and_batches(models):
    dense, cached = models
    ids = torch.randint(0, 97, (2, 90))
    cache = SparseKitCache(cached.config, **EXACT)
    cached(ids, past_key_values=cache)
    cache.crop(-30)
    assert cache.get_seq_length() == 60
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    more = torch.randint(0, 97, (3, 4))
    got = cached(more, past_key_values=cache).logits
    want = dense(torch.cat([ids[[1, 0, 0], :60], more], 1)).logits[:, -4:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(cached(ids, past_key_values=cache).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_refusals(models):
    dense, cached = models
    ids = torch.randint(0, 97, (1, 9))
    with pytest.raises(ValueError, match="found attn_implementation='sdpa'"):
        dense(ids, past_key_values=SparseKitCache(dense.config, bits=4))
    config = transformers.Qwen2Config(
        num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=0
    )
    with pytest.raises(NotImplementedError, match="sliding_attention"):
        SparseKitCache(config)
    with pytest.raises(NotImplementedError, match="offloading"):
        SparseKitCache(cached.config).layers[0].offload()
