"""Recipes: what they return is attention over what they chose, and what they chose is what the paper says."""

import math

import pytest
import torch

import sparsekit
from numerics import assert_passes, dense_draws
from sparsekit import BlockPattern, recipes
from sparsekit.recipes.minference import search
from sparsekit.recipes.recipe import Stripes

HEADS, GATE = 4, dict(gate_dim=16, block_size=64)


def inputs(len_q=450, len_k=450, dim=32, dtype=torch.float32, structured=True):
    """GQA; structured: a few keys and a band stand out, as in a trained model."""
    query, key, value = torch.randn(1, HEADS, len_q, dim), torch.randn(1, 2, len_k, dim), torch.randn(1, 2, len_k, dim)
    if structured:
        query[..., 0] += 3
        key[:, :, torch.randint(0, len_k, (6,)), 0] += 6
        drift = torch.linspace(0, 12, len_k)
        query[..., 1] += 3 * drift[len_k - len_q :].cos()
        query[..., 2] += 3 * drift[len_k - len_q :].sin()
        key[..., 1] += 3 * drift.cos()
        key[..., 2] += 3 * drift.sin()
    return tuple(x.to(dtype) for x in (query, key, value))


def gates(layers=2):
    return torch.nn.ModuleList([recipes.AttentionGate(HEADS, 2, 32, **GATE) for _ in range(layers)])


MIXED = (recipes.AShape(20, 70), recipes.VerticalSlash(20, 9, 16, 3, 2), recipes.BlockSparse(2), recipes.AShape(20, 70))
# Each with a small and a large budget.
CASES = {
    "x": lambda much: recipes.XAttention(0.97 if much else 0.5, 8, 64),
    "sparge": lambda much: recipes.SpargeAttn(0.1, 0.98 if much else 0.3, (64, 32)),
    "flex": lambda much: recipes.FlexPrefill(0.97 if much else 0.4, 0.1, 64, 32),
    "flex-means": lambda much: recipes.FlexPrefill(0.97 if much else 0.4, 10.0, 64, 32),
    "seer": lambda much: recipes.SeerAttention(gates(), 5 if much else 2),
    "seer-threshold": lambda much: recipes.SeerAttention(gates(), None, 0.01 if much else 0.3),
    "streaming": lambda much: recipes.StreamingLLM(4, 200 if much else 30),
    "sample": lambda much: recipes.SampleAttention(0.97 if much else 0.3, 0.05, 0.05),
    "anchor": lambda much: recipes.AnchorAttention(20.0 if much else 1.0, 2, 32),
    "a-shape": lambda much: recipes.MInference(default=recipes.AShape(10, 200 if much else 30), block_size=32),
    "vertical-slash": lambda much: recipes.MInference(
        default=recipes.VerticalSlash(*((200, 30) if much else (10, 4)), 32, 3, 2), block_size=32
    ),
    "block-sparse": lambda much: recipes.MInference(default=recipes.BlockSparse(9 if much else 2), block_size=32),
    "mixed": lambda much: recipes.MInference({1: MIXED}, recipes.AShape(10, 400 if much else 30), 32),
}


def mask_of(choice, len_q, len_k):
    """bool [1, 1|H, Sq, Sk]: what a choice sees, in plain torch."""
    row = torch.arange(len_q)[:, None] + len_k - len_q
    column = torch.arange(len_k)
    if isinstance(choice, BlockPattern):
        return choice.to_token_mask()
    seen = (column < choice.sink) | ((column <= row) & (column > row - choice.local))
    mask = seen[None, None].clone()
    if choice.pattern is not None:
        mask = mask | choice.pattern.to_token_mask()
    indices, counts = choice.col_indices, choice.col_counts
    groups = torch.zeros(*indices.shape[:3], len_k, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).reshape(-1, 3).tolist():
        groups[tuple(place)][indices[tuple(place)][: counts[tuple(place)]].long()] = True
    mask = mask | groups.repeat_interleave(choice.group_size, 2)[:, :, :len_q]
    return mask & (column <= row)


@pytest.mark.parametrize("lengths", [(450, 450), (130, 457)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_is_attention_over_the_choice(name, lengths, seed):
    query, key, value = inputs(*lengths)
    recipe = CASES[name](False)
    choice = recipe.choose(query, key, layer=1)
    mask = mask_of(choice, *lengths).expand(1, HEADS, -1, -1)
    assert mask.diagonal(lengths[1] - lengths[0], 2, 3).all(), "a row without its own key"
    out, lse = recipe(query, key, value, layer=1, return_lse=True)
    exact = dense_draws(query.double(), key.double(), value.double(), mask, draws=1)[0]
    bases = [out for out, _ in dense_draws(query, key, value, mask)]
    terms = float((query[0, 0] @ key[0, 0].T).abs().max() / math.sqrt(32) * value.abs().max())
    assert_passes("out", out, exact[0], bases, torch.float32, terms)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_larger_budget_keeps_more(name, seed):
    query, key, value = inputs()
    kept = []
    for much in (False, True):
        torch.manual_seed(seed)  # equal gates
        kept.append(mask_of(CASES[name](much).choose(query, key, layer=0), 450, 450))
    causal = torch.ones(450, 450, dtype=torch.bool).tril()
    little, most = (float(mask.sum() / mask.shape[1] / causal.sum()) for mask in kept)
    assert little < most <= 1 and little < 0.8
    assert not (kept[1] & ~causal).any()
    assert kept[0].diagonal(dim1=2, dim2=3).all(), "a row without its own key"


@pytest.mark.parametrize("name", ["x", "sparge", "flex", "sample", "anchor", "vertical-slash"])
def test_choice_holds_more_attention_than_its_share_of_keys(name, seed):
    """What the choice is for: on structured inputs it finds more of the attention than as many keys at random."""
    query, key, value = inputs()
    mask = mask_of(CASES[name](False).choose(query, key), 450, 450).expand(1, HEADS, -1, -1)
    causal = torch.ones(450, 450, dtype=torch.bool).tril()
    score = query @ key.repeat_interleave(2, 1).mT / math.sqrt(32)
    weight = score.masked_fill(~causal, -math.inf).softmax(-1)
    found, share = float((weight * mask).sum(-1).mean()), float(mask.sum() / HEADS / causal.sum())
    assert found > min(0.98, 1.3 * share), f"{found:.2f} of the attention in {share:.2f} of the keys"


# ---- the papers' choices, in loops


def test_x_attention(seed):
    query, key, _ = inputs(256, 256)
    size, stride, threshold = 64, 8, 0.6
    kept = recipes.XAttention(threshold, stride, size).choose(query, key).to_dense()[0]
    for head in range(HEADS):
        score = (query[0, head] @ key[0, head // 2].T / math.sqrt(32)).double()
        tiles = 256 // stride
        # The antidiagonal of every stride x stride tile; causality by tiles.
        sums = torch.zeros(tiles, tiles, dtype=torch.float64)
        for i in range(tiles):
            for j in range(tiles):
                tile = score[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
                sums[i, j] = tile.flip(1).diagonal().mean() if j <= i else -math.inf
        weight = sums.softmax(-1).view(4, 8, 4, 8).sum((1, 3)) / 8
        for m in range(4):
            always = {0, m}
            order = sorted(range(m + 1), key=lambda n, m=m: (n not in always, -float(weight[m, n])))
            want, mass = [], 0.0
            for n in order:
                if mass >= threshold * float(weight[m, : m + 1].sum()) - 1e-9 and n not in always:
                    break
                want.append(n)
                mass += float(weight[m, n])
            assert kept[head, m].nonzero().flatten().tolist() == sorted(want), (head, m)


def test_sparge_keeps_what_its_means_cannot_judge(seed):
    query, key, _ = inputs(256, 256)
    key[:, 1, 64:96] = torch.randn(32, 32) * 5  # block 2 of key head 1: tokens unlike each other
    query[:, 0, 128:192] = torch.randn(64, 32) * 5  # query block 2 of head 0
    recipe = recipes.SpargeAttn(0.3, 0.2, (64, 32))
    kept = recipe.choose(query, key).to_dense()[0].bool()
    assert kept[2:, 1:, 2].all(), "an unlike key block is kept by all that see it"
    assert kept[0, 2, :6].all(), "an unlike query block keeps all it sees"

    def alike(x):
        unit = x / x.norm(dim=-1, keepdim=True)
        return (unit @ unit.T).mean()

    for head in range(HEADS):
        q = query[0, head].view(4, 64, 32)
        k = key[0, head // 2].view(8, 32, 32)
        for m in range(4):
            if alike(q[m]) < 0.3:
                continue
            score = torch.full((8,), -math.inf)
            for n in range(2 * m + 2):
                pairs = (torch.arange(64)[:, None] + 64 * m >= torch.arange(32) + 32 * n).float()
                product = q[m] @ k[n].T / math.sqrt(32)
                if alike(k[n]) >= 0.3:
                    score[n] = (product * pairs).sum() / pairs.sum()
            if score.max() == -math.inf:
                continue
            share, own = score.softmax(0), [2 * m, 2 * m + 1]
            want, mass = set(own), float(share[own].sum())
            for n in share.argsort(descending=True, stable=True).tolist():
                if mass >= 0.2 - 1e-6:
                    break
                if n not in want:
                    want.add(n)
                    mass += float(share[n])
            want |= {n for n in range(2 * m + 2) if alike(k[n]) < 0.3}
            assert set(kept[head, m].nonzero().flatten().tolist()) == want, (head, m)


def test_sample_attention_columns(seed):
    query, key, _ = inputs()
    recipe = recipes.SampleAttention(0.7, 0.1, 0.05)
    choice = recipe.choose(query, key)
    assert choice.local == round(0.05 * 450) and choice.sink == 0
    causal = torch.ones(450, 450, dtype=torch.bool).tril()
    score = query.double() @ key.double().repeat_interleave(2, 1).mT / math.sqrt(32)
    columns = score.masked_fill(~causal, -math.inf).softmax(-1)[:, :, 9::10].sum(2)
    for head in range(HEADS):
        order = columns[0, head].argsort(descending=True)
        enough = int((columns[0, head][order].cumsum(0) < 0.7 * columns[0, head].sum()).sum()) + 1
        got = choice.col_indices[0, head, 0][: choice.col_counts[0, head, 0]].tolist()
        assert got == sorted(order[:enough].tolist())


def test_anchor_attention_columns(seed):
    query, key, value = inputs()
    size, step, theta = 32, 3, 4.0
    recipe = recipes.AnchorAttention(theta, step, size)
    choice = recipe.choose(query, key)
    first = mask_of(choice.pattern, 450, 450)[0, 0]
    rows = step * size
    for i in (0, 31, 95, 96, 300, 449):  # the first block and the group's own
        seen = {j for j in range(i + 1) if j < size or j >= i // rows * rows}
        assert first[i].nonzero().flatten().tolist() == sorted(seen)
    score = (query @ key.repeat_interleave(2, 1).mT / math.sqrt(32))[0]
    anchor = score.masked_fill(~first, -math.inf).logsumexp(-1)
    for head in range(HEADS):
        for group in range(math.ceil(450 / rows)):
            want = set()
            for m in range(group * step, min((group + 1) * step, math.ceil(450 / size))):
                block = slice(m * size, min((m + 1) * size, 450))
                mean = score[head, block].mean(0)
                near = mean >= anchor[head, block].mean() - theta
                want |= set(near[size : group * rows].nonzero().flatten().add(size).tolist())
            got = choice.col_indices[0, head, group][: choice.col_counts[0, head, group]].tolist()
            assert got == sorted(want), (head, group)
    assert choice.col_counts.sum() > 0


def test_minference_search_finds_each_heads_shape(seed):
    query, key, value = inputs(256, 256, structured=False)
    key[:, :, 5:9, 3] += 60  # head 0 and 1: verticals far from sinks and window
    query[:, :2, :, 3] += 3
    positions = torch.arange(256)
    angle = positions * (math.pi / 256)
    close = 60 * torch.stack([angle.cos(), angle.sin()], -1)  # 16 keys away a weight has fallen by e^12
    query[:, 2:, :, :2] += close  # head 2 and 3: neighbours
    key[:, 1, :, :2] += close
    query[:, 2:, :, 3] = 0
    candidates = [recipes.AShape(1, 32), recipes.VerticalSlash(8, 1, 16, 0, 1)]
    shapes = search(query, key, value, candidates, block_size=16)
    assert shapes == [candidates[1], candidates[1], candidates[0], candidates[0]]


def test_mixed_heads_are_the_shapes_one_by_one(seed):
    query, key, value = inputs()
    mixed = recipes.MInference({0: MIXED}, block_size=32)(query, key, value, layer=0)
    for head, shape in enumerate(MIXED):
        alone = recipes.MInference(default=shape, block_size=32)(query, key, value)
        torch.testing.assert_close(mixed[:, head], alone[:, head], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"shapes\[3\]: found 1 shapes, the layer has 4 query heads"):
        recipes.MInference({3: MIXED[:1]})(query, key, value, layer=3)


# ---- other orders of tokens


@pytest.mark.parametrize("modalities", [False, True])
def test_mminference_grid(modalities, seed):
    query, key, value = inputs(300, 300)
    labels = (torch.arange(300) // 100 == 1).int() if modalities else None
    recipe = recipes.MMInferenceGrid(10, 4, labels, 16)
    order = recipe.order(300, "cpu").long()
    if modalities:  # text stands together and as it stood
        assert order[:200].tolist() == [*range(100), *range(200, 300)]
    else:
        assert order[:30].tolist() == list(range(0, 300, 10))
    pattern = recipe.choose(query, key)
    permuted = pattern.to_token_mask(order[None].int(), order[None].int())
    mask = torch.zeros(1, HEADS, 300, 300, dtype=torch.bool)
    mask[:, :, order[:, None], order] = permuted.expand(1, HEADS, -1, -1)
    assert not (mask & ~torch.ones(300, 300, dtype=torch.bool).tril()).any()
    assert mask.diagonal(dim1=2, dim2=3).all()
    out, lse = recipe(query, key, value, return_lse=True)
    exact = dense_draws(query.double(), key.double(), value.double(), mask, draws=1)[0]
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-4)


def test_token_sparse_attention(seed):
    query, key, value = inputs(300, 300)
    recipe = recipes.TokenSparseAttention(0.3, recent=20)
    tokens = recipe.tokens(query, key)
    assert tokens.shape == (1, HEADS, 90)
    out, lse = recipe(query, key, value, return_lse=True)
    causal = torch.ones(300, 300, dtype=torch.bool).tril()
    for head in range(HEADS):
        kept = tokens[0, head].long()
        assert kept.tolist() == sorted(set(kept.tolist())) and set(range(280, 300)) <= set(kept.tolist())
        k, v = key[0, head // 2].double(), value[0, head // 2].double()
        score = (query[0, head].double() @ k.T / math.sqrt(32)).masked_fill(~causal, -math.inf)[kept][:, kept]
        torch.testing.assert_close(out[0, head, kept].double(), score.softmax(-1) @ v[kept], rtol=1e-4, atol=2e-5)
        others = torch.ones(300, dtype=torch.bool).scatter(0, kept, False)
        assert (out[0, head, others] == 0).all() and (lse[0, head, others] == -math.inf).all()


# ---- training


def test_attention_gate_learns_the_pooled_map(seed):
    query, key, value = inputs(256, 256)
    gate = recipes.AttentionGate(HEADS, 2, 32, gate_dim=16, block_size=32)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(gate.loss(query, key, value))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in gate.parameters())


def test_gradients_flow_through_the_choice(seed):
    """A choice is not differentiated, attention over it is."""
    query, key, value = (x.requires_grad_() for x in inputs(130, 130))
    for name in ("x", "anchor", "vertical-slash"):
        grads = torch.autograd.grad(CASES[name](False)(query, key, value).square().sum(), (query, key, value))
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


def test_stripes_and_patterns_are_what_choose_returns(seed):
    query, key, _ = inputs(130, 130)
    for make in CASES.values():
        assert isinstance(make(False).choose(query, key, layer=1), (Stripes, BlockPattern))
    assert sparsekit.recipes is recipes
