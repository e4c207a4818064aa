"""The model with the fused operators and the other attention back-ends gives the same numbers as
plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.test_var import tiny
from tests.raises import raises
from tools.kernel_tables import steps_table
from var_kernels.adaln import launch as adaln_launch
from var_kernels.adaln import op as adaln_op
from var_kernels.attention import op as attention_op
from var_kernels.cross_entropy import op as cross_entropy_op
from var_kernels.mlp import op as mlp_op
from var_scale.config.load import load
from var_scale.config.schema import TrainConfig
from var_scale.model import VAR
from var_scale.model.attention import (
    Call,
    KVCache,
    ScaleMask,
    attend,
    block_causal_bias,
    choose_backend,
    require_trainable,
)
from var_scale.model.attention.biased import Flash, sdpa
from var_scale.model.attention.blocks import blocks
from var_scale.model.attention.choose import AUTOMATIC, BACKENDS
from var_scale.model.attention.dense import DenseAttention
from var_scale.model.load import new_tokenizer
from var_scale.scales import PatchNum, length
from var_scale.train.assemble import build_module
from var_scale.train.step import TrainStep

LABELS = torch.tensor([0, 3, 1])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"shared_aln": True},
    {"attn_l2_norm": False},
    {"drop_path_rate": 0.5},
    {"patch_nums": (1,)},
    {"depth": 1, "mlp_ratio": 2.5},
]


def pair(**kwargs: Any) -> tuple[VAR, VAR]:
    """The same weights without and with the fused operators."""
    kwargs = {"depth": 3} | kwargs
    plain, fused = tiny(kernels="off", **kwargs), tiny(kernels="on", **kwargs)
    fused.load_state_dict(plain.state_dict())
    return plain.train(), fused.train()


def losses(var: VAR, smoothing: float = 0.1, B: int = 3) -> list[torch.Tensor]:
    """Loss, cross-entropies, correctness, and the gradients of all weights, with fixed labels and
    paths."""
    torch.manual_seed(1)
    tokens = torch.randint(var.V, (B, var.L))
    keep = torch.rand(var.depth, 2, B) < 0.6
    step = TrainStep(
        var, var.vae_quant_proxy[0], TrainConfig(steps=1, label_smoothing=smoothing), "fp32"
    )
    loss, ce, correct = step(tokens, LABELS[:B], torch.tensor([False, True, False])[:B], keep)
    return [
        loss.detach(),
        ce,
        correct,
        *torch.autograd.grad(
            loss, list(var.parameters()), allow_unused=True, materialize_grads=True
        ),
    ]


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_fused_training_step(kwargs: dict[str, Any]) -> None:
    """The loss, the per-token results and all gradients agree."""
    plain, fused = pair(**kwargs)
    for number, (a, b) in enumerate(zip(losses(plain), losses(fused), strict=True)):
        torch.testing.assert_close(
            b, a, rtol=2e-4, atol=2e-6, msg=lambda text, number=number: f"result {number}: {text}"
        )


@pytest.mark.parametrize("kwargs", VARIANTS[:3], ids=str)
def test_fused_logits_and_sampling(kwargs: dict[str, Any]) -> None:
    """The logits, those of the first scales only, and the images of a seed agree."""
    plain, fused = (var.eval() for var in pair(**kwargs))
    x = torch.randn(3, plain.L - 1, plain.Cvae)
    for stage in (-1, 2):
        plain.prog_si = fused.prog_si = stage
        torch.testing.assert_close(fused(LABELS, x), plain(LABELS, x), rtol=1e-4, atol=1e-4)
    plain.prog_si = fused.prog_si = -1
    images = [
        var.autoregressive_infer_cfg(3, LABELS, g_seed=0, cfg=2.0, top_k=9)
        for var in (plain, fused)
    ]
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)


def test_drawn_paths_and_labels_are_the_same() -> None:
    """Without given noise both draw it from the same stream in the same order."""
    plain, fused = pair(drop_path_rate=0.5)
    x = torch.randn(3, plain.L - 1, plain.Cvae)
    outs = []
    for var in (plain, fused):
        torch.manual_seed(7)
        outs.append(var(LABELS, x))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    """In bfloat16 the fused model is at most 1.5 times as far from float32 as the plain one."""
    plain, fused = (var.eval() for var in pair())
    x = torch.randn(3, plain.L - 1, plain.Cvae)
    exact = plain(LABELS, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [
            float((var(LABELS, x).detach() - exact).norm() / exact.norm()) for var in (plain, fused)
        ]
    assert errors[1] < 1.5 * errors[0] < 0.1


@pytest.mark.parametrize("attn_l2_norm", [True, False])
def test_flex(attn_l2_norm: bool) -> None:
    """FlexAttention with its block mask, forward (it has no backward pass on CPUs), also of the
    first scales only."""
    plain, flex = tiny(attn_l2_norm=attn_l2_norm), tiny(attn_l2_norm=attn_l2_norm, attention="flex")
    flex.load_state_dict(plain.state_dict())
    x = torch.randn(3, plain.L - 1, plain.Cvae)
    with torch.no_grad():
        for stage in (-1, 1):
            plain.prog_si = flex.prog_si = stage
            torch.testing.assert_close(
                flex.eval()(LABELS, x), plain.eval()(LABELS, x), rtol=1e-4, atol=1e-4
            )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU tests/kernels/test_gpu.py does it on the GPU"
)
@pytest.mark.parametrize("attn_l2_norm", [True, False])
def test_triton_attention_and_norms_in_the_interpreter(
    attn_l2_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels inside the model: training step, gradients, sampling with the cache."""
    kwargs: dict[str, Any] = {"attn_l2_norm": attn_l2_norm, "patch_nums": (1, 2)}
    plain = tiny(kernels="off", **kwargs)
    triton = tiny(attention="triton", kernels="on", **kwargs)
    triton.load_state_dict(plain.state_dict())
    for module in (adaln_op, attention_op, cross_entropy_op, mlp_op):
        monkeypatch.setattr(module, "use_triton", lambda _: True)
    # Fewer programs, each with more rows: the interpreter takes its time per program.
    monkeypatch.setattr(adaln_launch, "multiprocessors", lambda _: 1)
    for a, b in zip(losses(plain.train(), B=2), losses(triton.train(), B=2), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
    images = [var.autoregressive_infer_cfg(1, 1, g_seed=0, cfg=1.5) for var in (plain, triton)]
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("blocks", torch.float64),
        ("blocks", torch.float32),
        ("blocks", torch.bfloat16),
        ("dense", torch.float64),
        ("dense", torch.float32),
    ],
)
@pytest.mark.parametrize(
    ("patch_nums", "scale"),
    [((1, 2, 3), 0.3), ((1,), 1.0), ((1, 3, 5, 9), 1.0), ((1, (2, 3)), 1.0)],
)
def test_written_out_attention(
    patch_nums: tuple[PatchNum, ...], scale: float, form: str, dtype: torch.dtype
) -> None:
    """The attention of CPUs against attention with a mask: output and gradients. It is at most
    twice as far from float64 as the plain form of the same precision."""
    L = length(patch_nums)
    inputs, g = (
        [torch.randn(2, 3, L, 16, dtype=torch.float64) for _ in range(3)],
        torch.randn(2, 3, L, 16, dtype=torch.float64),
    )
    bias = block_causal_bias(patch_nums).double()

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = function(*leaves)
        return [t.double() for t in (out.detach(), *torch.autograd.grad(out, leaves, g.to(dtype)))]

    exact = run(lambda q, k, v: sdpa(q, k, v, bias, scale), torch.float64)
    plain = run(
        lambda q, k, v: (q @ k.transpose(2, 3) * scale + bias.to(dtype)).softmax(-1) @ v, dtype
    )

    def written_out(q, k, v):
        if form == "blocks":
            return blocks(q, k, v, patch_nums, scale)
        return DenseAttention.apply(*(t.flatten(0, 1) for t in (q, k, v)), bias[0], scale).view_as(
            q
        )

    ours, again = run(written_out, dtype), run(written_out, dtype)
    for a, b, c, d in zip(ours, plain, exact, again, strict=True):
        room = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
        assert torch.equal(a, d) and float((a - c).norm()) <= max(
            2 * float((b - c).norm()), room * float(c.norm())
        )


@pytest.mark.parametrize("form", ["blocks", "dense"])
def test_attention_of_cpus_in_the_model(form: str) -> None:
    """The same losses, gradients and samples as with sdpa."""
    plain, other = tiny(attention="sdpa"), tiny(attention=form)
    other.load_state_dict(plain.state_dict())
    for a, b in zip(losses(plain.train()), losses(other.train()), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    images = [var.autoregressive_infer_cfg(2, 1, g_seed=0, cfg=1.5) for var in (plain, other)]
    assert torch.equal(*images)


def test_choices_and_wrong_ones() -> None:
    """`auto` gives its reason. Errors: triton on a CPU, training with flash or with flex on a CPU,
    and mask tensors for back-ends that use the model's mask."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    backend, reason = choose_backend("auto", cpu)
    assert "sdpa" in backend and "NVIDIA GPU" in reason
    for name, device in (("triton", cpu), ("blocks", cuda), ("dense", cuda)):
        with raises("model.attention", f"attention={name}"):
            choose_backend(name, device)
    for name in ("triton", "flex"):
        with raises("model.attention", f"attention={name}"):
            require_trainable(name, cpu)
    assert Flash().trains_on(cpu)
    require_trainable("auto", cpu)
    choices = tiny().choices()
    assert choices["attention"].startswith("blocks in half precision from 128 tokens on, dense in")
    assert choices["kernels"].startswith("off (asked: auto")
    with raises("model.kernels", "'yes'"):
        tiny(kernels="yes")
    with raises("model.kernels", "target_BL", "kernels='on'"):
        tiny()(LABELS, torch.randn(3, 29, 8), target_BL=torch.zeros(3, 30, dtype=torch.int64))
    one = tiny(patch_nums=(1,))  # a single scale has no input beside the label
    assert torch.isfinite(losses(one.train())[0])
    for name in ("triton", "flex", "blocks"):
        block = tiny(attention=name).blocks[0]
        with raises("model.attention", f"attention={name}"):
            block(torch.randn(1, 5, 32), torch.randn(1, 32), torch.zeros(1, 1, 5, 5))


def test_every_back_end_can_be_chosen_in_a_config() -> None:
    for name in ("auto", *BACKENDS):
        assert load("model/d16", [f"model.attention={name}"]).model.attention == name


@pytest.mark.parametrize("kind", ["per sample", "bool", "learned", "constant"])
def test_auto_computes_every_mask(kind: str) -> None:
    """Training in float32 on a CPU gives the attention of sdpa for any mask, and the gradient of a
    mask that has one."""
    torch.manual_seed(0)
    qkv, log_scale = torch.randn(2, 5, 3, 2, 8), torch.zeros(2)
    bias = {
        "per sample": torch.randn(2, 1, 5, 5),
        "bool": torch.rand(1, 1, 5, 5) < 0.8,
        "learned": torch.randn(1, 1, 5, 5, requires_grad=True),
        "constant": torch.randn(1, 1, 5, 5),
    }[kind]
    if kind == "bool":
        bias = bias | torch.eye(5, dtype=torch.bool)
    auto, exact = (attend(qkv, bias, log_scale, 1.0, name, None) for name in ("auto", "sdpa"))
    torch.testing.assert_close(auto, exact)
    assert auto.requires_grad == (kind == "learned")
    call = Call(qkv, bias, log_scale, 1.0, None)
    chosen = next(backend for backend in AUTOMATIC if backend.preferable(call))
    assert chosen.name == ("dense" if kind == "constant" else "sdpa")


def test_what_flash_supports() -> None:
    """It needs half precision and no mask."""
    flash, qkv = Flash(), torch.zeros(1, 5, 3, 2, 8)
    assert "float32" in flash.supports(Call(qkv, None, None, 1.0, None))
    assert "mask" in flash.supports(Call(qkv.half(), torch.zeros(1, 1, 5, 5), None, 1.0, None))
    assert not flash.supports(Call(qkv.half(), None, None, 1.0, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_auto_chooses_on_a_cpu(dtype: torch.dtype) -> None:
    """In half precision one product per scale, for long schedules and for sampling; in float32 an
    explicit softmax to train on short schedules; else sdpa."""
    half = dtype == torch.bfloat16
    short = "sdpa" if half else "dense"
    for patch_nums, cache, expected, training in (
        ((1, 2, 3), None, "sdpa", short),
        ((1, 2, 3, 11), None, *(2 * ["blocks" if half else "sdpa"])),
        (None, KVCache(), "blocks" if half else "sdpa", "sdpa"),
        (None, None, "sdpa", short),
    ):
        L = length(patch_nums) if patch_nums else 9
        mask = None if patch_nums is None else ScaleMask(patch_nums, torch.zeros(()), dtype)
        call = Call(torch.zeros(1, L, 3, 2, 8, dtype=dtype), mask, None, 1.0, cache)
        with torch.no_grad():
            found = next(backend for backend in AUTOMATIC if backend.preferable(call))
        assert found.name == expected
        assert next(b for b in AUTOMATIC if b.preferable(call)).name == training


def test_bench_of_a_step(tmp_path: Path) -> None:
    """Both forms are timed and recorded. On a CPU the fused form is the plain one: kernels auto."""
    from var_scale.bench.step import bench_step

    small = [
        "model.depth=1",
        "model.width=64",
        "model.heads=2",
        "tokenizer.ch=32",
        "tokenizer.patch_nums=[1,2,3]",
    ]
    rows = bench_step(["model/d16"], 2, small, tmp_path / "r.json")
    assert [row["form"] for row in rows] == ["plain", "fused"] and all(
        row["step_ms"] > row["block_ms"] > 0 for row in rows
    )
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == rows


def test_a_form_without_memory_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory is the result of a form; the rows measured before are on disk by then."""
    from var_scale.bench import step as module

    def timed(config: object, batch: int, device: object) -> dict[str, object]:
        if len(seen := json.loads(out.read_text())["rows"] if out.exists() else []) == 1:
            assert seen[0]["form"] == "plain"
            raise torch.OutOfMemoryError("no memory")
        return {"block_ms": 1.0, "step_ms": 2.0, "attention": "a", "kernels": "k"}

    out = tmp_path / "r.json"
    monkeypatch.setattr(module, "time_config", timed)
    monkeypatch.setattr(module, "check_writable", lambda out: None)
    rows = module.bench_step(["model/d16", "model/d20"], 2, [], out)
    assert [row.get("failed") for row in rows] == [None, "out of memory", None, None]
    assert json.loads(out.read_text())["rows"] == rows
    assert "| 2 | fused | out of memory |" in steps_table(json.loads(out.read_text()))


def test_weights_are_drawn_on_the_device() -> None:
    """Nothing of the model and its loss is built on the CPU when a device is chosen."""
    config = load("model/d16", ["tokenizer.ch=32", "model.depth=1"])
    device = torch.device("meta")
    with device:
        vae = new_tokenizer(config.tokenizer)
        module = build_module(config, vae, device)
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}


def test_a_compiled_block_has_no_graph_break() -> None:
    """The fused block is one graph, with a mask, a pending branch and drop-path, and gives the same
    result and gradients."""
    _, fused = pair(drop_path_rate=0.5)
    block, x = fused.blocks[1], torch.randn(3, fused.L, fused.C, requires_grad=True)
    cond, branch, gate = (
        torch.randn(3, fused.C),
        torch.randn(3, fused.L, fused.C),
        torch.randn(3, 1, fused.C),
    )
    mask = ScaleMask(fused.patch_nums, fused.attn_bias_for_masking, torch.float32)
    keep = torch.tensor([[True, False, True], [False, True, True]])

    def function(x: torch.Tensor) -> torch.Tensor:
        x, (y, gamma, _) = block(x, cond, mask, keep, (branch, gate, None), defer=True)
        return x + y * gamma

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outs = [f(x) for f in (function, compiled)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(out.square().sum(), [x, *block.parameters()]) for out in outs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
