"""Size of the residual stream after every block, which grows before a model diverges."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class ActivationNorms:
    """Hooks on the blocks that measure while `armed`, on the samples of this rank. Activations are
    not stored."""

    def __init__(self, blocks: nn.ModuleList):
        self.armed = False
        self.sizes: dict[int, Tensor] = {}
        for number, block in enumerate(blocks):
            block.register_forward_hook(partial(self._hook, number))

    @torch.no_grad()
    def _hook(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        """Measure the residual stream after block `number`."""
        if not (self.armed and module.training):
            return
        x_BLC = output
        # The fused form has not added the branch of the MLP yet.
        if isinstance(output, tuple):
            x_BLC, (branch_BLC, gamma_B1C, keep_B) = output
            x_BLC = x_BLC + branch_BLC * gamma_B1C * (
                1.0 if keep_B is None else keep_B.view(-1, 1, 1)
            )
        x_BLC = x_BLC.detach().float()
        self.sizes[number] = torch.stack([x_BLC.square().mean().sqrt(), x_BLC.abs().amax()])

    def read(self) -> dict[str, list[float]]:
        """Root mean square and largest element after every block, in the last measured step."""
        if not self.sizes:
            return {}
        rms, largest = (
            torch.stack([self.sizes[number] for number in sorted(self.sizes)]).t().tolist()
        )
        return {"activation_rms": rms, "activation_max": largest}
