"""The fused operators without var_scale: Triton kernels on an NVIDIA GPU, PyTorch elsewhere."""

import torch

from var_kernels import (
    block_attention,
    gate_adaptive_layer_norm,
    gelu_mlp,
    linear_cross_entropy,
    why_not,
)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print("kernels:", why_not(device) or "Triton")
B, H, D, patch_nums, V = 2, 4, 64, (1, 2, 3, 4), 512
L, C = sum(p * p for p in patch_nums), H * D

qkv = torch.randn(B, L, 3, H, D, device=device, requires_grad=True)
# Tokens of a scale attend to their own scale and to all coarser ones.
x = block_attention(qkv, patch_nums, torch.full((H,), 1.4, device=device), 1.0)
gate, scale, shift = (torch.randn(B, 1, C, device=device) for _ in range(3))
x, h = gate_adaptive_layer_norm(x.new_zeros(B, L, C), x, gate, scale, shift, None, 1e-6, x.dtype)
w1, b1 = torch.randn(4 * C, C, device=device) / C**0.5, torch.zeros(4 * C, device=device)
w2, b2 = torch.randn(C, 4 * C, device=device) / C, torch.zeros(C, device=device)
x = x + gelu_mlp(h, w1, b1, w2, b2)
head, target = torch.randn(V, C, device=device) / C**0.5, torch.randint(V, (B * L,), device=device)
loss, ce, best = linear_cross_entropy(x.flatten(0, 1), head, torch.zeros(V, device=device), target)
loss.mean().backward()
print(f"loss {loss.mean():.4f}, gradient of qkv {qkv.grad.norm():.4f}")
