"""The sections `train`, `engine` and `log`: the recipe, and how one run is carried out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from var_scale.config.fields import (
    Beta,
    Fraction,
    NonNegative,
    Positive,
    Section,
    setting,
)


class TrainConfig(Section):
    """The recipe. Names in parentheses are the flags of the official trainer."""

    epochs: float | None = setting(None, "passes over the data (ep); give epochs or steps", gt=0)
    steps: Positive | None = setting(None, "optimiser steps; give epochs or steps")
    batch_size: Positive = setting(768, "samples per optimiser step, over all ranks (bs)")
    accumulate: Positive = setting(
        1,
        "micro-batches per step on each rank (ac); saves memory and does not change the result",
        identity=False,
    )
    base_lr: float = setting(1e-4, "peak learning rate per 256 samples of the batch (tblr)", gt=0)
    lr_schedule: str = setting(
        "lin0",
        "decay of the learning rate (sche): lin00, lin0 and lin stay at the peak for 0, 5 and 15 % "
        "of the run and then fall linearly; lin0.3: two lines; cos: cosine; exp: exponential",
        pattern=r"^(lin0|lin00|lin|cos|exp|lin0?\.\d+)$",
    )
    warmup_epochs: float | None = setting(
        None, "linear warm-up (wp); null or 0: a fiftieth of the run", ge=0
    )
    lr_start: float = setting(0.005, "first learning rate / peak (wp0)", ge=0, le=1)
    lr_end: float = setting(0.01, "last learning rate / peak (wpe)", ge=0, le=1)
    weight_decay: float = setting(0.05, "weight decay at the start (twd)", ge=0)
    weight_decay_end: float | None = setting(
        None, "weight decay at the end (twde); default: unchanged", ge=0
    )
    adam_betas: tuple[Beta, Beta] = setting((0.9, 0.95), "betas of AdamW")
    clip: float = setting(2.0, "largest norm of the gradient (tclip); 0: no clipping", ge=0)
    label_smoothing: Fraction = setting(0.0, "label smoothing (ls)")
    z_loss: float = setting(
        0.0, "weight of the squared log-sum-exp of the logits, often 1e-4", ge=0
    )
    scale_weights: Literal["token", "scale"] | list[NonNegative] = setting(
        "token",
        "loss weights of the scales; token: every token has the same weight, as in the official "
        "code; scale: every scale has the same weight; or a list with a factor per scale",
    )
    progressive: float = setting(
        0.0,
        "progressive training (pg): fraction of the run after which all scales are trained; also "
        "sets lr_schedule to lin<fraction>, as the official code does; 0: always all scales",
        ge=0,
        le=1,
    )
    progressive_start: int = setting(4, "index of the last scale trained at the start (pg0)", ge=0)
    progressive_warmup_epochs: float | None = setting(
        None,
        "progressive training: epochs over which the loss weight of a new scale grows to its full "
        "value (pgwp); null or 0: a 300th of the run",
        ge=0,
    )
    ema: float = setting(
        0.0,
        "decay of an exponential moving average of the weights, which is saved and evaluated "
        "beside the trained weights; 0: no average",
        ge=0,
        lt=1,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "precision of matrix products; auto: bf16 where the hardware is fast at it, else fp32",
    )
    tf32: bool = setting(True, "use TF32 in float32 matrix products on NVIDIA GPUs")
    seed: int = setting(0, "seed of the initial weights, the order of samples and dropout")
    eval_batch: Positive = setting(512, "samples per evaluation step on each rank", identity=False)
    eval_label_dropout: bool = setting(
        False, "drop labels in evaluations, as the official code does"
    )
    evals: Positive = setting(1, "evaluations per run, evenly spaced, the last one at its end")
    checkpoint_seconds: float = setting(600.0, "seconds between checkpoints", gt=0, identity=False)
    keep_checkpoints: Positive = setting(2, "number of checkpoints to keep", identity=False)
    keep_steps: list[Positive] = setting(
        [], "steps whose checkpoints are always kept", identity=False
    )
    keep_at: list[Annotated[float, Field(gt=0, le=1)]] = setting(
        [],
        "as keep_steps, but as fractions of the run, such as [0.1, 0.4]; the report shows samples "
        "from these checkpoints",
        identity=False,
    )
    nonfinite: Literal["skip", "rollback", "stop"] = setting(
        "skip",
        "what to do when the loss or the gradient is not finite; the step is never taken; skip: "
        "continue; rollback: load the last checkpoint and skip the samples used since; stop",
        identity=False,
    )
    nonfinite_limit: Positive = setting(
        10,
        "number of such steps in a row, or of rollbacks, after which the run stops as diverged",
        identity=False,
    )
    hang_seconds: float = setting(
        1800.0,
        "seconds without progress after which a run stops and names the ranks that hang",
        gt=0,
        identity=False,
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                "give exactly one of epochs and steps; set the other to null, such as "
                "train.epochs=null"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.accumulate} micro-batches"
            )
        if self.epochs and self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} must be less than the {self.epochs:g} "
                "epochs of the run"
            )
        if isinstance(self.scale_weights, list) and not sum(self.scale_weights):
            raise ValueError("scale_weights are all 0; give at least one scale a positive weight")
        return self


class EngineConfig(Section):
    """The engine that carries out the training step, and the number of its processes."""

    name: Literal["single", "ddp", "fsdp", "deepspeed"] = setting("single", "name of the engine")
    processes: int = setting(
        0, "processes here; 0: one per GPU, or 2 without a GPU (single: 1)", ge=0
    )
    threads: Positive = setting(1, "CPU threads per process, where there is no GPU")
    shard: int = setting(0, "fsdp: ranks that share one copy of the state (HSDP); 0: all", ge=0)
    reshard_after_forward: bool = setting(
        True, "fsdp: free gathered weights after the forward pass"
    )
    recompute: Literal["none", "mlp", "block"] = setting(
        "none",
        "activations that are recomputed in the backward pass: none, the hidden ones of the MLPs, "
        "or all inside each block",
    )
    recompute_every: Positive = setting(1, "recompute only in every n-th block")
    compile: bool = setting(False, "torch.compile every block; not with ZeRO stage 3")
    graphs: bool = setting(
        False,
        "record forward and backward pass as a CUDA graph, for steps that wait for the host; only "
        "engine single, bf16 or fp32, and neither recompute nor compile",
    )
    deepspeed: dict[str, Any] = setting(
        {},
        "DeepSpeed's own configuration, passed to it as it is: a map, or a JSON file such as "
        "engine/zero2.json",
    )

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.deepspeed and self.name != "deepspeed":
            raise ValueError(
                f"deepspeed is given, but name is {self.name}; use engine=zero1, or remove it"
            )
        if self.shard and self.name != "fsdp":
            raise ValueError(f"shard is given, but name is {self.name}; only fsdp uses shard")
        if self.compile and self.name == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "compile: torch.compile cannot follow the hooks in which ZeRO stage 3 gathers "
                "weights; use a lower stage or fsdp"
            )
        return self

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def sharded_stage(self) -> int:
        """The ZeRO stage with the same memory and communication as this engine: 3 for FSDP."""
        return 3 if self.name == "fsdp" else self.zero_stage


class LogConfig(Section):
    """How often metrics.jsonl is written, and where its rows are copied to."""

    every: Positive = setting(10, "steps between rows of metrics.jsonl")
    activations: bool = setting(False, "log root mean square and maximum of each block's output")
    tensorboard: bool = setting(True, "write TensorBoard files to log/")
    wandb: Literal["disabled", "offline", "online"] = setting("disabled", "mode of wandb")
    wandb_project: str = setting("var-scale", "project on wandb")
    wandb_chart: str | None = setting(
        None,
        "ENTITY/NAME of the chart made from configs/wandb/scaling-law.json; default: wandb's own "
        "scatter plot",
    )
