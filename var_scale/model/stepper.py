"""One transformer that goes through the scales, coarse to fine, with key-value caches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from var_scale.model.block import fused
from var_scale.model.transformer import Transformer


class Stepper:
    """Makes the logits of one scale after the other.

    Args:
        var: the transformer; its blocks start with empty caches.
        label_B: classes (B,) on the model's device, or (2B,) with the unconditional half last.
    """

    def __init__(self, var: Transformer, label_B: Tensor):
        self.var, self.label_B, self.done = var, label_B, 0
        self._start()

    def _start(self) -> None:
        """Compute what is the same for all scales, and start with empty caches."""
        self.cond_BC = self.var.class_emb(self.label_B)
        self.ada = self.var.conditioning(self.cond_BC)
        self.position_1LC = self.var.lvl_embed(self.var.lvl_1L) + self.var.pos_1LC
        self.var.kv_caching(True)

    def step(self, inputs: Sequence[Tensor]) -> Tensor:
        """The logits (2B or B, l, V) of the scale after `inputs`.

        `inputs` holds what the scales 1, 2, ... see of the codes before them, each (B, l, Cvae).
        Scales that another model sampled are run first: their keys are still missing in the caches.
        """
        while True:
            si = self.done
            logits_BlV = self.scale(si, inputs[si - 1] if si else None)
            self.done += 1
            if si == len(inputs):
                return logits_BlV

    def scale(self, si: int, input_BlC: Tensor | None) -> Tensor:
        """The logits of scale `si`; its keys and values join the caches. Scale 0 has no input."""
        var = self.var
        if input_BlC is None:
            x_BlC = self.cond_BC.unsqueeze(1) + var.pos_start + self.position_1LC[:, : var.first_l]
        else:
            begin, end = var.begin_ends[si]
            x_BlC = (
                var.word_embed(input_BlC.to(var.word_embed.weight.dtype))
                + self.position_1LC[:, begin:end]
            )
            # With guidance the conditional and the unconditional half see the same codes.
            x_BlC = x_BlC.repeat(self.cond_BC.shape[0] // x_BlC.shape[0], 1, 1)
        # The residual stream stays in float32 even where the weights are in half precision: it is
        # the sum of all branches, and rounding it after each would add up over the depth.
        x_BlC, pending = x_BlC.float(), None
        defer = fused(var.kernels, x_BlC)
        for block, ada_B16C in zip(var.blocks, self.ada, strict=True):
            out = block(x_BlC, self.cond_BC, pending=pending, defer=defer, ada_B16C=ada_B16C)
            x_BlC, pending = out if defer else (out, None)
        return var.get_logits(x_BlC, self.cond_BC, pending)
