"""The teacher's tokens follow its distributions, which see what VAR sees, and its floor is their
entropy."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.data_samples import hashes
from tests.raises import raises
from var_scale.config.load import load
from var_scale.data.loader import TokenData
from var_scale.data.order import philox
from var_scale.data.teacher import (
    FUNCTION,
    Teacher,
    TeacherSettings,
    floor,
    score_split,
    teacher_set,
)
from var_scale.model.quantizer import MultiScaleQuantizer
from var_scale.scales import cells, grid
from var_scale.study.checks import check_study_here
from var_scale.study.manifests import with_manifests
from var_scale.study.single import generate_data
from var_scale.study.study import Study

TINY = TeacherSettings((1, 2), vocab_size=5, num_classes=2, features=16, gain=2.0)
WIDE = replace(TINY, patch_nums=(1, (2, 3), (3, 5)), vocab_size=7, freedom=float("inf"), seed=3)
NOTHING = {"loss_avg": 0.0}


def quantizer(settings: TeacherSettings, channels: int = 3) -> MultiScaleQuantizer:
    """A frozen quantiser with a random codebook and a phi that does something."""
    torch.manual_seed(settings.seed)
    made = MultiScaleQuantizer(settings.vocab_size, channels, v_patch_nums=settings.patch_nums)
    torch.nn.init.normal_(made.embedding.weight)
    return made.requires_grad_(False)


def teacher_of(settings: TeacherSettings) -> Teacher:
    with torch.no_grad():
        return Teacher(settings, quantizer(settings))


def by_numpy(teacher: Teacher, scale: int, x_Z: np.ndarray, inputs_NZ: np.ndarray) -> np.ndarray:
    """The probabilities (V,) at the input x_Z, from the definition, in float64. `inputs_NZ` are
    inputs of this scale that standardise it."""
    s = teacher.settings
    rng = philox((s.seed, FUNCTION))
    rng.normal(size=(s.num_classes, s.vocab_size))
    for _ in range(scale):
        shape = (len(x_Z), s.features)
        w = rng.standard_t(s.freedom, shape) if np.isfinite(s.freedom) else rng.normal(size=shape)
        b = rng.uniform(0, 2 * np.pi, s.features)
        a = rng.normal(size=(s.features, s.vocab_size)) * np.sqrt(2 / s.features)
    z_Z = (x_Z - inputs_NZ.mean(0)) / inputs_NZ.std(0)
    logits = s.gain * np.cos(z_Z @ w + b) @ a
    p = np.exp(logits - logits.max())
    return np.asarray(p / p.sum())


@pytest.mark.parametrize("settings", [TINY, WIDE])
def test_the_tokens_follow_the_distribution_at_var_s_own_input(settings: TeacherSettings) -> None:
    """At each scale the tokens of samples that show the teacher the same input have the
    frequencies of an independent implementation (chi-square). The input is that which the model
    gets from the tokens. The first scale has the class's own distribution."""
    teacher = teacher_of(settings)
    tokens_BL, labels = teacher_set(teacher, NOTHING).samples("train", 0, 16384)
    first = tokens_BL[:, 0]
    roots = settings.gain * philox((settings.seed, FUNCTION)).normal(
        size=(settings.num_classes, settings.vocab_size)
    )
    for label in range(settings.num_classes):
        p = np.exp(roots[label]) / np.exp(roots[label]).sum()
        assert above_mean([chi_square(first[labels == label], p)]) < 4
    edges = np.cumsum(cells(settings.patch_nums))
    parts = torch.from_numpy(tokens_BL).split(cells(settings.patch_nums), dim=1)
    inputs_BlZ = teacher.quantizer.idxBl_to_var_input(parts)
    assert inputs_BlZ is not None
    for scale, (start, stop) in enumerate(pairwise(edges), 1):
        x_BlZ = inputs_BlZ[:, start - edges[0] : stop - edges[0]].double().numpy()
        calibration_NZ = x_BlZ.reshape(-1, x_BlZ.shape[-1])
        # The commonest history, so that many samples share one input.
        _, history, counts = np.unique(
            tokens_BL[:, :start], axis=0, return_inverse=True, return_counts=True
        )
        same = np.flatnonzero(history.ravel() == counts.argmax())
        found = []
        for place in range(stop - start):
            p = by_numpy(teacher, scale, x_BlZ[same[0], place], calibration_NZ)
            exact = teacher.log_p(
                scale, torch.zeros(1), torch.from_numpy(x_BlZ[same[:1], place][:, None]).float()
            )
            # The teacher standardises with fewer samples than the whole set.
            np.testing.assert_allclose(exact.exp().numpy()[0, 0], p, atol=0.08)
            q = exact.double().exp().numpy()[0, 0]
            found.append(chi_square(tokens_BL[same, start + place], q))
        assert above_mean(found) < 4


def chi_square(tokens: np.ndarray, p: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic of the counts and its degrees of freedom. The rarest tokens are joined
    until 5 of them are expected."""
    order = np.argsort(p)
    seen, wanted = np.bincount(tokens, minlength=len(p))[order], len(tokens) * p[order]
    first = int(np.searchsorted(wanted.cumsum(), 5)) + 1
    seen, wanted = (np.append(v[first:], v[:first].sum()) for v in (seen, wanted))
    return float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1


def above_mean(found: list[tuple[float, int]]) -> float:
    """The sum of independent statistics in standard deviations above its expectation."""
    value, freedom = map(sum, zip(*found, strict=True))
    return float((value - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("settings", [TINY, WIDE])
def test_the_floor_is_what_one_who_knows_the_teacher_scores(
    settings: TeacherSettings, tmp_path: Path
) -> None:
    """The entropy that the floor integrates, and the loss of the teacher on drawn tokens, agree
    within their standard errors, per scale and on average; so do the error rates."""
    teacher = teacher_of(settings)
    lowest = floor(teacher, 1e-3)
    assert lowest["loss_avg_sem"] < 1e-3 * lowest["loss_avg"]
    teacher_set(teacher, lowest).write(tmp_path, "val", 16384, "abc", 16384)
    scored = score_split(teacher, tmp_path)
    for name in ("loss_per_scale", "loss_last", "loss_avg", "err_per_scale", "err_avg"):
        apart = np.subtract(scored[name], lowest[name])
        error = np.hypot(scored[f"{name}_sem"], lowest[f"{name}_sem"])
        assert (np.abs(apart) < 4 * error).all(), name
    weight = np.array(cells(settings.patch_nums)) / sum(cells(settings.patch_nums))
    assert lowest["loss_avg"] == pytest.approx(weight @ lowest["loss_per_scale"], abs=1e-6)
    if settings is TINY:
        # Two scales: the expectation over the class and the root can be summed directly.
        p_KV = teacher.roots_KV.double().exp().numpy()
        code_V1Z = teacher.quantizer.embedding.weight[:, None]
        f_hat = torch.zeros(5, 3, 2, 2)
        _, x_VZhw = teacher.quantizer.get_next_autoregressive_input(
            0, 2, f_hat, code_V1Z.transpose(1, 2)[..., None]
        )
        log_p = teacher.log_p(1, torch.zeros(5), x_VZhw.flatten(2).transpose(1, 2)).double()
        entropy_V = -(log_p.exp() * log_p).sum(2).mean(1).numpy()
        exact = [-(p_KV * np.log(p_KV)).sum(1).mean(), p_KV.mean(0) @ entropy_V]
        np.testing.assert_allclose(lowest["loss_per_scale"], exact, rtol=4e-3)
    assert json.loads((tmp_path / "manifest.json").read_text())["source"]["bayes"] == lowest


def test_a_sample_depends_only_on_its_number(tmp_path: Path) -> None:
    tokens = teacher_set(teacher_of(WIDE), NOTHING)
    whole, labels = tokens.samples("train", 0, 5000)
    assert whole.shape == (5000, sum(a * b for a, b in map(grid, WIDE.patch_nums)))
    assert whole.min() >= 0 and whole.max() < 7
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for start, count in ((0, 1), (4095, 2), (4097, 900)):
        part, part_labels = tokens.samples("train", start, count)
        np.testing.assert_array_equal(part, whole[start : start + count])
        np.testing.assert_array_equal(part_labels, labels[start : start + count])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert (tokens.samples("val", 0, 5000)[0] != whole).any(axis=1).all()
    other = teacher_set(teacher_of(replace(WIDE, seed=4)), NOTHING)
    assert (other.samples("train", 0, 5000)[0] != whole).any(axis=1).mean() > 0.9
    for name, size in (("a", 700), ("b", 700)):
        tokens.write(tmp_path / name, "train", 2000, "abc", size)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    np.testing.assert_array_equal(
        TokenData(tmp_path / "a").gather(np.arange(2000))[0], whole[:2000]
    )


SMALL = [
    "study/truth",
    "data.teacher={num_classes: 3, features: 8, train_samples: 256, val_samples: 64}",
    "tokenizer.vocab_size=5",
    "tokenizer.patch_nums=[1, 2]",
]


def test_a_study_generates_the_set_once(tmp_path: Path) -> None:
    """Tokens, tokenizer and floor.json; the same command again changes nothing, and every reader of
    the config counts the set's classes and samples."""
    config = load(SMALL[0], SMALL[1:])
    assert (config.classes, config.train_samples) == (3, 256)
    assert with_manifests(config) == config
    check_study_here(Study(config, tmp_path))
    generate_data(config, tmp_path)
    folder = tmp_path / "truth"
    found = json.loads((folder / "floor.json").read_text())
    files = {path: path.stat().st_mtime_ns for path in (folder / "tokens").rglob("*.tar")}
    manifest = json.loads((folder / "tokens" / "val" / "manifest.json").read_text())
    assert manifest["num_samples"] == 64 and manifest["num_classes"] == 3
    assert manifest["source"]["bayes"] == found["exact"]
    assert found["validation"]["samples"] == 64
    generate_data(config, tmp_path)
    assert json.loads((folder / "floor.json").read_text()) == found
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "tokens").rglob("*.tar")}
    assert not Study(config, tmp_path).needs_data()


def test_what_is_refused() -> None:
    with raises("data.teacher-settings", "vocab_size"):
        TeacherSettings((1, 2), vocab_size=1)
    with raises("data.split-name", "'x'"):
        teacher_set(teacher_of(TINY), NOTHING).samples("x", 0, 1)
    for key, value in (("gain", 0), ("freedom", 0.5), ("features", 0), ("val_samples", 0)):
        with raises("config.value", f"data.teacher.{key}"):
            load("study/truth", [f"data.teacher.{key}={value}"])
    with raises("config.value", "data.num_classes"):
        load("study/truth", ["data.num_classes=7"])
