"""A shard in a hundred is damaged, in every way that `tarfile` and `webdataset` may pass over: `verify` names it, training refuses it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import write_images, write_tokens

from tests.runs import run, small_config
from var_scale.data.loader import TokenData
from var_scale.data.manifest import load_manifest
from var_scale.data.shards import index_tar, verify_folder
from var_scale.errors import UserError


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def second_header(content: bytes) -> int:
    """Where the second sample begins."""
    headers = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    return headers[2]


WAYS: dict[str, Callable[[bytes, int], bytes | None]] = {
    "cut in a member": lambda content, offset: content[: offset + 7],
    "cut between samples": lambda content, offset: content[: second_header(content)],
    "cut in a header": lambda content, offset: content[: second_header(content) + 100],
    "bad checksum of a header": lambda content, offset: flip(content, second_header(content) + 3),
    "half a sample": lambda content, offset: content[:512] + content[1024:],
    "a web page": lambda content, offset: b"<html>404</html>" * 99,
    "empty": lambda content, offset: b"",
    "zeros": lambda content, offset: bytes(len(content)),
    "gone": lambda content, offset: None,
    "twice": lambda content, offset: content + content,
    "a bit of the data": lambda content, offset: flip(content, offset + 150),
    "the end mark": lambda content, offset: content.rstrip(b"\0"),
}


def damage(path: Path, way: str, kind: str) -> Callable[[], None]:
    """Damage a shard; returns what mends it."""
    content = path.read_bytes()
    changed = WAYS[way](content, int(index_tar(path, kind)["offset"][0]))
    path.unlink() if changed is None else path.write_bytes(changed)
    return lambda: (path.write_bytes(content), None)[1]


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_one_shard_in_a_hundred(kind: str, tmp_path: Path) -> None:
    """Random shards, each way: all found by name, none accepted by the reader; without the bad one the folder is sound again."""
    (write_images if kind == "image" else write_tokens)(tmp_path, 200, 2)
    rng, whole = random.Random(), load_manifest(tmp_path)
    assert len(whole.shards) == 100 and verify_folder(tmp_path) == []
    for way in WAYS:
        number = rng.randrange(100)
        shard = tmp_path / whole.shards[number].name
        mend = damage(shard, way, kind)
        found = verify_folder(tmp_path)
        assert len(found) == 1 and str(shard) in found[0], (way, found)
        if kind == "tokens":
            try:
                assert TokenData(tmp_path).damaged() == [number], way
            except UserError as error:
                assert str(shard) in str(error), way
        mend()
    index = tmp_path / whole.shards[3].index
    content = index.read_bytes()
    for changed in (flip(content, 3), content[:-1], b""):
        index.write_bytes(changed)
        assert [str(index) in line for line in verify_folder(tmp_path)] == [True]
        if kind == "tokens":
            with pytest.raises(UserError, match=index.name):
                TokenData(tmp_path)
    index.write_bytes(content)
    damage(tmp_path / whole.shards[7].name, "a bit of the data", kind)
    assert len(verify_folder(tmp_path, drop=True)) == 1 and verify_folder(tmp_path) == []
    assert load_manifest(tmp_path).num_samples == 198 and load_manifest(tmp_path).digest != whole.digest


def test_training_refuses_a_damaged_shard(tmp_path: Path) -> None:
    """One bit, which no size or header shows: the run stops before its first step, on all ranks, with the shard's name."""
    config = small_config(tmp_path / "data", engine={"name": "ddp", "processes": 2})
    shard = sorted((tmp_path / "data" / "train").glob("*.tar"))[1]
    damage(shard, "a bit of the data", "tokens")
    code, folder = run(config, tmp_path / "run")
    status = folder.status()
    assert code == 2 or status["state"] == "failed"
    assert f"{shard}: the sha256 differs" in status["reason"] and not folder.read_metrics(), status
