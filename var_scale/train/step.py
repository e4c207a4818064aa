"""The module that engines wrap: tokens in, loss and per-token results out. Every engine runs this
same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_scale.config.schema import TrainConfig
from var_scale.model.block import fused
from var_scale.model.var import VAR
from var_scale.scales import PatchNum, cells

HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def split_scales(tokens_BL: Tensor, patch_nums: Sequence[PatchNum]) -> list[Tensor]:
    """Split tokens (B, L) into one tensor (B, h*w) per scale."""
    return list(tokens_BL.split(cells(patch_nums), dim=1))


def token_weights(
    scale_weights: str | Sequence[float], patch_nums: Sequence[PatchNum]
) -> Tensor | None:
    """Loss weight of every token, (L,) with mean 1; None if all weights are 1."""
    if scale_weights == "token":
        return None
    counts = cells(patch_nums)
    factors = (
        [1 / n for n in counts] if scale_weights == "scale" else [float(f) for f in scale_weights]
    )
    weight_L = torch.cat([torch.full((n,), f) for n, f in zip(counts, factors, strict=True)])
    return weight_L / weight_L.mean()


class TrainStep(nn.Module):
    """VAR with its loss. The quantizer (codebook and phi) turns tokens into inputs; it is frozen
    and not a submodule.

    Args:
        var: the transformer; its parameters are the only ones of this module.
        quantizer: multi-scale quantiser of the tokenizer, in float32.
        train: label smoothing, z-loss, weights of the scales.
        precision: fp32, bf16 or fp16, the type of VAR's matrix products (autocast); inputs, logits
            and loss are float32.
    """

    def __init__(self, var: VAR, quantizer: nn.Module, train: TrainConfig, precision: str):
        super().__init__()
        self.var = var
        # A tuple hides it from parameters() and state_dict().
        self.frozen: tuple[Any] = (quantizer,)
        self.patch_nums = var.patch_nums
        self.precision, self.half_dtype = precision, HALF[precision]
        self.smoothing, self.z_loss = train.label_smoothing, train.z_loss
        weight_L = token_weights(train.scale_weights, self.patch_nums)
        self.weight_L: Tensor | None
        self.register_buffer("weight_L", weight_L, persistent=False)

    def forward(
        self,
        tokens_BL: Tensor,
        label_B: Tensor,
        label_drop_B: Tensor | None = None,
        path_keep_D2B: Tensor | None = None,
        stage: int = -1,
        newest: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass.

        Args:
            stage: progressive training trains the scales 0 to `stage`; -1 trains all.
            newest: loss weight of the last of these scales.

        Returns:
            the loss (), a mean over samples and all L tokens; the detached cross-entropy (B, l) in
            nats; and whether each prediction is correct (B, l), empty while training.
        """
        var = self.var
        end = var.begin_ends[stage][1]
        tokens_BL = tokens_BL[:, :end]
        shown = self.patch_nums[: stage + 1] if stage >= 0 else self.patch_nums
        # As in the official code, the transformer and the quantiser read the stage from here.
        var.prog_si = self.frozen[0].prog_si = stage
        with torch.no_grad():
            x_BLZ = self.frozen[0].idxBl_to_var_input(split_scales(tokens_BL, shown))
        loss_BL, ce_BL, correct_BL = self._losses(
            tokens_BL, label_B, x_BLZ, label_drop_B, path_keep_D2B
        )
        if self.weight_L is not None and self.training:
            loss_BL = loss_BL * self.weight_L[:end]
        if stage < 0:
            return loss_BL.mean(), ce_BL.detach(), correct_BL
        begin = var.begin_ends[stage][0]
        loss_B = loss_BL[:, :begin].sum(1) + newest * loss_BL[:, begin:].sum(1)
        return loss_B.mean() / var.L, ce_BL.detach(), correct_BL

    def _losses(
        self,
        tokens_BL: Tensor,
        label_B: Tensor,
        x_BLZ: Tensor | None,
        label_drop_B: Tensor | None,
        path_keep_D2B: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss with smoothing and z-loss, cross-entropy, and whether the most likely token is
        correct, each (B, l)."""
        # Evaluation is float32, as in the reference.
        enabled = self.half_dtype is not None and self.training
        autocast = torch.autocast(
            tokens_BL.device.type, dtype=self.half_dtype or torch.bfloat16, enabled=enabled
        )
        kwargs: dict[str, Any] = {"label_drop_B": label_drop_B, "path_keep_DB": path_keep_D2B}
        if fused(self.var.kernels, tokens_BL):
            with autocast:
                loss_BL, ce_BL, best_BL = self.var(
                    label_B,
                    x_BLZ,
                    **kwargs,
                    target_BL=tokens_BL,
                    label_smoothing=self.smoothing,
                    z_loss=self.z_loss,
                )
            if self.training:  # which does not read it
                return loss_BL, ce_BL, best_BL.new_empty(0, dtype=torch.bool)
            return loss_BL, ce_BL, best_BL == tokens_BL
        with autocast:
            logits_BLV = self.var(label_B, x_BLZ, **kwargs)
        logits_BLV = logits_BLV.float()
        ce_BL = F.cross_entropy(
            logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction="none"
        ).view_as(tokens_BL)
        loss_BL = ce_BL
        if self.smoothing:
            # The cross-entropy with (1 - s) one-hot + s / V.
            loss_BL = (1 - self.smoothing) * loss_BL - self.smoothing * F.log_softmax(
                logits_BLV, dim=-1
            ).mean(dim=-1)
        if self.z_loss:
            loss_BL = loss_BL + self.z_loss * logits_BLV.logsumexp(dim=-1).square()
        # Training does not read it, and it would cost a pass over all logits.
        with torch.no_grad():
            correct_BL = (
                tokens_BL.new_empty(0, dtype=torch.bool)
                if self.training
                else logits_BLV.argmax(dim=-1) == tokens_BL
            )
        return loss_BL, ce_BL, correct_BL
