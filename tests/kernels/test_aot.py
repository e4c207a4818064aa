"""Every kernel compiles ahead of time for Ampere, Hopper and Blackwell, without spills, with wide loads and tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REGISTERS = {"adaln.forward": 128, "adaln.backward": 255, "cross_entropy": 80, "mlp.gelu": 64}
"""registers a thread that the number of programs on a multiprocessor was planned with (config.py): AdaLN forward four of 4 warps, backward
two, cross-entropy three; attention and products may take all 255, two programs of 4 warps"""


@pytest.mark.parametrize("architecture", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100"))])
def test_machine_code(architecture: str) -> None:
    """Budgets, not equalities: register counts differ between versions of Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    process = subprocess.run([sys.executable, "-m", "var_kernels.aot", architecture, "--json"], capture_output=True, text=True,
                             env=environment, check=False)  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    builds = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(builds) >= 20
    for build in builds:
        name = build["name"]
        assert build["stack"] <= build["known_stack"], f"{name} spills {build['stack']} bytes on {architecture}"
        room = (99 if architecture == "sm_80" else 227) * 1024
        assert build["registers"] * 32 * build["warps"] <= 65536 and build["shared"] <= room, build
        budget = next((limit for start, limit in REGISTERS.items() if name.startswith(start)), 255)
        assert build["registers"] <= budget, build
        if not name.startswith(("cross_entropy V", "group_norm.finish")):  # the logit of a target is one number, a group a few channels
            assert build["narrow_loads"] == 0, build
        if not name.endswith(".finish"):  # float32 sums of some columns
            assert build["wide_loads"] > 0, build
        if build["matrix"]:
            assert build["tensor_core"] > 0, build
