"""Whether the nodes of a job are fit: `python -m var_scale.cluster.nodes check LOGS` on every rank, then `bad LOGS HOST ...` on the first
node for the names of those that are not.

Each rank looks at its GPU (there, nearly empty, computing what it should) and at the folder of the run, reaches the first node, and takes
part in one exchange. What it finds is in LOGS/check-RANK: lines of `host HOST`, `ok STAGE`, `error ...`.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
from pathlib import Path

STAGES = ("here", "reached", "exchanged")
FREE_SHARE = 0.9  # of a GPU's memory
SECONDS = float(os.environ.get("VAR_SCALE_CHECK_SECONDS", "120"))


def check(logs: Path) -> None:
    """On every rank. Exits with 1 where something is wrong."""
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    report = open(logs / f"check-{rank}", "w", buffering=1)  # noqa: SIM115  # this process ends with it
    report.write(f"host {os.environ.get('SLURMD_NODENAME') or socket.gethostname().partition('.')[0]}\n")
    try:
        if size != (wanted := int(os.environ["VAR_SCALE_WORLD"])):
            raise RuntimeError(f"{size} ranks were started, the job asked for {wanted}")
        _here(int(os.environ["SLURM_LOCALID"]))
        report.write("ok here\n")
        _together(rank, size, report)
    except Exception as error:  # whatever is wrong with a node
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        report.write(f"error {text}\n")
        print(f"error: rank {rank} on {socket.gethostname()}: {text}", flush=True)
        os._exit(1)
    os._exit(0)


def _here(local_rank: int) -> None:
    """This rank's own GPU and PyTorch."""
    import torch

    if int(os.environ.get("VS_GPUS", "0")) == 0:
        return
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU is visible")
    device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
    free, total = torch.cuda.mem_get_info(device)
    if free < FREE_SHARE * total:
        raise RuntimeError(f"{(total - free) / 2**30:.1f} GiB of the GPU's memory are in use by others")
    a = torch.arange(1024 * 1024, device=device, dtype=torch.float32).reshape(1024, 1024).remainder_(7)
    wrong = (a @ a).sub_((a.cpu().double() @ a.cpu().double()).to(device)).abs().max()
    if float(wrong) > 1e-2:
        raise RuntimeError(f"the GPU computes wrongly (a product is off by {float(wrong):g})")


def _together(rank: int, size: int, report: object) -> None:
    """Reach the first node, then one exchange among all."""
    import torch
    import torch.distributed as dist

    if size == 1:
        return
    timeout = datetime.timedelta(seconds=SECONDS)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["VS_CHECK_PORT"]), size, rank == 0, timeout, wait_for_workers=False)
    store.set(f"rank{rank}", "here")
    store.wait([f"rank{other}" for other in range(size)], timeout)
    report.write("ok reached\n")  # type: ignore[attr-defined]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["SLURM_LOCALID"]) if torch.cuda.device_count() > 1 else 0)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("check", store), rank=rank, world_size=size, timeout=timeout)
    total = torch.tensor(float(rank), device="cuda" if cuda else "cpu")
    dist.all_reduce(total)
    if float(total) != size * (size - 1) / 2:
        raise RuntimeError(f"a sum over all ranks is {float(total):g}, it should be {size * (size - 1) / 2:g}")
    dist.barrier()
    report.write("ok exchanged\n")  # type: ignore[attr-defined]


def bad(logs: Path, hosts: list[str]) -> str:
    """Names of the nodes to leave out, with commas: those with a rank that came no further than another node's ranks did. Empty where all
    nodes came equally far: then it is not a node."""
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
