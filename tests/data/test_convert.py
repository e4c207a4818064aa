"""The conversion of image folders, tables and tars to shards gives the same bytes in every way of
running it, and reports everything that it leaves out."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.data_samples import hashes, image
from tests.raises import raises
from var_scale.cli import main
from var_scale.data import convert
from var_scale.data.convert import BROKEN_NAME, shard_images
from var_scale.data.image_files import EXTENSIONS
from var_scale.data.image_loader import ImageData
from var_scale.data.image_source import class_names, find_splits, read_source
from var_scale.data.indexing import index_folder
from var_scale.data.manifest import load_manifest
from var_scale.data.order import epoch_permutation
from var_scale.data.verify import describe_folder, verify_folder
from var_scale.evaluate.read_images import read_images
from var_scale.files import read_lines

WNIDS = ("n02012849", "n01440764", "n03126707")


def encoded(index: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image(index)).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """The folders train and val with three classes, which hold 24 and 6 images in several
    formats."""
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
    """Both splits are converted. The class names come from the folder ids, the shuffle is global,
    the bytes depend only on the seed, and the pixels are unchanged."""
    done = shard_images(imagenet, tmp_path / "a", samples_per_shard=5, processes=2)
    shard_images(imagenet, tmp_path / "b", samples_per_shard=5, processes=1)
    shard_images(imagenet, tmp_path / "c", samples_per_shard=5, seed=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") != hashes(tmp_path / "c")
    assert {name: manifest.num_samples for name, manifest in done.items()} == {
        "train": 24,
        "val": 6,
    }
    names = ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"]
    assert done["train"].class_names == done["val"].class_names == names
    data, order = ImageData(tmp_path / "a" / "train"), epoch_permutation(24, 0, 0)
    assert data.labels.tolist() == [place // 8 for place in order.tolist()]
    written = [
        (1 - label if label < 2 else 2) * 8 + place % 8
        for place, label in zip(order.tolist(), data.labels.tolist(), strict=True)
    ]
    for sample, index in enumerate(written):
        if index % 4 in (0, 3):  # PNG and BMP lose nothing
            np.testing.assert_array_equal(data.images(np.array([sample]))[0], image(index))
    assert verify_folder(tmp_path / "a" / "train") == []
    info = describe_folder(tmp_path / "a" / "train")
    assert info["width_min_median_max"] == "8 8 8" and info["class_names"].startswith("0: tench")
    before = hashes(tmp_path / "a")
    shard_images(imagenet, tmp_path / "a", samples_per_shard=5)
    assert hashes(tmp_path / "a") == before
    with raises("data.other-settings", "shuffle_seed"):
        shard_images(imagenet, tmp_path / "a", samples_per_shard=5, seed=1)


def test_broken_images(imagenet: Path, tmp_path: Path) -> None:
    """Broken images are listed and left out. Too many of them stop the job, and with a larger
    allowed share the job continues from that point."""
    files = sorted((imagenet / "train").rglob("*.*"))
    files[0].write_bytes(b"<html>not found</html>")
    files[5].write_bytes(files[5].read_bytes()[:60])
    with raises("data.too-many-broken", "1.00%", 24, "broken.csv"):
        shard_images(imagenet, tmp_path / "out", samples_per_shard=5)
    done = shard_images(imagenet, tmp_path / "out", samples_per_shard=5, max_broken=0.1)
    report = (tmp_path / "out" / "train" / BROKEN_NAME).read_text()
    assert (
        done["train"].num_samples == 22
        and str(files[0]) in report
        and str(files[5]) in report
        and len(report.splitlines()) == 3
    )
    assert verify_folder(tmp_path / "out" / "train") == []
    with raises("data.too-many-broken"):  # the limit holds for a second attempt, too
        for _ in range(2):
            shard_images(imagenet, tmp_path / "again", samples_per_shard=5)
    files[0].write_bytes(encoded(0))
    files[5].write_bytes(encoded(5))
    assert (
        shard_images(imagenet, tmp_path / "again", samples_per_shard=5)["train"].num_samples == 24
    ), "images that were fixed come back"
    assert not (tmp_path / "again" / "train" / BROKEN_NAME).exists()


def test_csv_and_tars(imagenet: Path, tmp_path: Path) -> None:
    """A CSV table of paths has names or numbers as classes; shards of other programs are shuffled
    again and keep their names."""
    files = sorted((imagenet / "train").rglob("*.*"))[:12]
    for name, labels in (("names", ["a", "b"]), ("numbers", ["3", "1"])):
        table = tmp_path / f"{name}.csv"
        table.write_text(
            "path,label\n"
            + "".join(
                f"{os.path.relpath(file, tmp_path)},{labels[i % 2]}\n"
                for i, file in enumerate(files)
            )
        )
        manifest = shard_images(table, tmp_path / name, "val")["val"]
        assert manifest.num_classes == (2 if name == "names" else 4) and manifest.class_names == (
            ["a", "b"] if name == "names" else None
        )
    again = shard_images(tmp_path / "names", tmp_path / "again", seed=3)["train"]
    assert again.num_samples == 12 and again.class_names == ["a", "b"]
    one, two = ImageData(tmp_path / "names"), ImageData(tmp_path / "again")
    pixels = [
        sorted(
            (label, x.tobytes())
            for label, x in zip(d.labels.tolist(), d.images(np.arange(12)), strict=True)
        )
        for d in (one, two)
    ]
    assert pixels[0] == pixels[1] and one.labels.tolist() != two.labels.tolist()
    adopted = index_folder(tmp_path / "again", class_names=["x", "y", "z"])
    assert adopted.num_classes == 3 and adopted.class_names == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("make", "code", "name"),
    [
        (
            lambda root: (root / "a.csv").write_text("file,label\nx,1\n") and root / "a.csv",
            "data.csv-invalid",
            "file, label",
        ),
        (
            lambda root: (root / "a.csv").write_text("path,label\nx,\n") and root / "a.csv",
            "data.csv-invalid",
            "line 2",
        ),
        (lambda root: root / "none", "data.no-source", "none"),
        (
            lambda root: (root / "x.jpg").write_bytes(b"") == 0 and root,
            "data.no-class-folders",
            "root",
        ),
        (lambda root: (root / "a").mkdir() or root, "data.no-images", "root"),
        (
            lambda root: (
                [
                    (root / "train" / "a").mkdir(parents=True),
                    (root / "train" / "a" / "1.png").write_bytes(encoded(0)),
                    (root / "val" / "b").mkdir(parents=True),
                ]
                and root
            ),
            "data.class-unknown",
            "class b",
        ),
    ],
)
def test_what_is_refused(make, code: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with raises(code, name):
        shard_images(make(tmp_path / "root"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_could_be_mistaken(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tars beside class folders are ignored with a message; an output folder inside the source is
    refused; empty classes are named."""
    shard_images(imagenet, tmp_path / "a", samples_per_shard=5)
    (imagenet / "train" / "n01440764.tar").write_bytes(b"x")
    (imagenet / "old.tar").write_bytes(b"x")
    assert (
        shard_images(imagenet, tmp_path / "b", samples_per_shard=5)["train"].digest
        == load_manifest(tmp_path / "a" / "train").digest
    )
    assert "1 tar beside the class folders" in capsys.readouterr().out
    for out in (imagenet, imagenet / "train" / "shards"):
        with raises("data.out-in-source", out):
            shard_images(imagenet, out)
    (imagenet / "train" / "empty").mkdir()
    shard_images(imagenet / "train", tmp_path / "c")
    assert "such as empty" in capsys.readouterr().out
    with raises("data.split-name", "--split a/b"):
        shard_images(imagenet / "train", tmp_path / "d", "a/b")


def test_a_csv_of_ids_has_the_classes_of_training(imagenet: Path, tmp_path: Path) -> None:
    """ImageNet's validation images, listed in a CSV file beside the training shards, get the same
    names and numbers, even if a class is missing."""
    shard_images(imagenet / "train", tmp_path / "a" / "train")
    rows = [
        f"val/{wnid}/{wnid}_{number}.{form},{wnid}"
        for wnid in WNIDS[:1]
        for number, form in ((0, "PNG"), (1, "JPEG"))
    ]
    (imagenet / "val.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    val = shard_images(imagenet / "val.csv", tmp_path / "a" / "val", "val")["val"]
    assert (
        val.class_names == load_manifest(tmp_path / "a" / "train").class_names
        and val.num_classes == 3
    )
    assert ImageData(tmp_path / "a" / "val").labels.tolist() == [1, 1]
    (imagenet / "val.csv").write_text("path,label\nval/x.png,n00000001\n")
    with raises("data.class-unknown", "class n00000001"):
        shard_images(imagenet / "val.csv", tmp_path / "a" / "val2", "val")


def test_labels_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In img2dataset's tars the class is a field of the .json file. They are indexed, converted,
    verified and read; the hint of the error explains how."""
    import webdataset

    (tmp_path / "t").mkdir()
    with webdataset.TarWriter(str(tmp_path / "t" / "0.tar"), mtime=0) as tar:
        for number in range(6):
            tar.write(
                {
                    "__key__": f"{number:03d}",
                    "png": encoded(number),
                    "json": {"class": number % 3, "url": "x"},
                }
            )
    with raises("data.sample-incomplete", "--label-key"):
        index_folder(tmp_path / "t")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    main(
        [
            "data",
            "shard",
            str(tmp_path / "t"),
            str(tmp_path / "s"),
            "--label-key",
            "class",
            "--class-names",
            str(tmp_path / "names.txt"),
        ]
    )
    assert load_manifest(tmp_path / "s").class_names == ["a", "b", "c"]
    assert sorted(ImageData(tmp_path / "s").labels) == [0, 0, 1, 1, 2, 2]
    main(
        [
            "data",
            "index",
            str(tmp_path / "t"),
            "--label-key",
            "class",
            "--class-names",
            str(tmp_path / "names.txt"),
        ]
    )
    main(["data", "verify", str(tmp_path / "t")])
    assert ImageData(tmp_path / "t").labels.tolist() == [0, 1, 2, 0, 1, 2]
    main(["data", "index", str(tmp_path / "t"), "--label-key", "class"])
    assert load_manifest(tmp_path / "t").class_names == ["a", "b", "c"], "names are kept"
    with raises("data.sample-label", "nothing"):
        index_folder(tmp_path / "t", label_key="nothing")
    capsys.readouterr()
    (tmp_path / "s" / "manifest.json").unlink()
    for command in (
        ["verify", str(tmp_path / "s"), "--drop-bad"],
        ["index", str(tmp_path / "t"), "--out", str(tmp_path / "x")],
        ["verify", "http://host/x"],
        ["info", str(tmp_path)],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["data", *command])
        assert ended.value.code == 2, command
    printed = capsys.readouterr().err
    for name in ("[data.no-manifest]", "[data.index-folder]", "http://host/x", tmp_path / "t"):
        assert str(name) in printed


def test_all_of_imagenet_has_a_name() -> None:
    """A thousand ids exist, and each has a name of its own."""
    table = Path(__file__).parents[2] / "var_scale" / "data" / "imagenet_classes.tsv"
    ids = [line.split("\t")[0] for line in table.read_text().splitlines()]
    names = class_names(ids)
    assert len(set(ids)) == len(set(names)) == 1000 and ids == sorted(ids)
    assert (names[0], names[207], names[999]) == (
        "tench, Tinca tinca",
        "golden retriever",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert class_names(["dog", "cat"]) == ["dog", "cat"]


def command_in_a_session(arguments: list[str], output: int) -> None:
    """In a forked process: run a command as the leader of a session, with its output in a pipe.
    Shards are written slowly, so that the command still runs when its signal arrives."""
    os.setsid()
    shard = convert._shard

    @functools.wraps(shard)
    def slowly(job: Any) -> dict[str, Any]:
        time.sleep(0.03)
        return shard(job)

    convert._shard = slowly
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout = sys.stderr = os.fdopen(output, "w")
    main(arguments)


def test_killed_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """After SIGINT, then kill -9, the third call finishes with the same bytes; no worker stays
    behind or prints anything."""
    root, out = tmp_path / "images", tmp_path / "out"
    for label in "ab":
        (root / label).mkdir(parents=True)
        for index in range(150):
            (root / label / f"{index}.png").write_bytes(encoded(index))
    shard_images(root, tmp_path / "whole", samples_per_shard=4)
    command = ["data", "shard", str(root), str(out), "--samples-per-shard", "4"]
    for number in (signal.SIGINT, signal.SIGKILL):
        read, write = os.pipe()
        process = get_context("fork").Process(target=command_in_a_session, args=(command, write))
        process.start()
        os.close(write)
        before, deadline = len(list(out.glob("*.tar"))), time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < before + 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, number)
        with os.fdopen(read) as stream:
            output = stream.read()  # until no process holds the other end
        process.join(30)
        assert process.exitcode == (130 if number == signal.SIGINT else -number), output
        assert "Traceback" not in output and not (out / "manifest.json").exists()
    shard_images(root, out, samples_per_shard=4)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert load_manifest(out).num_samples == 300


def test_class_names_of_any_editor(tmp_path: Path) -> None:
    """A byte order mark and empty lines at the end are no names; another encoding is named."""
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\ndög\n\n\n".encode())
    assert read_lines(path) == ["cat", "dög"]
    path.write_bytes("dög\n".encode("latin-1"))
    with raises("file.not-text", "names.txt"):
        read_lines(path)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_not_utf8(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders, classes and broken images of any name are converted and listed, with the bytes
    escaped, also where the output cannot show an accent."""
    source, out = os.fsencode(tmp_path) + b"/\xff", os.fsencode(tmp_path) + b"/out\xff"
    for name in (b"caf\xe9", "éléphant".encode()):
        os.makedirs(source + b"/" + name)
        Image.fromarray(image(0)).save(os.fsdecode(source + b"/" + name + b"/1.png"))
    Path(os.fsdecode(source + b"/caf\xe9/br\xfcken.png")).write_bytes(b"no image")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    monkeypatch.setenv("PYTHONIOENCODING", "")
    folder = os.fsdecode(out)
    main(["data", "shard", os.fsdecode(source), folder, "--max-broken=0.5", "--processes=1"])
    for command in ("info", "verify"):
        main(["data", command, folder])
    sys.stdout.flush()
    text = shown.getvalue().decode(encoding)
    monkeypatch.undo()
    assert r"0: caf\udce9" in text and r"out\udcff" in text
    assert "1: éléphant" in text if encoding == "utf-8" else r"1: \xe9l\xe9phant" in text
    assert load_manifest(Path(folder)).class_names == [os.fsdecode(b"caf\xe9"), "éléphant"]
    assert r"br\udcfcken.png" in (Path(folder) / BROKEN_NAME).read_text(encoding="utf-8")


def test_the_files_of_a_class_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every walker ignores hidden files, takes all formats of Pillow in any case, follows links,
    and counts what it leaves out."""
    cat, elsewhere = tmp_path / "root" / "cat", tmp_path / "elsewhere"
    taken = {
        "1.jpg": "JPEG",
        "2.jfif": "JPEG",
        "3.JPE": "JPEG",
        "4.Bmp": "BMP",
        "5.TIF": "TIFF",
        "more/6.ppm": "PPM",
    }
    for folder in (cat / ".ipynb_checkpoints", cat.parent / "__MACOSX" / "cat", elsewhere):
        folder.mkdir(parents=True)
    (cat / "more").symlink_to(elsewhere)
    for name, form in taken.items():
        (cat / name).write_bytes(encoded(0, form))
    junk = ("._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "Thumbs.db", "../__MACOSX/cat/1.jpg")
    for name in (*junk, "7.unreadable", "8.Unreadable", "README"):
        (cat / name).write_bytes(b"x")
    os.mkfifo(cat / "9.jpg")
    source = read_source(cat.parent)
    assert [os.path.relpath(item.path, cat) for item in source.items] == list(taken)
    assert source.classes == ["cat"]
    line = "4 files not read as images: 2 .unreadable, 1 that are no regular"
    assert line in capsys.readouterr().out
    assert sum(map(len, read_images(cat.parent))) == len(taken)
    assert line in capsys.readouterr().out
    (elsewhere / "up").symlink_to("../root")
    for walk in (lambda: read_source(cat.parent), lambda: list(read_images(cat.parent))):
        with raises("data.link-loop", cat / "more" / "up"):
            walk()
    (elsewhere / "up").unlink()
    (cat.parent / "dog").symlink_to(".")
    with raises("data.link-loop", cat.parent / "dog"):
        read_source(cat.parent)


def test_only_files_without_a_reader(tmp_path: Path) -> None:
    """The error of a source without images counts the files that were found."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.xyz").write_bytes(b"x")
    with raises("data.no-images", "1 .xyz"):
        read_source(tmp_path)


def test_pillow_reads_every_format() -> None:
    """The list of extensions has no name that Pillow does not know."""
    Image.init()
    known = {end for end, form in Image.registered_extensions().items()}
    assert set(EXTENSIONS) <= known and len(EXTENSIONS) == len(set(EXTENSIONS))


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Train/a", "VALID/a", "Test/a"), {"train": "Train", "val": "VALID", "test": "Test"}),
        (("training/a", "validation/a"), {"train": "training", "val": "validation"}),
        (("train/a", "rest/a"), {"train": "train"}),
        (("train", "truck"), {}),
        (("test", "valid", "invalid"), {}),
        (("a", "b"), {}),
    ],
)
def test_names_of_splits(folders: tuple[str, ...], splits: dict[str, str], tmp_path: Path) -> None:
    """Names of splits count in any case; a class folder may be named train."""
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").write_bytes(encoded(0))
    assert find_splits(tmp_path) == {split: tmp_path / name for split, name in splits.items()}


def test_splits_that_are_not_clear(tmp_path: Path) -> None:
    """Two folders of one split, and a missing training split, are refused."""
    for folder in ("val/a", "Test/a"):
        (tmp_path / folder).mkdir(parents=True)
    with raises("data.split-name", "Test and val"):
        find_splits(tmp_path)
    for folder in ("train/a", "valid/a"):
        (tmp_path / folder).mkdir(parents=True)
    with raises("data.split-twice", "val and valid"):
        find_splits(tmp_path)


def test_names_for_the_classes_of_splits(imagenet: Path, tmp_path: Path) -> None:
    """A list of names replaces the names of the class folders in every split."""
    done = shard_images(imagenet, tmp_path / "out", class_list=["x", "y", "z"])
    assert [manifest.class_names for manifest in done.values()] == [["x", "y", "z"]] * 2


def test_what_is_beside_the_class_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images without a class and links to missing folders are named, hidden files are not."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").symlink_to("missing")
    for name in ("cat/1.png", "2.png", "._2.png"):
        (tmp_path / name).write_bytes(encoded(0))
    assert read_source(tmp_path).classes == ["cat"]
    printed = capsys.readouterr().out
    assert "lead nowhere: dog" in printed and "1 image beside" in printed and "2.png" in printed
