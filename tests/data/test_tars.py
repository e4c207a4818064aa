"""Every image and label of a tar becomes part of a sample, or is refused or counted."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.data_samples import image
from tests.raises import raises
from var_scale.cli import main
from var_scale.data.convert import shard_images
from var_scale.data.embedded import png_bytes
from var_scale.data.findings import Tally
from var_scale.data.image_loader import ImageData
from var_scale.data.indexing import index_folder
from var_scale.data.tar_index import index_tar

PICTURES = [png_bytes(image(number)) for number in range(3)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    """Write a tar of members: a name with bytes, or with the header of a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.name = name
            if isinstance(content, bytes):
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
            else:
                tar.addfile(header)
    return path


def link(kind: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo()
    header.type, header.linkname = kind, "1.png"
    return header


def pairs(*names: str) -> list[tuple[str, bytes | tarfile.TarInfo]]:
    """Members of these names: class numbers in .cls, images in the others."""
    return [
        (name, b"0" if name.lower().endswith("cls") else PICTURES[place % 3])
        for place, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("members", "code", "name"),
    [
        (pairs("1.png", "1.cls", "1.png", "1.cls"), "data.sample-twice", "1.png and 1.png"),
        (pairs("1.png", "1.cls", "1.PNG", "1.CLS"), "data.sample-twice", "1.png and 1.PNG"),
        (pairs("1.cls", "1.png", "2.cls", "2.png", "1.cls", "1.png"), "data.sample-twice", "sort"),
        (pairs("1.png", "2.png", "1.cls", "2.cls"), "data.sample-twice", "tar --sort=name"),
        (pairs("1.cls", "1.png", "2.cls", "1.bin", "2.png"), "data.sample-twice", "sample 2"),
        (pairs("1.png", "1.tif", "1.cls"), "data.sample-images", "1.png and 1.tif"),
        (pairs("1.cls", "1.png", "a.2.cls", "a.2.png"), "data.sample-dots", "a.2."),
        (pairs("1.cls", "1.png", "1.b.cls", "1.b.png"), "data.sample-dots", "1.b."),
        (pairs("a.1.cls", "a.1.png", "a.2.cls", "a.2.png"), "data.sample-dots", "a.1."),
        (pairs("1.cls", "1.b.png"), "data.sample-dots", "1.b.png"),
        (pairs("1.cls", "1.png", "2.b.png"), "data.sample-dots", "2.b.png"),
        (pairs("1.cls", "1.xyz"), "data.sample-incomplete", ".cls, .xyz but no image"),
        (pairs("1.png", "1.xyz", "1.mask.png"), "data.sample-incomplete", "no .cls"),
        (
            [*pairs("1.png", "1.cls", "2.cls"), ("2.png", link(tarfile.SYMTYPE))],
            "data.tar-link",
            "2.png is a link to 1.png",
        ),
        (
            [*pairs("1.png", "1.cls", "2.cls"), ("2.png", link(tarfile.LNKTYPE))],
            "data.tar-link",
            "--hard-dereference",
        ),
    ],
)
def test_no_sample_is_lost(
    members: list[tuple[str, bytes | tarfile.TarInfo]], code: str, name: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    with raises(code, path, name):
        index_tar(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), (" 12\n", 12), ("3.7", None), ("true", None), ("1_0", None), ("-1", None)]
    + [(word, None) for word in ("", "cat", "9999999999", "7" + " " * 99 + "8", "1e3", "NaN")],
)
def test_labels(text: str, number: int | None, tmp_path: Path) -> None:
    """Only whole numbers are labels, in .cls and in JSON, as a number or as text."""
    plain = write_tar(tmp_path / "a.tar", [("1.png", PICTURES[0]), ("1.cls", text.encode())])
    quoted = json.dumps({"kind": text}).encode()
    forms = {
        plain: None,
        write_tar(tmp_path / "b.tar", [("1.png", PICTURES[0]), ("1.json", quoted)]): "kind",
    }
    if number is None or text == str(number):
        bare = f'{{"kind": {text}}}'.encode()
        forms[write_tar(tmp_path / "c.tar", [("1.png", PICTURES[0]), ("1.json", bare)])] = "kind"
    for path, key in forms.items():
        if number is not None:
            assert index_tar(path, label_key=key)["label"].tolist() == [number]
        else:
            with raises("data.sample-label", path, "1."):
                index_tar(path, label_key=key)


def test_labels_in_other_json(tmp_path: Path) -> None:
    """A JSON of any size is read, and what is wrong with others is named."""
    long = json.dumps({"text": "x" * (2 << 20), "kind": 5}).encode()
    path = write_tar(tmp_path / "a.tar", [("1.png", PICTURES[0]), ("1.json", long)])
    assert index_tar(path, label_key="kind")["label"].tolist() == [5]
    for content, problem in (
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "field kind"),
        (b"{}", "field kind"),
        (b'{"kind": Infinity}', "Infinity"),
        (b'{"kind": null}', "null"),
    ):
        write_tar(path, [("1.png", PICTURES[0]), ("1.json", content)])
        with raises("data.sample-label", path, problem):
            index_tar(path, label_key="kind")


def test_every_format_of_pillow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of all formats are indexed in place; masks and other members are counted, and hidden
    ones are not."""
    stream = io.BytesIO()
    Image.fromarray(image(0)).save(stream, "TIFF")
    members = [
        ("./._1.tif", b"x"),
        ("./1.tif", stream.getvalue()),
        ("./1.cls", b"4"),
        ("./1.mask.png", PICTURES[1]),
        ("./1.txt", b"a caption"),
        ("__MACOSX/1.png", b"x"),
        ("README", b"x"),
        ("list.txt", b"x"),
    ]
    write_tar(tmp_path / "t" / "a.tar", members)
    (tmp_path / "t" / "._a.tar").write_bytes(b"x")
    (tmp_path / "t" / "b.tar.gz").write_bytes(b"x")
    main(["data", "index", str(tmp_path / "t")])
    data = ImageData(tmp_path / "t")
    np.testing.assert_array_equal(data.images(np.array([0]))[0], image(0))
    assert data.labels.tolist() == [4]
    printed = capsys.readouterr().out
    assert "3 members" in printed and "README" in printed and "b.tar.gz" in printed
    shard_images(tmp_path / "t", tmp_path / "s")
    printed = capsys.readouterr().out
    assert "3 members" in printed and "README" in printed and "b.tar.gz" in printed
    unused = Tally()
    index_tar(tmp_path / "t" / "a.tar", unused=unused)
    assert unused.count == 3


def test_compressed_tars(tmp_path: Path) -> None:
    """A compressed file is named as such, with the command that decompresses it."""
    path = write_tar(tmp_path / "a.tar", pairs("1.png", "1.cls"))
    content = path.read_bytes()
    index_tar(path)
    path.write_bytes(gzip.compress(content))
    with raises("data.tar-compressed", "gzip -dc a.tar"):
        index_tar(path)
    path.write_bytes(b"PK\x03\x04" + bytes(2000))
    with raises("data.tar-compressed", "zip"):
        index_tar(path)
    path.rename(tmp_path / "a.tar.gz")
    for read, code in ((index_folder, "data.no-tars"), (shard_images, "data.no-class-folders")):
        with raises(code, "1 archive", "a.tar.gz"):
            read(tmp_path, *([tmp_path.parent / "out"] if read is shard_images else []))


def test_labels_that_count_from_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels from 1 to N, in several tars or in a CSV, are named; those from 0 to N are not."""
    warning = "they go from 1 to 3"
    for first in (1, 0):
        folder = tmp_path / f"from{first}"
        for name, labels in (("a", (2, 3)), ("b", (first, 2))):
            members = [
                (f"{number}.{end}", content)
                for number, label in enumerate(labels)
                for end, content in (("png", PICTURES[number]), ("cls", str(label).encode()))
            ]
            write_tar(folder / f"{name}.tar", members)
        for number in range(3):
            (folder / f"{number}.png").write_bytes(PICTURES[number])
        table = folder / "t.csv"
        table.write_text(f"path,label\n0.png,3\n1.png,{first}\n2.png,2\n")
        commands = [
            ["index", str(folder)],
            ["info", str(folder)],
            ["shard", str(folder), str(tmp_path / f"tars{first}")],
            ["shard", str(table), str(tmp_path / f"table{first}")],
        ]
        for command in commands:
            main(["data", *command])
            assert (warning in capsys.readouterr().out) == bool(first), command
    with raises("data.class-range", "class 3", "count from 1"):
        index_folder(tmp_path / "from1", num_classes=3)
    with raises("data.class-unnamed", "class 3", "count from 1"):
        shard_images(tmp_path / "from1", tmp_path / "named", class_list=["a", "b", "c"])
    assert not (tmp_path / "named").exists()


def test_archives_that_are_not_read_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tars in folders below, and tars whose name ends in capitals, with the way to have them
    read."""
    for name in ("0.tar", "sub/1.tar", "sub/.hidden/2.tar", "3.TAR"):
        write_tar(tmp_path / name, pairs("1.png", "1.cls"))
    index_folder(tmp_path)
    printed = capsys.readouterr().out
    assert "1 archive in folders below" in printed and "sub/1.tar (give each" in printed
    assert "3.TAR (let the name end in lower case)" in printed


def test_a_name_with_a_nul_byte(tmp_path: Path) -> None:
    """It cannot be a file, and is one broken image."""
    (tmp_path / "ok.png").write_bytes(PICTURES[0])
    (tmp_path / "list.csv").write_text("path,label\nok.png,0\nno\0pe.png,1\n")
    with raises("data.too-many-broken", "null byte"):
        shard_images(tmp_path / "list.csv", tmp_path / "out", processes=1)
