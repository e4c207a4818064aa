"""The command `var-scale bench launches`: the time that the host takes for one launch.

A small model on a fast GPU waits for the host: the GPU is idle while Python prepares the next
operation. The operations here are so small that only this time is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from var_kernels.bench.run import describe, require_writable, write

from var_kernels import adaptive_layer_norm
from var_kernels.dispatch import use_triton

ROUNDS, CALLS = 7, 500


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the least time per call over several rounds of calls.

    The device is waited for once per round, so its work overlaps with the next launches.
    """
    best = float("inf")
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 1e6 * best / CALLS


def launches(device: torch.device) -> dict[str, float]:
    """Return the microseconds of one operation of each kind.

    The kinds are: `plain`, an operation of torch; `triton`, a Triton kernel; `operator`, the
    forward pass of one of our registered operators without gradients; `autograd`, its forward and
    backward pass with them, which are several launches.
    """
    x = torch.zeros(1, 1, 64, device=device)
    scale, shift = (torch.zeros(1, 1, 64, device=device) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (x, scale, shift)]
    found = {"plain": microseconds(lambda: x.add_(1.0), device)}
    if use_triton(x):
        found["triton"] = microseconds(triton_launch(device), device)
    with torch.no_grad():
        found["operator"] = microseconds(
            lambda: adaptive_layer_norm(x, scale, shift, 1e-6, torch.float32), device
        )

    def both() -> None:
        y = adaptive_layer_norm(*leaves, 1e-6, torch.float32)
        torch.autograd.grad(y, leaves, y)

    found["autograd"] = microseconds(both, device)
    return found


def triton_launch(device: torch.device) -> Callable[[], object]:
    """Return a call that launches a Triton kernel which does nearly nothing."""
    import triton
    import triton.language as tl

    @triton.jit
    def add_one(pointer: Any) -> None:
        tl.store(pointer, tl.load(pointer) + 1.0)

    x = torch.zeros(1, device=device)
    return lambda: add_one[(1,)](x)


def run(out: Path | None) -> dict[str, Any]:
    """Measure, print the times and write them to `out`."""
    require_writable(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {**describe(device), "microseconds": launches(device)}
    result["timing"] = "whole calls"
    for name, time_us in result["microseconds"].items():
        print(f"{name:10} {time_us:8.2f} µs per call", flush=True)
    write(out, result)
    if out:
        print(f"wrote {out}")
    return result
