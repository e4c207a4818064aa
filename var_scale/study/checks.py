"""Every condition that has to hold before work begins: one function each, called by three lists.

The lists are `check_study_here`, `check_study_on_slurm` and `check_run_here`; the conditions on
data are in `data_checks`. A check writes nothing and raises a UserError that names the key or file
and the way to fix it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.jobs.local import process_count
from var_scale.jobs.script import SIGNAL_EARLY, launcher, seconds
from var_scale.jobs.slurm import active_jobs
from var_scale.locks import lock
from var_scale.machine import gpu_count
from var_scale.records.runs_csv import read_runs_csv
from var_scale.study.data_checks import (
    require_complete_shards,
    require_enough_samples,
    require_given_shards,
    require_image_size,
    require_known_samples,
    require_matching_classes,
    require_named_shards,
    require_one_source,
    require_sources,
    require_vocabulary,
    require_weights,
)
from var_scale.study.study import Study
from var_scale.train.create import require_same_run


def check_study_here(study: Study) -> None:
    """All that a study needs before it begins on this machine."""
    check_data_settings(study)
    require_sources(study)
    require_given_shards(study)
    require_known_samples(study)
    check_machine(study)
    require_matching_runs(study)
    require_matching_classes(study.with_files())


def check_study_on_slurm(study: Study, dry_run: bool = False) -> None:
    """All that a study needs before its jobs are submitted. A dry run downloads no weights."""
    check_data_settings(study)
    require_sources(study)
    require_known_samples(study)
    if study.config.tokenizer.weights and not dry_run:
        require_weights(study.config)
    if not dry_run:
        require_given_shards(study)
    require_matching_runs(study)
    require_matching_classes(study.with_files())
    for config, _ in study.runs():
        require_launchable(config)
        require_time_to_train(config)
        keys = "cluster.nodes x cluster.tasks_per_node"
        require_divisible_batch(config, config.cluster.world, keys)
        require_engine_settings(config, config.cluster.world)


def check_run_here(config: Config) -> None:
    """All that one run needs before its folder is created."""
    require_named_shards(config)
    require_weights(config)
    require_complete_shards(config)
    require_matching_classes(config)
    require_runnable_here(config)


def check_data_settings(study: Study) -> None:
    """The part of the lists that a plan needs too: the data settings agree with each other."""
    require_one_source(study)
    require_vocabulary(study)
    require_enough_samples(study)
    require_image_size(study)
    require_rates(study)


def check_machine(study: Study) -> None:
    """The part of the list for this machine that a plan of timed steps needs too."""
    if study.config.tokenizer.weights:
        require_weights(study.config)
    for config, _ in study.runs():
        require_runnable_here(config)
        require_single_lanes(study, config)


def require_runnable_here(config: Config) -> None:
    """This machine's devices can run the processes of a run."""
    processes = process_count(config.engine)
    require_trainable_attention(config)
    require_divisible_batch(config, processes, "engine.processes")
    require_gpus(processes)
    require_engine_settings(config, processes)


def require_rates(study: Study) -> None:
    """The table of the sweep of learning rates, which the report will read, is one."""
    if table := study.rates_table():
        read_runs_csv(table)


def require_folder(study: Study) -> None:
    """The study has a folder, in which its runs are looked for."""
    if not study.folder.is_dir():
        raise UserError(
            f"{study.folder}: this study does not exist; it was not run yet, or --runs is another "
            "folder",
            code="study.folder-missing",
        )


def require_untrained_tokenizer(config: Config, processes: int) -> None:
    """The config leaves the tokenizer to be trained, and its batch divides over the processes."""
    if config.tokenizer.weights:
        raise UserError(
            f"tokenizer.weights: {config.tokenizer.weights} is given, so there is nothing to "
            "train; set it to null",
            code="study.tokenizer-given",
        )
    if (batch := config.tokenizer.train.batch_size) % processes:
        raise UserError(
            f"tokenizer.train.batch_size: {batch} does not divide into {processes} processes; "
            "change it or --processes",
            code="study.batch-indivisible",
        )


def require_matching_runs(study: Study) -> None:
    """The run folders that exist hold runs of this study, trained on its data."""
    data_hash = study.data_hash()
    for config, run in study.runs():
        described = run.path / "run.json"
        if (
            data_hash
            and described.exists()
            and read_json(described, "run description")["data_hash"] != data_hash
        ):
            raise UserError(
                f"{run.path}: this run was trained on other tokens than the study has now; "
                "give the study another name, or remove the run",
                code="study.other-data",
            )
        require_same_run(config, run)


@contextmanager
def only_process(study: Study) -> Iterator[None]:
    """Hold the study's lock, so that one process at a time runs or submits it."""
    with lock(study.folder / ".lock") as held:
        if not held:
            raise UserError(
                f"{study.folder}: another process is running or submitting this study; "
                "wait for it or stop it",
                code="study.in-use",
            )
        yield


def require_no_jobs(study: Study) -> None:
    """SLURM has no jobs of the study, which would train the same runs."""
    known = study.job_ids() if study.submitted_jobs() and shutil.which("squeue") else []
    if active := sorted(active_jobs(known)):
        raise UserError(
            f"{study.folder}: SLURM has jobs of this study ({', '.join(active[:3])}); "
            "wait for them, or cancel them with `var-scale study stop`",
            code="study.jobs-active",
        )


def require_budget(study: Study, hours: float) -> None:
    """The plan's device-hours are within study.budget_hours."""
    limit = study.spec.budget_hours
    if limit and hours > limit:
        raise UserError(
            f"study.budget_hours: the plan needs {hours:,.0f} device-hours, but the budget is "
            f"{limit:,.0f}; leave out sizes, seeds or epochs, or raise the budget",
            code="study.over-budget",
        )


def require_divisible_batch(config: Config, processes: int, keys: str) -> None:
    """Batches divide over processes and micro-batches; `keys` set the number of processes."""
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch % (processes * parts):
        raise UserError(
            f"run {config.name}: train.batch_size {batch} does not divide into {processes} "
            f"processes ({keys}) x {parts} micro-batches (train.accumulate); change one of them",
            code="study.batch-indivisible",
        )


def require_trainable_attention(config: Config) -> None:
    """The attention back-end has a backward pass on this machine's devices."""
    if config.model.attention == "auto":
        return
    import torch

    from var_scale.model.attention import require_trainable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_trainable(config.model.attention, device)


def require_single_lanes(study: Study, config: Config) -> None:
    """Runs that train at the same time have one process each."""
    if study.spec.parallel > 1 and config.engine.name != "single":
        raise UserError(
            f"study.parallel: is {study.spec.parallel}, but the engine of run {config.name} is "
            f"{config.engine.name}, which may use the whole machine; set engine=single or "
            "study.parallel=1",
            code="study.parallel-engine",
        )


def require_gpus(processes: int) -> None:
    """A machine with GPUs has one for each process."""
    if 0 < (gpus := gpu_count()) < processes:
        raise UserError(
            f"engine.processes: {processes} processes, but this machine has {gpus} GPUs; use at "
            "most that many processes",
            code="study.gpus-missing",
        )


def require_engine_settings(config: Config, processes: int) -> None:
    """The engine's groups divide the processes, and DeepSpeed's keys agree with the recipe."""
    engine, train = config.engine, config.train
    if engine.shard and processes % engine.shard:
        raise UserError(
            f"engine.shard: {processes} processes do not divide into groups of {engine.shard}",
            code="study.shard-groups",
        )
    if engine.name == "deepspeed":
        from var_scale.train.engine.deepspeed_config import engine_config

        engine_config(engine.deepspeed, processes, train.batch_size, train.accumulate, train.clip)


def require_launchable(config: Config) -> None:
    """The launcher can start the run's engine on the cluster's nodes."""
    c, starter, single = config.cluster, launcher(config), config.engine.name == "single"
    problem = ""
    if single and c.world > 1:
        problem = (
            f"engine single on {c.world} processes; set engine=zero1 or another, or "
            "cluster.nodes=1 and cluster.tasks_per_node=1"
        )
    elif single and starter in ("pdsh", "slurm", "deepspeed"):
        problem = f"{starter} does not start engine single; set cluster.launcher=srun"
    elif c.container and starter in ("pdsh", "slurm"):
        problem = (
            f"{starter} starts ranks outside of cluster.container; set cluster.launcher=srun or "
            "deepspeed"
        )
    if problem:
        raise UserError(f"run {config.name}: {problem}", code="study.launcher-unfit")


def require_time_to_train(config: Config) -> None:
    """The time limit leaves time to train before SLURM's signal."""
    c = config.cluster
    if seconds(c.time) <= 2 * (SIGNAL_EARLY + c.stop_seconds):
        raise UserError(
            f"run {config.name}: cluster.time={c.time} leaves no time to train: SLURM's signal "
            f"comes {SIGNAL_EARLY} + {c.stop_seconds} (cluster.stop_seconds) seconds before the "
            "end; set a longer time",
            code="study.time-too-short",
        )
