"""Block-sparse attention on your own tensors: which key blocks each query block sees, and one call. Runs on a CPU."""

import torch

import sparsekit

query, key, value = (torch.randn(1, 8, 2048, 64) for _ in range(3))  # [batch, heads, tokens, head_dim], as in SDPA

block_map = torch.rand(1, 8, 16, 16) < 0.25  # which 128 x 128 blocks each head computes: here at random,
block_map[..., 0] = True  # the first block
block_map |= torch.eye(16, dtype=torch.bool)  # and the diagonal always
pattern = sparsekit.BlockPattern.from_bool(block_map, 128, causal=True)

out = sparsekit.block_sparse_attention(query, key, value, pattern)

dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=pattern.to_token_mask())
print(f"{pattern.to_dense().sum():,} of {block_map.numel():,} blocks computed")
print(f"largest difference from dense attention with the same mask: {(out - dense).abs().max():.1e}")
