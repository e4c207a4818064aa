"""The grammar is determined by its key, agrees with its own probabilities, and cannot be learnt
below its floor."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.data.data_samples import hashes
from tests.raises import raises
from var_scale.config.load import load
from var_scale.data.grammar import (
    GrammarSettings,
    bayes,
    children,
    grammar_set,
    picture,
)
from var_scale.data.loader import TokenData
from var_scale.run_folder import RunFolder
from var_scale.scales import cells, grid

SMALL = GrammarSettings((1, 2, 3, 4), symbols=12, rules=3, num_classes=4, zipf=1.2)
WIDE = replace(SMALL, patch_nums=(1, (2, 3), (3, 5)))


def test_a_sample_depends_only_on_its_number(tmp_path: Path) -> None:
    tokens = grammar_set(SMALL)
    whole, labels = tokens.samples("train", 0, 5000)
    assert whole.shape == (5000, 30) and whole.min() >= 0 and whole.max() < 36
    for start, count in ((0, 1), (4095, 2), (4097, 900)):
        part, part_labels = tokens.samples("train", start, count)
        np.testing.assert_array_equal(part, whole[start : start + count])
        np.testing.assert_array_equal(part_labels, labels[start : start + count])
    assert (tokens.samples("val", 0, 5000)[0] != whole).any(axis=1).all()
    for name, size in (("a", 700), ("b", 700)):
        tokens.write(tmp_path / name, "train", 2000, "abc", size)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    np.testing.assert_array_equal(
        TokenData(tmp_path / "a").gather(np.arange(2000))[0], whole[:2000]
    )
    assert picture(SMALL, whole[0], 16).shape == (16, 64, 3)


@pytest.mark.parametrize("settings", [SMALL, WIDE])
def test_the_floor_is_what_one_who_knows_the_tables_scores(settings: GrammarSettings) -> None:
    """A prediction with the tables knows the symbol of every child, and its rule has the stated
    probability; the mean loss is the Bayes loss."""
    tokens_BL, labels = grammar_set(settings).samples("val", 0, 20000)
    tables, share, floor = children(settings), settings.share_R, bayes(settings)
    counts, grids = (
        cells(settings.patch_nums),
        [grid(patch_num) for patch_num in settings.patch_nums],
    )
    edges = np.cumsum([0, *counts])
    scales = [
        tokens_BL[:, start:stop].reshape(-1, *sides)
        for (start, stop), sides in zip(pairwise(edges), grids, strict=True)
    ]
    assert (scales[0][:, 0, 0] // settings.rules % settings.num_classes == labels).all()
    for scale, tokens in enumerate(scales):
        for y, x in np.ndindex(grids[scale]) if scale else ():
            (h, w), (above_h, above_w) = grids[scale], grids[scale - 1]
            parent = scales[scale - 1][:, y * above_h // h, x * above_w // w]
            assert (
                tokens[:, y, x] // settings.rules == tables[scale - 1][parent, 2 * (y % 2) + x % 2]
            ).all()
        loss = -np.log(share[tokens % settings.rules]).mean() + (
            np.log(settings.symbols / settings.num_classes) if scale == 0 else 0
        )
        assert loss == pytest.approx(floor["loss_per_scale"][scale], abs=0.02)
    weights = np.array(counts) / sum(counts)
    assert floor["loss_avg"] == pytest.approx(weights @ floor["loss_per_scale"]) and floor[
        "err_last"
    ] == pytest.approx(1 - share.max())


def test_the_preset_states_its_floors() -> None:
    """The floors that configs/study/grammar.yaml gives to the fit are those of the grammar."""
    config = load("study/grammar")
    assert config.study and config.data.grammar and len(config.study.floors) == 2
    grammar = config.data.grammar.model_dump(exclude={"train_samples", "val_samples"})
    floor = bayes(GrammarSettings(config.tokenizer.patch_nums, **grammar))
    assert config.study.floors == {
        name: pytest.approx(floor[name], abs=1e-5) for name in config.study.floors
    }
    assert config.tokenizer.vocab_size == config.data.grammar.symbols * config.data.grammar.rules


def test_what_is_refused() -> None:
    with raises("data.grammar-settings", "10 symbols", "4 classes"):
        GrammarSettings((1, 2), symbols=10, num_classes=4)
    with raises("data.grammar-settings", 65536):
        GrammarSettings((1, 2), symbols=2**15, rules=4, num_classes=4)
    with raises("data.split-name", "'x'"):
        grammar_set(SMALL).samples("x", 0, 1)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_larger_model_comes_nearer_to_the_floor_and_none_goes_below(tmp_path: Path) -> None:
    """Two sizes of the preset are trained through the command. At each scale the loss stays above
    the floor of the grammar, except for the noise of 4096 validation samples; the larger model has
    learnt the tables."""
    command = [sys.executable, "-m", "var_scale.cli"]
    subprocess.run(
        [*command, "data", "synth", "study/grammar", "--runs", str(tmp_path)], check=True
    )
    config = load("study/grammar")
    assert config.data.grammar
    settings = GrammarSettings(
        config.tokenizer.patch_nums,
        **config.data.grammar.model_dump(exclude={"train_samples", "val_samples"}),
    )
    floor_S, above = np.array(bayes(settings)["loss_per_scale"]), []
    for depth in (1, 3):
        subprocess.run(
            [*command, "train", "study/grammar", "--depth", str(depth), "--runs", str(tmp_path)],
            check=True,
        )
        row = RunFolder(tmp_path / "grammar" / f"d{depth:02d}-s0").read_metrics()[-1]
        assert row["kind"] == "eval" and (np.array(row["loss_per_scale"]) > floor_S - 0.03).all()
        above.append(row["loss_last"] - floor_S[-1])
    assert above[0] > 0.5 and -0.01 < above[1] < 0.05
