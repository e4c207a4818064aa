"""Sampling: top-k and top-p filters, guidance that grows with the scale, and the loop over scales.

Random numbers come in one of two ways. `OneGenerator` draws as the reference does, in its order and sizes, so that a seed gives the same
tokens; what an image gets then depends on its neighbours in the batch. `SeedPerImage` gives every image its own seed, whatever batch,
device or process it is made in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from var_scale.errors import UserError, require_positive
from var_scale.model.block import fused
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


def filter_(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Both filters in place, top-k first; 0: no filter."""
    if top_k > 0:
        filter_top_k_(logits_BlV, top_k)
    if top_p > 0:
        filter_top_p_(logits_BlV, top_p)
    return logits_BlV


def sample_with_top_k_top_p_(
    logits_BlV: Tensor, top_k: int = 0, top_p: float = 0.0, rng: torch.Generator | None = None, num_samples: int = 1
) -> Tensor:
    """Filter the logits in place (0: no filter), top-k first, and draw `num_samples` tokens: (B, l, num_samples).

    A negative number draws that many without replacement.
    """
    B, l, V = logits_BlV.shape
    filter_(logits_BlV, top_k, top_p)
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


@dataclass(frozen=True)
class Settings:
    """How to draw. Each of the numbers may be a tuple instead, one a scale."""

    cfg: float | tuple[float, ...] = 1.5
    """weight t of the guidance (1 + t) conditional - t unconditional; a number rises from 0 at the first scale to itself at the last, as in
    the reference, a tuple is taken as it stands"""
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 0.0
    temperature: float | tuple[float, ...] = 1.0
    """logits are divided by it, before the filters"""
    more_smooth: bool = False
    """feed back a mixture of codes (soft Gumbel-softmax) in place of the drawn code: nicer pictures, not for measurements"""

    def check(self, scales: int) -> None:
        """UserError where a tuple has not one value a scale, or a value is out of range."""
        for name, low, high in (("cfg", 0, float("inf")), ("top_k", 0, float("inf")), ("top_p", 0, 1), ("temperature", 1e-6, float("inf"))):
            value = getattr(self, name)
            if not isinstance(value, tuple | int | float):
                raise UserError(f"{name}: {type(value).__name__} {value}; give a number, or a tuple of one a scale")
            values = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and len(value) != scales:
                raise UserError(f"{name}: {len(value)} values are given for {scales} scales; give one number, or one a scale")
            if wrong := [v for v in values if not low <= v <= high]:
                wanted = "a positive number" if name == "temperature" else "at least 0" + (" and at most 1" if high == 1 else "")
                raise UserError(f"{name}: {wrong[0]:g} is out of range; give {wanted}")

    def at(self, name: str, si: int) -> Any:
        """A number at scale `si`."""
        value = getattr(self, name)
        return value[si] if isinstance(value, tuple) else value

    def guidance(self, si: int, scales: int) -> float:
        """Weight t at scale `si`."""
        return float(self.cfg[si]) if isinstance(self.cfg, tuple) else self.cfg * ratio_of(si, scales)


def ratio_of(si: int, scales: int) -> float:
    """si / (S - 1), 1 for a single scale."""
    return si / (scales - 1) if scales > 1 else 1.0


class Draws(Protocol):
    """Where the random numbers come from."""

    def tokens(self, logits_BlV: Tensor) -> Tensor:
        """One token of each distribution: (B, l)."""
        ...

    def exponential(self, like_BlV: Tensor) -> Tensor:
        """Exp(1) numbers of the shape and on the device of `like_BlV`."""
        ...


class OneGenerator:
    """The reference's draws: multinomial over the whole batch, from one generator; None is PyTorch's global one."""

    def __init__(self, rng: torch.Generator | None):
        self.rng = rng

    def tokens(self, logits_BlV: Tensor) -> Tensor:
        # What torch.multinomial does for one draw, number by number, but it makes the host wait for the GPU.
        return logits_BlV.softmax(-1).div_(self.exponential(logits_BlV)).argmax(-1)

    def exponential(self, like_BlV: Tensor) -> Tensor:
        return torch.empty_like(like_BlV, memory_format=torch.contiguous_format).exponential_(generator=self.rng)


class SeedPerImage:
    """Every image's numbers from a stream of its own (Philox, keyed by a whole number of up to 128 bits): the same on every device. Tokens
    by the inverse of the distribution."""

    def __init__(self, seeds: Sequence[int]):
        self.rngs = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]

    def tokens(self, logits_BlV: Tensor) -> Tensor:
        l = logits_BlV.shape[1]
        u_Bl = torch.from_numpy(np.stack([rng.random(l) for rng in self.rngs])).to(logits_BlV.device, torch.float32)
        cumulated_BlV = logits_BlV.float().softmax(-1).cumsum(-1)
        target_Bl1 = (u_Bl * cumulated_BlV[..., -1]).unsqueeze(-1)
        last_Bl1 = (cumulated_BlV < cumulated_BlV[..., -1:]).sum(-1, keepdim=True)  # rounding must not step past what has a probability
        return torch.searchsorted(cumulated_BlV, target_Bl1, right=True).minimum(last_Bl1).squeeze(-1)

    def exponential(self, like_BlV: Tensor) -> Tensor:
        numbers = np.stack([rng.standard_exponential(like_BlV.shape[1:], dtype=np.float32) for rng in self.rngs])
        return torch.from_numpy(numbers).to(like_BlV)


@dataclass
class Hooks:
    """What may be changed on the way; `si` is the scale, from 0."""

    logits: Callable[[int, Tensor], Tensor] | None = None
    """(si, guided logits (B, l, V) before temperature and filters) -> logits"""
    codes: Callable[[int, Tensor, Tensor], Tensor] | None = None
    """(si, tokens (B, l), their code vectors (B, l, Cvae)) -> code vectors, such as those of an image where a mask keeps it"""
    scale: Callable[[int, Tensor], None] | None = None
    """(si, accumulated map (B, Cvae, h, w)), which the decoder turns into a picture"""
    models: Mapping[int, VAR] = field(default_factory=dict)
    """another model from a scale on, of the same tokenizer and classes: {6: small} makes the last scales with `small`"""


@dataclass(frozen=True)
class Sampled:
    """Images (B, 3, H, W) in [0, 1], tokens (B, h*w) of every scale, and the map (B, Cvae, h, w) that was decoded."""

    images: Tensor
    tokens: list[Tensor]
    f_hat: Tensor


def sample_images(
    var: VAR, B: int, label_B: int | Tensor | None, g_seed: int | None, cfg: float, top_k: int, top_p: float, more_smooth: bool
) -> tuple[Tensor, list[Tensor]]:
    """The reference's call: images (B, 3, H, W) in [0, 1] and the tokens (B, h*w) of every scale.

    `g_seed` seeds a generator of the model's own; None uses PyTorch's global one. Guidance at scale i of S is cfg * i / (S - 1).
    """
    rng = None if g_seed is None else var.rng.manual_seed(g_seed)
    label_B = resolve_labels(var, B, label_B, rng)
    out = sample(var, label_B, Settings(cfg, top_k, top_p, more_smooth=more_smooth), OneGenerator(rng))
    return out.images, out.tokens


@torch.no_grad()
def sample(var: VAR, label_B: Tensor, settings: Settings, draws: Draws, hooks: Hooks | None = None) -> Sampled:
    """Sample scale after scale with key-value caches. Labels (B,) on the model's device, num_classes meaning none."""
    hooks = hooks or Hooks()
    settings.check(len(var.patch_nums))
    var.check_labels(label_B)
    if isinstance(draws, SeedPerImage) and len(draws.rngs) != len(label_B):
        raise UserError(f"{len(draws.rngs)} seeds for {len(label_B)} labels; give one seed an image")
    if wrong := [si for si in hooks.models if not 0 <= si < len(var.patch_nums)]:
        raise UserError(f"hooks.models: there is no scale {wrong[0]}, scales are 0 to {len(var.patch_nums) - 1}")
    used = {id(model): model for model in (var, *hooks.models.values())}
    for model in hooks.models.values():
        if (model.patch_nums, model.V, model.num_classes) != (var.patch_nums, var.V, var.num_classes):
            raise UserError("hooks.models: a model of other scales, tokens or classes cannot take over; give one of the same tokenizer")
    training = {key: model.training for key, model in used.items()}
    try:
        for model in used.values():
            model.eval()
        return _sample(var, label_B, settings, draws, hooks)
    finally:
        for key, model in used.items():
            model.kv_caching(False)
            model.train(training[key])


class Stepper:
    """One model going through the scales with its caches."""

    def __init__(self, var: VAR, label_B: Tensor):
        self.var, self.label_B, self.done = var, label_B, 0
        self._start()

    def _start(self) -> None:
        """What no scale changes: the AdaLN vectors of every block, the positions; and empty caches."""
        self.cond_BC = self.var.class_emb(self.label_B)
        self.ada = self.var.conditioning(self.cond_BC)
        self.position_1LC = self.var.lvl_embed(self.var.lvl_1L) + self.var.pos_1LC
        self.var.kv_caching(True)

    def step(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (2B or B, l, V) of the scale after `inputs`, what scales 1, 2, ... see of the codes before them, each (B, l, Cvae); scales
        that this model has not seen yet, since another made them, come first."""
        while True:
            si = self.done
            logits_BlV = self.scale(si, inputs[si - 1] if si else None)
            self.done += 1
            if si == len(inputs):
                return logits_BlV

    def scale(self, si: int, input_BlC: Tensor | None) -> Tensor:
        """Logits of scale `si`, whose keys and values join the caches; the first has no input."""
        var = self.var
        if input_BlC is None:
            x_BlC = self.cond_BC.unsqueeze(1) + var.pos_start + self.position_1LC[:, : var.first_l]
        else:
            begin, end = var.begin_ends[si]
            x_BlC = var.word_embed(input_BlC.to(var.word_embed.weight.dtype)) + self.position_1LC[:, begin:end]
            x_BlC = x_BlC.repeat(self.cond_BC.shape[0] // x_BlC.shape[0], 1, 1)
        x_BlC, pending = x_BlC.float(), None  # the residual stream, whatever the weights are
        defer = fused(var.kernels, x_BlC)
        for block, ada_B16C in zip(var.blocks, self.ada, strict=True):
            out = block(x_BlC, self.cond_BC, pending=pending, defer=defer, ada_B16C=ada_B16C)
            x_BlC, pending = out if defer else (out, None)
        return var.get_logits(x_BlC, self.cond_BC, pending)


def stepper_of(var: VAR, label_B: Tensor) -> Stepper:
    """The model's own graphs where it keeps them and they fit, else every step anew."""
    return var.graphs.stepper(var, label_B) if var.graphs and label_B.is_cuda else Stepper(var, label_B)


def _sample(var: VAR, label_B: Tensor, settings: Settings, draws: Draws, hooks: Hooks) -> Sampled:
    quantize, scales, B = var.vae_quant_proxy[0], len(var.patch_nums), label_B.shape[0]
    guided = any(settings.guidance(si, scales) for si in range(scales))
    # Without guidance the unconditional half would be computed for nothing.
    both_B = torch.cat((label_B, torch.full_like(label_B, var.num_classes))) if guided else label_B
    stepper = stepper_of(var, both_B)
    others: dict[int, Stepper] = {}
    f_hat_BChw = torch.zeros(B, var.Cvae, *grid(var.patch_nums[-1]), device=label_B.device)
    tokens: list[Tensor] = []
    inputs: list[Tensor] = []
    for si, pn in enumerate(var.patch_nums):
        if si in hooks.models:
            model = hooks.models[si]
            if id(model) not in others:
                others[id(model)] = stepper_of(model, both_B)
            stepper = others[id(model)]
        ratio = ratio_of(si, scales)
        logits_BlV = guide(stepper.step(inputs), B, settings.guidance(si, scales))
        if hooks.logits:
            logits_BlV = hooks.logits(si, logits_BlV).clone()  # the filters change them in place
        temperature = settings.at("temperature", si)
        if temperature != 1:
            logits_BlV = logits_BlV / temperature
        idx_Bl = draws.tokens(filter_(logits_BlV, settings.at("top_k", si), settings.at("top_p", si)))
        tokens.append(idx_Bl)
        if settings.more_smooth:
            tau = max(0.27 * (1 - ratio * 0.95), 0.005)
            noise_BlV = -draws.exponential(logits_BlV).log()
            h_BlC = ((logits_BlV * (1 + ratio) + noise_BlV) / tau).softmax(-1) @ quantize.embedding.weight.float()
        else:
            h_BlC = quantize.embedding(idx_Bl)
        if hooks.codes:
            h_BlC = hooks.codes(si, idx_Bl, h_BlC)
        h_BChw = h_BlC.transpose(1, 2).reshape(B, var.Cvae, *grid(pn))
        f_hat_BChw, next_BChw = quantize.get_next_autoregressive_input(si, scales, f_hat_BChw, h_BChw)
        if hooks.scale:
            hooks.scale(si, f_hat_BChw.clone())
        if si < scales - 1:
            inputs.append(next_BChw.flatten(2).transpose(1, 2))
    return Sampled(var.vae_proxy[0].fhat_to_img(f_hat_BChw).float().add(1).mul(0.5), tokens, f_hat_BChw)


@torch.no_grad()
def log_likelihood(var: VAR, tokens: Sequence[Tensor], label_B: Tensor) -> Tensor:
    """ln p(tokens | label), nats, of every scale: (B, S). `tokens` (B, h*w) a scale, labels (B,), num_classes meaning none; exact and
    teacher-forced, one forward pass."""
    if [idx_Bl.shape[1] for idx_Bl in tokens] != [end - begin for begin, end in var.begin_ends]:
        raise UserError(f"log_likelihood: tokens of {len(tokens)} scales are given; this model has {len(var.patch_nums)}, of "
                        f"{[end - begin for begin, end in var.begin_ends]} tokens")  # fmt: skip
    was_training = var.training
    var.eval()
    try:
        x_BlZ = var.vae_quant_proxy[0].idxBl_to_var_input(tokens)
        logits_BLV = var(label_B, x_BlZ)
    finally:
        var.train(was_training)
    log_p_BL = logits_BLV.log_softmax(-1).gather(-1, torch.cat(list(tokens), 1).unsqueeze(-1)).squeeze(-1)
    return torch.stack([log_p_BL[:, begin:end].sum(1) for begin, end in var.begin_ends], dim=1)


def class_log_likelihoods(var: VAR, tokens: Sequence[Tensor], classes: Sequence[int], batch: int = 64) -> Tensor:
    """ln p(tokens | class), nats, under each of `classes`: (B, classes). The largest classifies the image (Bayes, equal priors)."""
    B = tokens[0].shape[0]
    pairs = [(b, c) for b in range(B) for c in classes]
    values = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        rows = torch.tensor([b for b, _ in part], device=tokens[0].device)
        labels = torch.tensor([c for _, c in part], device=tokens[0].device)
        values.append(log_likelihood(var, [idx_Bl[rows] for idx_Bl in tokens], labels).sum(1))
    return torch.cat(values).view(B, len(classes))
