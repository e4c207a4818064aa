"""Checks the nodes of a job before its ranks start.

`python -m var_scale.jobs.nodes check LOGS` runs on every rank: it tests the rank's GPU, reaches the
first node, and takes part in one exchange. LOGS/check-RANK gets the lines `host HOST`, `ok STAGE`
and `error ...`. Then `bad LOGS HOST ...` prints, on the first node, the nodes to leave out.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
from pathlib import Path
from typing import TextIO

STAGES = ("here", "reached", "exchanged")
"""What a rank reports after `ok`, in this order."""
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free before the run starts."""
SECONDS = float(os.environ.get("VAR_SCALE_CHECK_SECONDS", "120"))
"""How long a rank waits for the other ranks."""


def check(logs: Path) -> None:
    """Check this rank, and end its process: exit code 1 where something is wrong."""
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    report = open(logs / f"check-{rank}", "w", buffering=1)  # noqa: SIM115
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    report.write(f"host {host}\n")
    try:
        if size != (wanted := int(os.environ["VAR_SCALE_WORLD"])):
            raise RuntimeError(f"{size} ranks were started, the job requested {wanted}")
        _check_gpu(int(os.environ["SLURM_LOCALID"]))
        report.write("ok here\n")
        _exchange(rank, size, report)
    except Exception as error:  # a broken node can raise anything
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        report.write(f"error {text}\n")
        print(f"error: rank {rank} on {socket.gethostname()}: {text}", flush=True)
        os._exit(1)
    os._exit(0)  # at once: with a process group a normal exit can hang or abort


def _check_gpu(local_rank: int) -> None:
    """PyTorch starts, and this rank's GPU is visible, free and computes correctly."""
    import torch

    if int(os.environ.get("VS_GPUS", "0")) == 0:
        return
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU is visible")
    device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
    free, total = torch.cuda.mem_get_info(device)
    if free < FREE_SHARE * total:
        raise RuntimeError(
            f"other processes use {(total - free) / 2**30:.1f} GiB of the GPU's memory"
        )
    # Whole numbers up to 6: their products and sums are exact in float32 and in TF32, so that any
    # difference from the processor's result is a fault.
    a = (
        torch.arange(1024 * 1024, device=device, dtype=torch.float32)
        .reshape(1024, 1024)
        .remainder_(7)
    )
    wrong = (a @ a).sub_((a.cpu().double() @ a.cpu().double()).to(device)).abs().max()
    if float(wrong) > 1e-2:
        raise RuntimeError(f"the GPU computes wrong results (a product is off by {float(wrong):g})")


def _exchange(rank: int, size: int, report: TextIO) -> None:
    """Reach the first node, then sum one number over all ranks."""
    import torch
    import torch.distributed as dist

    if size == 1:
        return
    timeout = datetime.timedelta(seconds=SECONDS)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["VS_CHECK_PORT"]),
        size,
        rank == 0,
        timeout,
        wait_for_workers=False,
    )
    store.set(f"rank{rank}", "here")
    store.wait([f"rank{other}" for other in range(size)], timeout)
    report.write("ok reached\n")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(
            int(os.environ["SLURM_LOCALID"]) if torch.cuda.device_count() > 1 else 0
        )
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("check", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    total = torch.tensor(float(rank), device="cuda" if cuda else "cpu")
    dist.all_reduce(total)
    if float(total) != size * (size - 1) / 2:
        raise RuntimeError(
            f"a sum over all ranks is {float(total):g}, it should be {size * (size - 1) / 2:g}"
        )
    dist.barrier()
    report.write("ok exchanged\n")


def bad(logs: Path, hosts: list[str]) -> str:
    """Names of the nodes to leave out, separated by commas.

    These are the nodes whose ranks did not come as far as those of another node. Empty if all
    nodes came equally far: then no single node is at fault.
    """
    # A node came as far as its slowest rank; -1: none of its ranks reported anything.
    furthest = dict.fromkeys(hosts, len(STAGES) + 1)
    seen = set()
    for path in logs.glob("check-*"):
        lines = path.read_text().splitlines()
        host = lines[0].removeprefix("host ") if lines else ""
        if host in furthest:
            seen.add(host)
            furthest[host] = min(furthest[host], sum(line.startswith("ok ") for line in lines))
    furthest |= {host: -1 for host in hosts if host not in seen}
    best = max(furthest.values())
    return ",".join(host for host, stage in furthest.items() if stage < best)


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(Path(sys.argv[2]))
    print(bad(Path(sys.argv[2]), sys.argv[3:]))
