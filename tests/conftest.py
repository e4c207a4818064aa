"""Shared settings of all tests: one thread per process, and which tests share a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

from var_scale.machine import has_gpu_driver

# A shell that starts pytest in the background ignores SIGINT for it and for its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not has_gpu_driver():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # tests/kernels; read when a kernel is defined

import pytest

if TYPE_CHECKING:
    from tests.ranks import Ranks
    from var_scale.records.analyse import StudyResult

FIRST = ("timed", "ranks", "study")
"""Groups that take longest. They begin first, so that the workers end at about the same time."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep torch on one thread in this process."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks that stay up for the session and train what `ranks.run(config, folder)` gives."""
    from tests.ranks import Ranks

    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture(scope="session")
def fitted_ladder() -> StudyResult:
    """All fits of a synthetic ladder of six sizes, whose run d7-s0 diverged."""
    from tests.synthetic_study import ladder, record
    from var_scale.records.analyse import fit_study

    reason = "the loss is nan at step 10"
    return fit_study([*ladder(noise=0.001), record(7, state="diverged", reason=reason)])


@pytest.fixture(scope="session")
def fitted_grid() -> StudyResult:
    """All fits of a synthetic grid of seven sizes and three budgets whose data repeat, with too few
    bootstrap draws for intervals that mean something."""
    from tests.synthetic_study import grid
    from var_scale.records import optimum
    from var_scale.records.analyse import fit_study

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimum, "DRAWS", 10)
        return fit_study(grid((1e17, 4e17, 1.6e18), sizes=5, unique=2 * 10**8))


def group_of(item: pytest.Item) -> str:
    """The pytest-xdist group of a test: its mark, else the widest fixture of ours that it shares
    with other tests, so that one worker builds that fixture once."""
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.args[0])
    shared = {
        definition.scope: f"{definition.baseid}:{name}" if definition.scope != "session" else name
        for name, definitions in item._fixtureinfo.name2fixturedefs.items()  # type: ignore[attr-defined]
        for definition in definitions
        if definition.scope != "function" and definition.baseid
    }
    return shared.get("session") or shared.get("module") or ""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark groups, and put the long ones first."""
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        if group and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: groups[item] not in FIRST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop if pytest-xdist ignores the groups, which would cost minutes and mix timed tests."""
    if not session.config.getoption("loadgroup", False):  # set in a worker by --dist loadgroup
        return
    for item in session.items:
        if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
            raise pytest.UsageError("this pytest-xdist does not read groups with this pytest")
