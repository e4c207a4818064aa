"""The step of the official trainer, for `var-scale bench official`: its own code from a checkout.

`python -m var_scale.bench.official FOLDER`: FOLDER holds config.yaml and bench.json with the path
of the checkout, and gets official.json. It is a separate process, because importing the official
code changes torch for the whole process. Only its loggers are replaced: they need more packages,
and are silent in the timed steps.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch

from var_scale.bench.train_worker import timed
from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.files import read_json, write_json
from var_scale.scales import grid
from var_scale.train.optim import decays
from var_scale.train.telemetry import peak_memory
from var_scale.train.world import World, start_world


class OfficialStep:
    """VARTrainer with its best flags: float16 with loss scaling, fused kernels and flash-attn if
    installed, torch.compile on request. It encodes images in every step."""

    def __init__(self, checkout: Path, config: Config, world: World, compiled: bool):
        sys.path.insert(0, str(checkout))
        loggers = types.ModuleType("utils.misc")
        loggers.MetricLogger = loggers.TensorboardLogger = object  # type: ignore[attr-defined]
        sys.modules["utils.misc"] = loggers
        from models import build_vae_var
        from trainer import VARTrainer
        from utils.amp_sc import AmpOptimizer

        c, t = config.train, config.tokenizer
        vae, var = build_vae_var(
            device=world.device,
            patch_nums=tuple(t.patch_nums),
            V=t.vocab_size,
            Cvae=t.latent_channels,
            ch=t.ch,
            share_quant_resi=t.share_quant_resi,
            num_classes=config.classes,
            depth=config.model.depth,
            shared_aln=config.model.shared_aln,
            attn_l2_norm=config.model.attn_l2_norm,
            flash_if_available=True,
            fused_if_available=True,
        )
        for p in vae.parameters():  # its builder leaves them uninitialised
            torch.nn.init.normal_(p, std=0.02)
            p.requires_grad_(False)
        named = list(var.named_parameters())
        groups = [
            {"params": [p for name, p in named if decays(name, p) == decay]}
            for decay in (False, True)
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=1e-6, betas=c.adam_betas, weight_decay=0.05, fused=True
        )
        half = 1 if world.device.type == "cuda" else 0
        amp = AmpOptimizer(
            half, optimizer, [name for name, _ in named], [p for _, p in named], c.clip, 1
        )
        side, width = config.tokenizer.image_size
        if side != width:
            raise UserError(
                "bench official: the official trainer accepts only square images; give square "
                "tokenizer.patch_nums",
                code="bench.not-square",
            )
        cell = side // grid(t.patch_nums[-1])[0]
        resolutions = tuple(cell * height for height, _ in map(grid, t.patch_nums))
        called = torch.compile(var) if compiled else var
        self.trainer: Any = VARTrainer(
            world.device, tuple(t.patch_nums), resolutions, vae.eval(), var, called, amp, 0.0
        )
        self.images_B3HW = torch.rand(c.batch_size, 3, side, side, device=world.device) * 2 - 1
        self.label_B = torch.randint(config.classes, (c.batch_size,), device=world.device)
        self.silent = types.SimpleNamespace(log_iters=())
        var.train()

    def take_tokens(self) -> None:
        """From now on use the tokens of the same images, encoded once, instead of encoding them in
        every step, which the official trainer cannot do."""
        vae = self.trainer.vae_local
        with torch.no_grad():
            tokens = vae.img_to_idxBl(self.images_B3HW)
        vae.img_to_idxBl = lambda *_, **__: tokens

    def __call__(self) -> None:
        self.trainer.train_step(
            1, 1, True, self.silent, None, self.images_B3HW, self.label_B, -1, 1
        )


def measure(folder: Path) -> None:
    """Time the step in this process."""
    config, job = load(str(folder / "config.yaml")), read_json(folder / "bench.json")
    world = start_world(group=False, threads=config.engine.threads)
    # As its arguments set them by default.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        step = OfficialStep(Path(job["official"]), config, world, job["compile"])
    except ImportError as error:
        raise UserError(
            f"{job['official']}: the official code cannot be imported ({error})",
            code="bench.not-official",
        ) from None
    found = {"step_ms": median_step(step, job, world), "memory_bytes": peak_memory(world.device)}
    step.take_tokens()
    found["step_ms_from_tokens"] = median_step(step, job, world)
    write_json(folder / "official.json", found)


def median_step(step: OfficialStep, job: dict[str, Any], world: World) -> float:
    """The median time of a step after the warm-up, in milliseconds."""
    timed(step, job["warmup"], world)
    times = sorted(timed(step, job["steps"], world))
    return times[len(times) // 2]


if __name__ == "__main__":
    try:
        measure(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
