"""What an engine wraps: tokens in, loss and per-token results out. One module, so that every engine runs the same code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from var_scale.model.block import fused
from var_scale.model.var import VAR


def split_scales(tokens_BL: torch.Tensor, patch_nums: tuple[int, ...]) -> list[torch.Tensor]:
    """(B, L) tokens to one (B, pn*pn) tensor a scale."""
    return list(tokens_BL.split([pn * pn for pn in patch_nums], dim=1))


class TrainStep(nn.Module):
    """VAR with its loss. The quantizer (codebook and phi) turns tokens into inputs; it is frozen and not a submodule.

    Args:
        var: the transformer; its parameters are the only ones of this module.
        quantizer: multi-scale quantiser of the tokenizer, in float32.
        bf16: run the matrix products of VAR in bfloat16 (autocast); inputs, residual logits and loss stay float32.
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, var: VAR, quantizer: nn.Module, patch_nums: tuple[int, ...], bf16: bool, label_smoothing: float):
        super().__init__()
        self.var = var
        self.frozen: tuple[Any] = (quantizer,)  # a tuple hides it from parameters() and state_dict()
        self.patch_nums, self.bf16, self.label_smoothing = patch_nums, bf16, label_smoothing

    def forward(
        self,
        tokens_BL: torch.Tensor,
        label_B: torch.Tensor,
        label_drop_B: torch.Tensor | None = None,
        path_keep_D2B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean loss (scalar, with label smoothing), and detached cross-entropy (B, L) in nats and correctness (B, L)."""
        with torch.no_grad():
            x_BLZ = self.frozen[0].idxBl_to_var_input(split_scales(tokens_BL, self.patch_nums))
        enabled = self.bf16 and self.training  # evaluation is float32, as in the reference
        kwargs: dict[str, Any] = {"label_drop_B": label_drop_B, "path_keep_DB": path_keep_D2B}
        if fused(self.var.kernels, tokens_BL):
            kwargs |= {"target_BL": tokens_BL, "label_smoothing": self.label_smoothing}
            with torch.autocast(tokens_BL.device.type, dtype=torch.bfloat16, enabled=enabled):
                loss_BL, ce_BL, best_BL = self.var(label_B, x_BLZ, **kwargs)
            return loss_BL.mean(), ce_BL.detach(), best_BL == tokens_BL
        with torch.autocast(tokens_BL.device.type, dtype=torch.bfloat16, enabled=enabled):
            logits_BLV = self.var(label_B, x_BLZ, **kwargs)
        logits_BLV = logits_BLV.float()
        ce_BL = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction="none").view_as(tokens_BL)
        loss = ce_BL.mean()
        if self.label_smoothing:
            uniform = -F.log_softmax(logits_BLV, dim=-1).mean(dim=-1).mean()
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        with torch.no_grad():
            correct_BL = logits_BLV.argmax(dim=-1) == tokens_BL
        return loss, ce_BL.detach(), correct_BL
