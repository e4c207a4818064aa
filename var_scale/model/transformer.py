"""The transformer of VAR: it predicts the tokens of a scale from all coarser scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_kernels import linear_cross_entropy, why_not
from var_kernels.dispatch import compute_dtype
from var_scale.errors import UserError, require_grids, require_positive
from var_scale.model.attention import (
    ScaleMask,
    backend_name,
    block_causal_bias,
    choose_backend,
    level_index,
)
from var_scale.model.block import KERNELS, AdaLNBeforeHead, AdaLNSelfAttn, Pending, fused
from var_scale.model.cpu import linear
from var_scale.model.vqvae import VQVAE
from var_scale.scales import PATCH_NUMS_256, PatchNum, cells, normal


class SharedAdaLin(nn.Linear):
    """The linear of shared AdaLN, one for the whole model."""

    def forward(self, cond_BC: Tensor) -> Tensor:
        """(B, C) -> (B, 1, 6, C)."""
        return super().forward(cond_BC).view(-1, 1, 6, self.in_features)


class Head(nn.Linear):
    """The output projection, alone or with its cross-entropy."""

    def forward(  # type: ignore[override]
        self,
        x_BLC: Tensor,
        target_BL: Tensor | None = None,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits (B, L, V); with `target_BL` (loss, cross-entropy, likeliest code), each (B, L)."""
        if target_BL is None:
            return linear(x_BLC, self.weight, self.bias)
        loss, ce, best = linear_cross_entropy(
            x_BLC.flatten(0, 1), self.weight, self.bias, target_BL.flatten(), smoothing, z_loss
        )
        return loss.view_as(target_BL), ce.view_as(target_BL), best.view_as(target_BL)


class Transformer(nn.Module):
    """The official transformer with its tensor names; `VAR` in var.py adds the sampling method.

    The tokenizer `vae_local` is kept outside the state dict. It supplies V, the latent channels
    and, when sampling, the codebook and the decoder.

    Attributes:
        prog_si: if >= 0, `forward` is restricted to the scales 0..prog_si (progressive training).
        eval_label_drop: drop labels in evaluation too, as the official code does.
        graphs: a `graphs.Graphs` once the user sets one: CUDA graphs of sampling.

    Raises:
        UserError: code `model.sizes` or `model.kernels` for arguments that do not fit.
    """

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(
        self,
        vae_local: VQVAE,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[PatchNum] = PATCH_NUMS_256,
        attention: str = "auto",
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        require_positive(
            depth=depth, embed_dim=embed_dim, num_heads=num_heads, num_classes=num_classes
        )
        require_grids(patch_nums=patch_nums)
        if embed_dim % num_heads:
            raise UserError(
                f"model: width {embed_dim} is not a multiple of {num_heads} heads; change "
                "model.width, model.heads or model.depth",
                code="model.sizes",
            )
        self.Cvae, self.V = vae_local.Cvae, vae_local.V
        self.depth, self.C, self.D, self.num_heads = depth, embed_dim, embed_dim, num_heads
        self.num_classes, self.cond_drop_rate = num_classes, cond_drop_rate
        self.eval_label_drop = False
        self.shared_aln, self.attn_l2_norm, self.mlp_ratio = shared_aln, attn_l2_norm, mlp_ratio
        self.attention, self.kernels = backend_name(attention), kernels
        if kernels not in KERNELS:
            raise UserError(
                f"kernels={kernels!r} is unknown; use one of {', '.join(KERNELS)}",
                code="model.kernels",
            )
        self.prog_si = -1
        self.patch_nums = normal(patch_nums)
        ends = list(accumulate(cells(self.patch_nums), initial=0))
        self.begin_ends = list(pairwise(ends))
        self.L, self.first_l, self.num_stages_minus_1 = ends[-1], ends[1], len(self.patch_nums) - 1
        self.graphs: object = None
        # Tuples hide the tokenizer from torch, so that it is not part of this module's weights.
        self.vae_proxy, self.vae_quant_proxy = (vae_local,), (vae_local.quantize,)

        self.word_embed = nn.Linear(self.Cvae, embed_dim)
        self.class_emb = nn.Embedding(num_classes + 1, embed_dim)
        self.pos_start = nn.Parameter(torch.empty(1, self.first_l, embed_dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.L, embed_dim))
        self.lvl_embed = nn.Embedding(len(self.patch_nums), embed_dim)
        std = math.sqrt(1 / embed_dim / 3)
        for tensor in (self.class_emb.weight, self.pos_start, self.pos_1LC, self.lvl_embed.weight):
            nn.init.trunc_normal_(tensor.data, mean=0, std=std)

        self.shared_ada_lin: nn.Module = nn.Identity()
        if shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(embed_dim, 6 * embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(
                embed_dim,
                num_heads,
                mlp_ratio,
                rate,
                norm_eps,
                shared_aln,
                attn_l2_norm,
                attention,
                kernels,
            )
            for rate in rates
        )
        self.register_buffer("lvl_1L", level_index(self.patch_nums).view(1, self.L))
        self.register_buffer("attn_bias_for_masking", block_causal_bias(self.patch_nums))
        self.head_nm = AdaLNBeforeHead(embed_dim, norm_eps)
        self.head = Head(embed_dim, self.V)

    def kv_caching(self, enable: bool) -> None:
        """Start empty key-value caches in all blocks, or drop them."""
        for block in self.blocks:
            assert isinstance(block, AdaLNSelfAttn)
            block.attn.kv_caching(enable, self.L)

    def conditioning(self, cond_BC: Tensor) -> list[Tensor]:
        """The AdaLN vectors (B, 1, 6, C) of every block for the conditions (B, C)."""
        ada = self.shared_ada_lin(cond_BC)
        return [block.conditioning(ada) for block in self.blocks]  # type: ignore[operator]

    def get_logits(self, h_BLC: Tensor, cond_BC: Tensor, pending: Pending | None = None) -> Tensor:
        """Residual stream (B, L, C) and condition (B, C) -> logits (B, L, V) float32. The fused
        operators add a `pending` branch first."""
        h_BLC = self.head_nm(h_BLC.float(), cond_BC, pending, defer=pending is not None)
        return self.head(h_BLC.to(self.head.weight.dtype)).float()

    def forward(
        self,
        label_B: Tensor,
        x_BLCv_wo_first_l: Tensor | None,
        *,
        label_drop_B: Tensor | None = None,
        path_keep_DB: Tensor | None = None,
        target_BL: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The teacher-forced forward pass.

        Args:
            label_B: classes (B,) int64; num_classes means no class.
            x_BLCv_wo_first_l: (B, L - first, Cvae) from `idxBl_to_var_input`; None where there is
                one scale only.
            label_drop_B: (B,) bool, the labels to drop; None draws them in training (and in
                evaluation if `eval_label_drop`).
            path_keep_DB: (depth, B), or (depth, 2, B) for attention and MLP separately, bool: the
                samples that keep a block's branches; None draws them in training.
            target_BL: tokens (B, L); computes the loss inside the model. Needs the fused operators.
            label_smoothing: of the loss.
            z_loss: weight of the squared log-partition in the loss.

        Returns:
            Logits (B, L, V) float32, with `prog_si` of the first scales only. With `target_BL`
            (loss, cross-entropy, likeliest code), each (B, L).

        Raises:
            UserError: code `model.labels`, `model.input` or `model.kernels`.
        """
        B = label_B.shape[0]
        end = self.begin_ends[self.prog_si][1] if self.prog_si >= 0 else self.L
        x_BlZ = self._checked_input(label_B, x_BLCv_wo_first_l, end)
        # Embeddings are summed in float32, and the sum is rounded once, as in the official code.
        with torch.autocast(label_B.device.type, enabled=False):
            if label_drop_B is None and (self.training or self.eval_label_drop):
                label_drop_B = torch.rand(B, device=label_B.device) < self.cond_drop_rate
            if label_drop_B is not None:
                label_B = torch.where(label_drop_B, self.num_classes, label_B)
            cond_BC = self.class_emb(label_B)
            x_BLC = torch.cat(
                (cond_BC.unsqueeze(1) + self.pos_start, self.word_embed(x_BlZ)), dim=1
            )
            x_BLC = x_BLC + (self.lvl_embed(self.lvl_1L[:, :end]) + self.pos_1LC[:, :end])
        dtype = compute_dtype(x_BLC)
        ada = self.shared_ada_lin(cond_BC).to(dtype)
        shown = self.patch_nums[: self.prog_si + 1] if self.prog_si >= 0 else self.patch_nums
        mask = ScaleMask(shown, self.attn_bias_for_masking, dtype)
        x_BLC = x_BLC.to(dtype)
        keep = [None] * self.depth if path_keep_DB is None else path_keep_DB
        if fused(self.kernels, x_BLC):
            return self._fused(x_BLC, ada, cond_BC, mask, keep, target_BL, label_smoothing, z_loss)
        if target_BL is not None:
            raise UserError(
                "target_BL: only the fused operators compute the loss inside the model; use "
                "kernels='on', or compute the loss from the logits",
                code="model.kernels",
            )
        for block, keep_B in zip(self._called_blocks(), keep, strict=True):
            x_BLC = block(x_BLC, ada, mask, keep_B)
        return self.get_logits(x_BLC, cond_BC)

    def _fused(
        self,
        x_BLC: Tensor,
        ada: Tensor,
        cond_BC: Tensor,
        mask: ScaleMask,
        keep: Any,
        target_BL: Tensor | None,
        smoothing: float,
        z_loss: float,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Blocks, norm and head with the fused operators. Each branch is added in the pass over
        memory that computes the next norm."""
        pending: Pending | None = None
        for block, keep_B in zip(self._called_blocks(), keep, strict=True):
            x_BLC, pending = block(x_BLC, ada, mask, keep_B, pending, defer=True)
        h_BLC = self.head_nm(x_BLC, cond_BC, pending, defer=True)
        if target_BL is None:
            return self.head(h_BLC).float()
        return self.head(h_BLC, target_BL, smoothing, z_loss)

    def recompute_activations(self, what: str, every: int = 1) -> None:
        """Recompute activations in the backward pass to save memory.

        `what`: `mlp` recomputes the hidden activations of the MLPs, `block` everything inside a
        block, `none` nothing. Applies to every `every`-th block.
        """
        for number, block in enumerate(self.blocks):
            chosen = what if number % every == 0 else "none"
            assert isinstance(block, AdaLNSelfAttn)
            block.recompute, block.ffn.recompute = chosen == "block", chosen == "mlp"

    def _called_blocks(self) -> list[Callable[..., Any]]:
        """The blocks, wrapped in a checkpoint where their activations are recomputed."""
        trains = self.training and torch.is_grad_enabled()
        return [
            partial(checkpoint, block, use_reentrant=False) if trains and block.recompute else block
            for block in self.blocks
        ]

    def choices(self) -> dict[str, str]:
        """What `auto` means on the device of the weights: back-end and operators, with reasons."""
        device = self.lvl_1L.device
        backend, because = choose_backend(self.attention, device)
        obstacle = why_not(device)
        on = self.kernels == "on" or (self.kernels == "auto" and not obstacle)
        return {
            "attention": f"{backend} ({because})",
            "kernels": f"{'on' if on else 'off'} (asked: {self.kernels}; "
            f"{obstacle or 'they run here'})",
        }

    def _checked_input(self, label_B: Tensor, x_BlZ: Tensor | None, end: int) -> Tensor:
        """The input of the later scales, cut to `end` tokens; labels and shape are checked."""
        self.check_labels(label_B)
        B, length = label_B.shape[0], end - self.first_l
        dtype = self.word_embed.weight.dtype
        if x_BlZ is None or length == 0:
            # DDP waits for a gradient of every weight; an empty product still gives word_embed one.
            x_BlZ = label_B.new_empty((B, 0, self.Cvae), dtype=dtype)
        if x_BlZ.shape[0] != B or x_BlZ.shape[1] < length or x_BlZ.shape[2] != self.Cvae:
            raise UserError(
                f"the input of VAR has the shape {tuple(x_BlZ.shape)}; {B} labels, patch_nums "
                f"{self.patch_nums} and {self.Cvae} latent channels need {(B, length, self.Cvae)}",
                code="model.input",
            )
        return x_BlZ[:, :length].to(dtype)

    def check_labels(self, label_B: Tensor) -> None:
        """Check that the labels lie in 0..num_classes.

        Labels on a GPU are not checked, because reading them would make the host wait: the
        embedding fails on a wrong one.

        Raises:
            UserError: code `model.labels`.
        """
        if label_B.device.type == "cpu" and label_B.numel():
            low, high = int(label_B.min()), int(label_B.max())
            if low < 0 or high > self.num_classes:
                raise UserError(
                    f"label {low if low < 0 else high} is outside 0..{self.num_classes} "
                    f"({self.num_classes} means no class)",
                    code="model.labels",
                )

    @torch.no_grad()
    def init_weights(
        self,
        init_adaln: float = 0.5,
        init_adaln_gamma: float = 1e-5,
        init_head: float = 0.02,
        init_std: float = -1.0,
    ) -> None:
        """The official initialisation; a negative `init_std` means sqrt(1 / 3C). The position
        tensors keep the values of the constructor."""
        std = math.sqrt(1 / self.C / 3) if init_std < 0 else init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        if init_head >= 0:
            self.head.weight.mul_(init_head)
        self._ada_linear(self.head_nm).weight.mul_(init_adaln)
        for block in self.blocks:
            assert isinstance(block, AdaLNSelfAttn)
            block.attn.proj.weight.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.depth))
            if self.shared_aln:
                block.ada_gss[:, :, :2].mul_(init_adaln_gamma)
                block.ada_gss[:, :, 2:].mul_(init_adaln)
            else:
                weight = self._ada_linear(block).weight
                weight[: 2 * self.C].mul_(init_adaln_gamma)
                weight[2 * self.C :].mul_(init_adaln)

    @staticmethod
    def _ada_linear(module: nn.Module) -> nn.Linear:
        linear = module.get_submodule("ada_lin.1")
        assert isinstance(linear, nn.Linear)
        return linear
