"""Tokens from a teacher: a data set without images whose smallest possible loss is known, and of
which no model of finite size or data learns everything.

The tokens of a scale are drawn from the softmax of a fixed random function of exactly what VAR sees
at that place: its input from the frozen quantiser, the codes of all coarser scales accumulated and
resized. The tokens of a scale are therefore independent given the coarser ones, as VAR assumes, and
the smallest possible loss is the mean entropy of these distributions. With the inputs x of one
scale standardised per channel, the logits are

    gain cos(x W + b) A,   W (Z, F) Student's t,  b (F,) uniform,  A (F, V) normal, variance 2 / F,

so each has a standard deviation of `gain`. The heavy tails of W mix directions that are easy and
hard to learn. The first scale has no input: its logits are normal and depend on the class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from var_scale.data.generated import BLOCK, Rows, TokenSet
from var_scale.data.loader import TokenData
from var_scale.data.order import philox
from var_scale.errors import UserError
from var_scale.machine import cores
from var_scale.model.quantizer import MultiScaleQuantizer
from var_scale.scales import PatchNum, cells, grid

ROWS = 2048  # places whose features are computed together, so that they stay in the cache
CALIBRATION = 2048  # samples whose inputs give the means and deviations of a scale
FUNCTION, INPUTS, FLOOR = 2**32, 2**32 + 1, 2**33  # keys of random numbers; splits have small ones
REPLICATES = 16  # independent scrambled sequences, whose spread is the error of the floor
FIRST, LAST = 2**10, 2**18  # samples of each sequence


@dataclass(frozen=True)
class TeacherSettings:
    """The random functions: one for each scale of `patch_nums` after the first.

    Raises:
        UserError: a distribution over fewer than two tokens.
    """

    patch_nums: tuple[PatchNum, ...]
    vocab_size: int
    num_classes: int = 10
    features: int = 1024
    freedom: float = 3.0
    """Degrees of freedom of Student's t; infinite for a normal distribution."""
    gain: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise UserError(
                "teacher: a vocabulary of one token leaves nothing to learn; set "
                "tokenizer.vocab_size to 2 or more",
                code="data.teacher-settings",
            )


class _Waves(NamedTuple):
    """The function of one scale. The weights W and phases b contain the standardisation of x."""

    weight_ZF: Tensor
    phase_F: Tensor
    amplitude_FV: Tensor


class Drawn(NamedTuple):
    """Scales of samples that were drawn."""

    tokens: list[Tensor]
    """(B, l) of each."""
    log_p: list[Tensor]
    """(B, l, V) of each."""
    inputs: list[Tensor]
    """VAR's input (B, l, Z) of the second scale, ..., and of the one after the last drawn."""


class Teacher:
    """The distributions of all scales, over the codes of a frozen quantiser."""

    def __init__(self, settings: TeacherSettings, quantizer: MultiScaleQuantizer):
        self.settings, self.quantizer = settings, quantizer
        self.cells = cells(settings.patch_nums)
        rng = philox((settings.seed, FUNCTION))
        roots = settings.gain * rng.normal(size=(settings.num_classes, settings.vocab_size))
        self.roots_KV = torch.tensor(roots, dtype=torch.float32).log_softmax(1)
        self._waves: list[_Waves] = []
        self.second_VlV: Tensor | None = None
        seen = philox((settings.seed, INPUTS))
        labels_B = torch.from_numpy(seen.integers(settings.num_classes, size=CALIBRATION))
        uniform_BL = torch.from_numpy(seen.random((CALIBRATION, sum(self.cells)), np.float32))
        for scale in range(1, len(self.cells)):
            x_NZ = self.draw(labels_B, uniform_BL, scale).inputs[-1].flatten(0, 1)
            self._waves.append(self._new_waves(rng, x_NZ.double()))
            if scale == 1 and self.cells[0] == 1:
                self.second_VlV = self._second_scale()

    def _new_waves(self, rng: np.random.Generator, x_NZ: Tensor) -> _Waves:
        """A random function of inputs that are distributed like `x_NZ`."""
        s, channels = self.settings, x_NZ.shape[1]
        tall = (
            rng.standard_t(s.freedom, (channels, s.features))
            if math.isfinite(s.freedom)
            else rng.normal(size=(channels, s.features))
        )
        phase = rng.uniform(0, 2 * math.pi, s.features)
        amplitude = rng.normal(size=(s.features, s.vocab_size)) * s.gain * math.sqrt(2 / s.features)
        mean, sd = x_NZ.mean(0).numpy(), x_NZ.std(0).numpy()
        weight = tall / np.where(sd > 0, sd, 1)[:, None]
        return _Waves(
            *(
                torch.tensor(values, dtype=torch.float32)
                for values in (weight, phase - mean @ weight, amplitude)
            )
        )

    def log_p(self, scale: int, labels_B: Tensor, x_BlZ: Tensor | None) -> Tensor:
        """Log probabilities (B, l, V) of the tokens of a scale; `x_BlZ` is VAR's input there, which
        the first scale has not."""
        if x_BlZ is None:
            return self.roots_KV[labels_B][:, None].expand(-1, self.cells[0], -1)
        waves = self._waves[scale - 1]
        logits = [
            torch.addmm(waves.phase_F, x_NZ, waves.weight_ZF).cos_() @ waves.amplitude_FV
            for x_NZ in x_BlZ.flatten(0, 1).split(ROWS)
        ]
        return torch.cat(logits).log_softmax(1).view(*x_BlZ.shape[:2], -1)

    def draw(self, labels_B: Tensor, uniform_BL: Tensor, scales: int) -> Drawn:
        """Draw the first `scales` scales by the inverse of their distribution functions at
        `uniform_BL`."""
        f_hat_BZhw = self._empty(len(labels_B))
        drawn, x_BlZ = Drawn([], [], []), None
        cells = self.cells[:scales]
        for scale, uniform_Bl in enumerate(uniform_BL[:, : sum(cells)].split(cells, 1)):
            if scale == 1 and self.second_VlV is not None:
                log_p_BlV = self.second_VlV[drawn.tokens[0][:, 0]]
            else:
                log_p_BlV = self.log_p(scale, labels_B, x_BlZ)
            below_Bl = (log_p_BlV.exp().cumsum(-1) < uniform_Bl[..., None]).sum(-1)
            drawn.log_p.append(log_p_BlV)
            drawn.tokens.append(below_Bl.clamp_(max=self.settings.vocab_size - 1))
            if scale < len(self.cells) - 1:
                x_BlZ = self._next_input(scale, f_hat_BZhw, drawn.tokens[-1])
                drawn.inputs.append(x_BlZ)
        return drawn

    def _empty(self, count: int) -> Tensor:
        """The map (B, Z, h, w) of the quantiser before the first scale."""
        return torch.zeros(count, self.quantizer.Cvae, *grid(self.settings.patch_nums[-1]))

    def _next_input(self, scale: int, f_hat_BZhw: Tensor, tokens_Bl: Tensor) -> Tensor:
        """VAR's input (B, l, Z) of the scale after `scale`, whose codes are added to the map."""
        code_BlZ = self.quantizer.embedding(tokens_Bl).transpose(1, 2)
        code_BZhw = code_BlZ.unflatten(2, grid(self.settings.patch_nums[scale]))
        _, x_BZhw = self.quantizer.get_next_autoregressive_input(
            scale, len(self.cells), f_hat_BZhw, code_BZhw
        )
        return x_BZhw.flatten(2).transpose(1, 2)

    def _second_scale(self) -> Tensor:
        """The log probabilities (V, l, V) of the second scale after each code of a first scale of
        one cell: there are few, and they are needed often."""
        codes_V1 = torch.arange(self.settings.vocab_size)[:, None]
        x_VlZ = self._next_input(0, self._empty(len(codes_V1)), codes_V1)
        return self.log_p(1, codes_V1[:, 0], x_VlZ)

    def score(self, tokens_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """What a model that knows the teacher scores on these tokens: losses (B, L) in nats and
        whether it errs (B, L)."""
        tokens = tokens_BL.split(self.cells, dim=1)
        inputs = self.quantizer.idxBl_to_var_input(tokens)
        x_scale = (None, *inputs.split(self.cells[1:], dim=1)) if inputs is not None else (None,)
        losses, errors = [], []
        for scale, (tokens_Bl, x_BlZ) in enumerate(zip(tokens, x_scale, strict=True)):
            log_p_BlV = self.log_p(scale, labels_B, x_BlZ)
            losses.append(-log_p_BlV.gather(2, tokens_Bl[..., None])[..., 0])
            errors.append(log_p_BlV.argmax(2) != tokens_Bl)
        return torch.cat(losses, 1), torch.cat(errors, 1)


@contextmanager
def exactly() -> Iterator[None]:
    """Without gradients, on one thread: the order of sums, and so each token, does not depend on
    the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def teacher_set(teacher: Teacher, bayes: dict[str, Any]) -> TokenSet:
    """The samples of a teacher. `bayes` is the result of `floor`."""
    return TokenSet("teacher", teacher.settings, bayes, partial(_block, teacher))


def _block(teacher: Teacher, split: int, block: int) -> Rows:
    """Tokens (BLOCK, L) and labels (BLOCK,) of block `block`."""
    rng = philox((teacher.settings.seed, split), (0, 0, block, 0))
    labels_B = torch.from_numpy(rng.integers(teacher.settings.num_classes, size=BLOCK))
    uniform_BL = torch.from_numpy(rng.random((BLOCK, sum(teacher.cells)), np.float32))
    with exactly():
        drawn = teacher.draw(labels_B, uniform_BL, len(teacher.cells))
    return torch.cat(drawn.tokens, 1).numpy(), labels_B.numpy()


def floor(teacher: Teacher, precision: float = 1e-4) -> dict[str, Any]:
    """The smallest possible expected loss (nats per token) and error rate given the class: per
    scale, of the last scale and over all tokens, each with its standard error (`_sem`).

    It is the mean entropy of the teacher's distributions, by randomised quasi-Monte Carlo:
    scrambled Sobol sequences choose class, tokens, and one place in each scale. The sequences are
    lengthened until the standard error of the mean loss is below `precision` of it, up to LAST
    samples.
    """
    walks = [_Walk(teacher, number) for number in range(REPLICATES)]
    while True:
        with exactly(), ThreadPoolExecutor(min(len(walks), cores())) as pool:
            list(pool.map(lambda walk: walk.extend(max(FIRST, walk.count)), walks))
        found = _summary(teacher, np.array([walk.sums_QS / walk.count for walk in walks]))
        count = walks[0].count
        if found["loss_avg_sem"] < precision * found["loss_avg"] or count >= LAST:
            return {**found, "samples": REPLICATES * count}


class _Walk:
    """One scrambled sequence: the sums over its first `count` samples of the entropy and of the
    smallest error of each scale, (2, S)."""

    def __init__(self, teacher: Teacher, number: int):
        from scipy.stats import qmc

        self.teacher, self.count = teacher, 0
        self.sums_QS = np.zeros((2, len(teacher.cells)))
        self.drawn = sum(teacher.cells[:-1])
        # A class, a number for each token that another scale sees, and a place in each scale.
        dimensions = 1 + self.drawn + len(teacher.cells)
        rng = np.random.default_rng([teacher.settings.seed, FLOOR, number])
        self.sequence = qmc.Sobol(dimensions, rng=rng)

    def extend(self, count: int) -> None:
        """Add `count` samples."""
        for start in range(0, count, BLOCK):
            points = self.sequence.random(min(BLOCK, count - start))
            with exactly():
                self._add(points)
        self.count += count

    def _add(self, points: np.ndarray) -> None:
        teacher, after = self.teacher, 1 + self.drawn
        labels_B = torch.from_numpy((points[:, 0] * teacher.settings.num_classes).astype(np.int64))
        uniform_BL = torch.from_numpy(points[:, 1:after].astype(np.float32))
        scales, samples = len(teacher.cells), np.arange(len(points))
        drawn = teacher.draw(labels_B, uniform_BL, scales - 1)
        for scale in range(scales):
            place_B = (points[:, after + scale] * teacher.cells[scale]).astype(np.int64)
            if scale < scales - 1:
                log_p_BV = drawn.log_p[scale][samples, place_B].double()
            else:
                x_B1Z = drawn.inputs[-1][samples, place_B][:, None] if scale else None
                log_p_BV = teacher.log_p(scale, labels_B, x_B1Z)[:, 0].double()
            p_BV = log_p_BV.exp()
            self.sums_QS[0, scale] -= float((p_BV * log_p_BV).sum())
            self.sums_QS[1, scale] += float((1 - p_BV.amax(1)).sum())


def _summary(teacher: Teacher, means_RQS: np.ndarray) -> dict[str, Any]:
    """Means and standard errors over the sequences, rounded, as plain values."""
    weight_S = np.array(teacher.cells) / sum(teacher.cells)
    found: dict[str, Any] = {}
    for name, values_RS in zip(("loss", "err"), means_RQS.transpose(1, 0, 2), strict=True):
        for what, values in (
            ("per_scale", values_RS),
            ("last", values_RS[:, -1]),
            ("avg", values_RS @ weight_S),
        ):
            error = values.std(0, ddof=1) / math.sqrt(REPLICATES)
            found[f"{name}_{what}"] = np.round(values.mean(0), 7).tolist()
            found[f"{name}_{what}_sem"] = np.round(error, 7).tolist()
    return found


def score_split(teacher: Teacher, folder: Path) -> dict[str, Any]:
    """Losses and error rates that a model which knows the teacher has on the tokens of `folder`,
    with the standard error of the losses from the choice of samples."""
    data = TokenData(folder)
    values: dict[str, list[np.ndarray]] = {"loss": [], "err": []}
    edges = np.cumsum([0, *teacher.cells])
    for start in range(0, data.num_samples, BLOCK):
        rows, labels = data.gather(np.arange(start, min(start + BLOCK, data.num_samples)))
        with exactly():
            scored = teacher.score(torch.from_numpy(rows), torch.from_numpy(labels))
        for name, values_BL in zip(values, scored, strict=True):
            values[name].append(np.add.reduceat(values_BL.double().numpy(), edges[:-1], axis=1))
    found: dict[str, Any] = {"samples": data.num_samples}
    for name, parts in values.items():
        sums_NS = np.concatenate(parts)
        for what, values_N in (
            ("per_scale", sums_NS / np.array(teacher.cells)),
            ("last", sums_NS[:, -1] / teacher.cells[-1]),
            ("avg", sums_NS.sum(1) / edges[-1]),
        ):
            found[f"{name}_{what}"] = values_N.mean(0).tolist()
            error = values_N.std(0, ddof=1) / math.sqrt(len(values_N))
            found[f"{name}_{what}_sem"] = error.tolist()
    return found
