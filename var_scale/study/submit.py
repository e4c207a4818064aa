"""The driver on SLURM: submits a study's data, runs and report, stops and retries runs.

Each run folder gets a job script, runs that ask for the same nodes are one job array, and
dependencies put the data before the runs and the report after them. Nothing waits here: `submit`
returns as soon as the jobs are queued. STUDY/slurm/jobs.json lists what was submitted; submitting
again submits only what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from var_scale.config.load import load, write_config
from var_scale.config.schema import Config
from var_scale.cost.time import DEVICES
from var_scale.errors import UserError
from var_scale.files import require_exists, write_json, write_text
from var_scale.jobs.job import HOLD
from var_scale.jobs.script import array_script, command_script, header, output, run_script
from var_scale.jobs.slurm import active_jobs, command, sbatch
from var_scale.progress import say
from var_scale.run_folder import RunFolder
from var_scale.study.checks import check_study_on_slurm, only_process, require_folder
from var_scale.study.plan import plan_table
from var_scale.study.stages import nothing_to_do
from var_scale.study.study import ENDED, Study, run_jobs
from var_scale.train.create import create_run

Runs = Sequence[tuple[Config, RunFolder]]
Active = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Array:
    """Runs that ask for the same nodes and time: one job array."""

    name: str
    runs: Runs
    head: list[str]
    """its #SBATCH lines"""

    @property
    def script(self) -> str:
        """The whole script."""
        return array_script(self.head, [run for _, run in self.runs])


def arrays(study: Study, runs: Runs) -> list[Array]:
    """Runs grouped by what they ask SLURM for."""
    groups: dict[str, list[tuple[Config, RunFolder]]] = {}
    for config, run in runs:
        # Without name and log the header holds only what the run asks for.
        groups.setdefault("\n".join(header(config.cluster, "", "")), []).append((config, run))
    made = []
    for number, members in enumerate(groups.values()):
        c = members[0][0].cluster
        name = f"train-{number}" if len(groups) > 1 else "train"
        span = f"0-{len(members) - 1}" + (f"%{c.at_once}" if c.at_once else "")
        log = output(study.folder / "slurm", f"{name}-%A_%a.out")
        made.append(Array(name, members, header(c, f"{study.config.name}-{name}", log, array=span)))
    return made


def side_script(study: Study, what: str) -> str:
    """The script of a job that runs a command of the study: `prepare` on a whole node, `report` on
    one GPU."""
    config, one = study.config, {"nodes": 1, "launcher": "srun"}
    if what.startswith("report") and config.cluster.gpus_per_node:
        # "0" asks for all memory of the node, which one GPU does not need.
        memory = config.cluster.memory if config.cluster.memory != "0" else "32G"
        one |= {"gpus_per_node": 1, "tasks_per_node": 1, "memory": memory}
    name = what.partition(" ")[0]
    return command_script(
        config.model_copy(update={"cluster": config.cluster.model_copy(update=one)}),
        f"{config.name}-{name}",
        output(study.folder / "slurm", f"{name}-%j.out"),
        [
            "study",
            *what.split(),
            str(study.folder / "study.yaml"),
            "--runs",
            str(study.folder.parent),
        ],
    )


def submit(config: Config, runs: Path, dry_run: bool = False) -> None:
    """Queue what is missing of a study: data, runs, report.

    Args:
        dry_run: print the plan and the scripts, and write nothing.

    Raises:
        UserError: a condition of `check_study_on_slurm` does not hold, or SLURM refuses a job.
    """
    study = Study(config, runs)
    if nothing_to_do(study):
        return
    check_study_on_slurm(study, dry_run)
    if dry_run:
        _show(study)
        return
    with only_process(study):
        _plan(study)
        _Submission(study).submit()


def _plan(study: Study) -> None:
    """Print the plan for the named device or the cluster's GPUs.

    No step is timed: the nodes are other machines.
    """
    gpu = (study.config.cluster.gpu_type or "").lower()
    if study.spec.device == "auto" and gpu in DEVICES:
        spec = study.spec.model_copy(update={"device": gpu})
        study = Study(study.config.model_copy(update={"study": spec}), study.folder.parent)
    if study.spec.device != "auto":
        plan_table(study)
    else:
        say("no times: name the device of the nodes, such as study.device=h100, to see them")


def _pending(study: Study, active: Active) -> Runs:
    """Runs that have neither ended nor a job."""
    return [
        (config, run)
        for config, run in study.runs()
        if run.status()["state"] not in ENDED and run.status().get("job") not in active
    ]


def _show(study: Study) -> None:
    """Print what would be submitted."""
    _plan(study)
    folder, submitted = study.folder / "slurm", study.submitted_jobs()
    pending = _pending(study, active_jobs(submitted.values()))
    if study.needs_data():
        say(f"\n# ---- {folder}/prepare.sh\n{side_script(study, 'prepare')}")
    for array in arrays(study, pending):
        names = ", ".join(config.name for config, _ in array.runs)
        say(f"# ---- {folder / array.name}.sh: {names}\n{array.script}")
    if pending:
        say(f"# ---- {pending[0][1].path}/job.sh\n{run_script(*pending[0], study.config.name)}")
    say(f"# ---- {folder}/report.sh\n{side_script(study, 'report --whole')}")
    say(f"{len(pending)} of {len(study.runs())} runs would be submitted; nothing was written")


class _Submission:
    """Submits a study's jobs in order and keeps their numbers in jobs.json."""

    def __init__(self, study: Study):
        self.study, self.folder = study, study.folder / "slurm"
        self.jobs = study.submitted_jobs()
        self.active = active_jobs(study.job_ids())

    def submit(self) -> None:
        """Data, then runs, then the report."""
        study = self.study
        write_config(study.config, study.folder / "study.yaml")
        study.keep_rates()
        for array in arrays(study, _pending(study, self.active)):
            # SLURM refuses a wrong request here, before anything is queued.
            self._sbatch(array.name, array.script, "--test-only")
        self._submit_data()
        pending = _pending(study, self.active)
        for array in arrays(study, pending):
            self._submit_array(array)
        self._submit_report(renew=bool(pending))
        if not pending:
            say("all runs have ended or are queued; nothing more was submitted")
        say(
            f"watch them with: var-scale study status {study.folder / 'study.yaml'} "
            f"--runs {study.folder.parent} --watch"
        )

    def _sbatch(self, name: str, script: str, *options: str) -> str:
        return sbatch(self.folder / f"{name}.sh", script, *options)

    def _keep(self, name: str, job: str) -> None:
        """Record a job's number."""
        self.jobs[name] = job
        write_json(self.folder / "jobs.json", self.jobs)

    def _submit_data(self) -> None:
        """Submit the job that makes images, tokenizer and tokens, where they are missing."""
        if self.study.needs_data() and self.jobs.get("prepare") not in self.active:
            self._keep("prepare", self._sbatch("prepare", side_script(self.study, "prepare")))
            say(f"prepare: job {self.jobs['prepare']} makes images, tokenizer and tokens")
        self.active |= active_jobs([self.jobs.get("prepare", "")])

    def _submit_array(self, array: Array) -> None:
        """Submit one array, which starts after the data exist."""
        for config, run in array.runs:
            create_run(config, run.path)
            (run.path / HOLD).unlink(missing_ok=True)
            write_text(run.path / "job.sh", run_script(config, run, self.study.config.name))
            run.log.mkdir(exist_ok=True)
        waits = []
        if self.jobs.get("prepare") in self.active:
            waits = [f"--dependency=afterok:{self.jobs['prepare']}", "--kill-on-invalid-dep=yes"]
        job = self._sbatch(array.name, array.script, "--hold", *waits)
        self._keep(array.name, job)
        for number, (config, run) in enumerate(array.runs):
            run.set_status("queued", job=f"{job}_{number}", idle_attempts=0)
            c = config.cluster
            say(f"{config.name}: job {job}_{number}, {c.nodes} x {c.tasks} processes")
        # Released only now: this process would otherwise mark a job as queued that already runs.
        command("scontrol", "release", job)

    def _submit_report(self, renew: bool) -> None:
        """Submit the job that writes the report after all runs.

        With `renew` a report job that is still queued is replaced, because it does not wait for the
        runs submitted now.
        """
        jobs, report = self.jobs, self.jobs.get("report", "")
        active = active_jobs(self.study.job_ids())
        if renew and report in active:
            command("scancel", report)
            active.pop(report)
        if report not in active:
            others = {job.partition("_")[0] for job in active} - {jobs.get("prepare"), report}
            after = [f"--dependency=afterany:{':'.join(sorted(others))}"] if others else []
            script = side_script(self.study, "report --whole")
            self._keep("report", self._sbatch("report", script, *after))
            say(
                f"report: job {jobs['report']}, after all runs; "
                f"it writes {self.study.report / 'report.html'}"
            )


# ---------------------------------------------------------------- stopping


def stop(study: Study, names: Sequence[str] = ()) -> None:
    """Stop all runs of a study, or those named, until the study is run again.

    A run that trains saves first; queued jobs are cancelled.
    """
    require_folder(study)
    _require_names(study, names)
    chosen = [(c, r) for c, r in study.runs() if not names or c.name in names]
    submitted = {} if names else study.submitted_jobs()
    jobs = {name: job for name, job in submitted.items() if name in ("prepare", "report")}
    active = active_jobs([*jobs.values(), *run_jobs(run for _, run in chosen)])
    for name, job in jobs.items():
        if job in active:
            command("scancel", job)
            say(f"{name}: job {job} cancelled")
    for config, run in chosen:
        status = run.status()
        job = status.get("job", "")
        if job in active and active[job][0] == "PENDING":
            command("scancel", job)
            if status["state"] not in ENDED:
                run.set_status("preempted", "stopped by `study stop`", cause="stopped")
            say(f"{config.name}: job {job} cancelled")
        elif job in active or status["state"] == "running":
            # STOP makes the ranks save and end. HOLD keeps the job from starting them again.
            (run.path / HOLD).touch()
            (run.path / "STOP").touch()
            say(f"{config.name}: asked to stop; it saves first")


def retry(study: Study, names: Sequence[str]) -> None:
    """Let runs that failed or diverged continue from their last checkpoint.

    They continue when the study is run again.
    """
    _require_names(study, names)
    for config, run in study.runs():
        if config.name in names:
            state = str(run.status()["state"])
            if state == "complete":
                raise UserError(
                    f"{config.name}: this run is complete; remove {run.path} to train it again",
                    code="study.run-complete",
                )
            jobs = run_jobs([run])
            if state in ("queued", "running") and set(jobs) & set(active_jobs(jobs)):
                raise UserError(
                    f"{config.name}: this run is {state}; stop it first with "
                    "`var-scale study stop`",
                    code="study.jobs-active",
                )
            (run.path / HOLD).unlink(missing_ok=True)
            run.set_status("created", f"was {state}; tried again", cause="retried")


def retry_folders(folders: Sequence[Path]) -> None:
    """`retry` for runs of one study by their folders; on SLURM they are submitted."""
    for run in folders:
        require_exists(run)
    folder = folders[0].resolve().parent
    spec = folder / "study.yaml"
    if any(run.resolve().parent != folder for run in folders) or not spec.exists():
        raise UserError(
            f"{folders[0]}: give folders of runs of one study, such as runs/tiny/d02-s0",
            code="study.run-unknown",
        )
    config = load(str(spec))
    study = Study(config, folder.parent)
    retry(study, [run.resolve().name for run in folders])
    if study.submitted_jobs():
        submit(config, folder.parent)
    else:
        say(f"continue them with: var-scale study run {spec} --runs {folder.parent}")


def _require_names(study: Study, names: Sequence[str]) -> None:
    known = [config.name for config, _ in study.runs()]
    if wrong := sorted(set(names) - set(known)):
        raise UserError(
            f"{wrong[0]}: no run of study {study.config.name} has this name; "
            f"its runs are {', '.join(known)}",
            code="study.run-unknown",
        )
