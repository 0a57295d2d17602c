"""Scores and choices in plain torch, dense and in float64: what the kernels are tested against. Shares no code with them."""

import math

import torch

from backends import BACKENDS

DEVICES = sorted({backend.device for backend in BACKENDS})


# ---- scores


def causal_mask(len_q: int, len_k: int, causal: bool) -> torch.Tensor:
    """bool [Sq, Sk]: query i stands at i + Sk - Sq."""
    at_q, at_k = torch.arange(len_q)[:, None] + len_k - len_q, torch.arange(len_k)[None]
    return (at_k <= at_q) | torch.tensor(not causal)


def products(query, key, scale=None) -> torch.Tensor:
    """scale * q.k, float64 [B, Hq, Sq, Sk]."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scale * (query.double() @ key.transpose(-1, -2))


def by_blocks(x: torch.Tensor, block: tuple[int, int], fill: float) -> torch.Tensor:
    """[..., Sq, Sk] -> [..., Mq, Nk, block_q, block_k], filled up at the ends."""
    pad = (0, -x.shape[-1] % block[1], 0, -x.shape[-2] % block[0])
    x = torch.nn.functional.pad(x, pad, value=fill)
    return x.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0])).transpose(-2, -3)


def block_scores(query, key, block, reduce="mean", causal=False, scale=None, stride=16) -> torch.Tensor:
    scores = products(query, key, scale)
    mask = causal_mask(query.shape[2], key.shape[2], causal).expand(scores.shape)
    if reduce == "antidiagonal":
        return _antidiagonal(scores, mask, block, stride)
    scores, mask = by_blocks(scores, block, 0.0), by_blocks(mask.double(), block, 0.0) > 0
    count = mask.sum((-1, -2))
    if reduce == "mean":
        result = scores.where(mask, 0).sum((-1, -2)) / count.clamp(min=1)
    else:
        result = scores.where(mask, -math.inf).flatten(-2).max(-1).values
    return result.where(count > 0, -math.inf)


def _antidiagonal(scores, mask, block, stride):
    """XAttention, algorithm 1, with causality inside the tiles that the diagonal cuts."""
    len_q, len_k = scores.shape[-2:]
    t = torch.arange(stride)
    first = torch.arange(0, len_q, stride)[:, None]  # a tile's antidiagonal begins at the last row that it has
    row, column = (first + stride).clamp(max=len_q) - 1 - t, torch.arange(0, len_k, stride)[:, None] + t
    exists = (row >= first)[:, None] & (column < len_k)  # [R, C, stride]
    row, column = row.clamp(min=0)[:, None], column.clamp(max=len_k - 1)
    tiles, seen = scores[..., row, column], (mask[..., row, column] & exists).double()
    count = seen.sum(-1)
    mean = ((tiles * seen).sum(-1) / count.clamp(min=1)).where(count > 0, -math.inf)
    sees = (count > 0).any(-1, keepdim=True)
    share = mean.where(sees, 0).softmax(-1).where(sees, 0)
    size = (block[0] // stride, block[1] // stride)
    total = by_blocks(share, size, 0.0).sum((-1, -2))
    rows = by_blocks(sees.double().expand(share.shape), size, 0.0)[..., :, 0].sum(-1)
    seen_blocks = by_blocks(count, size, 0.0).sum((-1, -2)) > 0
    return (total / rows.clamp(min=1)).clamp(min=2.0**-126).log().where(seen_blocks, -math.inf)


def similarity(x: torch.Tensor, block: int) -> torch.Tensor:
    """The mean cosine of all pairs of a block's rows, [B, H, blocks]."""
    rows = []
    for part in x.double().split(block, 2):
        norm = part.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 0, part / norm.where(norm > 0, 1), 0)
        rows.append((unit @ unit.transpose(-1, -2)).mean((-1, -2)))
    return torch.stack(rows, -1)


def column_scores(query, key, positions, causal=True, scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B, P]."""
    scores = products(query, key, scale)
    distance = positions[:, :, None].long() - torch.arange(key.shape[2])  # [B, P, Sk]
    sees = (distance >= 0)[:, None] if causal else torch.ones_like(distance, dtype=torch.bool)[:, None]
    share = masked_softmax(scores, sees)
    slots = distance.where((distance >= 0) & (distance < key.shape[2]), key.shape[2])[:, None].expand(share.shape)
    diagonals = torch.zeros(*share.shape[:2], key.shape[2] + 1, dtype=torch.float64)
    diagonals.scatter_add_(2, slots.flatten(2), share.flatten(2))
    return share.sum(2), diagonals[..., :-1]


def masked_softmax(scores, sees) -> torch.Tensor:
    any_seen = sees.any(-1, keepdim=True)
    return scores.where(sees, -math.inf).where(any_seen, 0).softmax(-1).where(any_seen & sees, 0)


def attention(query, key, mask, lse, scale=None) -> torch.Tensor:
    """exp(score - lse), [B, Hq, Sq, Sk]; 0 where not seen, also in rows with lse = -inf."""
    share = (products(query, key, scale) - lse.double()[..., None]).exp()
    return share.where(mask & (lse != -math.inf)[..., None], 0)


# ---- choices


def choose(
    scores, rule, *, number=None, weights=None, by_head=False, min_count=0, width=None, sink=0, local=0, row_limit=None
):
    """(indices, counts, mass) of scores [heads, rows, N], entry by entry. `number`: k, p or threshold [heads, rows] (top-p
    by head: [heads]); weights [heads, rows, N]; row_limit [heads, rows]."""
    heads, rows, columns = scores.shape
    width = columns if width is None else width
    values = scores.float() if weights is None else scores.float() * weights
    indices = torch.full((heads, rows, width), -1, dtype=torch.int32)
    counts, mass = torch.zeros(heads, rows, dtype=torch.int32), torch.zeros(heads, rows)
    for head in range(heads):
        forced, others = [], []
        for row in range(rows):
            limit = columns if row_limit is None else min(max(int(row_limit[head, row]), 0), columns)
            value = values[head, row].tolist()
            allowed = [j for j in range(limit) if value[j] > -math.inf]  # NaN is not
            forced.append([j for j in allowed if j < sink or j >= limit - local])
            free = set(forced[-1])
            others.append(sorted((j for j in allowed if j not in free), key=lambda j, v=value: (-v[j], j)))
        takes = [_how_many(rule, values[head], r, forced[r], others[r], number[head]) for r in range(rows)]
        if by_head:
            takes = _fewest_of_head(values[head], forced, others, float(number[head]))
        elif rule == "top_p":
            takes = [
                _fewest_of_head(values[head, r : r + 1], [forced[r]], [others[r]], float(number[head, r]))[0]
                for r in range(rows)
            ]
        for row in range(rows):
            total = min(max(takes[row] + len(forced[row]), min_count), width)
            chosen = sorted([*forced[row], *others[row][: max(total - len(forced[row]), 0)]])
            counts[head, row] = len(chosen)
            indices[head, row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            mass[head, row] = torch.tensor(
                sum(values[head, row, chosen].double().tolist()), dtype=torch.float64
            ).float()
    return indices, counts, mass


def _how_many(rule, values, row, forced, others, number):
    if rule == "top_k":
        return max(int(number[row]) - len(forced), 0)
    if rule == "threshold":
        return sum(float(values[row, j]) >= float(number[row]) for j in others)
    return 0


def _fewest_of_head(values, forced, others, p):
    """How many of each row's `others` top-p takes of all rows together: masses are integers, sums are exact."""
    rows, columns = values.shape
    biggest = float(torch.finfo(torch.float32).max)
    real = {(r, j): min(max(float(values[r, j]), 0.0), biggest) for r in range(rows) for j in forced[r] + others[r]}
    shift = 52 - (rows * columns - 1).bit_length() - math.frexp(max(real.values(), default=0.0))[1]
    unit = {at: round(math.ldexp(value, shift)) for at, value in real.items()}
    line = sorted(((r, j) for r in range(rows) for j in others[r]), key=lambda at: (-float(values[at]), *at))
    if p >= 1:
        taken = [at for at in line if float(values[at]) > 0]
    else:
        wanted = max(p, 0.0) * sum(unit.values())
        taken, total = [], sum(unit[r, j] for r in range(rows) for j in forced[r])
        for at in line:
            if total >= wanted:
                break
            taken.append(at)
            total += unit[at]
    return [sum(at[0] == r for at in taken) for r in range(rows)]
