"""How fast one core reads samples: images by each way to resize them, and tokens from shards."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import var_scale
from var_scale.data import images as decoding
from var_scale.data.image_loader import ImageData
from var_scale.data.loader import TokenData, TokenLoader
from var_scale.data.shards import Sample, ShardSet, token_sample
from var_scale.files import write_json
from var_scale.machine import processor_name
from var_scale.progress import say
from var_scale.scales import PATCH_NUMS_256

SIDES, COUNT, RESO = (500, 375), 48, 256
"""Width and height of the JPEGs, how many there are, and the side of the training images."""
TOKENS, LENGTH, BATCH = 65536, 680, 256
"""Samples of the token shards, tokens of each, and samples that are read at a time."""
ROUNDS, SECONDS = 5, 2.0
"""Rounds, and seconds of every way in each round."""


def photographs(folder: Path) -> None:
    """Write image shards of JPEGs with the usual size and bytes of ImageNet: 1/f noise with grain,
    quality 90."""
    rng = np.random.default_rng(0)
    width, height = SIDES
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    samples = []
    for _ in range(COUNT):
        noise = np.fft.fft2(rng.standard_normal((3, height, width))) / frequency**1.2
        cloud = np.fft.ifft2(noise).real.transpose(1, 2, 0)
        cloud = 127 + 50 * (cloud - cloud.mean()) / cloud.std() + rng.normal(0, 9, cloud.shape)
        stream = io.BytesIO()
        Image.fromarray(np.clip(cloud, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        samples.append(Sample(stream.getvalue(), 0, "jpg"))
    shards = ShardSet(folder, "image", "train", 1, COUNT, {"name": "noise"})
    shards.write(0, samples)
    shards.finish()


def tokens(folder: Path) -> None:
    """Write token shards of random tokens."""
    rng, each = np.random.default_rng(0), 4096
    about = {
        "dtype": "<u2",
        "views": 1,
        "length": LENGTH,
        "patch_nums": list(PATCH_NUMS_256),
        "vocab_size": 4096,
        "tokenizer_hash": "none",
    }
    shards = ShardSet(folder, "tokens", "train", 1, each, {"name": "random"}, about)
    for number in range(TOKENS // each):
        shards.write(
            number, [token_sample(row, 0) for row in rng.integers(0, 4096, (each, 1, LENGTH))]
        )
    shards.finish()


def rates(ways: dict[str, Callable[[int], int]]) -> dict[str, float]:
    """Samples per second of each way, the median over rounds in which all alternate."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began, count, number = time.perf_counter(), 0, 0
            while time.perf_counter() - began < SECONDS:
                count += way(number)
                number += 1
            found[name].append(count / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def bench_data(out: Path | None) -> dict[str, Any]:
    """Measure, print and write the images per second of one core with Pillow and with PyTorch, and
    the token samples per second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        photographs(root / "images")
        tokens(root / "tokens")
        exact, fast = (
            ImageData(root / "images", (RESO, RESO), resize) for resize in ("pillow", "torch")
        )
        loader = TokenLoader(TokenData(root / "tokens"), 0, BATCH)
        places = [np.arange(start, start + 8) for start in range(0, COUNT, 8)]

        def pillow(number: int) -> int:
            # Pillow alone, as in the official code: without the faster decoder.
            kept, decoding.simplejpeg = decoding.simplejpeg, None
            exact.random_crops(places[number % len(places)], 0, number)
            decoding.simplejpeg = kept
            return 8

        def torch_(number: int) -> int:
            fast.random_crops(places[number % len(places)], 0, number)
            return 8

        found = rates(
            {
                "pillow": pillow,
                "torch": torch_,
                "tokens": lambda number: len(loader.batch(number).labels_B),
            }
        )
        one, two = (data.random_crops(np.arange(COUNT), 0, 0).astype(int) for data in (exact, fast))
        size = int(np.mean(exact.sizes))
    torch.set_num_threads(before)
    difference = np.abs(one - two)
    result = {
        "images_per_second": {name: found[name] for name in ("pillow", "torch")},
        "ratio": found["torch"] / found["pillow"],
        "largest_difference": int(difference.max()),
        "share_different": float((difference > 0).mean()),
        "tokens_samples_per_second": found["tokens"],
        "jpeg": {"sides": SIDES, "bytes": size, "reso": RESO},
        "decoder": "simplejpeg" if decoding.simplejpeg else "pillow",
        "cores": 1,
        "device": f"CPU ({processor_name()})",
        "versions": {
            "var_scale": var_scale.__version__,
            "torch": torch.__version__,
            "pillow": Image.__version__,
        },  # type: ignore[attr-defined]
        "command": "var-scale bench data",
        "date": time.strftime("%Y-%m-%d"),
    }
    say(
        f"{result['device']}, one core, {SIDES[0]}x{SIDES[1]} JPEGs of {size / 1000:.0f} kB to "
        f"{RESO} pixels: Pillow {found['pillow']:.0f} images/s, {result['decoder']} and PyTorch "
        f"{found['torch']:.0f} ({result['ratio']:.2f} times); they differ by at most "
        f"{result['largest_difference']} in {result['share_different']:.1%} of the values"
    )
    say(f"tokens: {found['tokens']:,.0f} samples/s of {LENGTH} tokens, in random order")
    if out:
        write_json(out, result)
    return result
