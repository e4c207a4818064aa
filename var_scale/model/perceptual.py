"""Losses of tokenizer training beside the pixel losses: LPIPS (Zhang et al. 2018) and a patch
discriminator (Isola et al. 2017)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_scale.errors import UserError
from var_scale.model.official import load_strict, read_checkpoint

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""widths of VGG-16's convolutions between its poolings"""


class VGG16(nn.Module):
    """The convolutions of VGG-16, named as torchvision's `features`.

    Args:
        weights: the file of torchvision's vgg16.

    Raises:
        UserError: code `model.weights-mismatch` for a file of another kind.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        channels = 3
        for number, stage in enumerate(STAGES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False
        )
        state = read_checkpoint(weights)
        load_strict(
            self,
            {name: tensor for name, tensor in state.items() if name.startswith("features.")},
            weights,
        )
        self.eval().requires_grad_(False)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the activations after each of the five stages."""
        found = []
        x_BCHW = (x_BCHW - self.shift) / self.scale
        for number, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if number in self.ends:
                found.append(x_BCHW)
        return found


class LPIPS(nn.Module):
    """Perceptual distance of images: the squared difference of unit-length VGG-16 activations,
    weighted per channel.

    Args:
        vgg: the weights file of torchvision's vgg16.
        heads: the `lin` weights of LPIPS v0.1 for VGG.

    Raises:
        UserError: code `model.weights-mismatch` for files of another kind.
    """

    def __init__(self, vgg: Path, heads: Path):
        super().__init__()
        self.vgg = VGG16(vgg)
        weights = read_checkpoint(heads)
        for number, stage in enumerate(STAGES):
            name = f"lin{number}.model.1.weight"
            if name not in weights or weights[name].shape != (1, stage[-1], 1, 1):
                raise UserError(
                    f"{heads}: this file has no {name} of shape (1, {stage[-1]}, 1, 1); give the "
                    "lin weights of LPIPS v0.1 for VGG",
                    code="model.weights-mismatch",
                )
            self.register_buffer(f"head{number}", weights[name].float())
        self.eval().requires_grad_(False)

    def forward(self, one_BCHW: Tensor, two_BCHW: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> their mean distance, a scalar."""
        pairs = zip(self.vgg(one_BCHW), self.vgg(two_BCHW), strict=True)
        total = one_BCHW.new_zeros(())
        for number, pair in enumerate(pairs):
            one, two = (
                x.float() / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-10) for x in pair
            )
            total = total + ((one - two).square() * self.get_buffer(f"head{number}")).sum(1).mean()
        return total


SMALLEST_JUDGED = 24
"""side in pixels of the smallest image that the discriminator takes"""


class PatchDiscriminator(nn.Module):
    """A discriminator of overlapping patches (Isola et al. 2017), with group norm. (B, 3, H, W) ->
    logits (B, 1, h, w), positive for real."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number in range(1, layers + 1):
            inner, outer = width * min(2 ** (number - 1), 8), width * min(2**number, 8)
            blocks += [
                nn.Conv2d(inner, outer, 4, 2 if number < layers else 1, 1, bias=False),
                nn.GroupNorm(32, outer),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*blocks, nn.Conv2d(outer, 1, 4, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The logits of the patches; images have sides of at least `SMALLEST_JUDGED` pixels."""
        return self.net(x_BCHW)


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """The hinge loss of the discriminator from its logits of real and generated images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())
