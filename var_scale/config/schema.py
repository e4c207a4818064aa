"""Every key of every YAML file, with its type, default and meaning. A wrong key or value stops the program (load.py)."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from var_scale.scales import PATCH_NUMS_256, grid, normal

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _switch(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _time(value: Any) -> Any:
    """YAML reads 24:00:00 as a number of seconds."""
    text = f"{value // 3600:02d}:{value // 60 % 60:02d}:{value % 60:02d}" if isinstance(value, int) else str(value)
    if not re.fullmatch(r"(\d+-)?\d{1,4}(:\d{2}){1,2}", text):
        raise ValueError("give a time limit as HH:MM:SS or D-HH:MM:SS")
    return text


def _grid(value: Any) -> Any:
    """A side, or height and width; squares as a number, so that equal schedules are equal."""
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError("give a side or [height, width], whole numbers from 1 up")
    return normal([value])[0]


Grid = Annotated[int | tuple[int, int], BeforeValidator(_grid)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced silently between kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LeavesConfig(Section):
    """The embedded image set: class-conditional dead leaves with a Zipf dictionary of species."""

    size: Grid = Field(32, description="image side in pixels, or [height, width]")
    num_classes: Positive = Field(10, description="classes")
    species: Positive = Field(512, description="entries of the species dictionary")
    leaves: Positive = Field(8, description="leaves drawn in an image")
    zipf: float = Field(1.1, gt=0, description="exponent of the species frequencies")
    seed: int = Field(0, ge=0, description="seed of the generator")
    train_images: Positive = Field(65536, description="training images to generate")
    val_images: Positive = Field(8192, description="validation images to generate")


class GrammarConfig(Section):
    """Tokens of a grammar whose smallest possible loss is known; the tokenizer's vocab_size must be symbols x rules."""

    symbols: Positive = Field(64, description="symbols; each belongs to one class")
    rules: Positive = Field(4, description="ways to rewrite a symbol")
    zipf: float = Field(1.0, ge=0, description="exponent of the rules' frequencies")
    num_classes: Positive = Field(8, description="classes; must divide the symbols")
    seed: int = Field(0, ge=0, description="seed of the grammar and its samples")
    train_samples: Positive = Field(65536, description="training samples to generate")
    val_samples: Positive = Field(4096, description="validation samples to generate")


class DataConfig(Section):
    """Where the images or tokens are: `tokens_*` (token shards), `images_*` (image shards), or made here: `leaves`, `grammar`."""

    leaves: LeavesConfig | None = Field(None, description="generate the embedded image set")
    grammar: GrammarConfig | None = Field(None, description="generate the embedded token set")
    images_train: str | None = Field(None, description="folder of image shards (manifest.json) for training")
    images_val: str | None = Field(None, description="folder of image shards for validation")
    tokens_train: str | None = Field(None, description="folder of token shards for training")
    tokens_val: str | None = Field(None, description="folder of token shards for validation")
    fraction: float | None = Field(None, gt=0, le=1, description="share of the training samples that is used, the same for all seeds")
    num_classes: Positive | None = Field(None, description="classes; must match the shards; default 1000, or those of the embedded set")
    views: Positive = Field(1, description="random crops of each training image that are tokenised; 1: the centre crop")
    flip: bool = Field(False, description="mirrored images too: twice the views, or half the images where `online`")
    resize: Literal["auto", "torch", "pillow"] = Field(
        "auto", description="who resizes images: PyTorch's Lanczos (2.12 and later; fast, at most 2 grey levels from Pillow) or Pillow, as "
        "the official code; auto: PyTorch where it can",
    )  # fmt: skip
    online: bool = Field(False, description="train from images_train and images_val, tokenised in the step, instead of tokens")
    decoders: int = Field(0, ge=0, description="threads that decode images in a process; 0: its share of the cores, at most 8")
    train_samples: Positive | None = Field(None, description="training samples, for planning before the shards exist; default ImageNet's")
    cache: str | None = Field(None, description="folder on the node's own disk for shards of URLs; default $VAR_SCALE_CACHE or ~/.cache")
    cache_gb: float = Field(500.0, gt=0, description="what that folder may hold, in GB; other data sets' shards make room")
    check: Literal["sha256", "size"] = Field(
        "sha256", description="what is compared with the manifest before a run begins: every byte of the shards (the ranks share "
        "the work), or their sizes alone",
    )  # fmt: skip
    samples_per_shard: Positive = Field(4096, description="samples in a shard written here")


class TokenizerTrainConfig(Section):
    """Training of a tokenizer: pixel losses, VQ loss with the tokenizer's beta, and where asked for perception and an adversary."""

    steps: Positive = Field(1500, description="optimiser steps")
    batch_size: Positive = Field(64, description="images a step")
    lr: float = Field(2e-3, gt=0, description="peak learning rate (AdamW, cosine)")
    lr_end: Fraction = Field(0.05, description="learning rate at the end / peak")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's")
    weight_decay: float = Field(0.005, ge=0, description="AdamW's")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    l2: float = Field(1.0, ge=0, description="weight of the mean squared error")
    l1: float = Field(0.2, ge=0, description="weight of the mean absolute error")
    pyramid: float = Field(0.5, ge=0, description="weight of the absolute error of a three-level Laplacian pyramid")
    perceptual: float = Field(0.0, ge=0, description="weight of LPIPS")
    vgg_weights: str | None = Field(None, description="torchvision's vgg16 weights, for LPIPS and for the Frechet distance in the report")
    lpips_weights: str | None = Field(None, description="the lin weights of LPIPS v0.1 for VGG")
    adversarial: float = Field(0.0, ge=0, description="weight of a patch discriminator (hinge), relative to the other losses")
    adversarial_start: Fraction = Field(0.22, description="share of the steps before it joins")
    ema: Beta = Field(0.0, description="decay of the averaged weights that are written at the end; 0: the last ones")
    flip: bool = Field(False, description="mirror half of the images")
    warmup_steps: Positive = Field(50, description="linear warm-up")
    plain_fraction: Fraction = Field(0.15, description="share of the steps trained without quantisation first")
    codebook_decay: Beta = Field(0.97, description="EMA decay of the codebook")
    dead_count: float = Field(0.3, gt=0, description="codes with a smaller EMA count are re-seeded from residuals of the batch")
    seed: int = Field(0, description="seed of weights and order")


class TokenizerConfig(Section):
    """The multi-scale VQVAE."""

    arch: Literal["cnn", "patch"] = Field("cnn", description="cnn: the official network; patch: a small one for small images")
    weights: str | None = Field(
        None, description="trained weights: a .pth or .safetensors file, or hf://OWNER/NAME/FILE; null: trained by the study"
    )
    patch_nums: tuple[Grid, ...] = Field(
        PATCH_NUMS_256, min_length=1, description="token grid of each scale: its side, or [height, width] where it is not square"
    )
    vocab_size: Positive = Field(4096, description="codebook entries V")
    latent_channels: Positive = Field(32, description="channels of a code vector, Cvae")
    share_quant_resi: int = Field(4, ge=0, description="number of shared phi convolutions; 0: one a scale, 1: one for all")
    quant_resi: float = Field(0.5, description="weight of the phi convolution")
    beta: float = Field(0.25, description="commitment weight")
    ch: Positive = Field(160, description="base channels of the cnn")
    patch: Positive = Field(8, description="pixels a side of one latent cell (arch: patch)")
    hidden: Positive = Field(128, description="channels of arch: patch")
    encode_precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="numerics of the encoder when tokens are made; all but fp32 change some tokens, the share is printed"
    )
    train: TokenizerTrainConfig = TokenizerTrainConfig()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images it takes: 16 a latent cell for the official network."""
        height, width = grid(self.patch_nums[-1])
        pixels = self.patch if self.arch == "patch" else 16
        return height * pixels, width * pixels

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        for before, after in pairwise(map(grid, self.patch_nums)):
            if before == after or before[0] > after[0] or before[1] > after[1]:
                raise ValueError("patch_nums must rise: no side may fall from one scale to the next, and one must grow")
        if self.vocab_size > 65536:
            raise ValueError("vocab_size must be at most 65536 (tokens are stored as uint16)")
        return self


class ModelConfig(Section):
    """The VAR transformer. Width and heads follow depth unless they are given."""

    depth: Positive = Field(16, description="blocks d of a single run; a study takes them from study.depths")
    width: Positive | None = Field(None, description="channels C; default width_per_depth x depth")
    width_per_depth: Positive = Field(64, description="C / d of the ladder; 64 is the paper's")
    heads: Positive | None = Field(None, description="attention heads; default depth")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP / C")
    shared_aln: bool = Field(False, description="one AdaLN linear shared by all blocks")
    attn_l2_norm: bool = Field(True, description="L2-normalised queries and keys with a learned scale")
    cond_drop_rate: Fraction = Field(0.1, description="label dropout for classifier-free guidance")
    drop_path_rate: Fraction | None = Field(None, description="largest drop-path rate; default 0.1 d / 24")
    init_adaln: float = Field(0.5, description="scale of the AdaLN weights at the start")
    init_adaln_gamma: float = Field(1e-5, description="scale of the gate weights at the start")
    init_head: float = Field(0.02, description="scale of the head weights at the start")
    init_std: float = Field(-1.0, description="standard deviation at the start; negative: sqrt(1 / 3C)")
    attention: Literal["auto", "triton", "flex", "flash", "xformers", "blocks", "sdpa"] = Field(
        "auto", description="attention back-end; auto: triton on NVIDIA GPUs from Ampere on, else sdpa"
    )
    kernels: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="fused AdaLN, MLP and cross-entropy; auto: on NVIDIA GPUs from Ampere on; on: everywhere, in PyTorch on CPUs"
    )

    @property
    def channels(self) -> int:
        """Width C."""
        return self.width or self.width_per_depth * self.depth

    @property
    def num_heads(self) -> int:
        """Attention heads H."""
        return self.heads or self.depth

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.channels % self.num_heads:
            text = f"width {self.channels} (depth {self.depth}) does not divide into {self.num_heads} heads"
            raise ValueError(f"{text}; change width, heads or depth")
        return self


class TrainConfig(Section):
    """The recipe. Names in brackets are the official trainer's flags."""

    epochs: float | None = Field(None, gt=0, description="passes over the data (ep); give epochs or steps")
    steps: Positive | None = Field(None, description="optimiser steps; give epochs or steps")
    batch_size: Positive = Field(768, description="samples an optimiser step over all ranks (bs)")
    accumulate: Positive = Field(1, description="micro-batches a step on each rank (ac); changes memory, not the run")
    base_lr: float = Field(1e-4, gt=0, description="learning rate at batch 256 (tblr); the peak is base_lr x batch_size / 256")
    lr_schedule: str = Field(
        "lin0", pattern=r"^(lin0|lin00|lin|cos|exp|lin0?\.\d+)$",
        description="decay (sche): lin00, lin0, lin stay at the peak for 0, 5, 15 % and fall linearly; lin0.3: two lines; cos; exp",
    )  # fmt: skip
    warmup_epochs: float | None = Field(None, ge=0, description="linear warm-up (wp); none or 0: a fiftieth of the run")
    lr_start: float = Field(0.005, ge=0, le=1, description="first learning rate / peak (wp0)")
    lr_end: float = Field(0.01, ge=0, le=1, description="last learning rate / peak (wpe)")
    weight_decay: float = Field(0.05, ge=0, description="weight decay at the start (twd)")
    weight_decay_end: float | None = Field(None, ge=0, description="weight decay at the end (twde); default the same")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas")
    clip: float = Field(2.0, ge=0, description="largest gradient norm (tclip); 0: no clipping")
    label_smoothing: Fraction = Field(0.0, description="label smoothing (ls)")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-sum-exp of the logits in the loss; 1e-4 is usual")
    scale_weights: Literal["token", "scale"] | list[NonNegative] = Field(
        "token", description="loss weight of the scales: token, every token counts the same (reference); scale, every scale does; or a "
        "factor for the tokens of each scale",
    )  # fmt: skip
    progressive: float = Field(0.0, ge=0, le=1, description="share of the run after which all scales are trained (pg), and the "
                               "lr_schedule lin<share>, as in the reference; 0: from the start")  # fmt: skip
    progressive_start: int = Field(4, ge=0, description="last scale trained at the start (pg0)")
    progressive_warmup_epochs: float | None = Field(
        None, ge=0, description="epochs in which a new scale's loss weight grows (pgwp); none or 0: a 300th of the run"
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, kept and evaluated beside the trained ones; 0: none")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="matrix products; auto: bf16 where the processor has it fast, else fp32"
    )
    tf32: bool = Field(True, description="TF32 for float32 products on NVIDIA GPUs")
    seed: int = Field(0, description="seed of weights, order, dropout")
    eval_batch: Positive = Field(512, description="samples an evaluation step on each rank")
    eval_label_dropout: bool = Field(False, description="drop labels while evaluating as the reference code does")
    evals: Positive = Field(1, description="evaluations in a run, evenly spaced, the last at the end")
    checkpoint_seconds: float = Field(600.0, gt=0, description="time between checkpoints")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept")
    keep_steps: list[Positive] = Field(default_factory=list, description="steps at which a checkpoint is written and kept for good")
    keep_at: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=list, description="the same as shares of the run, such as [0.1, 0.4]; the report shows samples of them"
    )
    nonfinite: Literal["skip", "rollback", "stop"] = Field(
        "skip", description="when loss or gradient is not finite, the step is not taken; then go on, go back to the last checkpoint and "
        "pass over the samples since, or stop",
    )  # fmt: skip
    nonfinite_limit: Positive = Field(10, description="steps not taken in a row, or times gone back, after which the run stops as diverged")
    hang_seconds: float = Field(1800.0, gt=0, description="time without progress after which a run ends and names the ranks that hang")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps; set the other to null, such as train.epochs=null")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} micro-batches")
        if self.epochs and self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} is not shorter than the run of {self.epochs:g} epochs")
        if isinstance(self.scale_weights, list) and not sum(self.scale_weights):
            raise ValueError("scale_weights are all 0; give at least one scale a weight")
        return self


class EngineConfig(Section):
    """What carries out the training step on how many processes."""

    name: Literal["single", "ddp", "fsdp", "deepspeed"] = Field("single", description="engine")
    processes: int = Field(0, ge=0, description="processes on this machine; 0: one a GPU, without a GPU 2 (single: always 1)")
    threads: Positive = Field(1, description="CPU threads a process, without a GPU")
    shard: int = Field(0, ge=0, description="fsdp: ranks that hold one copy of the state together (HSDP); 0: all ranks")
    reshard_after_forward: bool = Field(True, description="fsdp: free gathered weights between forward and backward")
    recompute: Literal["none", "mlp", "block"] = Field(
        "none", description="activations made again in the backward pass: none, the MLPs' hidden ones, or all inside a block"
    )
    recompute_every: Positive = Field(1, description="every so many blocks are recomputed")
    compile: bool = Field(False, description="torch.compile every block; not with ZeRO 3")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="DeepSpeed's own configuration, passed through: a map, or a JSON file such as engine/zero2.json"
    )

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.deepspeed and self.name != "deepspeed":
            raise ValueError(f"deepspeed is given, but name is {self.name}; set engine=zero1, or leave it out")
        if self.shard and self.name != "fsdp":
            raise ValueError(f"shard is given, but name is {self.name}; it is for fsdp")
        if self.compile and self.name == "deepspeed" and self.zero_stage == 3:
            raise ValueError("compile: ZeRO 3 gathers weights in hooks that torch.compile cannot follow; use a lower stage or fsdp")
        return self

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))


class ClusterConfig(Section):
    """What a run asks of SLURM (`study run --on slurm`), and how its ranks are started there. Nothing here changes a result."""

    nodes: Positive = Field(1, description="nodes of a run; a study sets it for a size in study.overrides")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of a node; 0: none, the run computes on CPUs")
    gpu_type: str | None = Field(None, description="asked for as gpu:TYPE:N")
    tasks_per_node: int = Field(0, ge=0, description="processes on a node; 0: one a GPU, without GPUs one")
    cpus_per_task: Positive = Field(8, description="cores of a process")
    memory: str = Field("0", description="memory of a node, such as 200G; 0: all of it")
    time: Annotated[str, BeforeValidator(_time)] = Field(
        "24:00:00", description="time limit of one life of a run, [D-]HH:MM:SS; it comes back"
    )
    partition: str | None = Field(None, description="partition")
    account: str | None = Field(None, description="account")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description='features of the nodes, such as "h100&ib"')
    sbatch: list[str] = Field(default_factory=list, description="further #SBATCH options, such as --reservation=NAME")
    launcher: Literal["auto", "deepspeed", "torchrun", "srun", "pdsh", "slurm"] = Field(
        "auto", description="what starts the ranks: deepspeed or torchrun on every node, srun every rank itself, pdsh (deepspeed over "
        "ssh), slurm (deepspeed's own); auto: deepspeed for its engine, else srun",
    )  # fmt: skip
    setup: list[str] = Field(default_factory=list, description="shell lines before all else, such as module load cuda")
    container: str | None = Field(None, description="what commands on the nodes are run with, such as apptainer exec --nv IMAGE")
    python: str | None = Field(None, description="Python on the nodes; default the one that submits, in a container python")
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Annotated[str, BeforeValidator(str)]] = Field(
        default_factory=dict, description="environment of the job, such as NCCL_SOCKET_IFNAME or VAR_SCALE_CACHE"
    )
    check: bool = Field(True, description="look at nodes, GPUs and connections before each life, and leave bad nodes out")
    stop_seconds: Positive = Field(120, description="what a run may need to save; SLURM's signal comes a minute earlier still")
    requeues: int = Field(50, ge=0, description="times that a run comes back after a time limit, preemption or lost node")
    at_once: int = Field(0, ge=0, description="runs of an array that may run at the same time; 0: all")

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Processes of a run."""
        return self.nodes * self.tasks

    @property
    def devices(self) -> int:
        """GPUs of a run, or without GPUs its nodes."""
        return self.nodes * (self.gpus_per_node or 1)


class LogConfig(Section):
    """Mirrors of metrics.jsonl; they may fail without harm."""

    every: Positive = Field(10, description="steps between rows of metrics.jsonl")
    activations: bool = Field(False, description="root mean square of the residual stream after every block, and its largest element")
    tensorboard: bool = Field(True, description="write TensorBoard files to log/")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="wandb mode")
    wandb_project: str = Field("var-scale", description="wandb project")
    wandb_chart: str | None = Field(None, description="ENTITY/NAME of the chart made of configs/wandb/scaling-law.json (docs/laws.md); "
                                    "else wandb's own scatter")  # fmt: skip


class StudySpec(Section):
    """The ladder and what is made of it."""

    depths: tuple[Positive, ...] = Field((), description="sizes of the ladder")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="seeds of every size")
    preset: str | None = Field(None, description="a preset a size, such as model/d{depth}: model and recipe of that depth")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="other keys to sweep, dotted, each with its values: all combinations of them for every size and "
        "seed; engine takes presets",
    )  # fmt: skip
    flops: list[PositiveFloat] = Field(
        default_factory=list, description="training FLOPs of a run: every size with every one of them, its epochs follow (isoFLOP curves)"
    )
    budget_hours: PositiveFloat | None = Field(None, description="device-hours that the plan may need on a named device; more is refused")
    overrides: dict[int, dict[str, Any]] = Field(default_factory=dict, description="keys changed for one depth where it is run, dotted")
    common: dict[str, Any] = Field(
        default_factory=dict, description="keys changed for every size after its preset, dotted; the command line's key=value go here too"
    )
    floors: dict[Literal["loss_last", "loss_avg", "err_last", "err_avg"], float] = Field(
        default_factory=dict, description="irreducible part assumed for a metric in the power law; 0 where none is given"
    )
    exclude: dict[str, str] = Field(default_factory=dict, description="runs that a person leaves out of the laws, each with the reason")
    keep: dict[str, str] = Field(default_factory=dict, description="runs that a person keeps though the gate would not, with the reason")
    device: str = Field("auto", description="device for the expected time: auto (measured here) or a name of the peak table")
    devices: Positive = Field(1, description="devices a run, for the expected time on a named device")
    mfu: float = Field(0.4, gt=0, le=1, description="assumed share of the device's peak")
    sample_classes: Positive = Field(10, description="classes in the sample grid")
    samples_per_class: Positive = Field(6, description="images a class in the sample grid")
    cfg: float = Field(1.5, ge=0, description="guidance of the sample grid")
    top_k: int = Field(0, ge=0, description="top-k of the sample grid")
    top_p: Fraction = Field(0.0, description="top-p of the sample grid")

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        for name, values in (("depths", self.depths), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)} lists a value twice")
        for section, keys in (("common", self.common), *((f"overrides.{d}", keys) for d, keys in self.overrides.items())):
            for key, by in (("model.depth", "depths"), ("train.seed", "seeds")):
                if key in keys:
                    raise ValueError(f"{section}: {key} is set by study.{by}, a run each; change that")
        for key, points in self.grid.items():
            if not points or len({str(point) for point in points}) < len(points):
                raise ValueError(f"grid.{key} {points} is empty or lists a value twice")
            if key in ("model.depth", "train.seed") or key.partition(".")[0] in ("study", "name", "cluster", "tokenizer"):
                raise ValueError(f"grid.{key}: cannot be swept; sizes are study.depths, seeds study.seeds, a tokenizer is a study's own, "
                                 "and no key of cluster changes a result (study.overrides sets them for a size)")  # fmt: skip
        if self.budget_hours and self.device == "auto":
            raise ValueError("budget_hours needs a device to count hours of; set study.device, such as h100")
        if self.flops and any(key in ("train.epochs", "train.steps") for key in self.grid):
            raise ValueError("flops sets the epochs; leave train.epochs and train.steps out of the grid")
        return self


class Config(Section):
    """One file names everything."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the study or run: its folder in runs/")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    log: LogConfig = LogConfig()
    study: StudySpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Config:
        scales, train, made = len(self.tokenizer.patch_nums), self.train, self.data.leaves or self.data.grammar
        if isinstance(train.scale_weights, list) and len(train.scale_weights) != scales:
            raise ValueError(f"train.scale_weights: {len(train.scale_weights)} weights for the {scales} scales of tokenizer.patch_nums")
        if train.progressive and train.progressive_start >= scales:
            raise ValueError(f"train.progressive_start: {train.progressive_start} of {scales} scales; give 0 to {scales - 1}")
        if made and self.data.num_classes not in (None, made.num_classes):
            raise ValueError(f"data.num_classes: {self.data.num_classes}, but the embedded set has {made.num_classes}; leave it out")
        return self

    @property
    def classes(self) -> int:
        """Number of classes: of the embedded set when it is used, else of `data`."""
        made = self.data.leaves or self.data.grammar
        return made.num_classes if made else self.data.num_classes or 1000

    @property
    def train_samples(self) -> int:
        """Training samples an epoch, for planning."""
        made, data = self.data.leaves.train_images if self.data.leaves else None, self.data
        whole = made or (data.grammar.train_samples if data.grammar else data.train_samples or 1281167)
        return max(1, int((data.fraction or 1) * whole))
