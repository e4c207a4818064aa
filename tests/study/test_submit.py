"""The scripts and jobs that a study submits to SLURM; test_slurm.py runs them on a real one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.raises import raises
from tests.study.mini import mini
from var_scale.config.load import config_hash
from var_scale.jobs.script import launch_root, run_script
from var_scale.study.study import Study
from var_scale.study.submit import arrays, retry, retry_folders, stop, submit


def study(tmp_path: Path, *overrides: str) -> Study:
    return mini(tmp_path, "engine=ddp", "cluster=dev", *overrides)


def test_scripts(tmp_path: Path) -> None:
    """Sizes that need the same nodes are one array, headers contain the keys of the preset and of
    the size, and bash can parse every script."""
    larger = "{cluster.nodes: 4, cluster.time: '12:00:00'}"
    rules = f"study.overrides={{4: {larger}, 5: {larger}}}"
    site = [
        "cluster.partition=gpu",
        "cluster.constraint=h100&ib",
        "cluster.sbatch=[--reservation=mine]",
        "cluster.gpus_per_node=8",
        "cluster.gpu_type=h100",
        "cluster.tasks_per_node=0",
        "cluster.setup=[module load cuda]",
        "cluster.at_once=2",
        "cluster.env={NCCL_SOCKET_IFNAME: ib0}",
        "cluster.container=apptainer exec --nv image.sif",
        "train.batch_size=64",
    ]
    found = arrays(made := study(tmp_path, rules, *site), made.runs())
    assert [[c.name for c, _ in array.runs] for array in found] == [
        ["d01-s0", "d02-s0", "d03-s0"],
        ["d04-s0", "d05-s0"],
    ]
    first, second = ("\n".join(array.head) for array in found)
    for line in (
        "--nodes=2",
        "--gres=gpu:h100:8",
        "--ntasks-per-node=8",
        "--partition=gpu",
        "--constraint=h100&ib",
        "--reservation=mine",
        "--signal=B:USR1@90",
        "--array=0-2%2",
        "--time=00:30:00",
    ):
        assert f"#SBATCH {line}\n" in first + "\n"
    assert "--nodes=4" in second and "--time=12:00:00" in second and "--array=0-1%2" in second
    config, run = made.runs()[4]
    script = run_script(config, run, "mini")
    for line in (
        "module load cuda || setup_failed 'module load cuda'",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export VS_NODES=4",
        "export VS_TASKS=8",
        "export VS_PYTHON=python",
        "export VS_CONTAINER='apptainer exec --nv image.sif'",
        "export VS_LAUNCHER=srun",
    ):
        assert f"\n{line}\n" in script
    for text in (script, found[0].script, (launch_root() / "node.sh").read_text()):
        assert (
            subprocess.run(
                ["bash", "-n"], input=text, text=True, capture_output=True, check=False
            ).stderr
            == ""
        )
    assert config_hash(config) == config_hash(
        study(tmp_path, rules.replace("4, c", "7, c"), "train.batch_size=64").runs()[4][0]
    )


def test_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run needs no SLURM and writes nothing; a real one names the missing command."""
    monkeypatch.setenv("PATH", str(tmp_path))
    submit(study(tmp_path).config, tmp_path / "runs", dry_run=True)
    out = capsys.readouterr().out
    assert (
        "#SBATCH --array=0-4" in out
        and "export VS_RUN=" in out
        and not (tmp_path / "runs").exists()
    )
    with raises("jobs.slurm-missing", "sbatch"):
        submit(study(tmp_path).config, tmp_path / "runs")


def test_stopping_and_retrying_ask_for_runs_of_the_study(tmp_path: Path) -> None:
    """A name or folder that is none of its runs is refused, and so is a complete run."""
    made = study(tmp_path)
    runs = dict((config.name, run) for config, run in made.runs())
    runs["d01-s0"].set_status("complete")
    runs["d02-s0"].set_status("diverged", "loss not finite")
    for call in (
        lambda: stop(made, ["d99-s0"]),
        lambda: retry(made, ["d02-s0", "d99-s0"]),
        lambda: retry_folders([runs["d02-s0"].path]),  # its study was never run
    ):
        with raises("study.run-unknown"):
            call()
    with raises("study.run-complete", "d01-s0"):
        retry(made, ["d01-s0"])
    retry(made, ["d02-s0"])
    assert runs["d02-s0"].status()["state"] == "created"
    assert runs["d02-s0"].status()["cause"] == "retried"
