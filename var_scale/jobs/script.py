"""The scripts of SLURM jobs: of one run, of an array of runs, and of a single command."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from var_scale.config.load import config_root
from var_scale.config.schema import ClusterConfig, Config
from var_scale.errors import UserError
from var_scale.run_folder import RunFolder

SIGNAL_EARLY = 60
"""Seconds by which SLURM may send its signal before the requested time."""

SETUP_FAILED = """\
setup_failed() {
  trap - EXIT
  echo "error: cluster.setup: $1"
  [ -z "${VS_RUN:-}" ] || $VS_CONTAINER "$VS_PYTHON" -m var_scale.jobs.job fail "$VS_RUN" \\
    setup-failed "cluster.setup failed on $(hostname): $1"
  exit 2
}"""
"""Shell function that ends the job after a failed line of cluster.setup, and records it in the run
where the job has one (VS_RUN)."""

COMMAND = """\
trap 'kill -TERM $child' USR1 TERM  # the command finishes, or removes its unfinished files
{call} &
child=$!
while kill -0 $child 2> /dev/null; do wait $child; done
wait $child
code=$?
if [ $code = 85 ] || [ $code = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""
"""Runs one command in a job, and requeues the job if the command was stopped (exit code 85 or 130).
The script waits in a loop, because a signal ends `wait` before the command has ended."""


def launch_root() -> Path:
    """The folder launch/: beside the package in a checkout, inside it when installed."""
    root = config_root()
    return root.parent / ("launch" if root.name == "configs" else "_launch")


def output(folder: Path, name: str) -> str:
    """The value of --output for a file `name` in which SLURM replaces %j, %A and %a.

    Raises:
        UserError: the folder's name does not fit into an #SBATCH line (code `jobs.folder-name`).
    """
    if '"' in str(folder) or "\n" in str(folder):
        raise UserError(
            f"{folder}: a SLURM script cannot name this folder; choose one without quotes",
            code="jobs.folder-name",
        )
    return f"{str(folder.resolve()).replace('%', '%%')}/{name}"


def header(cluster: ClusterConfig, name: str, log: str, *, array: str = "") -> list[str]:
    """The #SBATCH lines of a job."""
    given = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    gpus = ":".join(filter(None, ("gpu", cluster.gpu_type, str(cluster.gpus_per_node))))
    lines = [
        f"--job-name={name}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.tasks}",
        f"--cpus-per-task={cluster.cpus_per_task}",
        f"--mem={cluster.memory}",
        f"--time={cluster.time}",
        *([f"--gres={gpus}"] if cluster.gpus_per_node else []),
        *(f"--{key}={value}" for key, value in given.items() if value),
        # B: only the batch script gets the signal, and asks the ranks or the command to stop.
        f"--signal=B:USR1@{SIGNAL_EARLY + cluster.stop_seconds}",
        "--requeue",
        "--open-mode=append",
        f'--output="{log}"',
        *([f"--array={array}"] if array else []),
    ]
    return ["#!/bin/bash", *(f"#SBATCH {line}" for line in (*lines, *cluster.sbatch))]


def variables(config: Config) -> list[str]:
    """The lines of a job that set its environment and run its setup."""
    c = config.cluster
    exports = dict(c.env)
    if not c.gpus_per_node:
        exports |= {"OMP_NUM_THREADS": str(config.engine.threads), "DS_ACCELERATOR": "cpu"}
    exports |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": ":backslashreplace"}
    setup = [f"{line} || setup_failed {shlex.quote(line)}" for line in c.setup]
    if setup:
        # A setup line may also end the shell itself, which only a trap notices.
        trap = "trap 'setup_failed \"it ended the job\"' EXIT"
        setup = [SETUP_FAILED, trap, *setup, "trap - EXIT"]
    return [
        f"cd {shlex.quote(os.getcwd())}",
        *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
        *setup,
        # No file of the working folder is imported in place of a module. The lines of the setup may
        # start scripts that import files beside them.
        "export PYTHONSAFEPATH=1",
    ]


def python(cluster: ClusterConfig) -> str:
    """The Python interpreter on the nodes."""
    return cluster.python or ("python" if cluster.container else sys.executable)


def seconds(limit: str) -> int:
    """Seconds of a time limit, [D-]HH:MM:SS or MM:SS."""
    days, _, clock = limit.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return 86400 * int(days or 0) + total


def launcher(config: Config) -> str:
    """The program that starts the ranks."""
    if config.cluster.launcher != "auto":
        return config.cluster.launcher
    return "deepspeed" if config.engine.name == "deepspeed" else "srun"


def run_script(config: Config, run: RunFolder, study: str) -> str:
    """The whole of RUN/job.sh: submit it with sbatch, or let an array start it."""
    c, path = config.cluster, run.path.resolve()
    values = {
        "RUN": path,
        "NODES": c.nodes,
        "TASKS": c.tasks,
        "CPUS": c.cpus_per_task,
        "GPUS": c.gpus_per_node,
        "LAUNCHER": launcher(config),
        "REQUEUES": c.requeues,
        "CHECK": int(c.check),
        "PYTHON": python(c),
        "CONTAINER": c.container or "",
        "LAUNCH": launch_root(),
        "ENV": " ".join(c.env),
    }
    lines = [
        *header(c, f"{study}-{config.name}", output(path / "log", "job-%j.out")),
        "",
        *(f"export VS_{key}={shlex.quote(str(value))}" for key, value in values.items()),
        *variables(config),
        "",
    ]
    return "\n".join(lines) + "\n" + (launch_root() / "job.sh").read_text()


def command_script(config: Config, name: str, log: str, arguments: Sequence[str]) -> str:
    """A job that runs `var-scale ARGUMENTS`, and comes back when a time limit stops it."""
    call = shlex.join([python(config.cluster), "-m", "var_scale.cli", *arguments])
    lines = [*header(config.cluster, name, log), "", *variables(config), ""]
    call = f"{config.cluster.container or ''} {call}".strip()
    return "\n".join([*lines, COMMAND.format(call=call)])


def array_script(head: Sequence[str], runs: Sequence[RunFolder]) -> str:
    """An array whose task K starts the job script of run K.

    SLURM keeps the script as it was submitted, and with it the list of runs.
    """
    folders = [f"  {shlex.quote(str(run.path.resolve()))}" for run in runs]
    return "\n".join(
        [*head, "", "runs=(", *folders, ")", 'exec bash "${runs[$SLURM_ARRAY_TASK_ID]}/job.sh"', ""]
    )
