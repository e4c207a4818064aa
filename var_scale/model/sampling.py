"""Sampling: top-k and top-p filters, guidance that grows with the scale, and the loop over scales.

The order and sizes of the random draws are those of the reference, so a seed gives the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from var_scale.errors import UserError, require_positive
from var_scale.scales import grid

if TYPE_CHECKING:
    from var_scale.model.var import VAR


def filter_top_k_(logits_BlV: Tensor, top_k: int) -> Tensor:
    """Set everything below the k-th largest logit to -inf, in place; ties with it stay."""
    k = min(top_k, logits_BlV.shape[-1])
    threshold_Bl1 = logits_BlV.topk(k, dim=-1, sorted=False)[0].amin(dim=-1, keepdim=True)
    return logits_BlV.masked_fill_(logits_BlV < threshold_Bl1, -torch.inf)


def filter_top_p_(logits_BlV: Tensor, top_p: float) -> Tensor:
    """Set the least likely tokens whose cumulated probability is at most 1 - p to -inf, in place; the likeliest always stays."""
    sorted_BlV, order_BlV = logits_BlV.sort(dim=-1, descending=False)
    drop_BlV = sorted_BlV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop_BlV[..., -1] = False
    return logits_BlV.masked_fill_(torch.zeros_like(drop_BlV).scatter_(-1, order_BlV, drop_BlV), -torch.inf)


def sample_with_top_k_top_p_(
    logits_BlV: Tensor, top_k: int = 0, top_p: float = 0.0, rng: torch.Generator | None = None, num_samples: int = 1
) -> Tensor:
    """Filter the logits in place (0: no filter), top-k first, and draw `num_samples` tokens: (B, l, num_samples).

    A negative number draws that many without replacement.
    """
    B, l, V = logits_BlV.shape
    if top_k > 0:
        filter_top_k_(logits_BlV, top_k)
    if top_p > 0:
        filter_top_p_(logits_BlV, top_p)
    count, replacement = abs(num_samples), num_samples >= 0
    probability_NV = logits_BlV.softmax(dim=-1).view(-1, V)
    return torch.multinomial(probability_NV, num_samples=count, replacement=replacement, generator=rng).view(B, l, count)


def gumbel_softmax_with_rng(
    logits_BlV: Tensor, tau: float = 1.0, hard: bool = False, dim: int = -1, rng: torch.Generator | None = None
) -> Tensor:
    """Gumbel-softmax, softmax((logits + g) / tau), g = -log(Exp(1)); one draw a logit. `hard`: one-hot, with the soft one's gradient."""
    noise_BlV = -torch.empty_like(logits_BlV, memory_format=torch.contiguous_format).exponential_(generator=rng).log()
    soft_BlV = ((logits_BlV + noise_BlV) / tau).softmax(dim)
    if not hard:
        return soft_BlV
    hard_BlV = torch.zeros_like(soft_BlV).scatter_(dim, soft_BlV.argmax(dim, keepdim=True), 1.0)
    return hard_BlV - soft_BlV.detach() + soft_BlV


def guide(logits_2BlV: Tensor, B: int, t: float) -> Tensor:
    """Classifier-free guidance, (1 + t) conditional - t unconditional; the conditional half comes first."""
    if logits_2BlV.shape[0] == B:
        return logits_2BlV
    return (1 + t) * logits_2BlV[:B] - t * logits_2BlV[B:]


def resolve_labels(var: VAR, B: int, label_B: int | Tensor | None, rng: torch.Generator | None) -> Tensor:
    """Labels as a tensor (B,): None draws classes uniformly, an int is repeated (negative: no class), a tensor is taken as it is."""
    device = var.lvl_1L.device
    require_positive(B=B)
    if label_B is None:
        return torch.multinomial(var.uniform_prob, num_samples=B, replacement=True, generator=rng).reshape(B)
    if isinstance(label_B, int):
        label_B = torch.full((B,), var.num_classes if label_B < 0 else label_B)
    if label_B.shape != (B,):
        raise UserError(f"label_B has the shape {tuple(label_B.shape)} but {B} images were asked for; give one label an image")
    var.check_labels(label_B.cpu())
    return label_B.to(device)


def sample_images(
    var: VAR, B: int, label_B: int | Tensor | None, g_seed: int | None, cfg: float, top_k: int, top_p: float, more_smooth: bool
) -> tuple[Tensor, list[Tensor]]:
    """Sample scale after scale with a key-value cache: images (B, 3, H, W) in [0, 1] and the tokens (B, h*w) of every scale.

    `g_seed` seeds a generator of the model's own; None uses PyTorch's global one. Guidance at scale i of S is cfg * i / (S - 1).
    `more_smooth` feeds back a mixture of codes (soft Gumbel-softmax) in place of the drawn code: nicer pictures, not for measurements.
    """
    was_training = var.training
    var.eval()
    var.kv_caching(True)
    try:
        return _sample(var, B, label_B, g_seed, cfg, top_k, top_p, more_smooth)
    finally:
        var.kv_caching(False)
        var.train(was_training)


def _sample(
    var: VAR, B: int, label_B: int | Tensor | None, g_seed: int | None, cfg: float, top_k: int, top_p: float, more_smooth: bool
) -> tuple[Tensor, list[Tensor]]:
    quantize, scales = var.vae_quant_proxy[0], len(var.patch_nums)
    rng = None if g_seed is None else var.rng.manual_seed(g_seed)
    label_B = resolve_labels(var, B, label_B, rng)
    if cfg:  # without guidance the unconditional half would be computed for nothing
        label_B = torch.cat((label_B, torch.full_like(label_B, var.num_classes)))
    cond_BC = var.class_emb(label_B)
    ada = var.shared_ada_lin(cond_BC)
    position_1LC = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x_BlC = cond_BC.unsqueeze(1) + var.pos_start + position_1LC[:, : var.first_l]
    f_hat_BChw = cond_BC.new_zeros(B, var.Cvae, *grid(var.patch_nums[-1]), dtype=torch.float32)
    ms_idx_Bl: list[Tensor] = []
    for si, pn in enumerate(var.patch_nums):
        ratio = si / (scales - 1) if scales > 1 else 1.0
        for block in var.blocks:
            x_BlC = block(x_BlC, ada)
        logits_BlV = guide(var.get_logits(x_BlC, cond_BC), B, cfg * ratio)
        idx_Bl = sample_with_top_k_top_p_(logits_BlV, top_k, top_p, rng)[:, :, 0]
        ms_idx_Bl.append(idx_Bl)
        if more_smooth:
            tau = max(0.27 * (1 - ratio * 0.95), 0.005)
            h_BlC = gumbel_softmax_with_rng(logits_BlV * (1 + ratio), tau, rng=rng) @ quantize.embedding.weight
        else:
            h_BlC = quantize.embedding(idx_Bl)
        h_BChw = h_BlC.transpose(1, 2).reshape(B, var.Cvae, *grid(pn))
        f_hat_BChw, next_BChw = quantize.get_next_autoregressive_input(si, scales, f_hat_BChw, h_BChw)
        if si < scales - 1:
            begin, end = var.begin_ends[si + 1]
            next_BlC = next_BChw.flatten(2).transpose(1, 2).to(var.word_embed.weight.dtype)
            x_BlC = (var.word_embed(next_BlC) + position_1LC[:, begin:end]).repeat(label_B.shape[0] // B, 1, 1)
    return var.vae_proxy[0].fhat_to_img(f_hat_BChw).add(1).mul(0.5), ms_idx_Bl
