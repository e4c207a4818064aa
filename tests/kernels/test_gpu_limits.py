"""Tests on an NVIDIA GPU at the limits of the kernels: `pytest -m gpu`.

More than 2^31 elements, the longest sequences, heads of other widths, hot heads, compiled blocks,
and several processes on one GPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.kernels.compare import check, eager_attention, relative
from tests.runs import losses, run, small_config
from var_kernels import adaptive_layer_norm, block_attention, linear_cross_entropy
from var_kernels.adaln import reference as norm
from var_kernels.attention import mask, scales
from var_kernels.attention import reference as attention
from var_kernels.attention.schedule import OFFICIAL_SCALES
from var_kernels.cross_entropy import reference as ce
from var_scale.config.schema import TrainConfig
from var_scale.model import build_vae, build_var
from var_scale.train.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
UP_TO_64 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
"""Scales of 9,451 tokens, for 1024 pixels."""


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check_attention(patches: tuple[int, ...], B: int, D: int, log_scale: list[float]) -> None:
    """Compare block-causal attention of heads with these factors in bfloat16."""
    visible, H = scales(patches), len(log_scale)
    L = len(visible.lo)
    check(
        lambda qkv, s: block_attention(qkv, patches, s),
        lambda qkv, s: attention.attention(*qkv.unbind(2), visible, s, 1.0).flatten(2),
        [randn(B, L, 3, H, D).to(torch.bfloat16), torch.tensor(log_scale, device="cuda")],
        [randn(B, L, H * D)],
        lambda qkv, s: eager_attention(qkv, s, mask(visible, "cuda")),
        sums=[2],
    )


@pytest.mark.parametrize("D", [32, 96, 128])
@pytest.mark.parametrize("hottest", [4.0, 60.0, 100.0])
def test_heads(D: int, hottest: float) -> None:
    """Heads of other widths, also with a factor above 40, whose logits need a maximum."""
    check_attention(OFFICIAL_SCALES[680], 2, D, [math.log(hottest), 0.3])


def test_the_longest_sequence() -> None:
    """One image of 1024 pixels: 9,451 tokens, of which each sees up to all."""
    check_attention(UP_TO_64, 1, 64, [1.4, 0.3])


def test_adaln_of_more_than_2_31_numbers() -> None:
    """The last sample of 2^31 + 2^20 numbers is normalised as it is alone, and so are its
    gradients."""
    B, L, C = 2050, 1024, 1024
    x = randn(B, L, C, dtype=torch.bfloat16).requires_grad_()
    scale, shift = (randn(B, C, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    out = adaptive_layer_norm(x, scale, shift)
    gradients = torch.autograd.grad(out, [x, scale, shift], out.detach())
    for place in (0, B - 1):
        part = [t[place : place + 1].detach().double().requires_grad_() for t in (x, scale, shift)]
        exact = norm.adaln(*part, 1e-6)
        wanted = torch.autograd.grad(exact, part, out[place : place + 1].detach().double())
        assert relative(out[place : place + 1].detach(), exact.detach()) < 6e-3
        for ours, truth in zip(gradients, wanted, strict=True):
            assert relative(ours[place : place + 1], truth) < 1e-2


def test_cross_entropy_of_more_than_2_31_logits() -> None:
    """The rows at both ends of 2^31 + 2^24 logits have the loss that they have alone."""
    N, C, V = 528_384, 64, 4096
    x, weight = randn(N, C, dtype=torch.bfloat16), randn(V, C, dtype=torch.bfloat16) / 8
    target = torch.randint(V, (N,), device="cuda")
    x.requires_grad_()
    loss, value, _ = linear_cross_entropy(x, weight, None, target)
    (dx,) = torch.autograd.grad(loss.sum(), [x])
    for part in (slice(0, 512), slice(N - 512, N)):
        rows = x[part].detach().double().requires_grad_()
        exact = ce.cross_entropy(rows @ weight.double().t(), target[part], 0.0, 0.0)[0]
        (wanted,) = torch.autograd.grad(exact.sum(), [rows])
        assert relative(value[part], exact.detach()) < 6e-3
        assert relative(dx[part], wanted) < 2e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_twice(compiled: bool) -> None:
    """Two steps of the same model, also with compiled blocks, give the same bits; both forms agree
    with float32."""
    torch.manual_seed(0)
    vae = build_vae(ch=32, device="cuda")
    var = build_var(
        vae, depth=4, drop_path_rate=0.0, kernels="on", attention="triton", device="cuda"
    ).train()
    if compiled:
        for block in var.blocks:
            block.compile()
    tokens = torch.randint(4096, (2, 680), device="cuda")
    labels, drop = torch.tensor([3, 999], device="cuda"), torch.zeros(2, dtype=torch.bool).cuda()

    def step(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        module = TrainStep(var, vae.quantize, TrainConfig(steps=1), precision)
        loss, _, _ = module(tokens, labels, drop)
        gradients = torch.autograd.grad(loss, list(var.parameters()))
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    exact, first, second = step("fp32"), step("bf16"), step("bf16")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert relative(first[1], exact[1]) < 0.05


def test_tf32_does_not_reach_the_evaluation() -> None:
    """Losses of an evaluation in float32 are exact to 1e-5 of those in float64 unless TF32 is
    allowed, and to 1e-3 with it."""
    torch.manual_seed(0)
    vae = build_vae(ch=32, device="cuda")
    var = build_var(vae, depth=2, kernels="on", attention="triton", device="cuda").eval()
    plain = build_var(vae, depth=2, kernels="off", attention="sdpa", device="cuda").eval()
    plain.load_state_dict(var.state_dict())
    tokens = torch.randint(4096, (2, 680), device="cuda")
    labels = torch.tensor([3, 999], device="cuda")
    x_BLZ = vae.quantize.idxBl_to_var_input(list(tokens.split([n * n for n in var.patch_nums], 1)))
    before = torch.get_float32_matmul_precision()
    with torch.no_grad():
        logits = plain.double()(labels, x_BLZ.double())
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens.flatten())
    try:
        for precision, room in (("highest", 1e-5), ("high", 1e-3)):
            torch.set_float32_matmul_precision(precision)
            with torch.no_grad():
                step = TrainStep(var, vae.quantize, TrainConfig(steps=1), "bf16").eval()
                loss, _, _ = step(tokens, labels)
            assert float(abs(loss - exact) / exact) < room, precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_engines_on_one_gpu(name: str, tmp_path: Path) -> None:
    """One process of an engine for several gives the losses of the single engine."""
    found = {}
    for engine in ("single", name):
        config = small_config(tmp_path, engine={"name": engine, "processes": 1})
        code, folder = run(config, tmp_path / engine)
        assert code == 0
        found[engine] = losses(folder)
    assert found[name] == pytest.approx(found["single"], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_recorded_steps(precision: str, tmp_path: Path) -> None:
    """Steps whose passes are recorded as CUDA graphs have the losses of plain ones."""
    found = {}
    for graphs in (False, True):
        config = small_config(tmp_path, engine={"graphs": graphs}, train={"precision": precision})
        code, folder = run(config, tmp_path / f"run-{graphs}")
        assert code == 0
        found[graphs] = losses(folder)
    assert json.loads(folder.env.read_text())["choices"]["graphs"] == "on"
    assert found[True] == pytest.approx(found[False], rel=1e-5)
