"""A study on SLURM: a job script in every run's folder, sizes as job arrays, data before them and the report after them by dependency.

Nothing waits here: `submit` returns as soon as the jobs are queued. What was submitted is in STUDY/slurm/jobs.json; run again, only what is
missing is submitted.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_scale.cluster.job import HOLD
from var_scale.cluster.pipeline import ENDED, Study, check_config, check_runs, require_sources
from var_scale.config.load import config_root, write_config
from var_scale.config.schema import ClusterConfig, Config
from var_scale.cost.time import DEVICES
from var_scale.errors import UserError
from var_scale.files import read_json, write_json, write_text
from var_scale.progress import say
from var_scale.run_folder import RunFolder, take_lock

SIGNAL_EARLY = 60  # seconds by which SLURM may send its signal before the time that was asked for
ACTIVE = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SIGNALING", "STAGE_OUT"}


def launch_root() -> Path:
    """The folder of scripts: beside the package in a checkout, inside it when installed."""
    root = config_root()
    return root.parent / ("launch" if root.name == "configs" else "_launch")


def command(*argv: str) -> str:
    """Run one of SLURM's commands and return what it said. UserError with its own words if it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{argv[0]}: no such command here; run this where SLURM is, or try launch/dev-cluster") from None
    if done.returncode:
        said = " ".join(line.removeprefix(f"{argv[0]}: ").removeprefix("error: ") for line in (done.stderr or done.stdout).splitlines())
        raise UserError(f"{argv[0]}: {said.strip() or 'failed'}")
    return done.stdout


def active_jobs(ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """State and reason of those jobs and array tasks that SLURM still has, by name such as 12_3."""
    wanted = {job.partition("_")[0] for job in ids if job}
    if not wanted:
        return {}
    found = {}
    for line in command("squeue", "--me", "-h", "-r", "-o", "%i|%T|%r").splitlines():
        job, state, reason = line.split("|", 2)
        if job.partition("_")[0] in wanted and state in ACTIVE:
            found[job] = (state, reason)
    return found


# ---------------------------------------------------------------- scripts


def output(folder: Path, name: str) -> str:
    """For --output: a folder as it is, and a name in which SLURM puts numbers in place of %j, %A and %a. UserError for a folder that no
    #SBATCH line can hold."""
    if '"' in str(folder) or "\n" in str(folder):
        raise UserError(f"{folder}: SLURM's scripts cannot name this folder; choose one without quotes")
    return f"{str(folder.resolve()).replace('%', '%%')}/{name}"


def header(cluster: ClusterConfig, name: str, log: str, *, array: str = "") -> list[str]:
    """The #SBATCH lines of a job."""
    given = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint}
    gpus = ":".join(filter(None, ("gpu", cluster.gpu_type, str(cluster.gpus_per_node)))) if cluster.gpus_per_node else None
    lines = [f"--job-name={name}", f"--nodes={cluster.nodes}", f"--ntasks-per-node={cluster.tasks}",
             f"--cpus-per-task={cluster.cpus_per_task}", f"--mem={cluster.memory}", f"--time={cluster.time}"]  # fmt: skip
    lines += [f"--gres={gpus}"] if gpus else []
    lines += [f"--{key}={value}" for key, value in given.items() if value]
    lines += [f"--signal=B:USR1@{SIGNAL_EARLY + cluster.stop_seconds}", "--requeue", "--open-mode=append", f'--output="{log}"']
    lines += [f"--array={array}"] if array else []
    return ["#!/bin/bash", *(f"#SBATCH {line}" for line in (*lines, *cluster.sbatch))]


def variables(config: Config) -> list[str]:
    """Setup lines and environment of a job."""
    c = config.cluster
    exports = dict(c.env)
    if not c.gpus_per_node:
        exports |= {"OMP_NUM_THREADS": str(config.engine.threads), "DS_ACCELERATOR": "cpu"}
    exports["PYTHONUNBUFFERED"] = "1"
    setup = [f"{line} || setup_failed {shlex.quote(line)}" for line in c.setup]
    if setup:
        setup = [SETUP_FAILED, "trap 'setup_failed \"it ended the job\"' EXIT", *setup, "trap - EXIT"]
    return [f"cd {shlex.quote(os.getcwd())}", *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()), *setup]


SETUP_FAILED = """\
setup_failed() {
  trap - EXIT
  echo "error: cluster.setup: $1"
  [ -z "${VS_RUN:-}" ] || $VS_CONTAINER "$VS_PYTHON" -m var_scale.cluster.job fail "$VS_RUN" "cluster.setup failed on $(hostname): $1"
  exit 2
}"""


def python(cluster: ClusterConfig) -> str:
    """Python on the nodes."""
    return cluster.python or ("python" if cluster.container else sys.executable)


def seconds(limit: str) -> int:
    """Of a time limit, [D-]HH:MM:SS or MM:SS."""
    days, _, clock = limit.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return 86400 * int(days or 0) + total


def launcher(config: Config) -> str:
    """What starts the ranks."""
    if config.cluster.launcher != "auto":
        return config.cluster.launcher
    return "deepspeed" if config.engine.name == "deepspeed" else "srun"


def run_script(config: Config, run: RunFolder, study: str) -> str:
    """RUN/job.sh, whole: `sbatch` it by hand, or let an array start it."""
    c, path = config.cluster, run.path.resolve()
    values = {
        "RUN": path, "NODES": c.nodes, "TASKS": c.tasks, "CPUS": c.cpus_per_task, "GPUS": c.gpus_per_node, "LAUNCHER": launcher(config),
        "REQUEUES": c.requeues, "CHECK": int(c.check), "PYTHON": python(c), "CONTAINER": c.container or "", "LAUNCH": launch_root(),
        "ENV": " ".join(c.env),
    }  # fmt: skip
    mine = [f"export VS_{key}={shlex.quote(str(value))}" for key, value in values.items()]
    lines = [*header(c, f"{study}-{config.name}", output(path / "log", "job-%j.out")), "", *mine, *variables(config), ""]
    return "\n".join(lines) + "\n" + (launch_root() / "job.sh").read_text()


def side_script(study: Study, what: str) -> str:
    """A job that runs a command of the study: `prepare` on a whole node, `report` on one GPU. Stopped by a time limit it comes back."""
    config, one = study.config, {"nodes": 1, "launcher": "srun"}
    if what.startswith("report") and config.cluster.gpus_per_node:
        one |= {"gpus_per_node": 1, "tasks_per_node": 1, "memory": config.cluster.memory if config.cluster.memory != "0" else "32G"}
    cluster = config.cluster.model_copy(update=one)
    spec, runs = str(study.folder / "study.yaml"), str(study.folder.parent)
    call = [python(config.cluster), "-m", "var_scale.cli", "study", *what.split(), spec, "--runs", runs]
    name = what.partition(" ")[0]
    lines = [*header(cluster, f"{study.config.name}-{name}", log(study, f"{name}-%j.out")), "", *variables(config), ""]
    return "\n".join([*lines, SIDE.format(call=f"{config.cluster.container or ''} {shlex.join(call)}".strip())])


SIDE = """\
trap 'kill -TERM $child' USR1 TERM  # it finishes or removes its files
{call} &
child=$!
while kill -0 $child 2> /dev/null; do wait $child; done
wait $child
code=$?
if [ $code = 85 ] || [ $code = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def log(study: Study, name: str) -> str:
    """Where a job of the study writes."""
    return output(study.folder / "slurm", name)


def array_script(head: Sequence[str], runs: Sequence[tuple[Config, RunFolder]]) -> str:
    """An array whose task K starts the job script of run K. SLURM keeps the script as it was submitted, and with it the list."""
    folders = [f"  {shlex.quote(str(run.path.resolve()))}" for _, run in runs]
    return "\n".join([*head, "", "runs=(", *folders, ")", 'exec bash "${runs[$SLURM_ARRAY_TASK_ID]}/job.sh"', ""])


# ---------------------------------------------------------------- submitting


@dataclass(frozen=True)
class Array:
    """Runs with the same request of nodes and time: one job array."""

    name: str
    runs: list[tuple[Config, RunFolder]]
    head: list[str]


def arrays(study: Study, runs: Sequence[tuple[Config, RunFolder]]) -> list[Array]:
    """Runs grouped by what they ask of SLURM."""
    groups: dict[str, list[tuple[Config, RunFolder]]] = {}
    for config, run in runs:
        groups.setdefault("\n".join(header(config.cluster, "", "")), []).append((config, run))
    made = []
    for number, members in enumerate(groups.values()):
        c = members[0][0].cluster
        name = f"train-{number}" if len(groups) > 1 else "train"
        span = f"0-{len(members) - 1}" + (f"%{c.at_once}" if c.at_once else "")
        made.append(Array(name, members, header(c, f"{study.config.name}-{name}", log(study, f"{name}-%A_%a.out"), array=span)))
    return made


def check_cluster(study: Study) -> None:
    """Refuse what could only fail on the nodes."""
    for config, _ in study.runs():
        c = config.cluster
        if config.engine.name == "single" and c.world > 1:
            raise UserError(f"run {config.name}: engine single on {c.world} processes; set engine=zero1 or another, or cluster.nodes=1 and "
                            "cluster.tasks_per_node=1")  # fmt: skip
        if launcher(config) in ("pdsh", "slurm", "deepspeed") and config.engine.name == "single":
            raise UserError(f"run {config.name}: engine single is not started by {launcher(config)}; set cluster.launcher=srun")
        if c.container and launcher(config) in ("pdsh", "slurm"):
            raise UserError(f"run {config.name}: {launcher(config)} starts ranks outside of cluster.container; set cluster.launcher=srun "
                            "or deepspeed")  # fmt: skip
        batch, parts = config.train.batch_size, c.world * config.train.accumulate
        if batch % parts:
            raise UserError(f"run {config.name}: train.batch_size {batch} does not divide into {c.world} processes (cluster.nodes x "
                            f"cluster.tasks_per_node) x {config.train.accumulate} micro-batches; change one")  # fmt: skip
        if seconds(c.time) <= 2 * (SIGNAL_EARLY + c.stop_seconds):
            raise UserError(f"run {config.name}: cluster.time={c.time} leaves no time to train: SLURM's signal comes {SIGNAL_EARLY} + "
                            f"{c.stop_seconds} (cluster.stop_seconds) seconds before the end; give more time")  # fmt: skip
        check_config(config, c.world)


def check_classes(study: Study) -> None:
    """Refuse data of another number of classes, where they are there already."""
    from var_scale.data.manifest import MANIFEST_NAME, load_manifest

    data, config = study.with_files().data, study.config
    for folder in (data.images_train, data.images_val) if data.online else (data.tokens_train, data.tokens_val):
        if "://" not in str(folder) and (Path(str(folder)) / MANIFEST_NAME).exists():
            there = load_manifest(Path(str(folder)), check_files=False).num_classes
            if there != config.classes:
                raise UserError(f"{folder}: has {there} classes, the config says {config.classes}; set data.num_classes={there}")


def submit(config: Config, runs: Path, dry_run: bool = False) -> None:
    """Queue what is missing of a study: data, runs, report. `dry_run`: show the scripts and the cost alone."""
    study = Study(config, runs)
    check_runs(study)
    if study.complete():
        say(f"study {config.name} is complete, nothing to do. Report: {study.report / 'report.html'}")
        return
    require_sources(study)
    check_cluster(study)
    check_classes(study)
    if dry_run:
        _show(study)
        return
    lock = take_lock(study.folder / ".lock")
    if lock is None:
        raise UserError(f"{study.folder}: another process is running or submitting this study; wait for it or stop it")
    try:
        _plan(study)
        _submit(study)
    finally:
        os.close(lock)


def _plan(study: Study) -> None:
    """The plan, on the named device or the cluster's GPUs; nothing is timed here: the nodes are other machines."""
    from var_scale.cluster.plan import plan_table

    gpu = (study.config.cluster.gpu_type or "").lower()
    if study.spec.device == "auto" and gpu in DEVICES:
        spec = study.spec.model_copy(update={"device": gpu})
        study = Study(study.config.model_copy(update={"study": spec}), study.folder.parent)
    if study.spec.device != "auto":
        plan_table(study)
    else:
        say("no times: name the nodes' device for them, such as study.device=h100")


def _pending(study: Study, there: dict[str, tuple[str, str]]) -> list[tuple[Config, RunFolder]]:
    """Runs that are neither at their end nor queued."""
    return [(c, r) for c, r in study.runs() if r.status()["state"] not in ENDED and r.status().get("job") not in there]


def needs_data(study: Study) -> bool:
    """Whether images, tokenizer or tokens are still to be made."""
    data, c = study.with_files().data, study.config
    tokenizer = Path(str(study.with_files().tokenizer.weights)).exists() or "://" in str(c.tokenizer.weights)
    folders = (data.images_train, data.images_val) if data.online else (data.tokens_train, data.tokens_val)
    return not tokenizer or not all("://" in str(f) or (Path(str(f)) / "manifest.json").exists() for f in folders)


def _show(study: Study) -> None:
    """What would be submitted."""
    _plan(study)
    pending = _pending(study, active_jobs(_known(study).values()) if (study.folder / "slurm" / "jobs.json").exists() else {})
    if needs_data(study):
        say(f"\n# ---- {study.folder}/slurm/prepare.sh\n{side_script(study, 'prepare')}")
    for array in arrays(study, pending):
        script = study.folder / "slurm" / f"{array.name}.sh"
        say(f"# ---- {script}: {', '.join(c.name for c, _ in array.runs)}\n{array_script(array.head, array.runs)}")
    if pending:
        say(f"# ---- {pending[0][1].path}/job.sh\n{run_script(*pending[0], study.config.name)}")
    say(f"# ---- {study.folder}/slurm/report.sh\n{side_script(study, 'report --whole')}")
    say(f"{len(pending)} of {len(study.runs())} runs would be submitted; nothing was written")


def _known(study: Study) -> dict[str, str]:
    """Jobs by name as submitted last."""
    path = study.folder / "slurm" / "jobs.json"
    return dict(read_json(path, "list of jobs")) if path.exists() else {}


def _submit(study: Study) -> None:
    from var_scale.train.loop import create_run

    folder, jobs = study.folder / "slurm", _known(study)
    write_config(study.config, study.folder / "study.yaml")
    there = active_jobs([*jobs.values(), *(r.status().get("job", "") for _, r in study.runs())])
    for array in arrays(study, _pending(study, there)):  # what SLURM would refuse, before anything is queued
        _sbatch(study, array.name, array_script(array.head, array.runs), "--test-only")
    if needs_data(study) and jobs.get("prepare") not in there:
        jobs["prepare"] = _sbatch(study, "prepare", side_script(study, "prepare"))
        write_json(folder / "jobs.json", jobs)
        say(f"prepare: job {jobs['prepare']} makes images, tokenizer and tokens")
    there |= active_jobs([jobs["prepare"]]) if "prepare" in jobs else {}
    pending, waits = _pending(study, there), []
    if jobs.get("prepare") in there:
        waits = [f"--dependency=afterok:{jobs['prepare']}", "--kill-on-invalid-dep=yes"]
    for array in arrays(study, pending):
        for config, run in array.runs:
            create_run(config, run.path)
            (run.path / HOLD).unlink(missing_ok=True)
            write_text(run.path / "job.sh", run_script(config, run, study.config.name))
            run.log.mkdir(exist_ok=True)
        jobs[array.name] = _sbatch(study, array.name, array_script(array.head, array.runs), "--hold", *waits)
        write_json(folder / "jobs.json", jobs)
        for number, (config, run) in enumerate(array.runs):
            run.set_status("queued", job=f"{jobs[array.name]}_{number}", idle_lives=0)
            say(f"{config.name}: job {jobs[array.name]}_{number}, {config.cluster.nodes} x {config.cluster.tasks} processes")
        command("scontrol", "release", jobs[array.name])  # only now: a job that began at once would be called queued by this process
    active = active_jobs([*jobs.values(), *(r.status().get("job", "") for _, r in study.runs())])
    trained = sorted({job.partition("_")[0] for job in active if job.partition("_")[0] not in (jobs.get("prepare"), jobs.get("report"))})
    if pending and jobs.get("report") in active:
        command("scancel", jobs["report"])
        active.pop(jobs["report"])
    if jobs.get("report") not in active:
        after = [f"--dependency=afterany:{':'.join(trained)}"] if trained else []
        jobs["report"] = _sbatch(study, "report", side_script(study, "report --whole"), *after)
        say(f"report: job {jobs['report']}, after all runs; then {study.report / 'report.html'}")
    write_json(folder / "jobs.json", jobs)
    if not pending:
        say("all runs are at their end or queued; nothing more was submitted")
    say(f"watch them with: var-scale study status {study.folder / 'study.yaml'} --runs {study.folder.parent} --watch")


def _sbatch(study: Study, name: str, script: str, *options: str) -> str:
    """Write a script into the study's folder and submit it; its job's number."""
    path = study.folder / "slurm" / f"{name}.sh"
    write_text(path, script)
    try:
        return command("sbatch", "--parsable", *options, str(path)).strip().partition(";")[0]
    except UserError as error:
        raise UserError(f"{path}: {error}; change the keys of `cluster` for these runs (docs/slurm.md)") from None


# ---------------------------------------------------------------- stopping


def stop(study: Study, names: Sequence[str] = ()) -> None:
    """Stop all runs of a study, or those named: one that trains saves first, queued jobs are taken back. It stays stopped until the study
    is run again."""
    chosen = [(c, r) for c, r in study.runs() if not names or c.name in names]
    _require_names(study, names)
    jobs = {} if names else {key: job for key, job in _known(study).items() if key in ("prepare", "report")}
    there = active_jobs([*jobs.values(), *(r.status().get("job", "") for _, r in chosen)])
    for name, job in jobs.items():
        if job in there:
            command("scancel", job)
            say(f"{name}: job {job} taken back")
    for config, run in chosen:
        status = run.status()
        job = status.get("job", "")
        if job in there and there[job][0] == "PENDING":
            command("scancel", job)
            if status["state"] not in ENDED:
                run.set_status("preempted", "stopped by `study stop`")
            say(f"{config.name}: job {job} taken back")
        elif job in there or status["state"] == "running":
            (run.path / HOLD).touch()
            (run.path / "STOP").touch()
            say(f"{config.name}: asked to stop; it saves first")


def retry(study: Study, names: Sequence[str]) -> None:
    """Let runs that failed or diverged go on from their last checkpoint when the study is run again."""
    _require_names(study, names)
    for config, run in study.runs():
        if config.name in names:
            state: Any = run.status()["state"]
            if state == "complete":
                raise UserError(f"{config.name}: is complete; remove {run.path} to train it again")
            if state in ("queued", "running") and run.status().get("job") in active_jobs([run.status().get("job", "")]):
                raise UserError(f"{config.name}: is {state}; stop it first with `var-scale study stop`")
            (run.path / HOLD).unlink(missing_ok=True)
            run.set_status("created", f"was {state}; tried again")


def _require_names(study: Study, names: Sequence[str]) -> None:
    known = [config.name for config, _ in study.runs()]
    if wrong := sorted(set(names) - set(known)):
        raise UserError(f"{wrong[0]}: no run of study {study.config.name}; its runs are {', '.join(known)}")
