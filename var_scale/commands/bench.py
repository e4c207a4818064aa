"""`bench`: timings of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from var_scale.commands.arguments import (
    Commands,
    ConfigArguments,
    DeviceArguments,
    argument,
    command,
    family,
    folder_path,
    number_in,
    option,
    positive,
    whole_numbers,
)
from var_scale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BenchOutput:
    out: Path | None = option("write the results", None, metavar="FILE.json")


def bench_data(arguments: BenchOutput) -> None:
    """Time how fast one core turns JPEGs into training images, and how fast it reads tokens."""
    from var_scale.bench.data import bench_data

    bench_data(arguments.out)


@dataclass(frozen=True, kw_only=True)
class BenchKernels:
    operators: Sequence[str] = option(
        "such as block_attention; default: all", (), nargs="*", metavar="NAME"
    )
    shapes: Sequence[str] = option(
        "first letters of shapes, such as d16; default: all", (), nargs="*", metavar="START"
    )
    forms: Sequence[str] = option(
        "first letters of forms, such as eager; default: all", (), nargs="*", metavar="START"
    )
    out: Path | None = option("write the results and a roofline plot", None, metavar="FILE.json")
    sweep: bool = option("time the launch settings of each kernel instead", False)


def bench_kernels(arguments: BenchKernels) -> None:
    """Time the fused operators against eager PyTorch, torch.compile and other installed
    libraries."""
    from var_scale.bench.kernels import bench_kernels

    bench_kernels(
        list(arguments.operators),
        list(arguments.shapes),
        list(arguments.forms),
        out=arguments.out,
        sweep=arguments.sweep,
    )


def bench_launches(arguments: BenchOutput) -> None:
    """Time how long the host takes to launch one operation: of torch, of Triton, and one of the
    fused operators with its gradients."""
    from var_scale.bench.kernels import bench_launches

    bench_launches(arguments.out)


@dataclass(frozen=True, kw_only=True)
class BenchStep(BenchOutput):
    configs: Sequence[str] = argument(
        "config files or presets, such as model/d16 model/d30", nargs="+"
    )
    batch: int = option("samples per step", 32, type=positive)
    set: Sequence[str] = option("changes to every config", (), nargs="*", metavar="key=value")


def bench_step(arguments: BenchStep) -> None:
    """Time one block and one training step, with and without the fused operators."""
    from var_scale.bench.step import bench_step

    bench_step(list(arguments.configs), arguments.batch, list(arguments.set), arguments.out)


@dataclass(frozen=True, kw_only=True)
class _Timed(BenchOutput):
    steps: int = option("steps to time", 10, type=positive)
    warmup: int = option("steps before them that are not timed", 3, type=positive)


@dataclass(frozen=True, kw_only=True)
class _Checkout:
    checkout: Path = argument("folder of the official code, FoundationVision/VAR")


@dataclass(frozen=True, kw_only=True)
class BenchOfficial(_Timed, ConfigArguments, _Checkout):
    """The checkout comes before the config: fields of the last base class come first."""

    compile_official: bool = option(
        "torch.compile the official transformer (its flag tfast)", False
    )


def bench_official(arguments: BenchOfficial) -> None:
    """Compare a training step with the one of the official trainer, from a checkout of its code, on
    this device."""
    from var_scale.bench.train import bench_official

    bench_official(
        arguments.load(),
        arguments.checkout,
        arguments.steps,
        arguments.warmup,
        arguments.compile_official,
        arguments.out,
    )


@dataclass(frozen=True, kw_only=True)
class BenchSample(BenchOutput, DeviceArguments, _Checkout):
    depth: int = option("size of the model, with the official tokenizer", 16, type=positive)
    batch: Sequence[int] = option("batch sizes, such as 1,64", (1, 64), type=whole_numbers)
    precision: Sequence[str] = option(
        "precisions of both sides", ("fp32", "bf16"), nargs="+", choices=("fp32", "bf16", "fp16")
    )
    repeats: int = option("calls to time", 3, type=positive)
    warmup: int = option(
        "calls before them; the second records the graphs of a GPU", 2, type=number_in(int, 0)
    )


def bench_sample(arguments: BenchSample) -> None:
    """Compare sampling with the official loop, from a checkout of its code, on this device.

    Both use the same weights and greedy sampling, and their calls alternate."""
    from var_scale.bench.sample import bench_sample
    from var_scale.evaluate.source import choose_device

    bench_sample(
        arguments.checkout,
        arguments.depth,
        list(arguments.batch),
        list(arguments.precision),
        arguments.warmup,
        arguments.repeats,
        str(choose_device(arguments.device)),
        arguments.out,
    )


@dataclass(frozen=True, kw_only=True)
class BenchTrain(_Timed, ConfigArguments):
    depth: int | None = option("size, for a config of a study", None, type=positive)
    trace: Path | None = option(
        "profiler trace of one step (chrome://tracing)", None, metavar="FILE.json"
    )
    save: bool = option("also time a checkpoint, in a temporary folder", False)
    dry_run: bool = option("train no step; print what each of --world ranks would hold", False)
    world: int | None = option("ranks of the dry run; default: 1", None, type=positive)

    def __post_init__(self) -> None:
        if self.world and not self.dry_run:
            raise UserError(
                "--world: is only for --dry-run; training steps run on engine.processes",
                code="argument.combination",
            )


def bench_train(arguments: BenchTrain) -> None:
    """Time a training step of a config with its engine and processes, and show where the time goes.
    With --dry-run, print what each rank would hold."""
    from var_scale.bench.train import bench_train, show_dry_run
    from var_scale.study.single import config_of_size

    config = config_of_size(arguments.load(), arguments.depth)
    if arguments.dry_run:
        show_dry_run(config, arguments.world or 1)
    else:
        bench_train(
            config,
            arguments.steps,
            arguments.warmup,
            arguments.out,
            arguments.trace,
            arguments.save,
        )


@dataclass(frozen=True, kw_only=True)
class BenchCampaign:
    out: Path | None = option(
        "folder of the results; a later call continues it", None, type=folder_path, metavar="DIR"
    )
    seconds: float = option("time for this call", 560.0, type=number_in(float, 1))
    checkout: Path | None = option(
        "folder of the official code, for the stages that compare with it", None, type=folder_path
    )
    only: Sequence[str] = option("names of stages; default: all", (), nargs="*", metavar="NAME")
    list: bool = option("print the stages and run none", False)

    def __post_init__(self) -> None:
        if not (self.out or self.list):
            raise UserError(
                "--out: is missing; give a folder for the results, such as --out campaign/",
                code="argument.combination",
            )


def bench_campaign(arguments: BenchCampaign) -> None:
    """Measure this machine stage by stage within a bounded time; a later call continues.

    Each stage is a process of its own, and one that fails becomes a row of DIR/campaign.json."""
    from var_scale.bench.campaign import campaign, show, show_stages
    from var_scale.bench.campaign_stages import STAGES

    if arguments.out is None or arguments.list:
        show_stages(STAGES)
        return
    only, checkout = list(arguments.only), arguments.checkout
    rows = campaign(STAGES, arguments.out, arguments.seconds, checkout, only)
    show([s for s in STAGES if s.name in only or not only], rows)


def add(commands: Commands) -> None:
    """Add these commands."""
    bench = family(
        commands,
        "bench",
        "timings of this machine: campaign, kernels, launches, data, step, train, official, sample",
    )
    command(bench, "campaign", bench_campaign, BenchCampaign)
    command(bench, "data", bench_data, BenchOutput)
    command(bench, "kernels", bench_kernels, BenchKernels)
    command(bench, "launches", bench_launches, BenchOutput)
    command(bench, "step", bench_step, BenchStep)
    command(bench, "official", bench_official, BenchOfficial)
    command(bench, "sample", bench_sample, BenchSample)
    command(bench, "train", bench_train, BenchTrain)
