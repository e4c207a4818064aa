"""The section `cluster`: what a run requests from SLURM, and how its ranks are started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from var_scale.config.fields import Place, Positive, Section, TimeLimit, as_written, setting

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableValue = Annotated[str, BeforeValidator(lambda value: str(as_written(value)))]


class ClusterConfig(Section):
    """What a run requests from SLURM (`study run --on slurm`). No key here changes a result."""

    nodes: Positive = setting(1, "nodes of a run; a study can set them per size in study.overrides")
    gpus_per_node: int = setting(0, "GPUs of each node; 0: the run uses CPUs only", ge=0)
    gpu_type: str | None = setting(None, "type of GPU, requested as gpu:TYPE:N")
    tasks_per_node: int = setting(
        0, "processes per node; 0: one per GPU, or one without GPUs", ge=0
    )
    cpus_per_task: Positive = setting(8, "CPU cores of each process")
    memory: str = setting("0", "memory of each node, such as 200G; 0: all of it")
    time: TimeLimit = setting("24:00:00", "time limit of one attempt, [D-]HH:MM:SS")
    partition: str | None = setting(None, "partition")
    account: str | None = setting(None, "account")
    qos: str | None = setting(None, "quality of service")
    constraint: str | None = setting(None, 'required features of the nodes, such as "h100&ib"')
    sbatch: list[str] = setting([], "more #SBATCH options, such as --reservation=NAME")
    launcher: Literal["auto", "deepspeed", "torchrun", "srun", "pdsh", "slurm"] = setting(
        "auto",
        "program that starts the ranks; deepspeed, torchrun: one on every node; srun: srun starts "
        "every rank; pdsh: deepspeed over ssh; slurm: deepspeed's own use of srun; auto: deepspeed "
        "for the deepspeed engine, else srun",
    )
    setup: list[str] = setting([], "shell lines to run first, such as module load cuda")
    container: str | None = setting(
        None, "prefix of all commands, such as apptainer exec --nv IMAGE"
    )
    python: Place | None = setting(
        None,
        "Python interpreter on the nodes; default: the one that submits, or python in a container",
    )
    env: dict[VariableName, VariableValue] = setting(
        {}, "environment variables of the job, such as NCCL_SOCKET_IFNAME or VAR_SCALE_CACHE"
    )
    check: bool = setting(True, "test nodes and GPUs before each attempt, and exclude bad nodes")
    stop_seconds: Positive = setting(
        120,
        "seconds that a run may need to save before its time limit; SLURM's signal arrives one "
        "minute earlier",
    )
    requeues: int = setting(
        50, "requeues after time limits, preemptions and lost nodes, at most", ge=0
    )
    at_once: int = setting(0, "most runs of a job array at the same time; 0: no limit", ge=0)

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Processes of a run."""
        return self.nodes * self.tasks

    @property
    def devices(self) -> int:
        """GPUs of a run, or its nodes where they have no GPUs."""
        return self.nodes * (self.gpus_per_node or 1)
