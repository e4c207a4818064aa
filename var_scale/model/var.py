"""The official interface of the transformer: `VAR` with its sampling method, and the functions
that the official notebooks import beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from var_scale.errors import UserError, require_positive
from var_scale.model.block import AdaLNSelfAttn
from var_scale.model.sampling import OneGenerator, Settings, filter_, sample
from var_scale.model.transformer import Transformer

__all__ = ["VAR", "AdaLNSelfAttn", "gumbel_softmax_with_rng", "sample_with_top_k_top_p_"]


class VAR(Transformer):
    """The transformer as the official code knows it: `Transformer` with a method that samples."""

    _rng: torch.Generator | None = None

    @property
    def rng(self) -> torch.Generator:
        """The model's own random generator, on its device; `g_seed` of sampling seeds it."""
        device = self.lvl_1L.device
        if self._rng is None or self._rng.device != device:
            self._rng = torch.Generator(device=device)
        return self._rng

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
        """Sample B images.

        Args:
            B: number of images.
            label_B: classes (B,), one class for all (negative: no class), or None to draw them.
            g_seed: seed of the model's own generator; None uses PyTorch's global generator.
            cfg: guidance of the last scale; at scale i of S the weight is cfg * i / (S - 1).
            top_k: keep the k likeliest tokens; 0 keeps all.
            top_p: keep the likeliest tokens up to this total probability; 0 keeps all.
            more_smooth: feed back soft mixtures of codes, for nicer pictures; not for measurements.
            return_idx: also return the tokens.

        Returns:
            Images (B, 3, H, W) in [0, 1]; with `return_idx` also the tokens (B, h*w) of each scale.
        """
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        labels = resolve_labels(self, B, label_B, rng)
        settings = Settings(cfg, top_k, top_p, more_smooth=more_smooth)
        out = sample(self, labels, settings, OneGenerator(rng))
        return (out.images, out.tokens) if return_idx else out.images


def resolve_labels(
    var: Transformer, B: int, label_B: int | Tensor | None, rng: torch.Generator | None
) -> Tensor:
    """The classes (B,) of B images, on the model's device; `sample` checks their range.

    None draws classes uniformly, an int is repeated (negative: no class), a tensor is unchanged.

    Raises:
        UserError: code `model.labels` if there is not one label per image.
    """
    device = var.lvl_1L.device
    require_positive(B=B)
    if label_B is None:
        uniform = torch.full((1, var.num_classes), 1 / var.num_classes, device=device)
        return torch.multinomial(uniform, B, replacement=True, generator=rng).reshape(B)
    if isinstance(label_B, int):
        label_B = torch.full((B,), var.num_classes if label_B < 0 else label_B)
    if label_B.shape != (B,):
        raise UserError(
            f"label_B has the shape {tuple(label_B.shape)} but B={B} images were requested; give "
            "one label per image",
            code="model.labels",
        )
    return label_B.to(device)


def sample_with_top_k_top_p_(
    logits_BlV: Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    rng: torch.Generator | None = None,
    num_samples: int = 1,
) -> Tensor:
    """Filter the logits in place (0: no filter), top-k first, and draw tokens (B, l, num_samples).
    A negative `num_samples` draws that many without replacement."""
    B, l, V = logits_BlV.shape
    filter_(logits_BlV, top_k, top_p)
    count, replacement = abs(num_samples), num_samples >= 0
    probability_NV = logits_BlV.softmax(dim=-1).view(-1, V)
    return torch.multinomial(
        probability_NV, num_samples=count, replacement=replacement, generator=rng
    ).view(B, l, count)


def gumbel_softmax_with_rng(
    logits_BlV: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    dim: int = -1,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Gumbel-softmax: softmax((logits + g) / tau) with g = -log(Exp(1)), one draw per logit. `hard`
    returns one-hot vectors that have the gradient of the soft ones."""
    noise_BlV = -OneGenerator(rng).exponential(logits_BlV).log()
    soft_BlV = ((logits_BlV + noise_BlV) / tau).softmax(dim)
    if not hard:
        return soft_BlV
    hard_BlV = torch.zeros_like(soft_BlV).scatter_(dim, soft_BlV.argmax(dim, keepdim=True), 1.0)
    return hard_BlV - soft_BlV.detach() + soft_BlV
