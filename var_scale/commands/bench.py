"""Timings of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.commands.arguments import Commands, command, config_argument, family, load_config, number_in, whole_numbers
from var_scale.commands.sample import device_of
from var_scale.errors import UserError

if TYPE_CHECKING:
    pass


def bench_kernels(args: argparse.Namespace) -> None:
    """Time the fused operators against eager PyTorch, torch.compile and what else is installed."""
    from var_kernels.bench.run import run, run_sweep

    try:
        if args.sweep:
            run_sweep(args.operators, args.out)
            return
        run(args.operators, args.shapes, args.out, args.tune, args.forms)
    except ValueError as error:
        raise UserError(str(error)) from None


def bench_step(args: argparse.Namespace) -> None:
    """Time a block and a training step with the fused operators and without."""
    from var_scale.train.bench import bench_step

    bench_step(args.configs, args.batch, args.set, args.out)


def bench_official(args: argparse.Namespace) -> None:
    """Compare a training step with the official trainer's, from a checkout of its code, on this device."""
    from var_scale.cluster.bench import bench_official

    bench_official(load_config(args), args.checkout, args.steps, args.warmup, args.compile_official, args.out)


def bench_sample(args: argparse.Namespace) -> None:
    """Compare sampling with the official loop, from a checkout of its code, on this device: the same weights, greedy, in turns."""
    from var_scale.evaluate.bench_sample import bench_sample

    device = str(device_of(args))
    bench_sample(args.checkout, args.depth, args.batch, args.precision, args.warmup, args.repeats, device, args.out)


def bench_data(args: argparse.Namespace) -> None:
    """Time how fast one core makes training images of JPEGs, and reads tokens."""
    from var_scale.data.bench import bench_data

    bench_data(args.out)


def bench_train(args: argparse.Namespace) -> None:
    """Time a training step of a config on its engine's processes, and where its time goes; or with --dry-run what each rank would hold."""
    from var_scale.cluster.bench import bench_train, show_dry_run

    config = load_config(args)
    if config.study:
        from var_scale.config.load import run_config

        if args.depth is None:
            raise UserError(f"--depth: name a size of this study, such as {config.study.depths[0]}")
        config = run_config(config, args.depth, config.train.seed)
    if args.world and not args.dry_run:
        raise UserError("--world: is for --dry-run; a real step runs on engine.processes")
    if args.dry_run:
        show_dry_run(config, args.world or 1)
    else:
        bench_train(config, args.steps, args.warmup, args.out, args.trace)


def add(commands: Commands) -> None:
    """Add these commands."""
    bench = family(commands, "bench", "timings of this machine: kernels, data, step, train, official, sample")
    sub = command(bench, "data", bench_data)
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the results")
    sub = command(bench, "kernels", bench_kernels)
    sub.add_argument("--operators", nargs="*", default=[], metavar="NAME", help="such as block_attention; default all")
    sub.add_argument("--shapes", nargs="*", default=[], metavar="START", help="how names of shapes begin, such as d16; default all")
    sub.add_argument("--forms", nargs="*", default=[], metavar="START", help="how names of forms begin, such as eager ours; default all")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the results, and a roofline plot beside them")
    sub.add_argument("--tune", action="store_true", help="decide first which form of the MLP runs at each width, and keep that")
    sub.add_argument("--sweep", action="store_true", help="time the launch settings of each kernel instead, such as --operators attention")

    sub = command(bench, "step", bench_step)
    sub.add_argument("configs", nargs="+", help="config files or presets, such as model/d16 model/d30")
    sub.add_argument("--batch", type=number_in(int, 1), default=32, help="samples a step")
    sub.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to every config")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the results")

    sub = command(bench, "official", bench_official)
    sub.add_argument("checkout", type=Path, help="folder of the official code, FoundationVision/VAR")
    config_argument(sub)
    sub.add_argument("--steps", type=number_in(int, 1), default=10, help="steps to time")
    sub.add_argument("--warmup", type=number_in(int, 1), default=3, help="steps before them")
    sub.add_argument("--compile-official", action="store_true", help="torch.compile the official transformer (its tfast)")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the result")

    sub = command(bench, "sample", bench_sample)
    sub.add_argument("checkout", type=Path, help="folder of the official code, FoundationVision/VAR")
    sub.add_argument("--depth", type=number_in(int, 1), default=16, help="size of the model, official tokenizer, 256 pixels")
    sub.add_argument("--batch", type=whole_numbers, default=[1, 64], help="batch sizes, such as 1,64")
    sub.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"], help="of both sides")
    sub.add_argument("--repeats", type=number_in(int, 1), default=3, help="calls to time")
    sub.add_argument("--warmup", type=number_in(int, 0), default=2, help="calls before them; on a GPU the second records the graphs")
    sub.add_argument("--device", default=None, help="default the first GPU, else the CPU")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the results")

    sub = command(bench, "train", bench_train)
    config_argument(sub)
    sub.add_argument("--depth", type=number_in(int, 1), default=None, help="size of a study")
    sub.add_argument("--steps", type=number_in(int, 1), default=10, help="steps to time")
    sub.add_argument("--warmup", type=number_in(int, 1), default=3, help="steps before them")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the result")
    sub.add_argument("--trace", type=Path, default=None, metavar="FILE.json", help="write a profiler trace of one step (chrome://tracing)")
    sub.add_argument("--dry-run", action="store_true", help="no step: build the config for --world ranks and print what each would hold")
    sub.add_argument("--world", type=number_in(int, 1), default=None, help="ranks of the dry run; default 1")
