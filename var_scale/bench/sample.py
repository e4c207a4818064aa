"""Sampling against the official loop, for `var-scale bench sample`: the same weights in both,
alternating call by call.

Each side has its own process: importing the official code changes torch for the whole process. Its
half precision is the autocast of the official notebook.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from var_scale.bench.train import require_checkout, write_result
from var_scale.errors import UserError
from var_scale.machine import processor_name
from var_scale.model.build import build_vae_var
from var_scale.model.cpu import keep_freed_memory
from var_scale.model.graphs import Graphs
from var_scale.model.pretrained import write_weights
from var_scale.progress import say
from var_scale.scales import PATCH_NUMS_256
from var_scale.train.step import HALF

CFG, TOP_K = 1.5, 1
"""Greedy, so that both sides draw the same pictures, which can be compared."""


def one_side(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Our loop or the official one: every `next` is one call and yields its seconds and every 32nd
    pixel of the first picture."""
    device = torch.device(job["device"])
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])
    sizes = {
        "V": 4096,
        "Cvae": 32,
        "ch": 160,
        "share_quant_resi": 4,
        "depth": job["depth"],
        "patch_nums": PATCH_NUMS_256,
    }
    if job["official"]:
        sys.path.insert(0, job["official"])
        from models import build_vae_var as official_builder

        vae, var = official_builder(device=device, num_classes=1000, shared_aln=False, **sizes)
    else:
        vae, var = build_vae_var(device=device, **sizes)
    for module, name in ((vae, "vae"), (var, "var")):
        module.load_state_dict(
            {
                key: value.to(device)
                for key, value in load_file(f"{job['weights']}/{name}.safetensors").items()
            }
        )
        module.eval()
    half = HALF[job["precision"]]
    if not job["official"]:
        var.graphs = Graphs()
        var.to(half or torch.float32)
        vae.prepare_decoder(half or torch.float32)
        keep_freed_memory()
    label_B = torch.arange(job["batch"], device=device) % 1000
    while True:
        cast = (
            torch.autocast(device.type, half, cache_enabled=True)
            if half and job["official"]
            else nullcontext()
        )
        with torch.inference_mode(), cast:
            _wait(device)
            began = time.perf_counter()
            images = var.autoregressive_infer_cfg(
                B=job["batch"], label_B=label_B, cfg=CFG, top_k=TOP_K, g_seed=0
            )
            _wait(device)
            seconds = time.perf_counter() - began
        yield {
            "seconds": seconds,
            "picture": images[0, :, ::32, ::32].float().cpu().flatten().tolist(),
        }  # type: ignore[index]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_sample(
    checkout: Path,
    depth: int,
    batches: list[int],
    precisions: list[str],
    warmup: int,
    repeats: int,
    device: str,
    out: Path | None,
) -> list[dict[str, Any]]:
    """Time both sides for every batch size and precision.

    The speed is the median over calls, the ratio the median over pairs of calls.

    Raises:
        UserError: `checkout` is not the official code, or a side failed.
    """
    require_checkout(checkout, "models/var.py")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="var-scale-bench-") as name:
        torch.manual_seed(0)
        with torch.device(device):
            vae, var = build_vae_var(depth=depth)
        for module, file in ((vae, "vae"), (var, "var")):
            write_weights(Path(name) / f"{file}.safetensors", module)
        del vae, var, module
        if torch.cuda.is_initialized():  # the sides need the memory
            torch.cuda.empty_cache()
        for batch in batches:
            for precision in precisions:
                job = {
                    "weights": name,
                    "depth": depth,
                    "batch": batch,
                    "precision": precision,
                    "device": device,
                    "threads": torch.get_num_threads(),
                    "official": "",
                }
                with (
                    Side("ours", job) as ours,
                    Side("official", job | {"official": str(checkout.resolve())}) as theirs,
                ):
                    for _ in range(warmup + repeats):
                        ours.call()
                        theirs.call()
                seconds = {side.name: side.seconds[warmup:] for side in (ours, theirs)}
                speed = {side: batch / median(found) for side, found in seconds.items()}
                ratio = median(b / a for a, b in zip(*seconds.values(), strict=True))
                apart = max(abs(a - b) for a, b in zip(ours.picture, theirs.picture, strict=True))
                row = {
                    "depth": depth,
                    "batch": batch,
                    "precision": precision,
                    "images_per_second": speed,
                    "repeats": repeats,
                    "ratio": ratio,
                    "largest_difference": apart,
                    "seconds": seconds,
                    "threads": job["threads"],
                    "device": torch.cuda.get_device_name()
                    if device.startswith("cuda")
                    else processor_name(),
                    "torch": torch.__version__,
                    "date": time.strftime("%Y-%m-%d"),
                    "command": " ".join(["var-scale", *sys.argv[1:]]).replace(
                        str(checkout), "CHECKOUT"
                    ),
                }
                rows.append(row)
                write_result(rows, out, quiet=True)
                say(
                    f"d{depth} batch {batch} {precision}: ours {speed['ours']:.3g}, official "
                    f"{speed['official']:.3g} images/s, ratio {ratio:.2f}; pictures differ by at "
                    f"most {apart:.2g}"
                )
    write_result(rows, out)
    return rows


def _serve(job: dict[str, Any], connection: Connection) -> None:
    """The process of one side: one call for every message."""
    with redirect_stdout(None):
        try:
            calls = one_side(job)
            while connection.recv():
                connection.send(next(calls))
        except (EOFError, KeyboardInterrupt):
            pass
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


class Side:
    """The process of one side, and the seconds of its calls."""

    def __init__(self, name: str, job: dict[str, Any]):
        self.name, self.picture = name, list[float]()
        self.seconds: list[float] = []
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(job, other), daemon=True)
        self.process.start()
        other.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()

    def call(self) -> None:
        """Make one call."""
        try:
            self.connection.send("call")
            found = self.connection.recv()
        except (EOFError, ConnectionError):
            found = "its process ended"
        if isinstance(found, str):
            raise UserError(
                f"bench sample: {self.name} gave no result: {found}", code="bench.no-result"
            )
        self.seconds.append(found["seconds"])
        self.picture = found["picture"]
