"""CUDA graphs of sampling: one per scale, for one batch size, replayed call after call.

A step of a small batch is hundreds of short kernels, and launching them takes longer than running
them. With `var.graphs = Graphs()`, `sample` records the steps of the transformer at the second call
in a row with the same batch, and replays them from then on. Drawing, feeding back and decoding run
outside of the graphs, so hooks and settings may change from call to call.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from var_scale.model.stepper import Stepper
from var_scale.model.transformer import Transformer


class Graphs:
    """The graphs of one model for one batch: the last one that was requested twice in a row.

    They hold the caches of that batch, (B, L, 2, C) per block and twice that with guidance, until
    another batch takes their place or the user sets `var.graphs = None`.
    """

    def __init__(self) -> None:
        self._recorded: _Recorded | None = None
        self._last_key: Hashable = None
        self._too_large: Hashable = None

    def stepper(self, var: Transformer, label_B: Tensor) -> Stepper:
        """The recorded steps for these labels where they exist, else plain steps. Records first if
        the call before this one had the same batch."""
        key = _key(var, label_B)
        if self._recorded is not None and self._recorded.key == key:
            self._recorded.restart(label_B)
            return self._recorded
        repeated, self._last_key = key == self._last_key, key
        if not repeated or key == self._too_large:
            return Stepper(var, label_B)
        self._recorded = None  # frees the memory of the graphs before
        try:
            self._recorded = _Recorded(var, label_B, key)
        except torch.OutOfMemoryError:
            # Graphs keep their caches, so a batch that just fits alone may not fit with them.
            self._too_large = key
            var.kv_caching(False)
            torch.cuda.empty_cache()
            return Stepper(var, label_B)
        return self._recorded


def _key(var: Transformer, label_B: Tensor) -> Hashable:
    """All that a recording depends on: the addresses of the weights, the batch, torch's modes."""
    kind = label_B.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (
        label_B.shape[0],
        tuple(p.data_ptr() for p in var.parameters()),
        var.head.weight.dtype,
        cast,
        torch.is_inference_mode_enabled(),
    )


class _Recorded(Stepper):
    """The steps of one batch, recorded."""

    def __init__(self, var: Transformer, label_B: Tensor, key: Hashable):
        self.key = key
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._logits: list[Tensor] = []
        B, device = label_B.shape[0], label_B.device
        self._inputs = [
            None if begin == 0 else torch.zeros(B, end - begin, var.Cvae, device=device)
            for begin, end in var.begin_ends
        ]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Libraries allocate workspaces at their first call, which a recording does not allow.
        with torch.cuda.stream(stream):
            super().__init__(var, label_B.clone())
            for si, input_BlC in enumerate(self._inputs[:2]):
                super().scale(si, input_BlC)
        torch.cuda.current_stream(device).wait_stream(stream)
        var.kv_caching(False)
        torch.cuda.synchronize(device)
        # The graphs take memory from a pool of their own, not from what earlier calls have freed.
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        for si, input_BlC in enumerate(self._inputs):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                if si == 0:
                    self._start()
                self._logits.append(super().scale(si, input_BlC))
            self._graphs.append(graph)
        # The graphs write into these caches, so they must outlive the recording.
        self._caches = [block.attn.cache for block in var.blocks]  # type: ignore[union-attr]
        var.kv_caching(False)

    def restart(self, label_B: Tensor) -> None:
        """Start with the first scale and other labels."""
        self.label_B.copy_(label_B)
        self.done = 0

    def scale(self, si: int, input_BlC: Tensor | None) -> Tensor:
        """As `Stepper.scale`; the next call overwrites the logits."""
        target_BlC = self._inputs[si]
        if target_BlC is not None and input_BlC is not None:
            # The memory that the graph reads; with guidance both halves get the same input.
            target_BlC.view(-1, *input_BlC.shape).copy_(input_BlC)
        self._graphs[si].replay()
        return self._logits[si]
