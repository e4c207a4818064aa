"""The training step and state of the multi-scale VQVAE.

The first steps run without quantisation. Then the codebook starts from residuals of the data and
follows them by exponential moving averages, while encoder, decoder and phi follow the gradient.
With several processes each takes its part of the batch; gradients and the statistics of the
codebook are exchanged.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from var_scale.config.schema import Config, TokenizerTrainConfig
from var_scale.data.image_loader import ImageBatch, ImageData, ImageLoader
from var_scale.data.loader import Ahead
from var_scale.data.transforms import to_minus1_1
from var_scale.errors import UserError
from var_scale.files import atomic_file, canonical_hash
from var_scale.model.load import new_tokenizer
from var_scale.model.perceptual import LPIPS, SMALLEST_JUDGED, VGG16, PatchDiscriminator, hinge
from var_scale.model.vqvae import VQVAE
from var_scale.progress import say
from var_scale.scales import grid
from var_scale.train.codebook import Codebook, pixel_loss
from var_scale.train.engine.base import guard
from var_scale.train.world import World, fast_bf16


class TokenizerTrainer:
    """The state of a tokenizer training on one rank, which can be saved and resumed."""

    def __init__(self, config: Config, images: ImageData, folder: Path, world: World):
        self.recipe = recipe = config.tokenizer.train
        self.folder, self.world = folder, world
        torch.manual_seed(recipe.seed)
        self.vae: VQVAE = new_tokenizer(config.tokenizer).to(world.device)
        if world.device.type == "cpu":
            self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 25 % faster
        weight = self.vae.quantize.embedding.weight
        weight.requires_grad_(False)
        self.codebook = Codebook.of(weight.data, world)
        self.trained = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = self._adamw(self.trained, recipe.weight_decay)
        self.average = [p.detach().clone() for p in self.trained] if recipe.ema else []
        self.vgg = VGG16(Path(recipe.vgg_weights)).to(world.device) if recipe.vgg_weights else None
        self.lpips = LPIPS(*_weights(recipe)).to(world.device) if recipe.perceptual else None
        if recipe.adversarial and min(config.tokenizer.image_size) < SMALLEST_JUDGED:
            raise UserError(
                "tokenizer.train.adversarial: the discriminator needs images of at least "
                f"{SMALLEST_JUDGED} pixels per side; set it to 0",
                code="train.adversarial-size",
            )
        self.judge = PatchDiscriminator().to(world.device) if recipe.adversarial else None
        self.judge_optimizer = (
            self._adamw(list(self.judge.parameters()), 0.0) if self.judge else None
        )
        self.loader = Ahead(
            ImageLoader(
                images, recipe.seed, recipe.batch_size, world.size, world.rank, flip=recipe.flip
            )
        )
        made_by = config.tokenizer.identity()
        del made_by["encode_precision"]  # it changes the tokens, not the tokenizer
        self.identity = canonical_hash([made_by, images.digest])
        self.bf16 = fast_bf16(world.device)
        self.step = 0
        self.codes: list[Tensor] = []

    def _adamw(
        self, parameters: list[torch.nn.Parameter], weight_decay: float
    ) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            parameters, lr=0.0, betas=self.recipe.betas, weight_decay=weight_decay, fused=True
        )

    @property
    def plain_steps(self) -> int:
        """Number of steps without quantisation."""
        return round(self.recipe.plain_fraction * self.recipe.steps)

    def lr(self) -> float:
        """Learning rate: warm-up, then cosine to `lr_end` times the peak."""
        r = self.recipe
        if self.step < r.warmup_steps:
            return r.lr * (self.step + 1) / r.warmup_steps
        p = (self.step - r.warmup_steps) / max(1, r.steps - 1 - r.warmup_steps)
        return r.lr * (r.lr_end + (1 - r.lr_end) * (0.5 + 0.5 * math.cos(math.pi * p)))

    def batch(self) -> Tensor:
        """The images of this step and rank, (B, 3, H, W) in [-1, 1]."""
        batch = self.loader.batch(self.step)
        assert isinstance(batch, ImageBatch)
        return to_minus1_1(self.world.put(torch.as_tensor(batch.images_BHWC)))

    def train_step(self) -> dict[str, Tensor]:
        """Take one step and return its losses by name; `codes` then holds the codes of each
        scale."""
        img_BCHW, row = self.batch(), dict[str, Tensor]()
        with self.autocast():
            f_BZhw = self.vae.encode(img_BCHW).float()
        if self.step == self.plain_steps == 0:
            self._start_codebook(f_BZhw.detach())
        if self.step < self.plain_steps:
            # Without a codebook only this small penalty bounds the latent.
            fhat, extra = f_BZhw, 0.001 * f_BZhw.square().mean()
            if self.step == self.plain_steps - 1:
                self._start_codebook(f_BZhw.detach())
        else:
            fhat, extra, idx_list, residual_list = self.vae.quantize.encode_for_training(f_BZhw)
            # A function of the step alone: the same on all ranks and after a resume.
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
            with torch.no_grad():
                self.codebook.update(
                    torch.cat(idx_list),
                    torch.cat(residual_list),
                    self.recipe.codebook_decay,
                    self.recipe.dead_count,
                    generator,
                )
            self.codes = idx_list
        with self.autocast():
            out_BCHW = self.vae.decode(fhat).float()
        loss = pixel_loss(out_BCHW, img_BCHW, self.recipe)
        row["loss"] = loss.detach()
        if self.lpips:
            with self.autocast():
                distance = self.lpips(out_BCHW, img_BCHW)
            row["perceptual"] = distance.detach()
            loss = loss + self.recipe.perceptual * distance
        judged = (
            self.judge is not None
            and self.step >= self.recipe.adversarial_start * self.recipe.steps
        )
        if judged:
            loss = loss + self._adversary(loss, out_BCHW, row)
        self._follow(self.optimizer, loss + extra, self.trained)
        if judged:
            self._judge(out_BCHW.detach(), img_BCHW, row)
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(
                    self.average, [p.data for p in self.trained], 1 - self.recipe.ema
                )
        self.step += 1
        return row

    def autocast(self) -> torch.autocast:
        """bf16 convolutions if the processor is fast at them; quantiser and losses stay float32."""
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _follow(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[torch.nn.Parameter]
    ) -> None:
        """Backward pass, exchange of gradients, clipping, step."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr()
        loss.backward()
        for p in parameters if self.world.size > 1 else ():
            if p.grad is not None:  # phi has none before quantisation starts
                # copy_ keeps the memory layout of the gradient, which fused AdamW requires.
                p.grad.copy_(self.world.reduce(p.grad.contiguous()) / self.world.size)
        # A step whose gradient is not finite is not taken.
        guard(parameters, optimizer, self.recipe.clip, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _adversary(self, loss: Tensor, out_BCHW: Tensor, row: dict[str, Tensor]) -> Tensor:
        """The adversarial loss of the decoder.

        Its weight balances its gradient at the last layer with that of the other losses (Esser et
        al., arXiv 2012.09841), times `adversarial`.
        """
        assert self.judge
        last = next(
            m.weight
            for m in reversed(list(self.vae.decoder.modules()))
            if isinstance(m, torch.nn.Conv2d)
        )
        self.judge.requires_grad_(False)
        with self.autocast():
            game = -self.judge(out_BCHW).float().mean()
        self.judge.requires_grad_(True)
        pull, push = (
            torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, game)
        )
        strength = (pull / (push + 1e-4)).clamp(0, 1e4)
        row["strength"] = self.world.reduce(strength.detach().clone()) / self.world.size
        return self.recipe.adversarial * row["strength"] * game

    def _judge(self, out_BCHW: Tensor, img_BCHW: Tensor, row: dict[str, Tensor]) -> None:
        """The step of the discriminator."""
        assert self.judge and self.judge_optimizer
        with self.autocast():
            loss = hinge(self.judge(img_BCHW).float(), self.judge(out_BCHW).float())
        row["judge"] = loss.detach()
        self._follow(self.judge_optimizer, loss, list(self.judge.parameters()))

    def _start_codebook(self, f_BZhw: Tensor) -> None:
        """Initialise the codebook with residuals of this batch at every scale."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        vectors, rest = [], f_BZhw
        for patch_num in self.vae.quantize.v_patch_nums:
            low = F.adaptive_avg_pool2d(rest, grid(patch_num))
            vectors.append(low.permute(0, 2, 3, 1).reshape(-1, low.shape[1]))
            rest = rest - 0.7 * F.interpolate(low, size=f_BZhw.shape[-2:], mode="bicubic")
        self.codebook.reseed(
            torch.arange(len(self.codebook.counts), device=f_BZhw.device),
            torch.cat(vectors),
            generator,
        )

    def save(self) -> None:
        """Write the resumable state. All ranks have the same; rank 0 writes it."""
        if not self.world.main:
            return
        state = {
            "identity": self.identity,
            "step": self.step,
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.codebook.counts,
            "sums": self.codebook.sums,
            "average": self.average,
        }
        if self.judge and self.judge_optimizer:
            state |= {
                "judge": self.judge.state_dict(),
                "judge_optimizer": self.judge_optimizer.state_dict(),
            }
        with atomic_file(self.folder / "training.pt") as file:
            torch.save(state, file)

    def resume(self) -> None:
        """Continue from the saved state of the same training, if there is one."""
        path = self.folder / "training.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.world.device)
        if state["identity"] != self.identity:
            say("tokenizer: the settings or the images changed, so training starts again")
            return
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.counts, self.codebook.sums = state["counts"], state["sums"]
        self.average = state["average"]
        if self.judge and self.judge_optimizer:
            self.judge.load_state_dict(state["judge"])
            self.judge_optimizer.load_state_dict(state["judge_optimizer"])
        self.step = state["step"]

    @torch.no_grad()
    def finish(self) -> VQVAE:
        """The trained tokenizer, with averaged weights if `ema` is set."""
        # Without `ema` the list of averages is empty.
        for p, averaged in zip(self.trained, self.average, strict=False):
            p.copy_(averaged)
        return self.vae.eval()


def _weights(recipe: TokenizerTrainConfig) -> tuple[Path, Path]:
    if not recipe.vgg_weights or not recipe.lpips_weights:
        raise UserError(
            "tokenizer.train.perceptual: give tokenizer.train.vgg_weights (torchvision's vgg16) "
            "and lpips_weights (the lin weights of LPIPS for VGG)",
            code="train.lpips-weights",
        )
    return Path(recipe.vgg_weights), Path(recipe.lpips_weights)
