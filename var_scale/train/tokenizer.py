"""Training of the multi-scale VQVAE: EMA codebook with dead-code re-seeding; pixel, perceptual and adversarial losses.

The first steps run without quantisation; then the codebook starts from residuals of the data and follows them by exponential moving
averages, while encoder, decoder and phi follow the gradient. (A codebook that follows the gradient collapses.) On several processes each
takes its part of the batch; gradients and the codebook's statistics are exchanged.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from var_scale.config.load import load
from var_scale.config.schema import Config, TokenizerTrainConfig
from var_scale.data.loader import Ahead, ImageBatch, ImageData, ImageLoader
from var_scale.data.transforms import to_minus1_1
from var_scale.errors import Preempted, UserError
from var_scale.files import atomic_file, canonical_hash, disk_errors, read_json, write_json
from var_scale.machine import cores
from var_scale.model.load import new_tokenizer, save_tokenizer, tokenizer_file
from var_scale.model.perceptual import LPIPS, SMALLEST_JUDGED, VGG16, PatchDiscriminator, hinge
from var_scale.model.vqvae import VQVAE
from var_scale.progress import progress, say
from var_scale.run_folder import RunFolder, take_lock
from var_scale.scales import grid
from var_scale.train.engine.base import guard
from var_scale.train.inputs import require_sound
from var_scale.train.stopping import end_with_launcher, signals_noted
from var_scale.train.tokenizer_report import assess, perplexity, picture
from var_scale.train.world import World, fast_bf16, leave, start_world

SAVE_SECONDS, SAVE_SHARE = 10.0, 0.02  # between saves, or so long that saving takes this share of the time
ROW_STEPS = 50  # between rows of metrics.jsonl
PLACES = {"vgg_weights", "lpips_weights"}  # where files lie


@dataclass
class Codebook:
    """EMA counts (V,) and sums (V, Z) behind the codebook, the same on all ranks."""

    weight: Tensor
    counts: Tensor
    sums: Tensor
    world: World

    @staticmethod
    def of(weight: Tensor, world: World) -> Codebook:
        """An empty average for `weight` (V, Z)."""
        return Codebook(weight, torch.ones(weight.shape[0], device=weight.device), weight.detach().clone(), world)

    def reseed(self, codes: Tensor, vectors_NZ: Tensor, generator: torch.Generator) -> None:
        """Put random vectors of all ranks' `vectors_NZ` in place of `codes`."""
        rank, size, n = self.world.rank, self.world.size, len(vectors_NZ)
        pick = torch.randint(size * n, (len(codes),), generator=generator).to(vectors_NZ.device)
        mine = (pick // n == rank)[:, None]
        chosen = self.world.reduce(torch.where(mine, vectors_NZ[pick % n], torch.zeros_like(vectors_NZ[:1])))
        self.weight[codes] = chosen
        self.sums[codes] = chosen
        self.counts[codes] = 1.0

    def update(self, idx_N: Tensor, vectors_NZ: Tensor, decay: float, dead: float, generator: torch.Generator) -> None:
        """One EMA step: counts and sums follow the batch, dead codes move to residuals of the batch."""
        batch_counts = torch.bincount(idx_N, minlength=len(self.counts)).to(self.counts.dtype)
        batch_sums = torch.zeros_like(self.sums).index_add_(0, idx_N, vectors_NZ)
        both = self.world.reduce(torch.cat([batch_counts[:, None], batch_sums], dim=1))
        self.counts.mul_(decay).add_(both[:, 0], alpha=1 - decay)
        self.sums.mul_(decay).add_(both[:, 1:], alpha=1 - decay)
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
        gone = (self.counts < dead).nonzero().squeeze(1)
        if len(gone):
            self.reseed(gone, vectors_NZ, generator)


def pixel_loss(out_BCHW: Tensor, img_BCHW: Tensor, recipe: TokenizerTrainConfig) -> Tensor:
    """Weighted MSE, L1, and L1 of a three-level Laplacian pyramid."""
    difference = out_BCHW - img_BCHW  # the pyramid is linear, so the pyramid of the difference is the difference of pyramids
    loss = recipe.l2 * difference.square().mean() + recipe.l1 * difference.abs().mean()
    for _ in range(3 if recipe.pyramid else 0):
        if min(difference.shape[-2:]) < 2:
            break
        low = F.avg_pool2d(difference, 2, ceil_mode=True, count_include_pad=False)
        band = difference - F.interpolate(low, size=difference.shape[-2:], mode="bilinear", align_corners=False)
        loss = loss + recipe.pyramid / 3 * band.abs().mean()
        difference = low
    return loss


class TokenizerTrainer:
    """One rank's state of a tokenizer training; saved every now and then, so that it can be stopped anywhere."""

    def __init__(self, config: Config, images: ImageData, folder: Path, world: World):
        self.recipe = recipe = config.tokenizer.train
        self.images, self.folder, self.world = images, folder, world
        torch.manual_seed(recipe.seed)
        self.vae: VQVAE = new_tokenizer(config.tokenizer).to(world.device)
        if world.device.type == "cpu":
            self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster
        weight = self.vae.quantize.embedding.weight
        weight.requires_grad_(False)
        self.codebook = Codebook.of(weight.data, world)
        self.trained = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = self._adamw(self.trained, recipe.weight_decay)
        self.average = [p.detach().clone() for p in self.trained] if recipe.ema else []
        self.vgg = VGG16(Path(recipe.vgg_weights)).to(world.device) if recipe.vgg_weights else None
        self.lpips = LPIPS(*_weights(recipe)).to(world.device) if recipe.perceptual else None
        if recipe.adversarial and min(config.tokenizer.image_size) < SMALLEST_JUDGED:
            raise UserError(f"tokenizer.train.adversarial: the discriminator needs sides of {SMALLEST_JUDGED} pixels and more; set it to 0")
        self.judge = PatchDiscriminator().to(world.device) if recipe.adversarial else None
        self.judge_optimizer = self._adamw(list(self.judge.parameters()), 0.0) if self.judge else None
        self.loader = Ahead(ImageLoader(images, recipe.seed, recipe.batch_size, world.size, world.rank, flip=recipe.flip))
        made_by = config.tokenizer.model_dump(mode="json", exclude={"weights": True, "encode_precision": True, "train": PLACES})
        self.identity = canonical_hash([made_by, images.digest])
        self.bf16 = fast_bf16(world.device)
        self.step = 0
        self.codes: list[Tensor] = []

    def _adamw(self, parameters: list[torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=0.0, betas=self.recipe.betas, weight_decay=weight_decay, fused=True)

    @property
    def plain_steps(self) -> int:
        """Steps without quantisation."""
        return round(self.recipe.plain_fraction * self.recipe.steps)

    def lr(self) -> float:
        """Warm-up, then cosine to `lr_end` of the peak."""
        r = self.recipe
        if self.step < r.warmup_steps:
            return r.lr * (self.step + 1) / r.warmup_steps
        p = (self.step - r.warmup_steps) / max(1, r.steps - 1 - r.warmup_steps)
        return r.lr * (r.lr_end + (1 - r.lr_end) * (0.5 + 0.5 * math.cos(math.pi * p)))

    def batch(self) -> Tensor:
        """This rank's images of this step, (B, 3, H, W) in [-1, 1]."""
        batch = self.loader.batch(self.step)
        assert isinstance(batch, ImageBatch)
        return to_minus1_1(self.world.put(torch.as_tensor(batch.images_BHWC)))

    def train_step(self) -> dict[str, Tensor]:
        """One step; its losses. The codes it used, scale by scale, are in `codes` afterwards."""
        img_BCHW, row = self.batch(), dict[str, Tensor]()
        with self.autocast():
            f_BZhw = self.vae.quant_conv(self.vae.encoder(img_BCHW)).float()
        if self.step == self.plain_steps == 0:
            self._start_codebook(f_BZhw.detach())
        if self.step < self.plain_steps:
            fhat, extra = f_BZhw, 0.001 * f_BZhw.square().mean()
            if self.step == self.plain_steps - 1:
                self._start_codebook(f_BZhw.detach())
        else:
            fhat, extra, idx_list, residual_list = self.vae.quantize.encode_for_training(f_BZhw)
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
            with torch.no_grad():
                self.codebook.update(
                    torch.cat(idx_list), torch.cat(residual_list), self.recipe.codebook_decay, self.recipe.dead_count, generator
                )
            self.codes = idx_list
        with self.autocast():
            out_BCHW = self.vae.decoder(self.vae.post_quant_conv(fhat)).float()
        loss = pixel_loss(out_BCHW, img_BCHW, self.recipe)
        row["loss"] = loss.detach()
        if self.lpips:
            with self.autocast():
                distance = self.lpips(out_BCHW, img_BCHW)
            row["perceptual"] = distance.detach()
            loss = loss + self.recipe.perceptual * distance
        judged = self.judge is not None and self.step >= self.recipe.adversarial_start * self.recipe.steps
        if judged:
            loss = loss + self._adversary(loss, out_BCHW, row)
        self._follow(self.optimizer, loss + extra, self.trained)
        if judged:
            self._judge(out_BCHW.detach(), img_BCHW, row)
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.data for p in self.trained], 1 - self.recipe.ema)
        self.step += 1
        return row

    def autocast(self) -> torch.autocast:
        """bf16 convolutions where the processor has them fast; quantiser and losses stay float32."""
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _follow(self, optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[torch.nn.Parameter]) -> None:
        """Backward, exchange, clip, step."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr()
        loss.backward()
        for p in parameters if self.world.size > 1 else ():
            if p.grad is not None:  # phi has none before there are codes
                p.grad.copy_(self.world.reduce(p.grad.contiguous()) / self.world.size)  # in its own layout: fused AdamW goes by that
        guard(parameters, optimizer, self.recipe.clip, None)  # no step is taken on a gradient that is not finite
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _adversary(self, loss: Tensor, out_BCHW: Tensor, row: dict[str, Tensor]) -> Tensor:
        """The decoder's part of the game, as strong against the other losses as `adversarial` says where both meet the last layer
        (Esser et al. 2021)."""
        assert self.judge
        last = next(m.weight for m in reversed(list(self.vae.decoder.modules())) if isinstance(m, torch.nn.Conv2d))
        self.judge.requires_grad_(False)
        with self.autocast():
            game = -self.judge(out_BCHW).float().mean()
        self.judge.requires_grad_(True)
        pull, push = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, game))
        strength = (pull / (push + 1e-4)).clamp(0, 1e4)
        row["strength"] = self.world.reduce(strength.detach().clone()) / self.world.size
        return self.recipe.adversarial * row["strength"] * game

    def _judge(self, out_BCHW: Tensor, img_BCHW: Tensor, row: dict[str, Tensor]) -> None:
        """The discriminator's step."""
        assert self.judge and self.judge_optimizer
        with self.autocast():
            loss = hinge(self.judge(img_BCHW).float(), self.judge(out_BCHW).float())
        row["judge"] = loss.detach()
        self._follow(self.judge_optimizer, loss, list(self.judge.parameters()))

    def _start_codebook(self, f_BZhw: Tensor) -> None:
        """Begin with residuals as they come: codes from averages at every scale of this batch."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        vectors, rest = [], f_BZhw
        for patch_num in self.vae.quantize.v_patch_nums:
            low = F.adaptive_avg_pool2d(rest, grid(patch_num))
            vectors.append(low.permute(0, 2, 3, 1).reshape(-1, low.shape[1]))
            rest = rest - 0.7 * F.interpolate(low, size=f_BZhw.shape[-2:], mode="bicubic")
        self.codebook.reseed(torch.arange(len(self.codebook.counts), device=f_BZhw.device), torch.cat(vectors), generator)

    def save(self) -> None:
        """Write the resumable state; rank 0 does, all have the same."""
        if not self.world.main:
            return
        state = {
            "identity": self.identity, "step": self.step, "model": self.vae.state_dict(), "optimizer": self.optimizer.state_dict(),
            "counts": self.codebook.counts, "sums": self.codebook.sums, "average": self.average,
        }  # fmt: skip
        if self.judge and self.judge_optimizer:
            state |= {"judge": self.judge.state_dict(), "judge_optimizer": self.judge_optimizer.state_dict()}
        buffer = io.BytesIO()  # torch.save hides what a full disk says
        torch.save(state, buffer)
        with atomic_file(self.folder / "training.pt") as file:
            file.write(buffer.getbuffer())

    def resume(self) -> None:
        """Continue from the saved state of the same training, if there is one."""
        path = self.folder / "training.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.world.device)
        if state["identity"] != self.identity:
            say("tokenizer: the settings or the images changed, training starts again")
            return
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.counts, self.codebook.sums, self.average = state["counts"], state["sums"], state["average"]
        if self.judge and self.judge_optimizer:
            self.judge.load_state_dict(state["judge"])
            self.judge_optimizer.load_state_dict(state["judge_optimizer"])
        self.step = state["step"]

    @torch.no_grad()
    def finish(self) -> VQVAE:
        """The trained tokenizer, with averaged weights where they were asked for."""
        for p, averaged in zip(self.trained, self.average, strict=False):
            p.copy_(averaged)
        return self.vae.eval()


def _weights(recipe: TokenizerTrainConfig) -> tuple[Path, Path]:
    if not recipe.vgg_weights or not recipe.lpips_weights:
        raise UserError("tokenizer.train.perceptual: give tokenizer.train.vgg_weights (torchvision's vgg16) and lpips_weights (the lin "
                        "weights of LPIPS for VGG)")  # fmt: skip
    return Path(recipe.vgg_weights), Path(recipe.lpips_weights)


def train_tokenizer(config: Config, train: ImageData, val: ImageData, folder: Path, world: World | None = None) -> Path:
    """Train, report, and return the weights file; returns at once when it is already there for the same settings and images.

    Without `world`: in this process, on a GPU if there is one, else on all cores.
    """
    if world is None:
        world = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        torch.set_num_threads(cores())
    target = tokenizer_file(folder)
    trainer = TokenizerTrainer(config, train, folder, world)
    done = folder / "tokenizer.json"
    if target.exists() and done.exists() and read_json(done).get("identity") == trainer.identity:
        if trainer.world.main:
            say(f"tokenizer: already trained ({target})")
        return target
    if target.exists() and done.exists():
        raise UserError(f"{folder}: holds a tokenizer that was trained with other settings or on other images; choose another folder, or "
                        "remove it: tokens and runs made with it then need it no more")  # fmt: skip
    require_sound(config, train, trainer.world)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / ".lock", wait_seconds=5) if world.main else None
    if world.largest(int(world.main and lock is None)):
        raise UserError(f"{folder}: another process trains this tokenizer; wait for it or stop it")
    try:
        _train(config, trainer, val)
    finally:
        if lock is not None:
            os.close(lock)
    return target


def _train(config: Config, trainer: TokenizerTrainer, val: ImageData) -> None:
    """From where it was to the end, and the report."""
    folder, world, target = trainer.folder, trainer.world, tokenizer_file(trainer.folder)
    trainer.resume()
    world.barrier()  # nobody still looks for training.pt when rank 0 removes it
    trainer.vae.train()
    pace, log = Pace(), RunFolder(folder)
    if world.main and log.metrics.exists():
        log.append_metrics({"kind": "restart", "step": trainer.step})
    steps, stop_file = trainer.recipe.steps, folder / "STOP"
    with progress("tokenizer", steps, "steps", trainer.step, shown=world.main) as bar, signals_noted() as noted:
        while trainer.step < steps:
            row = trainer.train_step()
            asked = bool(noted) or (world.main and stop_file.exists())
            if world.largest(asked) if world.size > 1 else asked:
                trainer.save()
                if world.main:
                    say(f"tokenizer: stopped at step {trainer.step} of {steps}, saved")
                raise Preempted
            if trainer.step % ROW_STEPS == 0 or world.device.type == "cpu":
                loss = float(row["loss"])
                if not math.isfinite(loss):
                    raise UserError(f"{folder}: step {trainer.step}: the loss is not finite; lower tokenizer.train.lr, training then "
                                    "starts again")  # fmt: skip
                bar.update(trainer.step, f"loss {loss:.4f}")
                if world.main and trainer.step % ROW_STEPS == 0:
                    log.append_metrics(_row(trainer, row))
                if world.main and pace.due():
                    trainer.save()
                    pace.saved()
    vae = trainer.finish()
    if world.main:
        save_tokenizer(vae, target)
        report = assess(vae, val, world.device, trainer.vgg)
        picture(vae, val, folder / "reconstructions.png", world.device)
        write_json(folder / "tokenizer.json", {"identity": trainer.identity, "steps": trainer.recipe.steps, **report})
        (folder / "training.pt").unlink(missing_ok=True)
        distance = f"; Frechet distance by VGG-16 {report['rfd_vgg16']:.2f}" if trainer.vgg else ""
        of_scales = " ".join(f"{p:.0f}" for p in report["perplexity_per_scale"])
        say(f"tokenizer: validation PSNR {report['psnr_db']:.2f} dB, MAE {report['mae']:.4f}; codebook perplexity per scale {of_scales}"
            f" of {config.tokenizer.vocab_size}{distance}; picture {folder / 'reconstructions.png'}")  # fmt: skip
    world.barrier()


class Pace:
    """When to save: not so often that it costs."""

    def __init__(self) -> None:
        self.last = self.began = time.monotonic()
        self.took = 0.0

    def due(self) -> bool:
        """Whether it is time."""
        self.began = time.monotonic()
        return self.began - self.last > max(SAVE_SECONDS, self.took / SAVE_SHARE)

    def saved(self) -> None:
        """A save that began when it was last due has ended."""
        self.last = time.monotonic()
        self.took = self.last - self.began


def _row(trainer: TokenizerTrainer, row: dict[str, Tensor]) -> dict[str, Any]:
    """Losses and the perplexity of each scale in this step's batch."""
    numbers: dict[str, Any] = {key: float(value) for key, value in row.items()}
    if trainer.codes:
        hits = torch.stack([torch.bincount(idx, minlength=trainer.vae.V) for idx in trainer.codes])
        numbers["perplexity_per_scale"] = perplexity(hits)
    return {"kind": "tokenizer", "step": trainer.step, "lr": trainer.lr(), **numbers}


def main() -> None:
    """On every rank: `python -m var_scale.train.tokenizer FOLDER`, with FOLDER/config.yaml."""
    from var_scale.train.inputs import open_images

    folder = Path(sys.argv[1])
    config = load(str(folder / "config.yaml"))
    end_with_launcher()
    world, code = start_world(True, config.engine.threads), 0
    try:
        train, val = (open_images(config, where, world.size) for where in (config.data.images_train, config.data.images_val))
        train_tokenizer(config, train, val, folder, world)
    except UserError as error:
        print(f"error: {f'rank {world.rank}: ' * (not world.main)}{error}", flush=True)
        code = error.code
    except Preempted:
        pass  # saved; launchers take another code than 0 for a failure
    leave(world, code)


if __name__ == "__main__":
    main()
