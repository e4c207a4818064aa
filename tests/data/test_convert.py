"""Images as people have them to shards: the same bytes however it is done, nothing lost without a word."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_samples import hashes, image
from PIL import Image

from var_scale.cli import main
from var_scale.data.convert import BROKEN_NAME, class_names, shard_images
from var_scale.data.loader import ImageData
from var_scale.data.manifest import load_manifest
from var_scale.data.order import epoch_permutation
from var_scale.data.shards import describe_folder, index_folder, verify_folder
from var_scale.errors import UserError

WNIDS = ("n02012849", "n01440764", "n03126707")


def encoded(index: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image(index)).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """train and val with three classes; 24 + 6 images in several formats."""
    root, index = tmp_path / "imagenet", 0
    for split, count in (("train", 8), ("val", 2)):
        for wnid in WNIDS:
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                form = ("PNG", "JPEG", "WEBP", "BMP")[number % 4]
                (folder / f"{wnid}_{number}.{form}").write_bytes(encoded(index, form))
                index += 1
    return root


def test_imagenet_folders(imagenet: Path, tmp_path: Path) -> None:
    """Both splits, names from the folder ids, a global shuffle, bytes that depend on the seed alone, pixels as they were."""
    done = shard_images(imagenet, tmp_path / "a", samples_per_shard=5, processes=2)
    shard_images(imagenet, tmp_path / "b", samples_per_shard=5, processes=1)
    shard_images(imagenet, tmp_path / "c", samples_per_shard=5, seed=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") != hashes(tmp_path / "c")
    assert {name: manifest.num_samples for name, manifest in done.items()} == {"train": 24, "val": 6}
    names = ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"]
    assert done["train"].class_names == done["val"].class_names == names
    data, order = ImageData(tmp_path / "a" / "train"), epoch_permutation(24, 0, 0)
    assert data.labels.tolist() == [place // 8 for place in order.tolist()]
    written = [(1 - label if label < 2 else 2) * 8 + place % 8 for place, label in zip(order.tolist(), data.labels.tolist(), strict=True)]
    for sample, index in enumerate(written):
        if index % 4 in (0, 3):  # PNG and BMP lose nothing
            np.testing.assert_array_equal(data.images(np.array([sample]))[0], image(index))
    assert verify_folder(tmp_path / "a" / "train") == []
    info = describe_folder(tmp_path / "a" / "train")
    assert info["width_min_median_max"] == "8 8 8" and info["class_names"].startswith("0: tench")
    before = hashes(tmp_path / "a")
    shard_images(imagenet, tmp_path / "a", samples_per_shard=5)
    assert hashes(tmp_path / "a") == before
    with pytest.raises(UserError, match="shuffle_seed: 0 there, 1 here"):
        shard_images(imagenet, tmp_path / "a", samples_per_shard=5, seed=1)


def test_broken_images(imagenet: Path, tmp_path: Path) -> None:
    """Listed and left out; too many stop the job, and a larger share goes on from there."""
    files = sorted((imagenet / "train").rglob("*.*"))
    files[0].write_bytes(b"<html>not found</html>")
    files[5].write_bytes(files[5].read_bytes()[:60])
    with pytest.raises(UserError, match=r"images cannot be read, more than 1.00% of 24.*broken.csv"):
        shard_images(imagenet, tmp_path / "out", samples_per_shard=5)
    done = shard_images(imagenet, tmp_path / "out", samples_per_shard=5, max_broken=0.1)
    report = (tmp_path / "out" / "train" / BROKEN_NAME).read_text()
    assert done["train"].num_samples == 22 and str(files[0]) in report and str(files[5]) in report and len(report.splitlines()) == 3
    assert verify_folder(tmp_path / "out" / "train") == []
    with pytest.raises(UserError, match="cannot be read"):  # the limit holds for a second try too
        for _ in range(2):
            shard_images(imagenet, tmp_path / "again", samples_per_shard=5)
    files[0].write_bytes(encoded(0))
    files[5].write_bytes(encoded(5))
    assert shard_images(imagenet, tmp_path / "again", samples_per_shard=5)["train"].num_samples == 24, "mended images come back"
    assert not (tmp_path / "again" / "train" / BROKEN_NAME).exists()


def test_csv_and_tars(imagenet: Path, tmp_path: Path) -> None:
    """A table of paths with names or numbers; shards of others, shuffled again with their names."""
    files = sorted((imagenet / "train").rglob("*.*"))[:12]
    for name, labels in (("names", ["a", "b"]), ("numbers", ["3", "1"])):
        table = tmp_path / f"{name}.csv"
        table.write_text("path,label\n" + "".join(f"{os.path.relpath(file, tmp_path)},{labels[i % 2]}\n" for i, file in enumerate(files)))
        manifest = shard_images(table, tmp_path / name, "val")["val"]
        assert manifest.num_classes == (2 if name == "names" else 4) and manifest.class_names == (["a", "b"] if name == "names" else None)
    again = shard_images(tmp_path / "names", tmp_path / "again", seed=3)["train"]
    assert again.num_samples == 12 and again.class_names == ["a", "b"]
    one, two = ImageData(tmp_path / "names"), ImageData(tmp_path / "again")
    pixels = [sorted((label, x.tobytes()) for label, x in zip(d.labels.tolist(), d.images(np.arange(12)), strict=True)) for d in (one, two)]
    assert pixels[0] == pixels[1] and one.labels.tolist() != two.labels.tolist()
    adopted = index_folder(tmp_path / "again", class_names=["x", "y", "z"])
    assert adopted.num_classes == 3 and adopted.class_names == ["x", "y", "z"]


@pytest.mark.parametrize(("make", "text"), [
    (lambda root: (root / "a.csv").write_text("file,label\nx,1\n") and root / "a.csv", "needs the columns path and label, has file, label"),
    (lambda root: (root / "a.csv").write_text("path,label\nx,\n") and root / "a.csv", "line 2 lacks a path or a label"),
    (lambda root: root / "none", "no such folder"),
    (lambda root: (root / "x.jpg").write_bytes(b"") == 0 and root, "images without a class; give"),
    (lambda root: (root / "a").mkdir() or root, "no image here"),
    (lambda root: [(root / "train" / "a").mkdir(parents=True), (root / "train" / "a" / "1.png").write_bytes(encoded(0)),
                   (root / "val" / "b").mkdir(parents=True)] and root, "class b is not in the training split"),
])  # fmt: skip
def test_what_is_refused(make, text: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match=text):
        shard_images(make(tmp_path / "root"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_could_be_mistaken(imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tars beside class folders are left aside, with a word; a place inside the source is refused; empty classes are named."""
    shard_images(imagenet, tmp_path / "a", samples_per_shard=5)
    (imagenet / "train" / "n01440764.tar").write_bytes(b"x")
    (imagenet / "old.tar").write_bytes(b"x")
    assert shard_images(imagenet, tmp_path / "b", samples_per_shard=5)["train"].digest == load_manifest(tmp_path / "a" / "train").digest
    assert "1 tar beside the class folders, left aside" in capsys.readouterr().out
    for out in (imagenet, imagenet / "train" / "shards"):
        with pytest.raises(UserError, match="lies in the source"):
            shard_images(imagenet, out)
    (imagenet / "train" / "empty").mkdir()
    shard_images(imagenet / "train", tmp_path / "c")
    assert "1 class folders without an image, such as empty" in capsys.readouterr().out
    with pytest.raises(UserError, match="--split a/b"):
        shard_images(imagenet / "train", tmp_path / "d", "a/b")


def test_a_csv_of_ids_has_the_classes_of_training(imagenet: Path, tmp_path: Path) -> None:
    """ImageNet's validation images by a CSV, beside the training shards: the same names and numbers, though a class is missing."""
    shard_images(imagenet / "train", tmp_path / "a" / "train")
    rows = [f"val/{wnid}/{wnid}_{number}.{form},{wnid}" for wnid in WNIDS[:1] for number, form in ((0, "PNG"), (1, "JPEG"))]
    (imagenet / "val.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    val = shard_images(imagenet / "val.csv", tmp_path / "a" / "val", "val")["val"]
    assert val.class_names == load_manifest(tmp_path / "a" / "train").class_names and val.num_classes == 3
    assert ImageData(tmp_path / "a" / "val").labels.tolist() == [1, 1]
    (imagenet / "val.csv").write_text("path,label\nval/x.png,n00000001\n")
    with pytest.raises(UserError, match="class n00000001 is not in the training split"):
        shard_images(imagenet / "val.csv", tmp_path / "a" / "val2", "val")


def test_labels_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """img2dataset's tars: the class is a field of the .json; indexed and sharded, verified, read; the hint says how."""
    import webdataset

    (tmp_path / "t").mkdir()
    with webdataset.TarWriter(str(tmp_path / "t" / "0.tar"), mtime=0) as tar:
        for number in range(6):
            tar.write({"__key__": f"{number:03d}", "png": encoded(number), "json": {"class": number % 3, "url": "x"}})
    with pytest.raises(UserError, match="name it with --label-key"):
        index_folder(tmp_path / "t")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    main(["data", "shard", str(tmp_path / "t"), str(tmp_path / "s"), "--label-key", "class", "--class-names", str(tmp_path / "names.txt")])
    assert load_manifest(tmp_path / "s").class_names == ["a", "b", "c"]
    assert sorted(ImageData(tmp_path / "s").labels) == [0, 0, 1, 1, 2, 2]
    main(["data", "index", str(tmp_path / "t"), "--label-key", "class", "--class-names", str(tmp_path / "names.txt")])
    main(["data", "verify", str(tmp_path / "t")])
    assert ImageData(tmp_path / "t").labels.tolist() == [0, 1, 2, 0, 1, 2]
    main(["data", "index", str(tmp_path / "t"), "--label-key", "class"])
    assert load_manifest(tmp_path / "t").class_names == ["a", "b", "c"], "names are kept"
    with pytest.raises(UserError, match="no class number in nothing"):
        index_folder(tmp_path / "t", label_key="nothing")
    capsys.readouterr()
    (tmp_path / "s" / "manifest.json").unlink()
    for command in (["verify", str(tmp_path / "s"), "--drop-bad"], ["index", str(tmp_path / "t"), "--out", str(tmp_path / "x")],
                    ["verify", "http://host/x"], ["info", str(tmp_path)]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["data", *command])
        assert ended.value.code == 2, command
    said = capsys.readouterr().err
    assert "no manifest.json here" in said and "--out: is for tars" in said and "is a URL" in said and f"but in {tmp_path / 't'}" in said


def test_all_of_imagenet_has_a_name() -> None:
    """A thousand ids, each with a name of its own."""
    table = Path(__file__).parents[2] / "var_scale" / "data" / "imagenet_classes.tsv"
    ids = [line.split("\t")[0] for line in table.read_text().splitlines()]
    names = class_names(ids)
    assert len(set(ids)) == len(set(names)) == 1000 and ids == sorted(ids)
    assert (names[0], names[207], names[999]) == ("tench, Tinca tinca", "golden retriever", "toilet tissue, toilet paper, bathroom tissue")
    assert class_names(["dog", "cat"]) == ["dog", "cat"]


def test_killed_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGINT, then kill -9, then the end; no worker stays behind or says a word."""
    root = tmp_path / "images"
    for label in "ab":
        (root / label).mkdir(parents=True)
        for index in range(300):
            (root / label / f"{index}.png").write_bytes(encoded(index))
    shard_images(root, tmp_path / "whole", samples_per_shard=4)
    command = [sys.executable, "-m", "var_scale.cli", "data", "shard", str(root), str(tmp_path / "out"), "--samples-per-shard", "4"]
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        before, deadline = len(list(tmp_path.glob("out/*.tar"))), time.monotonic() + 60
        while len(list(tmp_path.glob("out/*.tar"))) < before + 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=30)
        assert "Traceback" not in output and not (tmp_path / "out" / "manifest.json").exists()
    shard_images(root, tmp_path / "out", samples_per_shard=4)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole") and load_manifest(tmp_path / "out").num_samples == 600
