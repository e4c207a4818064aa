"""Training of the small multi-scale VQVAE: EMA codebook with dead-code re-seeding, no adversary (data.md section 4).

The first steps run without quantisation; then the codebook starts from residuals of the data and follows them by
exponential moving averages, while encoder, decoder and phi follow the gradient.
"""

from __future__ import annotations

import io
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from var_scale.config.schema import Config, TokenizerTrainConfig
from var_scale.data.loader import ImageData
from var_scale.data.order import global_batch_indices
from var_scale.data.transforms import to_minus1_1
from var_scale.files import atomic_file, canonical_hash, disk_errors, read_json, write_json
from var_scale.model.load import new_tokenizer, save_tokenizer, tokenizer_file
from var_scale.model.vqvae import VQVAE
from var_scale.progress import progress, say
from var_scale.train.world import fast_bf16

SAVE_SECONDS = 10.0


@dataclass
class Codebook:
    """EMA counts (V,) and sums (V, Z) behind the codebook."""

    weight: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor) -> Codebook:
        """An empty average for `weight` (V, Z)."""
        return Codebook(weight, torch.ones(weight.shape[0]), weight.detach().clone())

    def reseed(self, codes: torch.Tensor, vectors_NZ: torch.Tensor, generator: torch.Generator) -> None:
        """Put random `vectors_NZ` in place of `codes`."""
        pick = torch.randint(len(vectors_NZ), (len(codes),), generator=generator)
        self.weight[codes] = vectors_NZ[pick]
        self.sums[codes] = vectors_NZ[pick]
        self.counts[codes] = 1.0

    def update(self, idx_N: torch.Tensor, vectors_NZ: torch.Tensor, decay: float, dead: float, generator: torch.Generator) -> None:
        """One EMA step: counts and sums follow the batch, dead codes move to residuals of the batch."""
        batch_counts = torch.bincount(idx_N, minlength=len(self.counts)).to(self.counts.dtype)
        batch_sums = torch.zeros_like(self.sums).index_add_(0, idx_N, vectors_NZ)
        self.counts.mul_(decay).add_(batch_counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(batch_sums, alpha=1 - decay)
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
        gone = (self.counts < dead).nonzero().squeeze(1)
        if len(gone):
            self.reseed(gone, vectors_NZ, generator)


def reconstruction_loss(out_BCHW: torch.Tensor, img_BCHW: torch.Tensor) -> torch.Tensor:
    """MSE + 0.2 L1 + 0.5 L1 of a three-level Laplacian pyramid."""
    loss = F.mse_loss(out_BCHW, img_BCHW) + 0.2 * F.l1_loss(out_BCHW, img_BCHW)
    difference = out_BCHW - img_BCHW  # the pyramid is linear, so the pyramid of the difference is the difference of pyramids
    for _ in range(3):
        low = F.avg_pool2d(difference, 2)
        band = difference - F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        loss = loss + 0.5 / 3 * band.abs().mean()
        difference = low
    return loss


class TokenizerTrainer:
    """State of a tokenizer training; saved every few seconds, so that it can be stopped anywhere."""

    def __init__(self, config: Config, images: ImageData, folder: Path):
        self.recipe: TokenizerTrainConfig = config.tokenizer.train
        self.images, self.folder = images, folder
        torch.manual_seed(self.recipe.seed)
        self.vae: VQVAE = new_tokenizer(config.tokenizer)
        self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on CPUs
        weight = self.vae.quantize.embedding.weight
        weight.requires_grad_(False)
        self.codebook = Codebook.of(weight.data)
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.005, fused=True)
        self.identity = canonical_hash([config.tokenizer.model_dump(mode="json", exclude={"weights"}), images.digest])
        self.bf16 = fast_bf16(torch.device("cpu"))
        self.step = 0

    @property
    def plain_steps(self) -> int:
        """Steps without quantisation."""
        return round(self.recipe.plain_fraction * self.recipe.steps)

    def lr(self) -> float:
        """Warm-up, then cosine to 5 % of the peak."""
        r = self.recipe
        if self.step < r.warmup_steps:
            return r.lr * (self.step + 1) / r.warmup_steps
        p = (self.step - r.warmup_steps) / max(1, r.steps - 1 - r.warmup_steps)
        return r.lr * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * p)))

    def batch(self) -> torch.Tensor:
        """Images of this step, (B, 3, H, W) in [-1, 1]."""
        index, _ = global_batch_indices(self.images.num_samples, self.recipe.seed, self.step, self.recipe.batch_size)
        return to_minus1_1(self.images.images(index))

    def train_step(self) -> float:
        """One step; returns the reconstruction loss."""
        img_BCHW = self.batch()
        with self.autocast():
            f_BZhw = self.vae.quant_conv(self.vae.encoder(img_BCHW)).float()
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
        with self.autocast():
            out_BCHW = self.vae.decoder(self.vae.post_quant_conv(fhat)).float()
        loss = reconstruction_loss(out_BCHW, img_BCHW)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def autocast(self) -> torch.autocast:
        """bf16 convolutions where the processor has them fast; quantiser and loss stay float32."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)

    def _start_codebook(self, f_BZhw: torch.Tensor) -> None:
        """Begin with residuals as they come: codes from averages at every scale of this batch."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        vectors, rest = [], f_BZhw
        for pn in self.vae.quantize.v_patch_nums:
            low = F.adaptive_avg_pool2d(rest, pn)
            vectors.append(low.permute(0, 2, 3, 1).reshape(-1, low.shape[1]))
            rest = rest - 0.7 * F.interpolate(low, size=f_BZhw.shape[-2:], mode="bicubic")
        pool = torch.cat(vectors)
        self.codebook.reseed(torch.arange(len(self.codebook.counts)), pool, generator)

    def save(self) -> None:
        """Write the resumable state."""
        state = {
            "identity": self.identity, "step": self.step, "model": self.vae.state_dict(), "optimizer": self.optimizer.state_dict(),
            "counts": self.codebook.counts, "sums": self.codebook.sums,
        }  # fmt: skip
        buffer = io.BytesIO()  # torch.save hides what a full disk says
        torch.save(state, buffer)
        with atomic_file(self.folder / "training.pt") as file:
            file.write(buffer.getvalue())

    def resume(self) -> None:
        """Continue from the saved state of the same training, if there is one."""
        path = self.folder / "training.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["identity"] != self.identity:
            say("tokenizer: the settings or the images changed, training starts again")
            return
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.counts, self.codebook.sums = state["counts"], state["sums"]
        self.step = state["step"]


def train_tokenizer(config: Config, train: ImageData, val: ImageData, folder: Path) -> Path:
    """Train, report, and return the weights file; returns at once when it is already there for the same settings and images."""
    target = tokenizer_file(folder)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    trainer = TokenizerTrainer(config, train, folder)
    done = folder / "tokenizer.json"
    if target.exists() and done.exists() and read_json(done).get("identity") == trainer.identity:
        say(f"tokenizer: already trained ({target})")
        return target
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trainer.resume()
    trainer.vae.train()
    saved = time.monotonic()
    with progress("tokenizer", trainer.recipe.steps, "steps", trainer.step) as bar:
        while trainer.step < trainer.recipe.steps:
            loss = trainer.train_step()
            bar.update(trainer.step, f"loss {loss:.4f}")
            if time.monotonic() - saved > SAVE_SECONDS:
                trainer.save()
                saved = time.monotonic()
    trainer.vae.eval()
    save_tokenizer(trainer.vae, target)
    report = assess(trainer.vae, val)
    picture(trainer.vae, val, folder / "reconstructions.png")
    write_json(done, {"identity": trainer.identity, "steps": trainer.recipe.steps, **report})
    (folder / "training.pt").unlink(missing_ok=True)
    perplexity = " ".join(f"{p:.0f}" for p in report["perplexity_per_scale"])
    say(f"tokenizer: validation PSNR {report['psnr_db']:.2f} dB, MAE {report['mae']:.4f}; codebook perplexity per scale {perplexity}"
        f" of {config.tokenizer.vocab_size}; picture {folder / 'reconstructions.png'}")  # fmt: skip
    return target


def decode(vae: VQVAE, idx_list: list[torch.Tensor]) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] of all scales' tokens."""
    out = vae.idxBl_to_img(idx_list, same_shape=True, last_one=True)
    assert isinstance(out, torch.Tensor)
    return out


@torch.no_grad()
def assess(vae: VQVAE, val: ImageData, limit: int = 4096, batch: int = 512) -> dict[str, Any]:
    """Reconstruction error on up to `limit` validation images (in [0, 1]) and codebook perplexity exp(entropy) of each scale."""
    hits = None
    squared = absolute = count = 0.0
    n = min(limit, val.num_samples)
    for start in range(0, n, batch):
        img = to_minus1_1(val.images(np.arange(start, min(start + batch, n))))
        idx_list = vae.img_to_idxBl(img)
        out = decode(vae, idx_list)
        difference = (out - img) / 2
        squared += float(difference.square().sum())
        absolute += float(difference.abs().sum())
        count += difference.numel()
        new = torch.stack([torch.bincount(i.flatten(), minlength=vae.V) for i in idx_list])
        hits = new if hits is None else hits + new
    assert hits is not None
    p_SV = hits.double() / hits.sum(dim=1, keepdim=True)
    perplexity = torch.exp(-torch.xlogy(p_SV, p_SV).sum(dim=1))
    mse = squared / count
    return {"images": n, "mse": mse, "psnr_db": -10 * math.log10(mse), "mae": absolute / count, "perplexity_per_scale": perplexity.tolist(),
            "codes_used_per_scale": (hits > 0).sum(dim=1).tolist()}  # fmt: skip


@torch.no_grad()
def picture(vae: VQVAE, val: ImageData, path: Path, columns: int = 16, rows: int = 4, zoom: int = 3) -> None:
    """Originals above their reconstructions, `rows` pairs of rows."""
    rows = max(1, min(rows, val.num_samples // columns))
    columns = min(columns, val.num_samples)
    images = val.images(np.arange(columns * rows))
    out = decode(vae, vae.img_to_idxBl(to_minus1_1(images)))
    again = ((out.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    strips = []
    for r in range(rows):
        part = slice(r * columns, (r + 1) * columns)
        strips += [np.concatenate(list(images[part]), axis=1), np.concatenate(list(again[part]), axis=1)]
        strips.append(np.full((4, *strips[-1].shape[1:]), 255, np.uint8))
    sheet = Image.fromarray(np.concatenate(strips[:-1], axis=0))
    sheet = sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")
