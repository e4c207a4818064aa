"""`var-scale bench step`: one block and one training step, with the fused operators and without, on this device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from var_kernels.bench.measure import measure
from var_kernels.bench.run import describe, require_writable

from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.model.attention import ScaleMask
from var_scale.model.block import fused
from var_scale.progress import say
from var_scale.train.bench_train import timed
from var_scale.train.engine.single import SingleEngine
from var_scale.train.untrained import untrained
from var_scale.train.world import World

REPEATS = 10
FORMS = {"plain": {"kernels": "off", "attention": "sdpa"}, "fused": {"kernels": "auto", "attention": "auto"}}


def bench_step(names: list[str], batch: int, overrides: list[str], out: Path | None) -> list[dict[str, Any]]:
    """Time block and step of each config at `batch` samples, print them, and write JSON to `out`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        require_writable(out)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type != "cuda":
        say("no GPU here: both forms are plain PyTorch unless model.kernels=on is set; their times say nothing about the kernels")
    rows = []
    for name in names:
        for form, model in FORMS.items():
            keys = [f"model.{key}={value}" for key, value in model.items()]
            config = load(name, [*overrides, *keys] if form == "plain" else [*keys, *overrides])  # a back-end asked for is the fused form
            row = {"config": name, "form": form, "batch": batch, **time_config(config, batch, device)}
            rows.append(row)
            memory = f"  peak {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else ""
            say(f"{name} batch {batch} {form:6} block {row['block_ms']:.3f} ms  step {row['step_ms']:.2f} ms{memory}  "
                f"attention {row['attention']}, kernels {row['kernels']}")  # fmt: skip
    if out:
        out.write_text(json.dumps({**describe(device), "rows": rows}, indent=1) + "\n")
        say(f"written: {out}")
    return rows


def time_config(config: Config, batch: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds (median) of a block forward and backward, and of a whole optimiser step; peak of memory on a GPU."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    module, _ = untrained(config, device)
    var = module.var
    engine = SingleEngine(module, config.train.model_copy(update={"accumulate": 1}))
    module.train()
    tokens_BL = torch.randint(config.tokenizer.vocab_size, (batch, var.L), device=device)
    label_B = torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        engine.prepare(last=True)
        engine.backward(engine.module(tokens_BL, label_B)[0])
        engine.step()

    dtype = module.half_dtype or torch.float32
    block, x_BLC = var.blocks[0], torch.randn(batch, var.L, var.C, device=device, dtype=dtype, requires_grad=True)
    cond = var.shared_ada_lin(torch.randn(batch, var.C, device=device)).to(dtype).detach()
    mask, gradient = ScaleMask(var.patch_nums, var.attn_bias_for_masking, dtype), torch.randn_like(x_BLC)
    wanted, defer = [x_BLC, *block.parameters()], fused(var.kernels, x_BLC)

    def one_block() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if defer:  # with the last branch added here: the same two sums and two norms in both forms
                x, (branch, gate, _) = block(x_BLC, cond, mask, defer=True)
                x = x + branch * gate
            else:
                x = block(x_BLC, cond, mask)
        torch.autograd.grad(x, wanted, gradient, allow_unused=True)

    steps = timed(step, 2 + REPEATS, World(0, 1, 0, device))[2:]
    step_ms = sorted(steps)[REPEATS // 2]
    result: dict[str, Any] = {"block_ms": measure(one_block, device).p50, "step_ms": step_ms, **var.choices()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result
