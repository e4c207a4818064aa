"""`var-scale bench step`: one block and one training step, with and without the fused operators."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from var_kernels.bench.measure import measure
from var_kernels.bench.run import describe

from var_scale.bench.train import check_writable, write_result
from var_scale.bench.train_worker import timed
from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.model.attention import ScaleMask
from var_scale.model.block import fused
from var_scale.progress import say
from var_scale.train.assemble import untrained
from var_scale.train.step import TrainStep
from var_scale.train.world import World

REPEATS = 10
FORMS = {
    "plain": {"kernels": "off", "attention": "sdpa"},
    "fused": {"kernels": "auto", "attention": "auto"},
}


def bench_step(
    names: list[str], batch: int, overrides: list[str], out: Path | None
) -> list[dict[str, Any]]:
    """Time a block and a step of each config at `batch` samples, print them, and write JSON to
    `out`.

    Raises:
        UserError: `out` cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_writable(out)
    if device.type != "cuda":
        say(
            "no GPU: both forms are plain PyTorch unless model.kernels=on is set, so the times "
            "tell nothing about the kernels"
        )
    rows: list[dict[str, Any]] = []
    result = {**describe(device), "rows": rows}
    for name in names:
        for form, model in FORMS.items():
            keys = [f"model.{key}={value}" for key, value in model.items()]
            # A back-end that the user chose belongs to the fused form.
            changes = [*overrides, *keys] if form == "plain" else [*keys, *overrides]
            config = load(name, changes)
            row: dict[str, Any] = {"config": name, "form": form, "batch": batch}
            rows.append(row)
            try:
                row |= time_config(config, batch, device)
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
                gc.collect()
                torch.cuda.empty_cache()
                say(f"{name} batch {batch} {form:6} out of memory")
            write_result(result, out, quiet=True)
            if "failed" in row:
                continue
            memory = f"  peak {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else ""
            say(
                f"{name} batch {batch} {form:6} block {row['block_ms']:.3f} ms  "
                f"step {row['step_ms']:.2f} ms{memory}  "
                f"attention {row['attention']}, kernels {row['kernels']}"
            )
    write_result(result, out)
    return rows


def time_config(config: Config, batch: int, device: torch.device) -> dict[str, Any]:
    """Median milliseconds of a block's forward and backward pass and of a whole optimiser step at
    `batch` samples; on a GPU also the peak of memory in bytes."""
    train = config.train.model_copy(update={"accumulate": 1, "batch_size": batch})
    engine = config.engine.model_copy(update={"name": "single"})
    config = config.model_copy(update={"train": train, "engine": engine})
    stepper = untrained(config, World(0, 1, device), random_data=True)
    last = stepper.schedule.total_steps - 1  # progressive training: with all scales
    steps = timed(lambda: stepper.step(last), 2 + REPEATS, stepper.world)[2:]
    var = stepper.engine.train_step_module().var
    result: dict[str, Any] = {
        "block_ms": measure(one_block(stepper.engine.train_step_module(), batch), device).p50,
        "step_ms": sorted(steps)[REPEATS // 2],
        **var.choices(),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        stepper.step(last)
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def one_block(module: TrainStep, batch: int) -> Callable[[], None]:
    """A call that runs the first block forward and backward on random activations."""
    var, dtype = module.var, module.half_dtype or torch.float32
    block, device = var.blocks[0], next(module.parameters()).device
    x_BLC = torch.randn(batch, var.L, var.C, device=device, dtype=dtype, requires_grad=True)
    cond = var.shared_ada_lin(torch.randn(batch, var.C, device=device)).to(dtype).detach()
    mask = ScaleMask(var.patch_nums, var.attn_bias_for_masking, dtype)
    gradient, inputs = torch.randn_like(x_BLC), [x_BLC, *block.parameters()]
    deferred = fused(var.kernels, x_BLC)

    def run() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if deferred:
                # The fused form leaves its last branch to the next block. Added here, both forms
                # compute the same two sums and two norms.
                x, (branch, gate, _) = block(x_BLC, cond, mask, defer=True)
                x = x + branch * gate
            else:
                x = block(x_BLC, cond, mask)
        torch.autograd.grad(x, inputs, gradient, allow_unused=True)

    return run
