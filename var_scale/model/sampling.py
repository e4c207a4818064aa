"""Sampling: top-k and top-p filters, guidance that grows with the scale, and the loop over scales.

Random numbers come in one of two ways. `OneGenerator` draws as the reference does, in its order and
sizes, so that a seed gives the same tokens; an image then depends on its neighbours in the batch.
`SeedPerImage` gives every image a seed of its own: the image is the same in any batch, on any
device and in any process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from var_scale.errors import UserError
from var_scale.model.graphs import Graphs
from var_scale.model.stepper import Stepper
from var_scale.model.transformer import Transformer
from var_scale.scales import grid


def filter_top_k_(logits_BlV: Tensor, top_k: int) -> Tensor:
    """Set everything below the k-th largest logit to -inf, in place; ties with it stay."""
    k = min(top_k, logits_BlV.shape[-1])
    threshold_Bl1 = logits_BlV.topk(k, dim=-1, sorted=False)[0].amin(dim=-1, keepdim=True)
    return logits_BlV.masked_fill_(logits_BlV < threshold_Bl1, -torch.inf)


def filter_top_p_(logits_BlV: Tensor, top_p: float) -> Tensor:
    """Set the least likely tokens to -inf, in place: those whose cumulated probability, from the
    least likely up, is at most 1 - p. The likeliest token always stays."""
    sorted_BlV, order_BlV = logits_BlV.sort(dim=-1, descending=False)
    drop_BlV = sorted_BlV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    drop_BlV[..., -1] = False
    return logits_BlV.masked_fill_(
        torch.zeros_like(drop_BlV).scatter_(-1, order_BlV, drop_BlV), -torch.inf
    )


def filter_(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Both filters in place, top-k first; 0: no filter."""
    if top_k > 0:
        filter_top_k_(logits_BlV, top_k)
    if top_p > 0:
        filter_top_p_(logits_BlV, top_p)
    return logits_BlV


def guide(logits_2BlV: Tensor, B: int, t: float) -> Tensor:
    """Classifier-free guidance: (1 + t) conditional - t unconditional. The conditional half comes
    first; B rows have no unconditional half and are returned as they are."""
    if logits_2BlV.shape[0] == B:
        return logits_2BlV
    return (1 + t) * logits_2BlV[:B] - t * logits_2BlV[B:]


@dataclass(frozen=True)
class Settings:
    """How to draw. Each number may be a tuple instead, with one value per scale."""

    cfg: float | tuple[float, ...] = 1.5
    """weight t of the guidance (1 + t) conditional - t unconditional. A number rises linearly from
    0 at the first scale to its full value at the last, as in the reference; a tuple is used as it
    is."""
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 0.0
    temperature: float | tuple[float, ...] = 1.0
    """the logits are divided by it before the filters"""
    more_smooth: bool = False
    """feed back a mixture of codes (soft Gumbel-softmax) instead of the drawn code: nicer pictures,
    not for measurements"""

    def check(self, scales: int) -> None:
        """Check the values, and that each tuple has one value per scale.

        Raises:
            UserError: code `model.settings`.
        """
        for name, low, high, wanted in (
            ("cfg", 0, float("inf"), "at least 0"),
            ("top_k", 0, float("inf"), "at least 0"),
            ("top_p", 0, 1, "at least 0 and at most 1"),
            ("temperature", 1e-6, float("inf"), "a positive number"),
        ):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not isinstance(value, tuple | int | float):
                problem = f"is {value!r}; give a number, or a tuple with one value per scale"
            elif isinstance(value, tuple) and len(value) != scales:
                problem = f"has {len(value)} values for {scales} scales; give a number, or one each"
            elif wrong := [v for v in values if not low <= v <= high]:
                problem = f"{wrong[0]:g} is out of range; give {wanted}"
            else:
                continue
            raise UserError(f"{name}: {problem}", code="model.settings")

    def at(self, name: str, si: int) -> Any:
        """The value of a number at scale `si`."""
        value = getattr(self, name)
        return value[si] if isinstance(value, tuple) else value

    def guidance(self, si: int, scales: int) -> float:
        """Weight t at scale `si`."""
        if isinstance(self.cfg, tuple):
            return float(self.cfg[si])
        return self.cfg * ratio_of(si, scales)


def ratio_of(si: int, scales: int) -> float:
    """si / (S - 1), 1 for a single scale."""
    return si / (scales - 1) if scales > 1 else 1.0


class Draws(Protocol):
    """A source of random numbers."""

    def tokens(self, logits_BlV: Tensor) -> Tensor:
        """One token of each distribution: (B, l)."""
        ...

    def exponential(self, like_BlV: Tensor) -> Tensor:
        """Exp(1) numbers of the shape and on the device of `like_BlV`."""
        ...


class OneGenerator:
    """The draws of the reference: multinomial over the whole batch, from one generator. `rng` None
    is PyTorch's global generator."""

    def __init__(self, rng: torch.Generator | None):
        self.rng = rng

    def tokens(self, logits_BlV: Tensor) -> Tensor:
        # The same numbers as torch.multinomial for one draw, which makes the host wait for the GPU.
        return logits_BlV.softmax(-1).div_(self.exponential(logits_BlV)).argmax(-1)

    def exponential(self, like_BlV: Tensor) -> Tensor:
        return torch.empty_like(like_BlV, memory_format=torch.contiguous_format).exponential_(
            generator=self.rng
        )


class SeedPerImage:
    """A random stream per image (Philox, keyed by a whole number of up to 128 bits).

    The numbers are drawn on the host, so they are the same on every device. A token is the inverse
    of the cumulated distribution at a uniform number.
    """

    def __init__(self, seeds: Sequence[int]):
        self.rngs = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]

    def tokens(self, logits_BlV: Tensor) -> Tensor:
        l = logits_BlV.shape[1]
        u_Bl = torch.from_numpy(np.stack([rng.random(l) for rng in self.rngs])).to(
            logits_BlV.device, torch.float32
        )
        cumulated_BlV = logits_BlV.float().softmax(-1).cumsum(-1)
        target_Bl1 = (u_Bl * cumulated_BlV[..., -1]).unsqueeze(-1)
        # Rounding may bring u up to the total; the last token with a probability is the limit then.
        last_Bl1 = (cumulated_BlV < cumulated_BlV[..., -1:]).sum(-1, keepdim=True)
        index_Bl1 = torch.searchsorted(cumulated_BlV, target_Bl1, right=True)
        return index_Bl1.minimum(last_Bl1).squeeze(-1)

    def exponential(self, like_BlV: Tensor) -> Tensor:
        numbers = np.stack(
            [rng.standard_exponential(like_BlV.shape[1:], dtype=np.float32) for rng in self.rngs]
        )
        return torch.from_numpy(numbers).to(like_BlV)


@dataclass
class Hooks:
    """What the caller may see and change at each scale `si`, counted from 0."""

    logits: Callable[[int, Tensor], Tensor] | None = None
    """(si, guided logits (B, l, V) before temperature and filters) -> logits"""
    codes: Callable[[int, Tensor, Tensor], Tensor] | None = None
    """(si, tokens (B, l), their code vectors (B, l, Cvae)) -> code vectors, such as those of an
    image where a mask keeps it"""
    scale: Callable[[int, Tensor], None] | None = None
    """(si, accumulated map (B, Cvae, h, w)), which the decoder turns into a picture"""
    models: Mapping[int, Transformer] = field(default_factory=dict)
    """another model from a scale on, of the same tokenizer and classes: {6: small} samples the last
    scales with `small`"""

    def check(self, var: Transformer) -> None:
        """Check that the other models fit `var`.

        Raises:
            UserError: code `model.hooks`.
        """
        if wrong := [si for si in self.models if not 0 <= si < len(var.patch_nums)]:
            raise UserError(
                f"hooks.models: scale {wrong[0]} does not exist; the scales are 0 to "
                f"{len(var.patch_nums) - 1}",
                code="model.hooks",
            )
        for si, model in self.models.items():
            for name in ("patch_nums", "V", "num_classes"):
                own, other = getattr(var, name), getattr(model, name)
                if own != other:
                    raise UserError(
                        f"hooks.models: the model of scale {si} has {name}={other}, the first one "
                        f"has {own}; use a model of the same tokenizer and classes",
                        code="model.hooks",
                    )


@dataclass(frozen=True)
class Sampled:
    """Images (B, 3, H, W) in [0, 1], the tokens (B, h*w) of every scale, and the map
    (B, Cvae, h, w) that was decoded."""

    images: Tensor
    tokens: list[Tensor]
    f_hat: Tensor


@torch.no_grad()
def sample(
    var: Transformer, label_B: Tensor, settings: Settings, draws: Draws, hooks: Hooks | None = None
) -> Sampled:
    """Sample scale after scale with key-value caches.

    The models run in evaluation mode; their mode is restored afterwards.

    Args:
        var: the model, with its tokenizer.
        label_B: classes (B,) on the model's device; num_classes means no class.
        settings: guidance, filters and temperature.
        draws: the source of random numbers.
        hooks: what to see and change on the way.

    Raises:
        UserError: code `model.settings`, `model.labels` or `model.hooks`.
    """
    hooks = hooks or Hooks()
    settings.check(len(var.patch_nums))
    var.check_labels(label_B.cpu())
    if isinstance(draws, SeedPerImage) and len(draws.rngs) != len(label_B):
        raise UserError(
            f"{len(draws.rngs)} seeds are given for {len(label_B)} labels; give one seed per image",
            code="model.labels",
        )
    hooks.check(var)
    used = {id(model): model for model in (var, *hooks.models.values())}
    training = {key: model.training for key, model in used.items()}
    try:
        for model in used.values():
            model.eval()
        return _sample(var, label_B, settings, draws, hooks)
    finally:
        for key, model in used.items():
            model.kv_caching(False)
            model.train(training[key])


def stepper_of(var: Transformer, label_B: Tensor) -> Stepper:
    """The recorded CUDA graphs of the model where it keeps some and they fit, else plain steps."""
    if isinstance(var.graphs, Graphs) and label_B.is_cuda:
        return var.graphs.stepper(var, label_B)
    return Stepper(var, label_B)


def _sample(
    var: Transformer, label_B: Tensor, settings: Settings, draws: Draws, hooks: Hooks
) -> Sampled:
    """`sample` with arguments that are checked and models in evaluation mode."""
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
        logits_BlV = guide(stepper.step(inputs), B, settings.guidance(si, scales))
        if hooks.logits:
            # The filters work in place, and the hook may keep what it returns.
            logits_BlV = hooks.logits(si, logits_BlV).clone()
        temperature = settings.at("temperature", si)
        if temperature != 1:
            logits_BlV = logits_BlV / temperature
        filter_(logits_BlV, settings.at("top_k", si), settings.at("top_p", si))
        idx_Bl = draws.tokens(logits_BlV)
        tokens.append(idx_Bl)
        if settings.more_smooth:
            h_BlC = soft_codes(logits_BlV, ratio_of(si, scales), draws) @ (
                quantize.embedding.weight.float()
            )
        else:
            h_BlC = quantize.embedding(idx_Bl)
        if hooks.codes:
            h_BlC = hooks.codes(si, idx_Bl, h_BlC)
        h_BChw = h_BlC.transpose(1, 2).reshape(B, var.Cvae, *grid(pn))
        f_hat_BChw, next_BChw = quantize.get_next_autoregressive_input(
            si, scales, f_hat_BChw, h_BChw
        )
        if hooks.scale:
            hooks.scale(si, f_hat_BChw.clone())
        if si < scales - 1:
            inputs.append(next_BChw.flatten(2).transpose(1, 2))
    images = var.vae_proxy[0].fhat_to_img(f_hat_BChw).float().add(1).mul(0.5)
    return Sampled(images, tokens, f_hat_BChw)


def soft_codes(logits_BlV: Tensor, ratio: float, draws: Draws) -> Tensor:
    """Weights (B, l, V) of a soft mixture of codes: a Gumbel-softmax whose temperature falls from
    0.27 at the first scale (`ratio` 0) to 0.0135 at the last (`ratio` 1), as in the reference."""
    tau = max(0.27 * (1 - ratio * 0.95), 0.005)
    noise_BlV = -draws.exponential(logits_BlV).log()
    return ((logits_BlV * (1 + ratio) + noise_BlV) / tau).softmax(-1)


@torch.no_grad()
def log_likelihood(var: Transformer, tokens: Sequence[Tensor], label_B: Tensor) -> Tensor:
    """ln p(tokens of the scale | coarser scales, label) in nats, for every scale: (B, S).

    Exact: one teacher-forced forward pass in evaluation mode.

    Args:
        var: the model.
        tokens: (B, h*w) of every scale.
        label_B: classes (B,); num_classes means no class.

    Raises:
        UserError: code `model.input` if the tokens do not have the shape of the model's scales.
    """
    counts = [end - begin for begin, end in var.begin_ends]
    if [idx_Bl.shape[1] for idx_Bl in tokens] != counts:
        raise UserError(
            f"log_likelihood: tokens of {len(tokens)} scales are given; this model has "
            f"{len(var.patch_nums)} scales, of {counts} tokens",
            code="model.input",
        )
    was_training = var.training
    var.eval()
    try:
        x_BlZ = var.vae_quant_proxy[0].idxBl_to_var_input(tokens)
        logits_BLV = var(label_B, x_BlZ)
    finally:
        var.train(was_training)
    idx_BL1 = torch.cat(list(tokens), 1).unsqueeze(-1)
    log_p_BL = logits_BLV.log_softmax(-1).gather(-1, idx_BL1).squeeze(-1)
    return torch.stack([log_p_BL[:, begin:end].sum(1) for begin, end in var.begin_ends], dim=1)


def class_log_likelihoods(
    var: Transformer, tokens: Sequence[Tensor], classes: Sequence[int], batch: int = 64
) -> Tensor:
    """ln p(tokens | class) in nats under each of `classes`: (B, classes).

    The largest one classifies the image (Bayes' rule with equal priors). `batch` pairs of image and
    class run at a time.
    """
    B = tokens[0].shape[0]
    pairs = [(b, c) for b in range(B) for c in classes]
    values = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        rows = torch.tensor([b for b, _ in part], device=tokens[0].device)
        labels = torch.tensor([c for _, c in part], device=tokens[0].device)
        values.append(log_likelihood(var, [idx_Bl[rows] for idx_Bl in tokens], labels).sum(1))
    return torch.cat(values).view(B, len(classes))
