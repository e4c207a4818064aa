"""Recorded passes of training. A CPU has no CUDA graphs: here a recording calls its function again,
so all but the recording itself is tested. tests/kernels/test_gpu_limits.py records on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import losses, run_here, small_config
from var_scale.train.assemble import untrained
from var_scale.train.graphs import StepGraphs, why_no_graphs
from var_scale.train.world import World

CPU = torch.device("cpu")
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"accumulate": 2, "clip": 0.1},
    "progressive": {"progressive": 0.5, "progressive_start": 0, "steps": 12},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recorded_steps_are_the_steps(recipe: str, tmp_path: Path) -> None:
    """Losses and weights are equal bit for bit, also when the shape changes between steps, and a
    recording happens only then."""
    config = small_config(tmp_path, train=RECIPES[recipe])
    found, recordings = [], 0

    def record(body: Callable[[], None]) -> Callable[[], None]:
        nonlocal recordings
        recordings += 1
        body()  # the passes of the warm-up must leave no trace
        return body

    for recorded in (False, True):
        torch.manual_seed(0)  # of the tokenizer
        stepper = untrained(config, World(0, 1, CPU))
        engine = stepper.engine
        if recorded:
            engine.graphs = StepGraphs(engine.train_step_module(), engine.scaled, record)
        seen = [torch.stack(stepper.step(step).losses) for step in range(8)]
        weights = [p.detach().clone() for _, p in engine.names()]
        found.append((torch.stack(seen), weights))
        stages = {stepper.stage(step)[0] for step in range(8)}
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert recordings == len(stages) and (len(stages) > 1) == (recipe == "progressive")


def test_why_passes_are_not_recorded(tmp_path: Path) -> None:
    """A run that cannot record its passes trains as usual, and env.json states the reason."""
    results = []
    for graphs in (False, True):
        config = small_config(tmp_path, engine={"graphs": graphs}, train={"steps": 3})
        code, folder = run_here(config, tmp_path / f"run-{graphs}")
        assert code == 0
        results.append(losses(folder))
    assert results[0] == results[1]
    chosen = json.loads(folder.env.read_text())["choices"]
    assert chosen["graphs"] == "off (a graph needs an NVIDIA GPU, not cpu)"


@pytest.mark.parametrize(
    ("changes", "precision", "word"),
    [
        ({"engine": {"name": "fsdp"}}, "bf16", "fsdp"),
        ({}, "fp16", "fp16"),
        ({"engine": {"recompute": "block"}}, "bf16", "recomputation"),
        ({"engine": {"compile": True}}, "bf16", "compiled"),
        ({"log": {"activations": True}}, "bf16", "log.activations"),
        ({}, "bf16", ""),
    ],
)
def test_what_stands_against_a_recording(
    changes: dict[str, Any], precision: str, word: str, tmp_path: Path
) -> None:
    config = small_config(tmp_path, **changes)
    reason = why_no_graphs(config, torch.device("cuda"), precision)
    assert word in reason and bool(word) == bool(reason)
