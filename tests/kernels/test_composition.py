"""Tests of the operators under autograd, torch.compile, activation checkpointing and autocast.

Without a GPU the operators run in their CPU form.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.compare import DEVICE
from var_kernels import (
    adaptive_layer_norm,
    block_attention,
    gate_adaptive_layer_norm,
    gelu_mlp,
    linear_cross_entropy,
    nearest_code,
    use_triton,
    why_not,
)
from var_kernels.adaln.op import adaln_op
from var_kernels.attention.op import attention_op
from var_kernels.cross_entropy.op import linear_ce_op
from var_kernels.dispatch import constant_when_compiled
from var_kernels.mlp import op as mlp_op_module
from var_kernels.mlp.op import mlp_op
from var_kernels.vq.op import nearest_code_op


def randn(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, requires_grad=grad)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(2, 24), randn(2, 24)


OPS: dict[str, Callable[[], tuple[torch.library.CustomOpDef, tuple]]] = {
    "adaln": lambda: (adaln_op, (randn(2, 5, 24), None, None, None, *rows(), 1e-6, torch.float32)),
    "gate_adaln": lambda: (
        adaln_op,
        (
            randn(2, 5, 24),
            randn(2, 5, 24),
            randn(2, 24),
            randn(2, grad=False),
            *rows(),
            1e-6,
            torch.float32,
        ),
    ),
    "attention": lambda: (attention_op, (randn(2, 14, 3, 2, 16), randn(2), [1, 4, 9], "full", 1.0)),
    "attention, no norm": lambda: (
        attention_op,
        (randn(2, 14, 3, 2, 16), None, [1, 4, 9], "2", 0.25),
    ),
    "mlp": lambda: (
        mlp_op,
        (randn(2, 5, 16), randn(64, 16), randn(64), randn(16, 64), randn(16), "preact"),
    ),
    "mlp, input": lambda: (
        mlp_op,
        (randn(2, 5, 16), randn(64, 16), randn(64), randn(16, 64), randn(16), "input"),
    ),
    "cross_entropy": lambda: (
        linear_ce_op,
        (randn(9, 16), randn(40, 16), randn(40), torch.arange(9, device=DEVICE), 0.1, 1e-3, True),
    ),
    "nearest_code": lambda: (
        nearest_code_op,
        (randn(9, 16, grad=False), randn(40, 16, grad=False), "ieee"),
    ),
}


def test_the_mark_of_a_constant_is_that_of_torch() -> None:
    """`constant_when_compiled` sets the same mark as torch's decorator."""

    def function(device: torch.device) -> str:
        return device.type

    assert torch.compiler.assume_constant_result(function) is function
    assert vars(function) == vars(constant_when_compiled(lambda device: device.type))
    assert set(vars(function)) <= set(vars(why_not))


@pytest.mark.slow
def test_the_operators_do_not_import_the_compiler() -> None:
    script = "import sys, var_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.fixture(autouse=True)
def cpu_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the MLP operator out of the interpreter where there is no GPU.

    The operator is not registered for a particular device.
    """
    if DEVICE == "cpu":
        monkeypatch.setattr("var_kernels.dispatch.INTERPRETED", False)


@pytest.mark.parametrize("name", list(OPS))
def test_opcheck(name: str) -> None:
    """The schema, fake tensors and autograd registration are valid and agree under AOT autograd."""
    operator, arguments = OPS[name]()
    torch.library.opcheck(operator, arguments)


def whole(
    x: torch.Tensor,
    y: torch.Tensor,
    ada: torch.Tensor,
    qkv: torch.Tensor,
    weights: list[torch.Tensor],
) -> torch.Tensor:
    """Apply all differentiable operators in one function."""
    gamma, scale, shift = ada.unbind(1)
    x_new, h = gate_adaptive_layer_norm(x, y, gamma, scale, shift)
    h = h + block_attention(qkv, (1, 2, 3), weights[0])
    h = gelu_mlp(h, *weights[1:5]) + adaptive_layer_norm(x_new, scale, shift)
    target = torch.arange(28, device=x.device)
    return linear_cross_entropy(h.flatten(0, 1), weights[5], weights[6], target, 0.1)[0].mean()


def arguments() -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]
]:
    weights = [
        randn(2),
        randn(64, 32),
        randn(64),
        randn(32, 64),
        randn(32),
        randn(40, 32),
        randn(40),
    ]
    return randn(2, 14, 32), randn(2, 14, 32), randn(2, 3, 32), randn(2, 14, 3, 2, 16), weights


def leaves(inputs: tuple) -> list[torch.Tensor]:
    return [*inputs[:4], *inputs[4]]


def test_compile_has_no_graph_break_and_the_same_gradients() -> None:
    """The function compiles with fullgraph, which allows no graph break, to the custom
    operators."""
    inputs = arguments()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(whole(*inputs), leaves(inputs))
    for got, expected in zip(
        torch.autograd.grad(compiled(*inputs), leaves(inputs)), eager, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_activation_checkpointing() -> None:
    """Recomputation in the backward pass gives the same result."""
    inputs = arguments()
    expected = torch.autograd.grad(whole(*inputs), leaves(inputs))
    again = torch.autograd.grad(checkpoint(whole, *inputs, use_reentrant=False), leaves(inputs))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_autocast() -> None:
    """Products are in bfloat16, losses in float32, and gradients in the type of each parameter."""
    inputs = arguments()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = whole(*inputs)
    assert loss.dtype == torch.float32
    exact = whole(*inputs)
    assert float((loss - exact).detach().abs()) < 0.05 * float(exact.detach())
    for leaf, gradient in zip(
        leaves(inputs), torch.autograd.grad(loss, leaves(inputs)), strict=True
    ):
        assert gradient.dtype == leaf.dtype and torch.isfinite(gradient).all()


def test_gradcheck_of_the_definitions() -> None:
    """The gradients of the references in float64 match finite differences."""
    from var_kernels.adaln import reference as norm
    from var_kernels.attention import reference as attention
    from var_kernels.attention import scales
    from var_kernels.cross_entropy import reference as ce
    from var_kernels.mlp import reference as two_layers

    def d(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(
        lambda *t: norm.adaln(norm.gate_residual(t[0], t[1], t[2], None), *t[3:], 1e-6),
        (d(2, 2, 5), d(2, 2, 5), d(2, 5), d(2, 5), d(2, 5)),
    )
    assert torch.autograd.gradcheck(
        lambda qkv, s: attention.attention(*qkv.unbind(2), scales((1, 2)), s, 1.0),
        (d(1, 5, 3, 2, 3), d(2)),
    )
    assert torch.autograd.gradcheck(
        lambda z: ce.cross_entropy(z, torch.tensor([1, 0, 3]), 0.1, 0.01)[0], (d(3, 4),)
    )
    assert torch.autograd.gradcheck(two_layers.mlp, (d(2, 3), d(5, 3), d(5), d(3, 5), d(3)))


def test_the_question_where_kernels_run_does_not_break_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compiler treats the answer as a constant, however it is computed."""
    from var_kernels import dispatch

    monkeypatch.setattr(
        dispatch,
        "_why_not",
        lambda device: "" if importlib.util.find_spec("numpy") else str(device),
    )
    compiled = torch.compile(
        lambda x: x + 1 if use_triton(x) else x, fullgraph=True, backend="aot_eager"
    )
    assert float(compiled(torch.ones(1))) == 2.0


def test_double_backward_is_refused() -> None:
    """A second derivative is an error instead of a silently wrong result."""
    x = torch.randn(1, 3, 16, requires_grad=True)
    y = mlp_op_module._eager(
        x, *(torch.randn(s) for s in ((64, 16), (64,), (16, 64), (16,))), "preact"
    )[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_where_the_kernels_run() -> None:
    """The kernels run only on NVIDIA GPUs from Ampere on, and `why_not` gives the reason."""
    cpu = torch.device("cpu")
    assert "need an NVIDIA GPU" in why_not(cpu) and not use_triton(torch.ones(1))
    assert nearest_code(torch.eye(3), torch.eye(3)).tolist() == [0, 1, 2]


def test_bench_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the benchmark uses a small shape; it reports wrong forms and does not time them."""
    from var_kernels.bench import run
    from var_kernels.bench.operators import TRY, Problem

    out = tmp_path / "r.json"
    rows = run.run(["nearest_code"], ["d16 B=32 L=680"], out)
    assert (
        rows[0]["forms"]["ours"]["forward"]["p50"] > 0
        and json.loads(out.read_text())["versions"]["torch"]
    )
    problem = Problem(
        "x", TRY[0], [torch.ones(3)], [], {"eager": lambda t: t, "ours": lambda t: 2 * t}
    )
    ceilings = {"copy_bytes_per_s": 1.0, "product_flop_per_s": 1.0}
    assert (
        "relative error"
        in run.run_problem(problem, torch.device("cpu"), ceilings)["forms"]["ours"]["wrong"]
    )


def test_frozen_weights_cost_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the weights need no gradient, only that of the input is computed, and it is the same."""
    from torch.utils.flop_counter import FlopCounterMode

    x = randn(2, 5, 16)
    weights = [randn(64, 16), randn(64), randn(16, 64), randn(16)]
    counts, gradients = [], []
    for frozen in (False, True):
        given = [w.detach() if frozen else w for w in weights]
        y = mlp_op_module._eager(x, *given, "preact")[0]
        with FlopCounterMode(display=False) as counter:
            gradients.append(torch.autograd.grad(y.sum(), x, retain_graph=not frozen)[0])
        counts.append(counter.get_total_flops())
    assert (torch.equal(*gradients) and counts[1] * 2 == 2 * counts[0]) or counts[1] < counts[0]


@pytest.mark.slow
def test_sweep_tries_every_setting() -> None:
    """The sweep runs every kernel on tiny shapes, and no setting fails.

    Without a GPU the kernels run in the interpreter.
    """
    from var_kernels.bench.sweep import KERNELS, sweep

    with (
        torch.cuda.stream(torch.cuda.Stream())
        if torch.cuda.is_available()
        else contextlib.nullcontext()
    ):
        rows = sweep([], small=True, milliseconds=1.0)
    assert not [row for row in rows if "failed" in row]
    assert {row["kernel"].split(".")[0] for row in rows} == set(KERNELS) and all(
        row["ms"] > 0 for row in rows
    )
