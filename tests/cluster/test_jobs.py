"""Scripts of SLURM jobs, what a job does at the end of a life, grids and budgets; SLURM itself is in test_slurm.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.test_pipeline import MINI
from var_scale.cluster.job import HOLD, IDLE_LIVES, begin, end
from var_scale.cluster.nodes import bad
from var_scale.cluster.pipeline import Study
from var_scale.cluster.plan import plan_table
from var_scale.cluster.slurm import array_script, arrays, check_cluster, header, launch_root, run_script, seconds, submit
from var_scale.config.load import config_hash, load
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.errors import UserError
from var_scale.run_folder import RunFolder


def study(tmp_path: Path, *overrides: str) -> Study:
    return Study(load(MINI[0], [*MINI[1:], "engine=ddp", "cluster=dev", *overrides]), tmp_path)


def test_scripts(tmp_path: Path) -> None:
    """Sizes that ask for the same are one array; the header says what the preset and the size's rules say; bash can read all."""
    rules = "study.overrides={4: {cluster.nodes: 4, cluster.time: '12:00:00'}, 5: {cluster.nodes: 4, cluster.time: '12:00:00'}}"
    site = ["cluster.partition=gpu", "cluster.constraint=h100&ib", "cluster.sbatch=[--reservation=mine]", "cluster.gpus_per_node=8",
            "cluster.gpu_type=h100", "cluster.tasks_per_node=0", "cluster.setup=[module load cuda]", "cluster.at_once=2",
            "cluster.env={NCCL_SOCKET_IFNAME: ib0}", "cluster.container=apptainer exec --nv image.sif", "train.batch_size=64"]  # fmt: skip
    found = arrays(made := study(tmp_path, rules, *site), made.runs())
    assert [[c.name for c, _ in array.runs] for array in found] == [["d01-s0", "d02-s0", "d03-s0"], ["d04-s0", "d05-s0"]]
    first, second = ("\n".join(array.head) for array in found)
    for line in ("--nodes=2", "--gres=gpu:h100:8", "--ntasks-per-node=8", "--partition=gpu", "--constraint=h100&ib", "--reservation=mine",
                 "--signal=B:USR1@90", "--array=0-2%2", "--time=00:30:00"):  # fmt: skip
        assert f"#SBATCH {line}\n" in first + "\n"
    assert "--nodes=4" in second and "--time=12:00:00" in second and "--array=0-1%2" in second
    config, run = made.runs()[4]
    script = run_script(config, run, "mini")
    for line in ("module load cuda || setup_failed 'module load cuda'", "export NCCL_SOCKET_IFNAME=ib0",
                 "export VS_NODES=4", "export VS_TASKS=8", "export VS_PYTHON=python",
                 "export VS_CONTAINER='apptainer exec --nv image.sif'", "export VS_LAUNCHER=srun"):  # fmt: skip
        assert f"\n{line}\n" in script
    for text in (script, array_script(found[0].head, found[0].runs), (launch_root() / "node.sh").read_text()):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""
    assert config_hash(config) == config_hash(study(tmp_path, rules.replace("4, c", "7, c"), "train.batch_size=64").runs()[4][0])
    assert not any("--gres" in line for line in header(load("model/d16", ["cluster=dev"]).cluster, "x", "y"))
    assert [seconds(text) for text in ("1-02:00:00", "00:30:00", "05:30")] == [93600, 1800, 330]


@pytest.mark.parametrize(("overrides", "words"), [
    (["cluster.tasks_per_node=3"], "batch_size 16 does not divide into 6 processes"),
    (["engine=single"], "engine single on 2 processes"),
    (["engine=single", "cluster.nodes=1", "cluster.launcher=pdsh"], "set cluster.launcher=srun"),
    (["cluster.time=120"], "leaves no time to train"),
    (["cluster.time=tomorrow"], "cluster.time"),
    (["cluster.launcher=mpirun"], "cluster.launcher"),
    (["engine=zero1", "cluster.launcher=slurm", "cluster.container=env"], "outside of cluster.container"),
    (["cluster.env={1A: b}"], "cluster.env"),
    (["study.budget_hours=1"], "needs a device"),
    (["study.grid={cluster.time: ['01:00:00']}"], "no key of cluster changes a result"),
    (["study.flops=[10]", "train.epochs=1", "train.steps=null", "train.warmup_epochs=0.5"], "warmup_epochs"),
])  # fmt: skip
def test_what_cannot_run_there_is_refused(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        check_cluster(study(tmp_path, *overrides))


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run needs none and writes nothing; a real one says what is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    submit(study(tmp_path).config, tmp_path / "runs", dry_run=True)
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-4" in out and "export VS_RUN=" in out and not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="sbatch: no such command here"):
        submit(study(tmp_path).config, tmp_path / "runs")


def test_the_end_of_a_life(tmp_path: Path) -> None:
    """What the job does next follows from what the run said last."""
    run, log = RunFolder(tmp_path), tmp_path / "launch.log"

    def life(state: str, reason: str = "", step: int = 0, text: str = "", code: int = 1) -> str:
        begin(run, "7_1")
        assert run.status()["state"] == "queued"
        if state != "queued":
            run.set_status(state, reason, step=step)  # type: ignore[arg-type]
        log.write_text(text)
        return end(run, code, log)

    assert life("preempted", "SIGTERM (saved 0.5 s later)", 10) == "again: SIGTERM (saved 0.5 s later)"
    assert life("complete", step=20) == "complete" and run.status()["job_seconds"] >= 0
    assert life("diverged", "step 3: loss", 3) == "diverged: step 3: loss"
    assert life("failed", "out of memory: ...", 4) == "failed: out of memory: ..."
    assert life("failed", "lost the connection to another rank: it was killed", 30).startswith("again: lost the connection")
    assert life("running", step=40, text="exits with return code = -9").startswith("again: a rank was ended by SIGKILL")
    assert run.status()["state"] == "preempted" and run.status()["idle_lives"] == 0
    (tmp_path / HOLD).touch()
    assert life("preempted", "asked to stop", 50).startswith("held")
    (tmp_path / HOLD).unlink()
    for _ in range(IDLE_LIVES - 1):
        assert life("queued", code=9) == "again: the processes ended without a word (exit code 9)"
    assert life("queued", code=9).startswith(f"failed: {IDLE_LIVES} lives") and run.status()["state"] == "failed"


def test_bad_nodes(tmp_path: Path) -> None:
    """Those whose ranks came less far than others', or said nothing; none where all came equally far."""
    for rank, (host, stages) in enumerate([("n1", 2), ("n1", 3), ("n2", 1), ("n3", 3)]):
        text = "".join(f"ok {stage}\n" for stage in ("here", "reached", "exchanged")[:stages])
        (tmp_path / f"check-{rank}").write_text(f"host {host}\n{text}")
    assert bad(tmp_path, ["n1", "n2", "n3"]) == "n1,n2"
    assert bad(tmp_path, ["n3", "n4"]) == "n4"
    assert bad(tmp_path, ["n1"]) == ""


def test_grids(tmp_path: Path) -> None:
    """All combinations, each with its name and its keys; engines by preset; FLOPs as epochs; a share of the data."""
    grid = "study.grid={train.base_lr: [0.01, 0.02], model.kernels: [on, off], engine: [ddp, zero2]}"
    runs = study(tmp_path, grid, "study.depths=[1,2]", "study.seeds=[0,1]").runs()
    assert len(runs) == 32 and len({run.path for _, run in runs}) == 32
    one = next(config for config, run in runs if run.path.name == "d02-s1-base_lr_0.02-kernels_off-engine_zero2")
    assert (one.train.base_lr, one.model.kernels, one.train.seed) == (0.02, "off", 1)
    assert (one.engine.name, one.engine.zero_stage) == ("deepspeed", 2)
    runs = study(tmp_path, "study.flops=[1e9,4e9]", "study.grid={data.fraction: [0.5]}", "study.depths=[1,3]").runs()
    assert [run.path.name for _, run in runs][:2] == ["d01-s0-fraction_0.5-c1e09", "d01-s0-fraction_0.5-c4e09"]
    for config, _ in runs:
        flops = count_flops(shape_of(config)).training * config.train_samples * (config.train.epochs or 0)
        assert flops == pytest.approx(1e9 if "1e09" in config.name else 4e9) and config.train_samples == 256 and config.train.steps is None
    steps = study(tmp_path, "study.grid={train.epochs: [1, 2]}", "study.depths=[1]").runs()
    assert [(config.train.epochs, config.train.steps) for config, _ in steps] == [(1, None), (2, None)]
    bad_grids = {"{train.base_lr: []}": "is empty", "{model.depth: [1]}": "cannot be swept", "{train.nonsense: [1]}": "nonsense"}
    for wrong, words in bad_grids.items():
        with pytest.raises(UserError, match=words):
            study(tmp_path, f"study.grid={wrong}").runs()


def test_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan on named devices counts those of each size's nodes, says how long it takes on more, and refuses what is over the budget."""
    paper = ["cluster=h100-8", "study.overrides={30: {cluster.nodes: 8}}", "study.depths=[16,30]"]
    rows = plan_table(Study(load("study/var_paper", paper), tmp_path))
    assert [row.devices for row in rows] == [16, 64] and rows[1].memory < rows[0].memory * 4
    assert "on 8," in (out := capsys.readouterr().out) and "on 256 NVIDIA H100" in out
    with pytest.raises(UserError, match=r"study.budget_hours: the plan needs [\d,]+ device-hours, 100 are allowed"):
        plan_table(Study(load("study/var_paper", [*paper, "study.budget_hours=100"]), tmp_path))


def test_the_page_of_plans_is_current() -> None:
    """docs/plans.md is what the presets say."""
    from var_scale.cluster.plan import page

    assert (launch_root().parent / "docs" / "plans.md").read_text() == page()
