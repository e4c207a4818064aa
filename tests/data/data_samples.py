"""Small folders of shards that the tests of this folder share."""

from pathlib import Path

import numpy as np

from var_scale.data.embedded import png_bytes
from var_scale.data.shards import ShardSetWriter, token_sample
from var_scale.files import sha256_file

PATCH_NUMS = [1, 2, 3]
TOKENS = {
    "dtype": "<u2",
    "views": 2,
    "length": 14,
    "patch_nums": PATCH_NUMS,
    "vocab_size": 300,
    "tokenizer_hash": "abc",
}


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def write_images(folder: Path, count: int = 20, per_shard: int = 8) -> None:
    with ShardSetWriter(
        folder, "image", "train", 5, per_shard, {"name": "test", "count": count}
    ) as writer:
        for index in range(writer.completed_samples(), count):
            writer.add_image(png_bytes(image(index)), index % 5)
        writer.finish()


def write_tokens(folder: Path, count: int = 20, per_shard: int = 8) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 300, (count, 2, 14))
    with ShardSetWriter(
        folder, "tokens", "train", 5, per_shard, {"name": "test"}, TOKENS
    ) as writer:
        for index in range(writer.completed_samples(), count):
            writer.add(token_sample(tokens[index], index % 5))
        writer.finish()
    return tokens


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
