"""CUDA graphs of sampling: one a scale, for one batch size, replayed call after call.

A step of a small batch is hundreds of short kernels, and launching them takes longer than running them. `var.graphs = Graphs()` makes
`sample` record the transformer's steps at the second call in a row with the same batch and replay them from then on; what is drawn, fed
back and decoded runs as before, so hooks and settings are free to change.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from var_scale.model.sampling import Stepper

if TYPE_CHECKING:
    from var_scale.model.var import VAR


class Graphs:
    """The graphs of one model for the batch that was asked for twice in a row; another batch so asked for takes their place. They hold the
    caches of that batch (B, L, 2, C) a block, twice with guidance, until then or until `var.graphs = None`."""

    def __init__(self) -> None:
        self._recorded: _Recorded | None = None
        self._seen: Hashable = None
        self._too_large: Hashable = None

    def stepper(self, var: VAR, label_B: Tensor) -> Stepper:
        """The recorded steps for these labels; recorded now, or, for a batch that was not the last one too, not at all."""
        key = _key(var, label_B)
        if self._recorded is not None and self._recorded.key == key:
            self._recorded.restart(label_B)
            return self._recorded
        again, self._seen = key == self._seen, key
        if not again or key == self._too_large:
            return Stepper(var, label_B)
        self._recorded = None  # frees the memory of the last ones
        try:
            self._recorded = _Recorded(var, label_B, key)
        except torch.OutOfMemoryError:  # the caches of graphs stay, so a batch that just fits without may not fit with them
            self._too_large = key
            var.kv_caching(False)
            torch.cuda.empty_cache()
            return Stepper(var, label_B)
        return self._recorded


def _key(var: VAR, label_B: Tensor) -> Hashable:
    """All that a recording depends on: where the weights lie, the batch, the modes of torch."""
    kind = label_B.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return label_B.shape[0], tuple(p.data_ptr() for p in var.parameters()), var.head.weight.dtype, cast, torch.is_inference_mode_enabled()


class _Recorded(Stepper):
    """The steps of one batch, recorded."""

    def __init__(self, var: VAR, label_B: Tensor, key: Hashable):
        self.key = key
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._logits: list[Tensor] = []
        B, device = label_B.shape[0], label_B.device
        self._inputs = [None if begin == 0 else torch.zeros(B, end - begin, var.Cvae, device=device) for begin, end in var.begin_ends]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries make their workspaces at a first call, not while recording
            super().__init__(var, label_B.clone())
            for si, input_BlC in enumerate(self._inputs[:2]):
                super().scale(si, input_BlC)
        torch.cuda.current_stream(device).wait_stream(stream)
        var.kv_caching(False)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what calls before have left: graphs have memory of their own
        pool = torch.cuda.graph_pool_handle()
        for si, input_BlC in enumerate(self._inputs):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                if si == 0:
                    self._start()
                self._logits.append(super().scale(si, input_BlC))
            self._graphs.append(graph)
        self._caches = [block.attn.cache for block in var.blocks]  # type: ignore[union-attr] # the graphs write there
        var.kv_caching(False)

    def restart(self, label_B: Tensor) -> None:
        """Begin again with other labels."""
        self.label_B.copy_(label_B)
        self.done = 0

    def scale(self, si: int, input_BlC: Tensor | None) -> Tensor:
        """As `Stepper.scale`; the logits are overwritten by the next call."""
        target_BlC = self._inputs[si]
        if target_BlC is not None and input_BlC is not None:  # where the graph reads it; with guidance both halves get it
            target_BlC.view(-1, *input_BlC.shape).copy_(input_BlC)
        self._graphs[si].replay()
        return self._logits[si]
