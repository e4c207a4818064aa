"""The multi-scale residual quantiser: a feature map becomes a pyramid of tokens, in which every
scale encodes what the coarser scales left over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from var_kernels import nearest_code, use_triton
from var_scale.errors import UserError
from var_scale.scales import PATCH_NUMS_256, PatchNum, grid, normal


@lru_cache(maxsize=128)
def _bicubic_matrix(size: int, target: int, device: torch.device) -> Tensor:
    """The matrix (target, size) of bicubic interpolation along one side, float32."""
    # The cached matrix may be needed in training later, which forbids tensors of inference mode.
    with torch.inference_mode(False):
        columns = torch.eye(size, dtype=torch.float64).view(1, size, size, 1)
        return (
            F.interpolate(columns, size=(target, 1), mode="bicubic")[0, :, :, 0]
            .t()
            .float()
            .contiguous()
            .to(device)
        )


def enlarge(h_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """F.interpolate(mode="bicubic"), (B, C, h, w) to (B, C, *size).

    On a GPU this is two matrix products: torch's kernel gives one thread a pixel of all maps, and
    takes 1.6 ms on an H200 for 64 maps of 32 channels and 16 x 16 cells.
    """
    if not h_BChw.is_cuda:
        return F.interpolate(h_BChw, size=size, mode="bicubic")
    down, across = (
        _bicubic_matrix(n, m, h_BChw.device) for n, m in zip(h_BChw.shape[2:], size, strict=True)
    )
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        with torch.autocast(h_BChw.device.type, enabled=False):
            return down @ h_BChw.float() @ across.t()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


class Phi(nn.Conv2d):
    """h <- (1 - r) h + r conv3x3(h): smooths the codes of a scale after they are enlarged."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h_BChw: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return h_BChw * (1 - self.ratio) + super().forward(h_BChw) * self.ratio


def phi_index(position: float, count: int) -> int:
    """The index of the phi, of `count`, that serves the scale at `position` in [0, 1].

    This is the official rule with its floating-point ties: for scales 2 and 7 of ten two phis are
    equally near, and the rounding of numpy's linspace decides.
    """
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    return int(np.argmin(np.abs(np.linspace(margin, 1 - margin, count) - position)))


def scale_position(scale: int, scales: int) -> float:
    """si / (S - 1); 0 for a single scale."""
    return scale / (scales - 1) if scales > 1 else 0.0


class PhiBank(nn.Module):
    """The phis of all scales. `share` 0: one per scale; 1: one for all; K: K of them, each for a
    few neighbouring scales."""

    def __init__(self, channels: int, ratio: float, share: int, scales: int) -> None:
        super().__init__()
        self.share = share
        self.count = scales if share == 0 else share

        def make() -> nn.Module:
            return Phi(channels, ratio) if abs(ratio) > 1e-6 else nn.Identity()

        # The three official layouts of names: quant_resi.K, quant_resi.qresi, quant_resi.qresi_ls.K
        if share == 1:
            self.qresi = make()
        elif share == 0:
            for k in range(self.count):
                self.add_module(str(k), make())
        else:
            self.qresi_ls = nn.ModuleList(make() for _ in range(share))

    def __getitem__(self, position: float) -> nn.Module:
        """The phi of the scale at `position` in [0, 1]."""
        if self.share == 1:
            return self.qresi
        index = phi_index(position, self.count)
        return self.get_submodule(str(index)) if self.share == 0 else self.qresi_ls[index]


class ScaleCode(NamedTuple):
    """One scale: the vectors that were looked up, their codes, and the map added to f_hat."""

    z_NC: Tensor
    idx_N: Tensor
    h_BChw: Tensor
    size: tuple[int, int]


class MultiScaleQuantizer(nn.Module):
    """The official `VectorQuantizer2`.

    For each scale: the residual is resized by area, every vector is replaced by its nearest code,
    the codes are enlarged by bicubic interpolation and smoothed by phi, and the result is added to
    f_hat.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool = False,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[PatchNum] = PATCH_NUMS_256,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_size, self.Cvae = vocab_size, Cvae
        self.using_znorm, self.beta = using_znorm, beta
        self.v_patch_nums = normal(v_patch_nums)
        self.quant_resi_ratio = quant_resi
        self.quant_resi = PhiBank(
            Cvae, quant_resi, share_quant_resi, default_qresi_counts or len(self.v_patch_nums)
        )
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size))
        self.record_hit = 0
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.prog_si = -1  # progressive training: last scale in use, -1 for all

    def eini(self, eini: float) -> None:
        """Re-initialise the codebook: > 0 truncated normal of this standard deviation, < 0 uniform
        in +-|eini| / V."""
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight.data, std=eini)
        elif eini < 0:
            bound = abs(eini) / self.vocab_size
            self.embedding.weight.data.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        return (
            f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}, "
            f"quant_resi={self.quant_resi_ratio}"
        )

    @torch.no_grad()
    def nearest(self, z_NC: Tensor) -> Tensor:
        """The codes (N,) nearest to vectors (N, C) in squared distance, or in cosine with znorm."""
        weight_VC = self.embedding.weight
        if self.using_znorm:
            return torch.argmax(F.normalize(z_NC, dim=-1) @ F.normalize(weight_VC.T, dim=0), dim=1)
        if use_triton(z_NC):
            return nearest_code(
                z_NC, weight_VC, "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
            )
        # |z|^2 - 2 z w + |w|^2.
        d_NV = z_NC.square().sum(1, keepdim=True) + weight_VC.square().sum(1)
        return torch.argmin(d_NV.addmm_(z_NC, weight_VC.T, alpha=-2, beta=1), dim=1)

    def _enlarge(self, h_Bchw: Tensor, si: int, scales: int, size: tuple[int, int]) -> Tensor:
        """phi of the codes of scale `si`, enlarged to `size` unless the scale is the last."""
        if si != scales - 1:
            h_Bchw = enlarge(h_Bchw, size)
        return self.quant_resi[scale_position(si, scales)](h_Bchw)

    def _codes(
        self, f_BChw: Tensor, sizes: Sequence[tuple[int, int]], codebook_VC: Tensor
    ) -> Iterator[ScaleCode]:
        """Quantise scale after scale.

        The maps have gradients with respect to `codebook_VC` and phi, not to `f_BChw`: the residual
        is detached, because the choice of codes has no gradient.
        """
        B, C, H, W = f_BChw.shape
        rest_BChw = f_BChw.detach().clone()
        for si, (h, w) in enumerate(sizes):
            small_Bchw = (
                rest_BChw
                if si == len(sizes) - 1
                else F.interpolate(rest_BChw, size=(h, w), mode="area")
            )
            z_NC = small_Bchw.permute(0, 2, 3, 1).reshape(-1, C)
            idx_N = self.nearest(z_NC)
            code_Bchw = (
                F.embedding(idx_N.view(B, h, w), codebook_VC).permute(0, 3, 1, 2).contiguous()
            )
            h_BChw = self._enlarge(code_Bchw, si, len(sizes), (H, W))
            yield ScaleCode(z_NC, idx_N, h_BChw, (h, w))
            rest_BChw = rest_BChw - h_BChw.detach()

    def _sizes(
        self, f_BChw: Tensor, v_patch_nums: Sequence[PatchNum] | None
    ) -> list[tuple[int, int]]:
        """The scales as (h, w); the last must have the size of the map."""
        sizes = [grid(patch_num) for patch_num in (v_patch_nums or self.v_patch_nums)]
        if sizes[-1] != tuple(f_BChw.shape[-2:]):
            raise UserError(
                f"the encoder's map is {f_BChw.shape[-2]}x{f_BChw.shape[-1]} but the last scale of "
                f"patch_nums is {sizes[-1][0]}x{sizes[-1][1]}; change the size of the images or "
                "patch_nums",
                code="model.input",
            )
        return sizes

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[PatchNum] | None = None
    ) -> list[Tensor]:
        """The tokens (B, h*w) of every scale of a map (B, C, H, W), or with `to_fhat` the maps
        (B, C, H, W) accumulated up to it.

        Raises:
            UserError: code `model.input` if the map does not have the size of the last scale.
        """
        B = f_BChw.shape[0]
        out: list[Tensor] = []
        f_BChw = f_BChw.float()
        f_hat_BChw = torch.zeros_like(f_BChw)
        with torch.no_grad(), torch.autocast(f_BChw.device.type, enabled=False):
            for si, code in enumerate(
                self._codes(f_BChw, self._sizes(f_BChw, v_patch_nums), self.embedding.weight)
            ):
                f_hat_BChw = f_hat_BChw + code.h_BChw
                out.append(f_hat_BChw if to_fhat else code.idx_N.view(B, -1))
                if si == self.prog_si:
                    break
        return out

    def forward(
        self, f_BChw: Tensor, ret_usages: bool = False
    ) -> tuple[Tensor, list[float] | None, Tensor]:
        """Quantise with gradients.

        Returns:
            The straight-through f_hat (B, C, H, W), with `ret_usages` the share of codes in use in
            percent for each scale (else None), and the VQ loss.
        """
        f_BChw = f_BChw.float()
        with torch.autocast(f_BChw.device.type, enabled=False):
            f_hat_BChw, loss, codes = self._quantize(f_BChw, self.embedding.weight)
        if self.training:
            for si, code in enumerate(codes):
                self._record_usage(si, code.idx_N)
        usages = None
        if ret_usages:
            world = dist.get_world_size() if dist.is_initialized() else 1
            margin = world * (f_BChw.numel() / f_BChw.shape[1]) / self.vocab_size * 0.08
            # A code is in use if it is hit at least 8 % as often as with uniform codes.
            usages = (self.ema_vocab_hit_SV >= margin).float().mean(1).mul(100).tolist()
        return f_hat_BChw, usages, loss

    def encode_for_training(
        self, f_BChw: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Quantise with gradients for the encoder and phi, and none for the codebook, which the
        trainer updates by a moving average.

        Returns:
            The straight-through f_hat (B, C, H, W), the VQ loss, and for every scale the codes (N,)
            and the vectors (N, C) that were looked up, detached, with N = B*h*w.
        """
        f_BChw = f_BChw.float()
        with torch.autocast(f_BChw.device.type, enabled=False):
            f_hat_BChw, loss, codes = self._quantize(f_BChw, self.embedding.weight.detach())
        return f_hat_BChw, loss, [c.idx_N for c in codes], [c.z_NC for c in codes]

    def _quantize(
        self, f_BChw: Tensor, codebook_VC: Tensor
    ) -> tuple[Tensor, Tensor, list[ScaleCode]]:
        """The mean over scales of beta MSE(sg(f_hat), f) + MSE(f_hat, sg(f)), where sg stops the
        gradient; the last f_hat passes its gradient straight through to f."""
        fixed_BChw = f_BChw.detach()
        f_hat_BChw = torch.zeros_like(fixed_BChw)
        loss = torch.zeros((), device=f_BChw.device)
        codes = []
        for code in self._codes(f_BChw, self._sizes(f_BChw, None), codebook_VC):
            f_hat_BChw = f_hat_BChw + code.h_BChw
            loss = (
                loss
                + self.beta * F.mse_loss(f_hat_BChw.detach(), f_BChw)
                + F.mse_loss(f_hat_BChw, fixed_BChw)
            )
            codes.append(code)
        return (f_hat_BChw.detach() - fixed_BChw) + f_BChw, loss / len(self.v_patch_nums), codes

    @torch.no_grad()
    def _record_usage(self, si: int, idx_N: Tensor) -> None:
        """Update the moving average of the hits of every code over all ranks. As in the reference,
        the counter that sets the decay runs per scale, not per step."""
        hit_V = idx_N.bincount(minlength=self.vocab_size).float()
        if dist.is_initialized():
            dist.all_reduce(hit_V)
        decay = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
        self.ema_vocab_hit_SV[si].mul_(decay).add_(hit_V, alpha=1 - decay)
        self.record_hit += 1

    def embed_to_fhat(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """The maps accumulated up to each scale from code vectors (B, C, h, w), or the last one.

        `all_to_max_scale=False` accumulates at the size of each scale instead of the full size; the
        reference calls it experimental.
        """
        sizes = [grid(patch_num) for patch_num in self.v_patch_nums]
        first_size = sizes[-1] if all_to_max_scale else sizes[0]
        f_hat_BChw = ms_h_BChw[0].new_zeros(
            ms_h_BChw[0].shape[0], self.Cvae, *first_size, dtype=torch.float32
        )
        out = []
        for si, (h_Bchw, size) in enumerate(zip(ms_h_BChw, sizes, strict=False)):
            if all_to_max_scale:
                f_hat_BChw = f_hat_BChw + self._enlarge(h_Bchw, si, len(sizes), sizes[-1])
            else:
                f_hat_BChw = enlarge(f_hat_BChw, size)
                f_hat_BChw = f_hat_BChw + self.quant_resi[scale_position(si, len(sizes))](h_Bchw)
            out.append(f_hat_BChw)
        return out[-1] if last_one else out

    @torch.no_grad()
    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor | None:
        """The transformer's teacher-forced input (B, L - first, C) float32 from the tokens (B, h*w)
        of every scale; None where there is one scale only."""
        scales, last = len(self.v_patch_nums), grid(self.v_patch_nums[-1])
        B = gt_ms_idx_Bl[0].shape[0]
        f_hat_BChw = self.embedding.weight.new_zeros(B, self.Cvae, *last, dtype=torch.float32)
        steps = scales - 1 if self.prog_si < 0 else min(self.prog_si, scales - 1)
        inputs_BlC = []
        for si in range(steps):
            h_Bchw = (
                self.embedding(gt_ms_idx_Bl[si])
                .transpose(1, 2)
                .reshape(B, self.Cvae, *grid(self.v_patch_nums[si]))
            )
            f_hat_BChw, next_Bchw = self.get_next_autoregressive_input(
                si, scales, f_hat_BChw, h_Bchw
            )
            inputs_BlC.append(next_Bchw.flatten(2).transpose(1, 2))
        return torch.cat(inputs_BlC, dim=1) if inputs_BlC else None

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the codes (B, C, h, w) of scale `si`, of `SN`, to `f_hat` in place. Returns `f_hat`
        and the input of the next scale (B, C, h', w')."""
        f_hat.add_(self._enlarge(h_BChw, si, SN, grid(self.v_patch_nums[-1])))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=grid(self.v_patch_nums[si + 1]), mode="area")
