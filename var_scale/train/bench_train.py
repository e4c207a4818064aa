"""`var-scale bench train`: how long a step of a config takes on its engine's processes, and where the time goes.

The command starts `python -m var_scale.train.bench_train FOLDER` on every rank through the engine's launcher; FOLDER holds config.yaml and
bench.json, and gets result.json (and trace.json) of rank 0.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from var_kernels.bench.run import describe

from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.cost.time import peak_of
from var_scale.data.loader import Ahead, Batch, TokenData
from var_scale.data.order import rank_slice
from var_scale.data.remote import located
from var_scale.files import write_json
from var_scale.machine import processor_name
from var_scale.model.vqvae import VQVAE
from var_scale.scales import length
from var_scale.train.engine.base import Engine
from var_scale.train.engine.build import build_engine
from var_scale.train.inputs import Images, Tokens, open_images
from var_scale.train.noise import StepNoise
from var_scale.train.schedule import Schedule
from var_scale.train.telemetry import peak_memory
from var_scale.train.untrained import untrained
from var_scale.train.world import World, leave, start_world

PHASES = ("data", "forward", "backward", "optimiser")
EXCHANGES = ("gloo:", "nccl:", "nccldevkernel")


class RandomTokens(Tokens):
    """Tokens without a file: random, the same on every rank's turn."""

    name = "random tokens"

    def __init__(self, config: Config, world: World):
        self.config, self.world, self.num_samples = config, world, config.train_samples
        self.length = length(config.tokenizer.patch_nums)

    def batch(self, step: int, micro_index: int = 0) -> Batch:
        """As a loader's."""
        c = self.config.train
        part = rank_slice(c.batch_size, self.world.size, self.world.rank, c.accumulate, micro_index)
        positions = step * c.batch_size + np.arange(c.batch_size)[part]
        rng = np.random.default_rng((step, micro_index, self.world.rank))
        tokens_BL = rng.integers(self.config.tokenizer.vocab_size, size=(len(positions), self.length))
        return Batch(tokens_BL, rng.integers(self.config.classes, size=len(positions)), positions)


def open_inputs(config: Config, world: World, vae: VQVAE) -> tuple[Tokens, Any]:
    """What the config trains on, or random tokens, and its loader."""
    c, data = config.train, config.data
    if data.online:
        images = open_images(config, data.images_train, world.size)
        found: Tokens = Images(images, world, vae, "", data.flip, config.tokenizer.encode_precision)
    elif data.tokens_train:
        found = Tokens(TokenData(located(data.tokens_train, data.cache, data.cache_gb)), world)
    else:
        found = RandomTokens(config, world)
        return found, found
    return found, Ahead(found.loader(c.seed, c.batch_size, world.size, world.rank, c.accumulate))


class Bench:
    """One rank's engine and data, and a step cut into phases."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        torch.manual_seed(config.train.seed)
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        module, vae = untrained(config, world.device)
        self.precision = module.precision
        self.engine: Engine = build_engine(config.engine, config.train, module)
        self.engine.module.train()
        self.data, self.loader = open_inputs(config, world, vae)
        self.schedule = Schedule.of(config.train, self.data.num_samples)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.number = 0

    def step(self, cut: bool = False) -> None:
        """One optimiser step. `cut`: wait for the device after every phase and add its time up."""
        c, world, engine = self.config.train, self.world, self.engine
        engine.set_rates(self.schedule.lr(0), self.schedule.wd(0))
        noise, began = StepNoise(self.config, self.number), time.perf_counter()

        def done(phase: str) -> None:
            nonlocal began
            if cut:
                wait(world)
                self.seconds[phase] += time.perf_counter() - began
                began = time.perf_counter()

        for micro in range(c.accumulate):
            engine.prepare(last=micro == c.accumulate - 1)
            batch = self.loader.batch(self.number, micro)
            tokens_BL, label_B = self.data.tensors(batch)
            extra = noise.of(batch, world)
            done("data")
            loss, _, _ = engine.module(tokens_BL, label_B, *extra)
            done("forward")
            engine.backward(loss)
            done("backward")
        engine.step()
        if engine.average:
            engine.average.update(engine)
        done("optimiser")
        self.number += 1


def wait(world: World) -> None:
    """For the device."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def timed(function: Callable[[], None], steps: int, world: World) -> list[float]:
    """Milliseconds of each call, all ranks together."""
    times = []
    for _ in range(steps):
        world.barrier()
        wait(world)
        began = time.perf_counter()
        function()
        wait(world)
        times.append(1e3 * (time.perf_counter() - began))
    return times


def exchange_seconds(bench: Bench, trace: Path | None) -> float:
    """Time of one step in exchanges between ranks, by the profiler (they overlap with other work); writes a trace of the step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.world.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        bench.step()
        wait(bench.world)
    if trace:
        profiler.export_chrome_trace(str(trace))
    total = 0.0
    for event in profiler.events() or ():
        if event.name.lower().startswith(EXCHANGES):
            total += max(event.self_device_time_total, event.time_range.elapsed_us() if event.name.startswith("gloo:") else 0)
    return total / 1e6


def measure(folder: Path, world: World) -> None:
    """What a rank does."""
    config, job = load(str(folder / "config.yaml")), json.loads((folder / "bench.json").read_text())
    bench = Bench(config, world)
    timed(bench.step, job["warmup"], world)
    times = sorted(timed(bench.step, job["steps"], world))
    timed(lambda: bench.step(cut=True), job["steps"], world)
    exchange = exchange_seconds(bench, folder / "trace.json" if job["trace"] and world.main else None)
    if not world.main:
        return
    step, flops, batch = times[len(times) // 2] / 1e3, count_flops(shape_of(config)), config.train.batch_size
    rate, peak = flops.training * batch / step, peak_of(world.device_name, bench.precision)
    cpu = {"device": f"CPU ({processor_name()})"} if world.device.type == "cpu" else {}
    write_json(folder / "result.json", {
        **describe(world.device), **cpu, "world": world.size, "precision": bench.precision, "engine": config.engine.model_dump(mode="json"),
        "choices": bench.engine.train_step_module().var.choices(), "batch": batch, "accumulate": config.train.accumulate,
        "data": bench.data.name, "step_ms": 1e3 * step,
        "step_ms_range": [times[0], times[-1]], "images_per_second": batch / step, "tokens_per_second": batch * flops.tokens / step,
        "flops_per_second": rate, "mfu": rate / (peak * world.size) if peak else None, "memory_bytes": peak_memory(world.device),
        "phases_ms": {name: 1e3 * seconds / job["steps"] for name, seconds in bench.seconds.items()}, "exchange_ms": 1e3 * exchange,
    })  # fmt: skip


if __name__ == "__main__":
    target = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
    engine = load(str(target / "config.yaml")).engine
    here = start_world(group=engine.name != "single", threads=engine.threads)
    measure(target, here)
    leave(here, 0)
