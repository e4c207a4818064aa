"""The environment variables by which launchers tell a process which rank it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

NAMES = frozenset(
    (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
        *("MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"),
        *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK_PID"),
        *("SLURM_NPROCS", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
        *("SLURM_LAUNCH_NODE_IPADDR", "VAR_SCALE_WORLD", "VAR_SCALE_LOGS", "VAR_SCALE_PARENT"),
    )
)
"""Set by torchrun, DeepSpeed, srun, or our own job script. SLURM_CONF and the number of the job are
not among them: they say nothing about ranks."""
PREFIXES = (
    *("SLURM_STEP_", "SLURM_SRUN_", "TORCHELASTIC_", "PET_"),
    *("OMPI_", "PMI_", "PMIX_", "PALS_", "MV2_COMM_WORLD_", "MPI_LOCAL"),
)
"""PET_ are the options of torchrun, as Kubeflow sets them."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of a launcher.

    A command that a user starts within a job, or from a notebook in one, inherits the variables of
    that job's ranks, which describe other processes.
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in NAMES and not name.startswith(PREFIXES)
    }


def place_on_node() -> tuple[int, int]:
    """The number of this rank among the ranks of its node, and their count; (0, 1) for a process
    that has joined no process group, whatever the environment says."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    given = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    count = int(next(filter(None, given), distributed.get_world_size()))
    return int(os.environ.get("LOCAL_RANK", "0")) % count, count
