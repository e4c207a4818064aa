"""CUDA graphs of training: the forward and backward pass of a micro-batch, recorded once and then
replayed.

A step is about a thousand kernels. Where the GPU runs them faster than the host launches them, the
step takes as long as the launches; a replay is one launch. The optimiser runs outside, so clipping,
learning rates and skipped steps stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from var_scale.config.schema import Config
from var_scale.train.step import TrainStep

Inputs = tuple[Tensor | None, ...]
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function that launches kernels, and returns one that repeats them."""

WARM_UP = 3
"""Passes before a recording, in which libraries allocate what they keep, as torch recommends."""


def why_no_graphs(config: Config, device: torch.device, precision: str) -> str:
    """The reason why the passes of this run cannot be recorded; "" if they can."""
    engine = config.engine
    if device.type != "cuda":
        return f"a graph needs an NVIDIA GPU, not {device.type}"
    if engine.name != "single":
        return f"engine {engine.name} exchanges gradients within the backward pass"
    if precision == "fp16":
        return "the loss scale of fp16 changes between steps"
    if engine.recompute != "none":
        return "recomputation of activations reads the state of random numbers"
    if engine.compile:
        return "compiled blocks decide at every call which code runs"
    if config.log.activations:
        return "log.activations reads the blocks during the pass"
    return ""


def record_on_gpu(body: Callable[[], None]) -> Callable[[], None]:
    """Record what `body` launches as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        body()
    return graph.replay


class StepGraphs:
    """The recorded passes of one module, for the last shape of its inputs.

    The gradients of all parameters exist from the first call on and are added to in place, so they
    must be set to zero in place, too.

    Args:
        module: in training mode, with its parameters in their final place.
        scaled: the loss that is differentiated, such as the mean over micro-batches.
        record: `record_on_gpu`, or in tests on a CPU something that calls the function again.
    """

    def __init__(
        self,
        module: TrainStep,
        scaled: Callable[[Tensor], Tensor],
        record: Record = record_on_gpu,
    ) -> None:
        self._module, self._scaled, self._record = module, scaled, record
        self._parameters = list(module.parameters())
        self._key: Hashable = None
        self._replay: Callable[[], None] = lambda: None
        self._inputs: Inputs = ()
        self._results: list[Tensor] = []

    def __call__(self, inputs: Inputs, stage: int, newest: float) -> tuple[Tensor, Tensor]:
        """Add the gradients of a micro-batch; its loss () and its cross-entropy (B, l), as
        `TrainStep.forward` returns them."""
        # The weight of the newest scale changes from step to step, so it is an input of the graph.
        weight = torch.tensor(newest, device=self._parameters[0].device)
        given = (*inputs, weight)
        key = (stage, *(None if t is None else (tuple(t.shape), t.dtype) for t in given))
        if key != self._key:
            self._start(given, stage)
            self._key = key
        for kept, new in zip(self._inputs, given, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new, non_blocking=True)
        self._replay()
        loss, ce_BL = self._results
        return loss.clone(), ce_BL.clone()  # the next replay overwrites them

    def _start(self, given: Inputs, stage: int) -> None:
        """Record a pass over copies of these inputs, and leave the gradients as they were."""
        self._replay = lambda: None  # frees the memory of the graph before
        self._inputs = tuple(None if t is None else t.clone() for t in given)
        before = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        for p in self._parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

        def body() -> None:
            *inputs, newest = self._inputs
            loss, ce_BL, _ = self._module(*inputs, stage, newest)
            self._scaled(loss).backward()
            self._results = [loss.detach(), ce_BL]

        self._replay = self._record(body)
        for p, kept in zip(self._parameters, before, strict=True):
            assert p.grad is not None
            if kept is None:
                p.grad.zero_()
            else:
                p.grad.copy_(kept)
