"""Imports the installed package and runs attention on each of the named instruction sets, forward and backward, against
dense attention. CI runs it on emulated processors, where an instruction outside its dispatch is an illegal one.

    qemu-x86_64 -cpu Haswell python tests/isa_smoke.py avx2 portable
"""

import sys

import torch

import sparsekit

torch.manual_seed(0)
torch.set_num_threads(1)
offered = torch.ops.sparsekit.cpu_features().split()
print("processor offers:", *offered)
block_map = torch.rand(1, 2, 5, 6) < 0.5
block_map[0, 0, 0] = False  # a row without keys
for isa in sys.argv[1:]:
    assert isa in offered, f"{isa} is not offered here"
    assert not any(name in offered for name in ("avx512", "avx512_bf16")), "this processor is not emulated"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query, key, value = (torch.randn(1, 2, n, 32, dtype=dtype, requires_grad=True) for n in (70, 90, 90))
        pattern = sparsekit.BlockPattern.from_bool(block_map, 16, seq_lengths=(70, 90), causal=True)
        with sparsekit.isa(isa):
            out = sparsekit.block_sparse_attention(query, key, value, pattern)
            grads = torch.autograd.grad(out.float().square().sum(), (query, key, value))
        exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
        wanted, _ = sparsekit.reference.block_sparse_attention(*exact, pattern)
        exact_grads = torch.autograd.grad(wanted.square().sum(), exact)
        limit = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        for name, found, right in zip("out dQ dK dV".split(), (out, *grads), (wanted, *exact_grads), strict=True):
            error = float((found.double() - right).norm() / right.norm())
            print(f"{isa} {dtype} {name}: relative error {error:.1e}")
            assert error < limit
