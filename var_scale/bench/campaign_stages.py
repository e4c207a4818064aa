"""The stages of `var-scale bench campaign`, in their order: what is asked, how, and what was
predicted.

Predictions for an H200 are arithmetic from measured times of single kernels, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from var_kernels.bench.targets import FLOOR, MLP

from var_scale.bench.campaign import Stage, Value

TRAIN = "var-scale bench train model/{} engine=single train.batch_size={}{} --out {{out}}"
"""A size, a batch, and further settings, which follow `engine=single` because it sets all of
engine."""
OFFICIAL = (
    "var-scale bench official {{checkout}} model/{} engine=single train.batch_size=32 --out {{out}}"
)
SAMPLE = (
    "var-scale bench sample {{checkout}} --depth {} --batch 1,64 --precision bf16 --out {{out}}"
)
PASSES = ("forward", "backward")
KERNELS = "var-scale bench kernels --operators {} --shapes {} --forms {} --out {{out}}"


def _train(depth: int, batch: int, seconds: int, step: float, mfu: float, question: str) -> Stage:
    """A training step; `step` in milliseconds and `mfu` are predictions."""
    targets = {16: (500.0, 0.50), 30: (None, 0.55)} if batch == 32 else {}
    rate, utilisation = targets.get(depth, (None, None))
    return Stage(
        f"train-d{depth}-b{batch}",
        seconds,
        TRAIN.format(f"d{depth}", batch, ""),
        question,
        (
            Value("step, ms", lambda r: r["step_ms"], step),
            # Training does not wait for the device after each step.
            Value("in a row, ms", lambda r: r["in_a_row_ms"], step),
            Value("images/s", lambda r: 1e3 * batch / r["in_a_row_ms"], 1e3 * batch / step, rate),
            Value("MFU", lambda r: r["mfu"] * r["step_ms"] / r["in_a_row_ms"], mfu, utilisation),
            Value("GPU without work, ms", lambda r: r["in_a_row_ms"] - r["device_ms"]),
            Value("peak, GiB", lambda r: r["memory_bytes"] / 2**30),
        ),
    )


def _ratio(predicted: float, target: float | None) -> tuple[Value, ...]:
    return (
        Value("images/s, times official", lambda r: r["ratio"], predicted, target),
        Value("both from tokens, times official", lambda r: r["ratio_from_tokens"]),
    )


def _floor(of: str, operator: str, tokens: int) -> tuple[Value, ...]:
    """Smallest share of the floor that an operator reaches at any of the shapes with this number of
    tokens, forward and backward. `of`: what the floor is."""
    return tuple(
        Value(f"{what}, share of {of}", _share(operator, place), None, target)
        for place, (what, target) in enumerate(zip(PASSES, FLOOR[operator, tokens], strict=True))
    )


def _share(operator: str, place: int) -> Callable[[Any], float]:
    """The smallest share of the floor in the forward (0) or backward (1) pass."""

    def read(result: Any) -> float:
        from var_kernels.bench.run import floor_seconds

        return min(
            floor_seconds(row, place, result["ceilings"])
            / (1e-3 * row["forms"]["ours"][PASSES[place]]["p50"])
            for row in result["rows"]
            if row["operator"] == operator
        )

    return read


def _against(form: str, target: float | None = 1.0) -> Value:
    """Largest time of ours at any shape, forward and backward, as a multiple of another form's."""

    def read(result: Any) -> float:
        ratios = []
        for row in result["rows"]:
            ours, other = row["forms"]["ours"], row["forms"][form]
            # A form that is wrong or failed has no time, and then there is no value.
            what = "both" if "backward" in ours else "forward"
            ratios.append(ours[what]["p50"] / other[what]["p50"])
        return max(ratios)

    return Value(f"time, times {form}", read, None, target, at_least=False)


def _attention(tokens: int, shape: str) -> Stage:
    """Attention at a shape with this number of tokens."""
    return Stage(
        f"attention-{tokens}",
        90,
        KERNELS.format("block_attention", f"'{shape}'", "eager ours 'flex 128'"),
        f"which share of the product rate does attention reach at {tokens:,} tokens?",
        _floor("the product rate", "block_attention", tokens),
    )


def _sampled(batch: int, target: float, rate: float | None = None) -> tuple[Value, ...]:
    def of(result: Any) -> Any:
        return next(row for row in result if row["batch"] == batch)

    return (
        Value(f"batch {batch}: images/s", lambda r: of(r)["images_per_second"]["ours"], None, rate),
        Value(f"batch {batch}: times official", lambda r: of(r)["ratio"], None, target),
    )


def _launch(name: str) -> Value:
    return Value(f"{name}, µs", lambda r: r["microseconds"][name])


STEP = Value("step, ms", lambda r: r["step_ms"])
LAUNCHES = tuple(map(_launch, ("plain", "triton", "operator", "autograd")))

STAGES: tuple[Stage, ...] = (
    Stage(
        "launches",
        60,
        "var-scale bench launches --out {out}",
        "how long does the host take to launch an operation?",
        LAUNCHES,
    ),
    Stage(
        "tests-gpu",
        240,
        "python -m pytest -q -m gpu tests/kernels -p no:cacheprovider",
        "are the kernels and a d16 step right on this GPU?",
    ),
    _train(16, 32, 60, 69.7, 0.42, "how fast is a step at d16?"),
    Stage(
        "train-d16-b32-graphs",
        60,
        TRAIN.format("d16", 32, " engine.graphs=true"),
        "how much does a step at d16 gain from CUDA graphs?",
        (
            Value("in a row, ms", lambda r: r["in_a_row_ms"]),
            Value("images/s", lambda r: 32e3 / r["in_a_row_ms"]),
            Value("peak, GiB", lambda r: r["memory_bytes"] / 2**30),
        ),
    ),
    _train(30, 32, 120, 376, 0.49, "how fast is a step at d30?"),
    Stage(
        "official-d16",
        90,
        OFFICIAL.format("d16"),
        "how much faster than the official trainer, from images?",
        _ratio(2.9, 3.0),
    ),
    Stage(
        "official-d16-compiled",
        150,
        OFFICIAL.format("d16") + " --compile-official",
        "how much faster than the official trainer with its transformer compiled?",
        _ratio(2.0, None),
    ),
    Stage(
        "official-d30",
        150,
        OFFICIAL.format("d30"),
        "how much faster than the official trainer at d30?",
        _ratio(1.85, 2.0),
    ),
    _train(16, 96, 60, 200, 0.43, "does a larger batch help at d16?"),
    _train(20, 32, 80, 125, 0.44, "how fast is a step at d20?"),
    _train(24, 32, 90, 205, 0.46, "how fast is a step at d24?"),
    _train(30, 96, 150, 1072, 0.51, "does a batch of 96 fit at d30?"),
    _attention(680, "d30 B=32"),
    _attention(2240, "d30 B=8"),
    Stage(
        "adaln",
        60,
        KERNELS.format("gate_adaptive_layer_norm", "'d16 B=32' 'd30 B=32'", "eager compile ours"),
        "which share of the copy rate does AdaLN with the gate reach?",
        (*_floor("the copy rate", "gate_adaptive_layer_norm", 680), _against("compile")),
    ),
    Stage(
        "head",
        60,
        KERNELS.format("linear_cross_entropy", "'d16 B=32' 'd30 B=32'", "eager compile ours liger"),
        "is the head ever slower than torch.compile?",
        (*_floor("the floor", "linear_cross_entropy", 680), _against("compile")),
    ),
    Stage(
        "mlp",
        60,
        KERNELS.format("gelu_mlp", "'d16 B=32' 'd30 B=32'", "eager compile ours products"),
        "how near is the MLP to the time of its products?",
        (_against("compile"), _against("products", 1 / MLP)),
    ),
    Stage(
        "sample-d16",
        120,
        SAMPLE.format(16),
        "how fast is sampling against the official loop?",
        (*_sampled(1, 3.0, 1e3 / 12), *_sampled(64, 2.0, 400.0)),
    ),
    Stage(
        "sample-d30",
        150,
        SAMPLE.format(30),
        "how fast is sampling of d30 against the official loop?",
        (*_sampled(1, 3.0), *_sampled(64, 2.0)),
    ),
    Stage(
        "train-d16-compiled",
        120,
        TRAIN.format("d16", 32, " engine.compile=true"),
        "does torch.compile of the blocks help?",
        (STEP,),
    ),
    Stage(
        "save-d30",
        150,
        TRAIN.format("d30", 32, "") + " --steps 3 --save",
        "how long does training wait for a checkpoint of d30?",
        (
            Value("training waits, ms", lambda r: r["save"]["stall_ms"]),
            Value("on disk after, s", lambda r: r["save"]["seconds"]),
            Value("step meanwhile, ms", lambda r: r["save"]["steps_ms"]),
        ),
    ),
    Stage(
        "tests-kernels",
        240,
        "python -m pytest -q tests/kernels -n 8 -m 'not slow' -p no:cacheprovider",
        "do all tests of the kernels pass with the real compiler?",
    ),
    Stage(
        "study-tiny",
        240,
        "var-scale study run study/tiny engine=single study.parallel=1 --runs {work}",
        "does the embedded study work on a GPU?",
    ),
    Stage(
        "sweep-attention",
        240,
        "var-scale bench kernels --sweep --operators attention --out {out}",
        "which launch settings of attention are fastest?",
    ),
    # Without a GPU: the same commands on what a CPU can do.
    Stage(
        "cpu-launches",
        60,
        "var-scale bench launches --out {out}",
        "how long does the host take to call an operation?",
        tuple(value for value in LAUNCHES if value.name != "triton, µs"),
        gpu=False,
    ),
    Stage(
        "cpu-step-short",
        60,
        "var-scale bench train study/truth engine=single engine.threads=1 --depth 5 --out {out}",
        "how fast is a step of study/truth (d5) on one core?",
        (STEP,),
        gpu=False,
    ),
    Stage(
        "cpu-step-d8",
        240,
        "var-scale bench train model/d8 engine=single engine.threads=2 train.batch_size=2 "
        "train.precision=bf16 --steps 5 --out {out}",
        "how fast is a step with 680 tokens (d8, batch 2, bf16) on two cores?",
        (STEP,),
        gpu=False,
    ),
    Stage(
        "cpu-kernels",
        120,
        "var-scale bench kernels --forms eager ours --out {out}",
        "do the operators run on a CPU, and how long do calls of tiny shapes take beside eager?",
        (_against("eager", None),),
        gpu=False,
    ),
    Stage(
        "cpu-data",
        120,
        "var-scale bench data --out {out}",
        "how fast does one core read images and tokens?",
        gpu=False,
    ),
)
