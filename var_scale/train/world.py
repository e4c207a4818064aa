"""Rank, world size, device and precision of this process."""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from var_scale.errors import UserError
from var_scale.run_folder import EXIT_REQUEUE

WORLD_ENV = "VAR_SCALE_WORLD"
"""Environment variable with the number of processes that a job requests."""
FROM_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


@dataclass(frozen=True)
class World:
    """This process among all processes of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def reduce(
        self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> torch.Tensor:
        """All-reduce in place, if there are other processes; returns the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor to the device without waiting, through page-locked memory: a copy from
        pageable memory would wait."""
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """The rows (k,) of all ranks, (size, k)."""
        table = row.new_empty(self.size, *row.shape)
        if self.size == 1:
            return table.copy_(row)
        dist.all_gather_into_tensor(table.view(-1), row.contiguous())
        return table

    def largest(self, value: int) -> int:
        """The largest value of all ranks; one process alone does not wait for its device."""
        if self.size == 1:
            return int(value)
        return int(
            self.reduce(
                torch.tensor(float(value), dtype=torch.float64, device=self.device),
                dist.ReduceOp.MAX,
            )
        )

    def agree(self, value: int) -> int:
        """The value of rank 0, which is at least 0, on every rank."""
        return self.largest(value if self.main else 0)

    @property
    def device_name(self) -> str:
        """The product name of the GPU, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def start_world(group: bool, threads: int, timeout: float = 1800.0) -> World:
    """With `group`, read RANK, LOCAL_RANK and WORLD_SIZE (torchrun, deepspeed) or srun's variables,
    and join the process group. Without, this is the only process, whatever the environment says.

    Args:
        threads: CPU threads of this process, without a GPU.
        timeout: seconds after which an unfinished exchange is an error.

    Raises:
        UserError: another number of processes was started than the job requested.
    """
    if (
        group
        and "RANK" not in os.environ
        and "SLURM_STEP_ID" in os.environ
        and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    ):
        os.environ |= {
            name: os.environ[slurm] for name, slurm in FROM_SLURM.items() if slurm in os.environ
        }
    given = os.environ if group else {}
    rank, size = int(given.get("RANK", "0")), int(given.get("WORLD_SIZE", "1"))
    local_rank = int(given.get("LOCAL_RANK", "0"))
    if size != int(os.environ.get(WORLD_ENV, size)):
        raise UserError(
            f"{size} processes were started, but the job requested {os.environ[WORLD_ENV]}; the "
            "launcher did not reach all nodes",
            code="train.world-size",
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads)
    if group:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if size == 1 else "29500")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
        )
    return World(rank, size, device)


def leave(world: World, code: int) -> NoReturn:
    """End the process at once after all ranks are done. With gloo a normal interpreter exit aborts
    in a few percent of runs."""
    if code in (0, EXIT_REQUEUE):
        world.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fast_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 if the device is fast at it, otherwise fp32."""
    return ("bf16" if fast_bf16(device) else "fp32") if precision == "auto" else precision
