"""VAR: a transformer that predicts the tokens of a scale from all coarser scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_kernels import linear_cross_entropy, why_not
from var_kernels.mlp.tune import summary as form_of_mlp
from var_scale.errors import UserError, require_grids, require_positive
from var_scale.model.attention import ScaleMask, backend_name, block_causal_bias, choose_backend, level_index
from var_scale.model.block import KERNELS, AdaLNBeforeHead, AdaLNSelfAttn, Pending, fused
from var_scale.model.linear import linear
from var_scale.model.sampling import gumbel_softmax_with_rng, sample_images, sample_with_top_k_top_p_
from var_scale.model.vqvae import VQVAE
from var_scale.scales import PATCH_NUMS_256, PatchNum, cells, normal

if TYPE_CHECKING:
    from var_scale.model.graphs import Graphs

# The names that the official notebooks import from this module.
__all__ = ["VAR", "AdaLNSelfAttn", "gumbel_softmax_with_rng", "sample_with_top_k_top_p_"]


class SharedAdaLin(nn.Linear):
    """The model-level AdaLN linear of the shared variant: (B, C) -> (B, 1, 6, C)."""

    def forward(self, cond_BC: Tensor) -> Tensor:
        """(B, C) -> (B, 1, 6, C)."""
        return super().forward(cond_BC).view(-1, 1, 6, self.in_features)


def residual_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else the dtype of `x`."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


class Head(nn.Linear):
    """The output projection, alone or with its cross-entropy."""

    def forward(  # type: ignore[override]
        self, x_BLC: Tensor, target_BL: Tensor | None = None, smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits (B, L, V); with `target_BL` (loss, cross-entropy, likeliest code), each (B, L)."""
        if target_BL is None:
            return linear(x_BLC, self.weight, self.bias)
        loss, ce, best = linear_cross_entropy(x_BLC.flatten(0, 1), self.weight, self.bias, target_BL.flatten(), smoothing, z_loss)
        return loss.view_as(target_BL), ce.view_as(target_BL), best.view_as(target_BL)


class VAR(nn.Module):
    """The official transformer with its tensor names.

    `vae_local` is kept outside the state dict; it supplies V, the latent channels and, when sampling, codebook and decoder.
    `prog_si` >= 0 restricts `forward` to the scales 0..prog_si. `eval_label_drop` makes evaluation drop labels as the reference does.
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
        require_positive(depth=depth, embed_dim=embed_dim, num_heads=num_heads, num_classes=num_classes)
        require_grids(patch_nums=patch_nums)
        if embed_dim % num_heads:
            raise UserError(f"model: width {embed_dim} does not divide into {num_heads} heads; change width, heads or depth")
        self.Cvae, self.V = vae_local.Cvae, vae_local.V
        self.depth, self.C, self.D, self.num_heads = depth, embed_dim, embed_dim, num_heads
        self.num_classes, self.cond_drop_rate, self.eval_label_drop = num_classes, cond_drop_rate, False
        self.shared_aln, self.attn_l2_norm, self.mlp_ratio = shared_aln, attn_l2_norm, mlp_ratio
        self.attention, self.kernels = backend_name(attention), kernels
        if kernels not in KERNELS:
            raise UserError(f"kernels={kernels!r} is not known; take one of {', '.join(KERNELS)}")
        self.prog_si = -1
        self.patch_nums = normal(patch_nums)
        ends = list(accumulate(cells(self.patch_nums), initial=0))
        self.begin_ends = list(pairwise(ends))
        self.L, self.first_l, self.num_stages_minus_1 = ends[-1], ends[1], len(self.patch_nums) - 1
        self._rng: torch.Generator | None = None
        self.graphs: Graphs | None = None  # of sampling on a GPU; see graphs.py
        # In tuples, so that the tokenizer is no part of this module's weights.
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
            AdaLNSelfAttn(embed_dim, num_heads, mlp_ratio, rate, norm_eps, shared_aln, attn_l2_norm, attention, kernels)
            for rate in rates
        )
        self.register_buffer("lvl_1L", level_index(self.patch_nums).view(1, self.L))
        self.register_buffer("attn_bias_for_masking", block_causal_bias(self.patch_nums))
        self.head_nm = AdaLNBeforeHead(embed_dim, norm_eps)
        self.head = Head(embed_dim, self.V)

    @property
    def rng(self) -> torch.Generator:
        """The model's own generator, on its device; `g_seed` of sampling seeds it."""
        device = self.lvl_1L.device
        if self._rng is None or self._rng.device != device:
            self._rng = torch.Generator(device=device)
        return self._rng

    @property
    def uniform_prob(self) -> Tensor:
        """The distribution from which classes are drawn where none is given, (1, classes)."""
        return torch.full((1, self.num_classes), 1 / self.num_classes, device=self.lvl_1L.device)

    def kv_caching(self, enable: bool) -> None:
        """Start empty key-value caches in all blocks, or drop them."""
        for block in self.blocks:
            assert isinstance(block, AdaLNSelfAttn)
            block.attn.kv_caching(enable, self.L)

    def conditioning(self, cond_BC: Tensor) -> list[Tensor]:
        """The AdaLN vectors (B, 1, 6, C) of every block."""
        ada = self.shared_ada_lin(cond_BC)
        return [block.conditioning(ada) for block in self.blocks]  # type: ignore[operator]

    def get_logits(self, h_BLC: Tensor, cond_BC: Tensor, pending: Pending | None = None) -> Tensor:
        """Residual stream (B, L, C) and condition (B, C) -> logits (B, L, V) float32; a `pending` branch is added first, by the fused
        operators."""
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
        """Teacher-forced logits (B, L, V) float32; with `prog_si` only of the first scales. With `target_BL`, for which the fused
        operators are needed, no logits but (loss with `label_smoothing` and `z_loss`, cross-entropy, likeliest code), each (B, L).

        label_B (B,) int64 classes, num_classes meaning none. x_BLCv_wo_first_l (B, L - first, Cvae) from `idxBl_to_var_input`; None
        where there is one scale only. label_drop_B (B,) bool: labels to drop; None draws them while training (and in evaluation if
        `eval_label_drop`). path_keep_DB (depth, B), or (depth, 2, B) for attention and MLP apart, bool: samples that keep a block's
        branches; None draws them while training.
        """
        B = label_B.shape[0]
        end = self.begin_ends[self.prog_si][1] if self.prog_si >= 0 else self.L
        x_BlZ = self._checked_input(label_B, x_BLCv_wo_first_l, end)
        with torch.autocast(label_B.device.type if label_B.device.type != "meta" else "cpu", enabled=False):
            if label_drop_B is None and (self.training or self.eval_label_drop):
                label_drop_B = torch.rand(B, device=label_B.device) < self.cond_drop_rate
            if label_drop_B is not None:
                label_B = torch.where(label_drop_B, self.num_classes, label_B)
            cond_BC = self.class_emb(label_B)
            x_BLC = torch.cat((cond_BC.unsqueeze(1) + self.pos_start, self.word_embed(x_BlZ)), dim=1)
            x_BLC = x_BLC + (self.lvl_embed(self.lvl_1L[:, :end]) + self.pos_1LC[:, :end])
        dtype = residual_dtype(x_BLC)
        ada = self.shared_ada_lin(cond_BC).to(dtype)
        shown = self.patch_nums[: self.prog_si + 1] if self.prog_si >= 0 else self.patch_nums
        mask = ScaleMask(shown, self.attn_bias_for_masking, dtype)
        x_BLC = x_BLC.to(dtype)
        keep = [None] * self.depth if path_keep_DB is None else path_keep_DB
        if fused(self.kernels, x_BLC):
            return self._fused(x_BLC, ada, cond_BC, mask, keep, target_BL, label_smoothing, z_loss)
        if target_BL is not None:
            raise UserError("target_BL: the loss is taken inside the model only by the fused operators; use kernels='on', or the logits")
        for block, keep_B in zip(self._called_blocks(), keep, strict=True):
            x_BLC = block(x_BLC, ada, mask, keep_B)
        return self.get_logits(x_BLC, cond_BC)

    def _fused(
        self, x_BLC: Tensor, ada: Tensor, cond_BC: Tensor, mask: ScaleMask, keep: Any, target_BL: Tensor | None, smoothing: float,
        z_loss: float,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Blocks, norm and head with the fused operators: every branch is added in the pass that takes the next norm."""
        pending: Pending | None = None
        for block, keep_B in zip(self._called_blocks(), keep, strict=True):
            x_BLC, pending = block(x_BLC, ada, mask, keep_B, pending, defer=True)
        h_BLC = self.head_nm(x_BLC, cond_BC, pending, defer=True)
        return self.head(h_BLC).float() if target_BL is None else self.head(h_BLC, target_BL, smoothing, z_loss)

    def recompute_activations(self, what: str, every: int = 1) -> None:
        """Keep fewer activations for the backward pass and make them again there: `mlp`, the hidden ones of the MLPs, `block`, all inside
        a block; in every `every`-th block. `none`: keep all."""
        for number, block in enumerate(self.blocks):
            chosen = what if number % every == 0 else "none"
            block.recompute, block.ffn.recompute = chosen == "block", chosen == "mlp"  # type: ignore[union-attr,assignment]

    def _called_blocks(self) -> list[Callable[..., Any]]:
        """The blocks, or what recomputes them in the backward pass."""
        again = self.training and torch.is_grad_enabled()
        return [partial(checkpoint, block, use_reentrant=False) if again and block.recompute else block for block in self.blocks]

    def choices(self) -> dict[str, str]:
        """What `auto` stands for on the device of the weights: back-end and operators, each with the reason."""
        device = self.lvl_1L.device
        backend, why = choose_backend(self.attention, device)
        reason = why_not(device)
        on, reason = self.kernels == "on" or (self.kernels == "auto" and not reason), reason or "they run here"
        return {"attention": f"{backend} ({why})", "kernels": f"{'on' if on else 'off'} (asked: {self.kernels}; {reason})",
                "mlp": f"{form_of_mlp()} products" if on and not why_not(device) else "PyTorch"}  # fmt: skip

    def _checked_input(self, label_B: Tensor, x_BlZ: Tensor | None, end: int) -> Tensor:
        """The input of the later scales, empty where there is only the first; UserError if it or the labels do not fit."""
        self.check_labels(label_B)
        B, length = label_B.shape[0], end - self.first_l
        dtype = self.word_embed.weight.dtype
        if x_BlZ is None or length == 0:  # an empty product still gives word_embed a gradient, which DDP needs
            x_BlZ = label_B.new_empty((B, 0, self.Cvae), dtype=dtype)
        if x_BlZ.shape[0] != B or x_BlZ.shape[1] < length or x_BlZ.shape[2] != self.Cvae:
            raise UserError(
                f"the input of VAR has the shape {tuple(x_BlZ.shape)}; {(B, length, self.Cvae)} is needed for {B} labels, "
                f"patch_nums {self.patch_nums} and {self.Cvae} latent channels"
            )
        return x_BlZ[:, :length].to(dtype)

    def check_labels(self, label_B: Tensor) -> None:
        """UserError for a label outside 0..num_classes. On a GPU left to the embedding, since reading would make the GPU wait."""
        if label_B.device.type == "cpu" and label_B.numel():
            low, high = int(label_B.min()), int(label_B.max())
            if low < 0 or high > self.num_classes:
                raise UserError(f"label {low if low < 0 else high} is outside 0..{self.num_classes} ({self.num_classes} means no class)")

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
        *,
        return_idx: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Sample B images (B, 3, H, W) in [0, 1]; with `return_idx` also the tokens (B, h*w) a scale. See sampling.sample_images."""
        image, ms_idx_Bl = sample_images(self, B, label_B, g_seed, cfg, top_k, top_p, more_smooth)
        return (image, ms_idx_Bl) if return_idx else image

    @torch.no_grad()
    def init_weights(
        self,
        init_adaln: float = 0.5,
        init_adaln_gamma: float = 1e-5,
        init_head: float = 0.02,
        init_std: float = -1.0,
    ) -> None:
        """Official initialisation; negative `init_std` means sqrt(1 / 3C). Position tensors keep what the constructor gave them."""
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
