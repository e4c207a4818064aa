"""Sampling against the official loop, for `var-scale bench sample`: the same weights in both, each in a process of its own, in turns.

`python -m var_scale.evaluate.bench_sample JOB.json`: one side's images a second. The official side imports its code from a checkout, which
changes torch for the whole process; the notebook's autocast stands for its half precision.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from var_scale.errors import UserError
from var_scale.files import read_json, write_json
from var_scale.machine import processor_name
from var_scale.model.build import PATCH_NUMS_256, build_vae_var
from var_scale.model.graphs import Graphs
from var_scale.progress import say

HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CFG, TOP_K = 1.5, 1
"""greedy, so that both sides do the same and their pictures can be compared"""


def one_side(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every call, and the first picture in eighths, of the official loop or ours."""
    device = torch.device(job["device"])
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])
    sizes = {"V": 4096, "Cvae": 32, "ch": 160, "share_quant_resi": 4, "depth": job["depth"], "patch_nums": PATCH_NUMS_256}
    if job["official"]:
        sys.path.insert(0, job["official"])
        from models import build_vae_var as official_builder

        vae, var = official_builder(device=device, num_classes=1000, shared_aln=False, **sizes)
    else:
        vae, var = build_vae_var(device=device, **sizes)
    for module, name in ((vae, "vae"), (var, "var")):
        module.load_state_dict({key: value.to(device) for key, value in load_file(f"{job['weights']}/{name}.safetensors").items()})
        module.eval()
    half = HALF[job["precision"]]
    if not job["official"]:
        var.graphs = Graphs()
        var.to(half or torch.float32)
        vae.prepare_decoder(half or torch.float32)
    cast = torch.autocast(device.type, half, cache_enabled=True) if half and job["official"] else nullcontext()
    label_B, times = torch.arange(job["batch"], device=device) % 1000, []
    with torch.inference_mode(), cast:
        for _ in range(job["warmup"] + job["repeats"]):
            _wait(device)
            began = time.perf_counter()
            images = var.autoregressive_infer_cfg(B=job["batch"], label_B=label_B, cfg=CFG, top_k=TOP_K, g_seed=0)
            _wait(device)
            times.append(time.perf_counter() - began)
    return {"seconds": times[job["warmup"] :], "picture": images[0, :, ::32, ::32].float().cpu().flatten().tolist()}  # type: ignore[index]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_sample(
    checkout: Path, depth: int, batches: list[int], precisions: list[str], warmup: int, repeats: int, device: str, out: Path | None
) -> list[dict[str, Any]]:
    """Every batch and precision: both sides in turns, ours first, images a second by the median, and their ratio."""
    if not (checkout / "models" / "var.py").is_file():
        raise UserError(f"{checkout}: is not a checkout of the official code (no models/var.py); clone FoundationVision/VAR, give its path")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="var-scale-bench-") as name:
        torch.manual_seed(0)
        vae, var = build_vae_var(depth=depth)
        for module, file in ((vae, "vae"), (var, "var")):
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, f"{name}/{file}.safetensors")
        del vae, var
        for batch in batches:
            for precision in precisions:
                job = {"weights": name, "depth": depth, "batch": batch, "precision": precision, "warmup": warmup, "repeats": repeats,
                       "device": device, "threads": torch.get_num_threads()}  # fmt: skip
                sides = {side: _run(job | {"official": str(checkout.resolve()) if side == "official" else ""}, Path(name))
                         for side in ("ours", "official")}  # fmt: skip
                speed = {side: batch / median(found["seconds"]) for side, found in sides.items()}
                apart = max(abs(a - b) for a, b in zip(sides["ours"]["picture"], sides["official"]["picture"], strict=True))
                row = {"depth": depth, "batch": batch, "precision": precision, "images_per_second": speed, "repeats": repeats,
                       "ratio": speed["ours"] / speed["official"], "largest_difference": apart,
                       "seconds": {side: found["seconds"] for side, found in sides.items()},
                       "threads": job["threads"],
                       "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor_name(),
                       "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
                       "command": " ".join(["var-scale", *sys.argv[1:]]).replace(str(checkout), "CHECKOUT")}  # fmt: skip
                rows.append(row)
                say(f"d{depth} batch {batch} {precision}: ours {speed['ours']:.3g}, official {speed['official']:.3g} images/s, ratio "
                    f"{row['ratio']:.2f}; pictures differ by at most {apart:.2g}")  # fmt: skip
    if out:
        write_json(out, rows)
        say(f"written: {out}")
    return rows


def _run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    path, result = folder / "job.json", folder / "result.json"
    write_json(path, job | {"result": str(result)})
    result.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "var_scale.evaluate.bench_sample", str(path)], capture_output=True, text=True, check=False)
    if not result.exists():
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise UserError(f"bench sample: {'the official side' if job['official'] else 'our side'} ended without a result: {last}")
    return dict(read_json(result))


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    write_json(Path(given["result"]), one_side(given))
