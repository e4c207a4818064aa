"""One shard of twenty is damaged in every way that `tarfile` and `webdataset` may ignore:
`verify` names it, and training refuses it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.data_samples import write_images, write_tokens
from tests.raises import raises
from tests.runs import ENGINES, run, run_here, small_config
from var_scale.data.loader import TokenData
from var_scale.data.manifest import load_manifest
from var_scale.data.tar_index import index_tar
from var_scale.data.verify import verify_folder
from var_scale.errors import UserError


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def second_header(content: bytes) -> int:
    """The offset at which the second sample begins."""
    headers = [
        place
        for place in range(0, len(content), 512)
        if content[place + 257 : place + 262] == b"ustar"
    ]
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
    """Damage a shard; return a function that repairs it."""
    content = path.read_bytes()
    changed = WAYS[way](content, int(index_tar(path, kind)["offset"][0]))
    path.unlink() if changed is None else path.write_bytes(changed)
    return lambda: (path.write_bytes(content), None)[1]


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_one_shard_in_twenty(kind: str, tmp_path: Path) -> None:
    """Random shards are damaged in each way: `verify` names all of them and the reader accepts
    none. Without the bad shard the folder is sound again."""
    (write_images if kind == "image" else write_tokens)(tmp_path, 40, 2)
    rng, whole = random.Random(), load_manifest(tmp_path)
    assert len(whole.shards) == 20 and verify_folder(tmp_path) == []
    for way in WAYS:
        number = rng.randrange(20)
        shard = tmp_path / whole.shards[number].name
        repair = damage(shard, way, kind)
        found = verify_folder(tmp_path)
        assert len(found) == 1 and str(shard) in found[0], (way, found)
        if kind == "tokens":
            try:
                assert TokenData(tmp_path).damaged() == [number], way
            except UserError as error:
                assert str(shard) in str(error), way
        repair()
    index = tmp_path / whole.shards[3].index
    content = index.read_bytes()
    for changed, code in (
        (flip(content, 3), "data.index-changed"),
        (content[:-1], "data.shard-missing"),
        (b"", "data.shard-missing"),
    ):
        index.write_bytes(changed)
        assert [str(index) in line for line in verify_folder(tmp_path)] == [True]
        if kind == "tokens":
            with raises(code, index.name):
                TokenData(tmp_path)
    index.write_bytes(content)
    damage(tmp_path / whole.shards[7].name, "a bit of the data", kind)
    assert len(verify_folder(tmp_path, drop=True)) == 1 and verify_folder(tmp_path) == []
    assert (
        load_manifest(tmp_path).num_samples == 38 and load_manifest(tmp_path).digest != whole.digest
    )


@pytest.mark.parametrize("engine", ["single", pytest.param("ddp", marks=pytest.mark.slow)])
def test_training_refuses_a_damaged_shard(engine: str, tmp_path: Path) -> None:
    """One flipped bit, which no size or header shows, stops the run before its first step, on all
    ranks, with the name of the shard."""
    config = small_config(tmp_path / "data", engine=ENGINES.get(engine, {}))
    shard = sorted((tmp_path / "data" / "train").glob("*.tar"))[1]
    damage(shard, "a bit of the data", "tokens")
    code, folder = (run if engine in ENGINES else run_here)(config, tmp_path / "run")
    status = folder.status()
    assert code and status["state"] == "failed", (code, status)
    assert f"{shard}: the sha256 differs" in status["reason"] and not folder.read_metrics(), status
