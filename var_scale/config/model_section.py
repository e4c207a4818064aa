"""The sections `tokenizer` and `model`: the networks, and the training of the tokenizer."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import model_validator

from var_scale.config.fields import (
    Beta,
    Fraction,
    Grid,
    Place,
    Positive,
    Section,
    Switch,
    setting,
)
from var_scale.scales import PATCH_NUMS_256, grid


class TokenizerTrainConfig(Section):
    """Training of the tokenizer: pixel and VQ losses, optionally perceptual and GAN losses."""

    steps: Positive = setting(1500, "number of optimiser steps")
    batch_size: Positive = setting(64, "images per step")
    lr: float = setting(2e-3, "peak learning rate of AdamW; it decays as a cosine", gt=0)
    lr_end: Fraction = setting(0.05, "last learning rate as a fraction of the peak")
    betas: tuple[Beta, Beta] = setting((0.9, 0.95), "betas of AdamW")
    weight_decay: float = setting(0.005, "weight decay of AdamW", ge=0)
    clip: float = setting(1.0, "largest norm of the gradient", gt=0)
    l2: float = setting(1.0, "weight of the mean squared error", ge=0)
    l1: float = setting(0.2, "weight of the mean absolute error", ge=0)
    pyramid: float = setting(0.5, "weight of the error of a three-level Laplacian pyramid", ge=0)
    perceptual: float = setting(0.0, "weight of the LPIPS loss", ge=0)
    vgg_weights: Place | None = setting(
        None,
        "file of torchvision's VGG-16 weights, for LPIPS and the Frechet distance in the report",
        identity=False,
    )
    lpips_weights: Place | None = setting(
        None, "linear weights of LPIPS v0.1 for VGG", identity=False
    )
    adversarial: float = setting(
        0.0, "relative weight of the hinge loss of a patch discriminator", ge=0
    )
    adversarial_start: Fraction = setting(0.22, "fraction of the steps before that loss is added")
    ema: Beta = setting(
        0.0,
        "decay of the exponential moving average of the weights, which is saved at the end; 0: the "
        "last weights are saved",
    )
    flip: bool = setting(False, "mirror half of the images")
    warmup_steps: Positive = setting(50, "steps of linear warm-up")
    plain_fraction: Fraction = setting(
        0.15, "fraction of the steps, at the start, without quantisation"
    )
    codebook_decay: Beta = setting(0.97, "decay of the average that updates the codebook")
    dead_count: float = setting(
        0.3, "codes with a smaller averaged count are reinitialised from residuals", gt=0
    )
    seed: int = setting(0, "seed of the initial weights and of the order of images")


class TokenizerConfig(Section):
    """The multi-scale VQVAE."""

    arch: Literal["cnn", "patch"] = setting(
        "cnn", "cnn: the official network; patch: one for small images"
    )
    # The hash of the tokenizer's file, kept with the tokens, identifies it: not its path.
    weights: Place | None = setting(
        None,
        "trained weights: a .pth or .safetensors file, or hf://OWNER/NAME/FILE; null: the study "
        "trains the tokenizer",
        identity=False,
    )
    patch_nums: tuple[Grid, ...] = setting(
        PATCH_NUMS_256,
        "token grid of each scale: its side, or [height, width] where it is not square",
        min_length=1,
    )
    vocab_size: Positive = setting(4096, "number of codes in the codebook, V")
    latent_channels: Positive = setting(32, "channels of a code vector, Z (the official Cvae)")
    share_quant_resi: int = setting(
        4, "number of phi convolutions; 0: one per scale; 1: one for all", ge=0
    )
    quant_resi: float = setting(0.5, "weight of the phi convolution in its residual sum")
    beta: float = setting(0.25, "weight of the commitment loss")
    ch: Positive = setting(160, "base number of channels (arch: cnn)")
    patch: Positive = setting(8, "pixels per side of one latent cell (arch: patch)")
    hidden: Positive = setting(128, "hidden channels (arch: patch)")
    encode_precision: Literal["fp32", "tf32", "bf16"] = setting(
        "fp32",
        "precision of the encoder when images are tokenised; tf32 and bf16 change some tokens, and "
        "the fraction of changed tokens is printed",
    )
    train: TokenizerTrainConfig = TokenizerTrainConfig()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels. The official network has 16 per latent cell."""
        height, width = grid(self.patch_nums[-1])
        pixels = self.patch if self.arch == "patch" else 16
        return height * pixels, width * pixels

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        for before, after in pairwise(map(grid, self.patch_nums)):
            if before == after or before[0] > after[0] or before[1] > after[1]:
                raise ValueError(
                    "patch_nums must rise: from one scale to the next, no side may shrink and at "
                    "least one must grow"
                )
        if self.vocab_size > 65536:
            raise ValueError("vocab_size must be at most 65536 (tokens are stored as uint16)")
        return self


class ModelConfig(Section):
    """The VAR transformer. Width and number of heads follow from depth unless they are given."""

    depth: Positive = setting(16, "blocks d of a single run; a study uses study.depths")
    width: Positive | None = setting(None, "channels C; default: width_per_depth x depth")
    width_per_depth: Positive = setting(64, "C / d of the ladder; the paper has 64")
    heads: Positive | None = setting(None, "number of attention heads; default: depth")
    mlp_ratio: float = setting(4.0, "hidden width of the MLP / C", gt=0)
    shared_aln: bool = setting(False, "share one AdaLN linear layer among all blocks")
    attn_l2_norm: bool = setting(True, "normalise queries and keys, with a learned scale per head")
    cond_drop_rate: Fraction = setting(0.1, "label dropout, for classifier-free guidance")
    drop_path_rate: Fraction | None = setting(None, "largest drop-path rate; default: 0.1 d / 24")
    init_adaln: float = setting(0.5, "factor of the initial AdaLN weights")
    init_adaln_gamma: float = setting(1e-5, "factor of the initial gate weights of AdaLN")
    init_head: float = setting(0.02, "factor of the initial weights of the head")
    init_std: float = setting(-1.0, "initial standard deviation; negative: sqrt(1 / 3C)")
    attention: Literal["auto", "triton", "flex", "flash", "xformers", "blocks", "dense", "sdpa"] = (
        setting(
            "auto",
            "attention back-end; auto: triton on NVIDIA GPUs since Ampere, on CPUs blocks in half "
            "precision and dense for training on short sequences in float32, else sdpa",
        )
    )
    kernels: Annotated[Literal["auto", "on", "off"], Switch] = setting(
        "auto",
        "fused AdaLN, MLP and cross-entropy; auto: on NVIDIA GPUs since Ampere; on: everywhere, on "
        "CPUs in their PyTorch form",
    )

    @property
    def channels(self) -> int:
        """Width C."""
        return self.width or self.width_per_depth * self.depth

    @property
    def num_heads(self) -> int:
        """Number of attention heads H."""
        return self.heads or self.depth

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.channels % self.num_heads:
            raise ValueError(
                f"width {self.channels} (depth {self.depth}) does not divide into "
                f"{self.num_heads} heads; change width, heads or depth"
            )
        return self
