"""Shards are written completely or not at all, damaged ones are refused, and the webdataset library
can read them."""

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.data_samples import TOKENS, hashes, image, write_images, write_tokens
from tests.raises import raises
from var_scale.data.embedded import png_bytes
from var_scale.data.indexing import index_folder
from var_scale.data.manifest import load_manifest
from var_scale.data.shards import ShardSetWriter, read_index
from var_scale.data.tar_index import index_tar
from var_scale.data.verify import describe_folder, verify_folder
from var_scale.errors import UserError
from var_scale.files import read_json, write_json


def test_round_trip_and_names(tmp_path: Path) -> None:
    write_images(tmp_path)
    manifest = load_manifest(tmp_path)
    assert [shard.samples for shard in manifest.shards] == [8, 8, 4] and manifest.num_samples == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["manifest.json"] + [f"train-{i:06d}.{ext}" for i in range(3) for ext in ("tar", "idx")]
    )
    records = read_index(tmp_path, manifest.shards[1])
    assert records["label"].tolist() == [index % 5 for index in range(8, 16)]
    payload = (tmp_path / "train-000001.tar").read_bytes()[records["offset"][3] :][
        : records["size"][3]
    ]
    assert payload == png_bytes(image(11))
    assert verify_folder(tmp_path) == []
    info = describe_folder(tmp_path)
    assert (
        info["samples"],
        info["classes"],
        info["samples_per_class_min"],
        info["samples_per_class_max"],
    ) == (20, 5, 4, 4)


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    write_images(tmp_path / "images")
    tokens = write_tokens(tmp_path / "tokens")
    urls = sorted(str(path) for path in (tmp_path / "images").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["cls"] for sample in samples] == [index % 5 for index in range(20)]
    np.testing.assert_array_equal(samples[13]["png"], image(13))
    urls = sorted(str(path) for path in (tmp_path / "tokens").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert samples[7]["tok.npy"].dtype == np.uint16
    np.testing.assert_array_equal(np.stack([sample["tok.npy"] for sample in samples]), tokens)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 4, 4)
    path = tmp_path / "a" / "train-000000.tar"
    whole = path.read_bytes()
    records = index_tar(path)
    end = len(whole.rstrip(b"\0"))  # the last byte that is not zero lies in the last member
    needed = -(-end // 512) * 512 + 1024
    cut = tmp_path / "cut.tar"
    for size in [*range(1, needed, 37), *range(512, needed, 512), needed - 1]:
        cut.write_bytes(whole[:size])
        with raises("data.tar-damaged", "cut.tar"):
            index_tar(cut)
    cut.write_bytes(whole[: int(records["offset"][3]) + 5])
    with raises("data.tar-damaged", "000000003.png"):
        index_tar(cut)
    cut.write_bytes(whole[:needed])
    np.testing.assert_array_equal(index_tar(cut), records)


def test_bad_checksum_half_sample_html_empty(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 4, 4)
    whole = bytearray((tmp_path / "a" / "train-000000.tar").read_bytes())
    bad = tmp_path / "bad.tar"
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    for at in headers:
        broken = bytearray(whole)
        broken[at + 2] ^= 1
        bad.write_bytes(broken)
        with raises("data.tar-damaged", "bad.tar"):
            index_tar(bad)
    # One member is missing; the rest is a sound tar.
    bad.write_bytes(whole[: headers[2]] + whole[headers[3] :])
    with raises("data.sample-incomplete", "000000001"):
        index_tar(bad)
    bad.write_bytes(b"<html><body>404 not found</body></html>" * 100)
    with raises("data.tar-damaged", "bad.tar"):
        index_tar(bad)
    for content, code in ((b"", "data.tar-damaged"), (bytes(10240), "data.no-samples")):
        bad.write_bytes(content)
        with raises(code, "bad.tar"):
            index_tar(bad)
    bad.write_bytes(whole + whole)
    with raises("data.tar-damaged", "end-of-archive"):
        index_tar(bad)
    with raises("data.shard-missing", "none.tar"):
        index_tar(tmp_path / "none.tar")


@pytest.mark.parametrize("tar_format", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
def test_adopting_foreign_tars(tmp_path: Path, tar_format: str) -> None:
    import io
    import tarfile

    long = "folder/" + "x" * (80 if tar_format == "USTAR_FORMAT" else 180)
    with tarfile.open(tmp_path / "some.tar", "w", format=getattr(tarfile, tar_format)) as tar:
        for index in range(3):
            for extension, data in (
                ("json", b"{}"),
                ("png", png_bytes(image(index))),
                ("cls", str(index * 3).encode()),
            ):
                info = tarfile.TarInfo(f"{long}{index}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    manifest = index_folder(tmp_path, "image", "val")
    assert (manifest.num_samples, manifest.num_classes, manifest.split) == (3, 7, "val")
    assert verify_folder(tmp_path) == []
    with raises("data.class-range", "class 6"):
        index_folder(tmp_path, "image", "val", num_classes=4)


def test_indexing_our_own_shards_gives_the_same_shard_list(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    before = load_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert index_folder(tmp_path, "tokens", tokens=TOKENS).shards == before.shards
    with raises("data.token-shape", "(1, "):
        index_folder(tmp_path, "tokens", tokens={**TOKENS, "views": 1})
    with raises("data.token-fields", "tokenizer_hash"):
        index_folder(tmp_path, "tokens")


KILLED = """
import os, sys
from pathlib import Path
from tests.data.data_samples import *
from var_scale.data import shards
folder, limit, stage = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if stage == "record":  # die after the tar and the index, before the record, which counts the shard
    original = shards.write_json

    def write_json(path, value):
        os._exit(9) if path.name == "000001.json" else original(path, value)

    shards.write_json = write_json
with ShardSetWriter(folder, "image", "train", 5, 8, {"name": "test", "count": 20}) as writer:
    for index in range(writer.completed_samples(), 20):
        if index == limit:
            os._exit(9)
        writer.add_image(png_bytes(image(index)), index % 5)
"""


@pytest.mark.parametrize(("limit", "stage", "left"), [(19, "samples", 16), (20, "record", 8)])
def test_killed_writer_resumes_to_identical_bytes(
    tmp_path: Path, limit: int, stage: str, left: int
) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(limit), stage],
        cwd=root,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{root}:{root}/tests/data"},
    )
    assert process.returncode == 9
    with raises("data.no-manifest", "manifest.json"):
        load_manifest(tmp_path / "killed")
    writer = ShardSetWriter(
        tmp_path / "killed", "image", "train", 5, 8, {"name": "test", "count": 20}
    )
    assert writer.completed_samples() == left
    write_images(tmp_path / "killed")
    write_images(tmp_path / "whole")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_a_lost_shard_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    write_images(tmp_path)
    before = hashes(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    write_images(tmp_path)
    assert hashes(tmp_path) == before


def test_a_stop_inside_a_shard_is_silent_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tar writer is closed before its file is closed, so the garbage collector prints no "write
    to closed file"."""
    import webdataset

    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    write = webdataset.TarWriter.write

    def stop(tar: webdataset.TarWriter, sample: dict[str, object]) -> None:
        write(tar, sample)
        raise KeyboardInterrupt

    monkeypatch.setattr(webdataset.TarWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path)
    gc.collect()
    assert (
        complaints == [] and not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*tar*"))
    )


def test_images_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    """An image that is truncated inside a sound tar: index refuses it, and verify of an adopted
    folder names it."""
    whole = png_bytes(image(0))
    with ShardSetWriter(tmp_path, "image", "train", 2, 8, {"name": "test"}) as writer:
        for payload in (whole, whole[: len(whole) // 2]):
            writer.add_image(payload, 1)
        writer.finish()
    assert (
        len(problems := verify_folder(tmp_path)) == 1
        and "sample 1" in problems[0]
        and "not a readable image" in problems[0]
    )
    with raises("data.image-invalid", "train-000000.tar: sample 1"):
        index_folder(tmp_path)
    with raises("data.split-name"):
        index_folder(tmp_path, split="")


def test_settings_with_tuples_are_the_same_settings(tmp_path: Path) -> None:
    """A finished folder is recognised although its manifest stores tuples as lists."""
    source = {"name": "test", "size": (16, 40)}
    with ShardSetWriter(tmp_path, "image", "train", 2, 8, source) as writer:
        writer.add_image(png_bytes(image(0)), 0)
        writer.finish()
    assert ShardSetWriter(tmp_path, "image", "train", 2, 8, source).complete


def test_other_settings_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path)
    with raises("data.other-settings", "source.count", 20, 21):
        write_images(tmp_path, 21)
    with ShardSetWriter(tmp_path / "part", "image", "train", 5, 2, {"name": "a"}) as writer:
        writer.add_image(b"x", 0)
    # Nothing is written yet, so the settings may change.
    ShardSetWriter(tmp_path / "part", "image", "train", 5, 2, {"name": "b"})
    with ShardSetWriter(tmp_path / "part", "image", "train", 5, 2, {"name": "a"}) as writer:
        writer.add_image(b"x", 0)
        writer.add_image(b"x", 0)
    with raises("data.other-settings", "samples_per_shard", 2, 3):
        ShardSetWriter(tmp_path / "part", "image", "train", 5, 3, {"name": "a"})


def test_label_outside_classes(tmp_path: Path) -> None:
    with (
        ShardSetWriter(tmp_path, "image", "train", 5, 8, {}) as writer,
        raises("data.class-range", "class 5"),
    ):
        writer.add_image(b"x", 5)


def test_full_disk_is_one_line_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:  # settings; tar, index and record of shard 0; then the disk is full
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full") as caught:
        write_images(tmp_path / "a")
    assert "\n" not in str(caught.value)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [".progress", "train-000000.idx", "train-000000.tar"]
    monkeypatch.setattr(os, "fsync", real)
    write_images(tmp_path / "a")
    write_images(tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_manifest_mismatches(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "manifest.json"
    good = read_json(path)
    for change, name in (
        ({"format": "other"}, "format"),
        ({"version": 2}, "version 2"),
        ({"num_classes": 6}, "digest"),
        ({"num_samples": 19}, "digest"),
        ({"kind": "sound"}, "kind 'sound'"),
        ({"shards": [{}]}, "field"),
    ):
        write_json(path, {**good, **change})
        with raises("data.manifest-invalid", name):
            load_manifest(tmp_path)
    path.write_text(path.read_text()[:100])
    with raises("file.not-json", path):
        load_manifest(tmp_path)
    write_json(path, good)
    load_manifest(tmp_path)


def test_missing_and_cut_shards_are_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    tar = tmp_path / "train-000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:-512])
    with raises("data.shard-missing", "train-000001.tar", len(content) - 512):
        load_manifest(tmp_path)
    tar.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    load_manifest(tmp_path)
    assert len(verify_folder(tmp_path)) == 1 and "sha256" in verify_folder(tmp_path)[0]
    tar.unlink()
    with raises("data.shard-missing", "train-000001.tar"):
        load_manifest(tmp_path)
