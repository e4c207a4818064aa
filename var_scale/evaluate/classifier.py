"""A small classifier of a study's own images, which measures how many samples show their class.

It is trained on real images alone, in seconds, so it suits small images that a small network can
tell apart. Its accuracy on real validation images is the bound of what samples can reach.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_scale.data.image_loader import ImageData
from var_scale.progress import progress

LARGEST_SIDE = 64
"""Pixels; larger images need another network."""
IMAGES, PASSES, BATCH, PEAK_LR = 4096, 3, 128, 3e-3
CHANNELS = (24, 48, 96)


def _network(classes: int) -> nn.Sequential:
    """Three convolutions of stride two, and a linear layer over a grid of 4 x 4 cells."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * CHANNELS[-1], classes)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Classifier:
    """A trained classifier."""

    network: nn.Sequential

    @torch.no_grad()
    def accuracy(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
        """Share of images, uint8 (B, H, W, 3), whose class is the label (B,) beside them."""
        right = total = 0
        for images_BHWC, labels in batches:
            found = self.network(_input(images_BHWC)).argmax(1).numpy()
            right, total = right + int((found == labels).sum()), total + len(labels)
        return right / total


def _input(images_BHWC: np.ndarray) -> Tensor:
    """In [-1, 1], (B, 3, H, W)."""
    return torch.tensor(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def suits(data: ImageData) -> bool:
    """Whether these images are small enough."""
    return max(data.images(np.arange(1)).shape[1:3]) <= LARGEST_SIDE


def train_classifier(data: ImageData, classes: int, seed: int = 0) -> Classifier:
    """Train on the first `IMAGES` images of a set of shards, on the CPU.

    The weights depend on the images, the seed and the number of threads.
    """
    images, labels = data.gather(np.arange(min(IMAGES, data.num_samples)))
    x, y = _input(images), torch.from_numpy(labels.astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(classes).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR)
    order = [torch.randperm(len(x), generator=generator).split(BATCH) for _ in range(PASSES)]
    steps = [chosen for one in order for chosen in one]
    with progress("classifier", len(steps), "steps") as bar:
        for step, chosen in enumerate(steps):
            optimizer.param_groups[0]["lr"] = PEAK_LR * (1 - step / len(steps))
            loss = F.cross_entropy(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update(step + 1)
    return Classifier(network.eval())
