"""Measurements of times and of the two ceilings of a device.

The ceilings are the rates of a copy and of a matrix product, measured in the same process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

QUANTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Time:
    """The milliseconds at the 20th, 50th and 80th percentiles."""

    p20: float
    p50: float
    p80: float


def measure(
    function: Callable[[], object],
    device: torch.device,
    milliseconds: float = 100.0,
    graph: bool = True,
) -> Time:
    """Time `function` after a warm-up.

    On a GPU, triton.testing.do_bench takes the time and empties the L2 cache before each call. If
    `function` can be recorded as a CUDA graph (on a separate stream), the result is the time of the
    GPU without the launches. Otherwise it is the time of the whole call.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return Time(
            *do_bench(
                recorded(function) if graph else function,
                warmup=25,
                rep=milliseconds,
                quantiles=list(QUANTILES),
            )
        )
    function()
    times, end = [], time.perf_counter() + milliseconds / 1e3
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return Time(cuts[1], statistics.median(times), cuts[7])


def recorded(function: Callable[[], object]) -> Callable[[], object]:
    """Return `function` as a CUDA graph, or `function` itself if it cannot be recorded.

    It cannot be recorded if it waits for the GPU, or if the current stream is the default stream.
    """
    function()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        return function
    try:
        with torch.cuda.graph(graph, stream=stream):
            function()
    # The library behind the function may raise any exception.
    except Exception:
        torch.cuda.synchronize()
        return function
    return graph.replay


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a copy.

    The copy is far larger than the L2 cache (8 GB on a GPU).
    """
    count = 1 << (32 if device.type == "cuda" else 25)
    source = torch.empty(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * count / (1e-3 * measure(lambda: target.copy_(source), device).p50)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP per second of a large square matrix product on random numbers.

    GPUs are reported to run faster on zeros.
    """
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / (1e-3 * measure(lambda: a @ b, device).p50)
