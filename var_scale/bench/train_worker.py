"""What `var-scale bench train` runs on every rank: `python -m var_scale.bench.train_worker FOLDER`.

FOLDER holds config.yaml and bench.json, and gets result.json (and trace.json) of rank 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from var_kernels.bench.run import describe

from var_scale.config.load import load
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.cost.time import peak_of
from var_scale.files import read_json, remove_tree, write_json
from var_scale.machine import processor_name
from var_scale.train.assemble import untrained
from var_scale.train.save import CheckpointWriter
from var_scale.train.stepper import PHASES, Stepper
from var_scale.train.telemetry import peak_memory
from var_scale.train.world import World, leave, start_world

EXCHANGES = ("gloo:", "nccl:", "nccldevkernel")
"""How the profiler names exchanges between ranks."""
TOP = 30
"""Operations that are listed by their time."""


class Phases:
    """Adds up the seconds of each phase of a step, waiting for the device after each."""

    def __init__(self, world: World):
        self.world, self.seconds = world, dict.fromkeys(PHASES, 0.0)
        self.phase, self.began = "", 0.0

    def begin(self, phase: str) -> None:
        """A phase begins and the one before it ends; an empty name only ends it."""
        wait(self.world)
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] += now - self.began
        self.phase, self.began = phase, now


def wait(world: World) -> None:
    """Wait for the device."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def timed(function: Callable[[], object], steps: int, world: World) -> list[float]:
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


def in_a_row(function: Callable[[], object], steps: int, world: World) -> float:
    """Milliseconds per call of `steps` calls between two waits for the device: as in training, the
    host prepares the next step while the device computes."""
    world.barrier()
    wait(world)
    began = time.perf_counter()
    for _ in range(steps):
        function()
    wait(world)
    return 1e3 * (time.perf_counter() - began) / steps


def profiled(
    function: Callable[[], object], world: World, trace: Path | None
) -> tuple[float, float | None, list[dict[str, Any]]]:
    """Profile one step, and write a trace of it.

    Returns:
        Seconds in exchanges between ranks, which overlap with other work; milliseconds that the
        kernels of a GPU take together (None without one); and the TOP operations that take the most
        time of the device (without a GPU: of the host), each with its name, its number of calls and
        their milliseconds.
    """
    on_gpu = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        function()
        wait(world)
    if trace:
        profiler.export_chrome_trace(str(trace))
    exchange, times = 0.0, dict[str, list[float]]()
    for event in profiler.events() or ():
        if event.name.lower().startswith(EXCHANGES):
            # gloo exchanges on the host, where an event has no time on the device.
            host = event.time_range.elapsed_us() if event.name.startswith("gloo:") else 0
            exchange += max(event.self_device_time_total, host)
        # On a GPU kernels have events of their own beside the operations that launch them.
        # Annotations there, such as that of the optimiser, span kernels and would count twice.
        if not on_gpu or (event.device_type == DeviceType.CUDA and not event.is_user_annotation):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times.setdefault(event.name, []).append(own)
    largest = sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]
    top = [
        {"name": name[:120], "calls": len(each), "ms": round(sum(each) / 1e3, 4)}
        for name, each in largest
    ]
    device_ms = sum(map(sum, times.values())) / 1e3 if on_gpu else None
    return exchange / 1e6, device_ms, top


def saving(step: Callable[[], None], stepper: Stepper, folder: Path) -> dict[str, float]:
    """Time a checkpoint: how long the loop waits for it, the median of the steps that are taken
    until it is on disk (a GPU copies its weights within the first of them), and the time until
    then. The first checkpoint of a run also allocates host memory, so the second one is timed."""
    world, found = stepper.world, dict[str, float]()
    writer = CheckpointWriter(folder, world.rank, world.size, "bench", keep=1)
    for number, name in ((1, "first_stall_ms"), (2, "stall_ms")):
        world.barrier()
        wait(world)
        began = time.perf_counter()
        writer.save(stepper.engine, {"step": number})
        found[name] = 1e3 * (time.perf_counter() - began)
        times = timed(step, 1, world)
        # Several ranks would not agree on when to stop.
        while world.size == 1 and writer.thread and writer.thread.is_alive():
            times += timed(step, 1, world)
        writer.wait()
        found |= {
            "seconds": time.perf_counter() - began,
            "steps_ms": sorted(times)[len(times) // 2],
        }
        world.barrier()
        if world.main:  # two of a large model may not fit on the disk
            remove_tree(folder / f"step-{number:08d}")
    return found


def measure(stepper: Stepper, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Time the optimiser steps from `job["at"]` on, a share of the whole run; every rank calls it.

    The steps are those that training takes there, with the learning rate and, in progressive
    training, the scales of that place.
    """
    config, world, schedule = stepper.config, stepper.world, stepper.schedule
    first = min(int(job["at"] * schedule.total_steps), schedule.total_steps - 1)
    position = iter(range(first, 1 << 62))
    phases = Phases(world)

    def step() -> None:
        stepper.step(first, next(position))

    def step_by_phases() -> None:
        stepper.step(first, next(position), phases.begin)
        phases.begin("")

    timed(step, job["warmup"], world)
    times = sorted(timed(step, job["steps"], world))
    together = in_a_row(step, job["steps"], world)
    timed(step_by_phases, job["steps"], world)
    trace = folder / "trace.json" if job["trace"] and world.main else None
    exchange, device_ms, top = profiled(step, world, trace)
    saved = saving(step, stepper, folder) if job["save"] else None
    stage, _ = stepper.stage(first)
    seconds, flops = times[len(times) // 2] / 1e3, count_flops(shape_of(config).shown(stage))
    batch, module = config.train.batch_size, stepper.engine.train_step_module()
    rate, peak = flops.training * batch / seconds, peak_of(world.device_name, module.precision)
    cpu = {"device": f"CPU ({processor_name()})"} if world.device.type == "cpu" else {}
    return {
        **describe(world.device),
        **cpu,
        "world": world.size,
        "precision": module.precision,
        "engine": config.engine.model_dump(mode="json"),
        "choices": module.var.choices() | stepper.engine.choices(),
        "batch": batch,
        "accumulate": config.train.accumulate,
        "data": stepper.data.name,
        "step": first,
        "stage": stage,
        "step_ms": 1e3 * seconds,
        "step_ms_range": [times[0], times[-1]],
        "in_a_row_ms": together,
        "device_ms": device_ms,
        "images_per_second": batch / seconds,
        "tokens_per_second": batch * flops.tokens / seconds,
        "flops_per_second": rate,
        "mfu": rate / (peak * world.size) if peak else None,
        "memory_bytes": peak_memory(world.device),
        "phases_ms": {name: 1e3 * s / job["steps"] for name, s in phases.seconds.items()},
        "exchange_ms": 1e3 * exchange,
        "top": top,
        "save": saved,
    }


def main() -> None:
    """Join the other ranks, measure, and leave."""
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
    config = load(str(folder / "config.yaml"))
    world = start_world(group=config.engine.name != "single", threads=config.engine.threads)
    result = measure(untrained(config, world), read_json(folder / "bench.json"), folder)
    if world.main:
        write_json(folder / "result.json", result)
    leave(world, 0)


if __name__ == "__main__":
    main()
