"""Engines and world sizes are compared with each other: they have the same losses, and any engine
at any world size continues any checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import Ranks
from tests.runs import ENGINES, final, launch_log, losses, small_config
from var_scale.run_folder import RunFolder

HSDP = {"name": "fsdp", "shard": 2}
WORLDS = (1, 2, 4)
RECIPE = {"steps": 8, "keep_steps": [4], "checkpoint_seconds": 1e6, "ema": 0.9}


@dataclass(frozen=True)
class Place:
    """An engine at a world size. `hsdp` needs four ranks: two groups of two."""

    engine: str
    world: int

    def __str__(self) -> str:
        return f"{self.engine}-{self.world}"

    @property
    def settings(self) -> dict[str, Any]:
        """The section `engine` of a config."""
        return {
            **(HSDP if self.engine == "hsdp" else ENGINES[self.engine]),
            "processes": self.world,
        }


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Groups of one, two and four ranks, which start when a test first needs them. Only one exists
    at a time, because idle ranks cost memory."""
    groups: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        for other in groups.values():
            if other.size != size:
                other.close()
        return groups.setdefault(size, Ranks(size, tmp_path_factory.mktemp(f"ranks-{size}")))

    yield of
    for one in groups.values():
        one.close()


def train(group: Ranks, root: Path, place: Place, folder: Path, **sections: Any) -> RunFolder:
    """Train a run over the tokens in `root` to its end."""
    config = small_config(root, engine=place.settings, **sections)
    code, run = group.run(config, folder)
    assert code == 0, launch_log(run)[-3000:]
    return run


def continued(group: Ranks, root: Path, written: Path, place: Place, folder: Path) -> RunFolder:
    """Train on from a copy of the checkpoint of step 4 that another run wrote."""
    name = Path("checkpoints") / "step-00000004"
    shutil.copytree(written / name, folder / name)
    return train(group, root, place, folder, train=RECIPE)


def all_worlds() -> list[Place]:
    """Every engine at every world size."""
    return [Place(name, world) for world in WORLDS for name in ENGINES] + [Place("hsdp", 4)]


def one_world_each() -> list[Place]:
    """Every engine at one world size, and ddp at 1, the reference."""
    places = [Place(name, WORLDS[number % 3]) for number, name in enumerate(ENGINES)]
    assert places[0] == Place("ddp", 1)
    return sorted([*places, Place("hsdp", 4)], key=lambda place: place.world)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("places", "shared_aln"),
    [
        pytest.param(one_world_each, False, marks=pytest.mark.slow),
        pytest.param(all_worlds, False, marks=pytest.mark.nightly),
        pytest.param(all_worlds, True, marks=pytest.mark.nightly),
    ],
)
def test_hundred_steps_on_all_engines_and_world_sizes(
    places: Callable[[], list[Place]],
    shared_aln: bool,
    group: Callable[[int], Ranks],
    tmp_path: Path,
) -> None:
    """World sizes 1, 2 and 4, including HSDP: the losses of 100 float32 steps and the evaluation
    agree within 1e-5 relative."""
    sections = {
        "train": {"steps": 100, "checkpoint_seconds": 1e6},
        "model": {"shared_aln": shared_aln},
    }
    runs = {
        place: train(group(place.world), tmp_path, place, tmp_path / str(place), **sections)
        for place in places()
    }
    reference = runs[Place("ddp", 1)]
    want = losses(reference)
    assert len(want) == 100 and want[-1] < want[0] - 0.3
    for place, run in runs.items():
        np.testing.assert_allclose(losses(run), want, rtol=1e-5, err_msg=str(place))
        np.testing.assert_allclose(
            final(run)["loss_per_scale"],
            final(reference)["loss_per_scale"],
            rtol=1e-5,
            err_msg=str(place),
        )


def whole_matrix() -> list[tuple[Place, Place]]:
    """Written by each engine at world size 2 (HSDP at 4), continued by each at 1 and 2 and by four
    of them at 4; and written at 1, continued at 2: 118 pairs of (writer, reader)."""
    written = [*(Place(name, 2) for name in ENGINES), Place("hsdp", 4)]
    readers = [Place(name, world) for world in (1, 2) for name in ENGINES]
    readers += [Place(name, 4) for name in ("ddp", "zero1", "zero3", "hsdp")]
    pairs = [(writer, reader) for writer in written for reader in readers]
    return pairs + [(Place("zero2", 1), Place(name, 2)) for name in ENGINES]


def pairwise_cover() -> list[tuple[Place, Place]]:
    """Every writing engine with every reading engine once, every pair of world sizes, and every
    reading engine at every world size that it has: 49 pairs."""
    names = [*ENGINES, "hsdp"]

    def world(name: str, number: int) -> int:
        return 4 if name == "hsdp" else WORLDS[number % 3]

    return [
        (Place(writer, world(writer, i)), Place(reader, world(reader, i + j)))
        for i, writer in enumerate(names)
        for j, reader in enumerate(names)
    ]


def test_the_cover_leaves_no_pair_out() -> None:
    """Pairs of engines, pairs of world sizes, and reading engines at world sizes."""
    cover, names = pairwise_cover(), {*ENGINES, "hsdp"}
    assert len(cover) == len(set(cover)) == 49
    assert {(w.engine, r.engine) for w, r in cover} == {(w, r) for w in names for r in names}
    assert {(w.world, r.world) for w, r in cover} == {(w, r) for w in WORLDS for r in WORLDS}
    assert {(r.engine, r.world) for _, r in cover} == {
        *((name, world) for name in ENGINES for world in WORLDS),
        ("hsdp", 4),
    }
    assert len(set(whole_matrix())) == 118


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(pairwise_cover, marks=pytest.mark.slow),
        pytest.param(whole_matrix, marks=pytest.mark.nightly),
    ],
)
def test_every_engine_continues_every_other(
    pairs: Callable[[], list[tuple[Place, Place]]],
    group: Callable[[int], Ranks],
    tmp_path: Path,
) -> None:
    """Another engine at another world size continues a checkpoint. Averaged weights are continued
    too. The losses and the evaluation are those of a run without a stop."""
    found = pairs()
    writers = sorted({writer for writer, _ in found} | {Place("ddp", 2)}, key=lambda w: w.world)
    written = {
        place: train(group(place.world), tmp_path, place, tmp_path / str(place), train=RECIPE)
        for place in writers
    }
    want, evaluated = losses(written[Place("ddp", 2)]), final(written[Place("ddp", 2)])
    for writer, reader in sorted(found, key=lambda pair: pair[1].world):
        path = tmp_path / f"{writer}-by-{reader}"
        run = continued(group(reader.world), tmp_path, tmp_path / str(writer), reader, path)
        np.testing.assert_allclose(losses(run), want[4:], rtol=1e-5, err_msg=path.name)
        for key in ("loss_per_scale", "ema_loss_per_scale"):
            np.testing.assert_allclose(
                final(run)[key], evaluated[key], rtol=1e-5, err_msg=path.name
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_continued_at_the_same_world_size_to_the_same_bits(
    name: str, group: Callable[[int], Ranks], tmp_path: Path
) -> None:
    """The weights, moments and averages of each engine are compared. (Across killed processes:
    tests/train/test_resume.py and test_soak.py.)"""
    place = Place(name, 2)
    whole = train(group(2), tmp_path, place, tmp_path / "whole", train=RECIPE)
    rest = continued(group(2), tmp_path, whole.path, place, tmp_path / "rest")
    one, two = (
        json.loads((run.checkpoints / "step-00000008" / "state.json").read_text())["files"]
        for run in (whole, rest)
    )
    assert one == two
