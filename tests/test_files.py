"""What every reader and writer of files has in common."""

from __future__ import annotations

import errno
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tests.raises import raises
from tests.runs import write_tokens
from var_scale.cli import main
from var_scale.config.load import load, write_config
from var_scale.data.convert import shard_images
from var_scale.data.image_source import read_source
from var_scale.data.images import decode_image
from var_scale.data.indexing import index_folder
from var_scale.data.manifest import load_manifest
from var_scale.data.remote import fetch
from var_scale.errors import UserError
from var_scale.evaluate.convert import convert
from var_scale.evaluate.edit import image_mask, read_picture
from var_scale.evaluate.extract import Statistics, load_extractor, read_reference
from var_scale.evaluate.generate import Job, Npz, PngFolder
from var_scale.evaluate.pictures import write_grid
from var_scale.evaluate.read_images import read_images
from var_scale.evaluate.source import Source
from var_scale.files import atomic_file, read_json, read_lines, write_json
from var_scale.model import VAR, VQVAE, build_vae, build_var
from var_scale.model.load import save_tokenizer
from var_scale.model.official import load_vae
from var_scale.model.perceptual import LPIPS
from var_scale.model.pretrained import save_official, save_pretrained, save_varhf
from var_scale.model.sampling import Settings
from var_scale.records.sources import read_records
from var_scale.report.theme import save
from var_scale.run_folder import RunFolder
from var_scale.train.checkpoint import Checkpoint
from var_scale.train.worker import _explain
from var_scale.train.world import World

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)
CPU: Any = torch.device("cpu")
READERS: dict[str, Callable[[Path], object]] = {
    "vae.pth": lambda path: load_vae(path, (1, 2)),
    "vae.safetensors": lambda path: load_vae(path, (1, 2)),
    "vgg.pth": lambda path: LPIPS(path, path),
    "inception.pt": lambda path: load_extractor(f"script:{path}", CPU),
    "inception.pth": lambda path: load_extractor(f"fidelity:{path}", CPU),
    "images.npz": lambda path: list(read_images(path)),
    "statistics.npz": lambda path: read_reference(path, None),  # type: ignore[arg-type]
    "image.jpg": lambda path: decode_image(path.read_bytes(), str(path)),
    "picture.png": lambda path: read_picture(path, (8, 8)),
    "mask.png": image_mask,
    "shard.tar": lambda path: index_folder(path.parent),
    "other.tar": lambda path: read_source(path.parent),
    "images.csv": read_source,
    "runs.csv": lambda path: read_records(str(path)),
    "foreign.csv": lambda path: read_records(str(path), {"depth": "d", "loss_avg": "l"}),
    "log.txt": lambda path: read_records(str(path)),
    "metrics.jsonl": lambda path: RunFolder(path.parent).read_metrics(),
    "config.yaml": lambda path: load(str(path)),
    "zero.json": lambda path: load("model/d16", [f"engine.deepspeed={path}"]),
    "manifest.json": read_json,
    "names.txt": read_lines,
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    """Git leaves such a text in place of a large file until `git lfs pull`; it is neither damaged
    nor of another kind."""
    (tmp_path / name).write_text(POINTER)
    with raises("file.lfs-pointer", tmp_path / name, "git lfs pull"):
        READERS[name](tmp_path / name)


def test_a_pointer_in_a_checkpoint_or_a_folder_of_shards_is_named(tmp_path: Path) -> None:
    """Where files have checksums or sizes, the message about them names the pointer."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "part-00000.safetensors").write_text(POINTER)
    checkpoint = Checkpoint(folder, {"step": 1, "files": {"part-00000.safetensors": "x"}})
    with raises("train.checkpoint-damaged", folder, "git lfs pull"):
        checkpoint.check()
    with raises("train.checkpoint-damaged", folder, "git lfs pull"):
        checkpoint._open("part-00000.safetensors")
    shards = tmp_path / "shards"
    write_tokens(shards, "val", 8, "tokenizer", [1, 2], 8, 0)
    tar = next(shards.glob("*.tar"))
    tar.write_text(POINTER)
    with raises("data.shard-missing", tar, "git lfs pull"):
        load_manifest(shards)


@contextmanager
def full_disk(limit: int = 1000) -> Iterator[None]:
    """No file grows beyond `limit` bytes: the system refuses to write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def figure() -> Figure:
    """A figure with more than a thousand bytes in each format."""
    drawn = Figure()
    drawn.subplots().plot(range(10))
    return drawn


def models() -> tuple[VAR, VQVAE]:
    """A small model of the official form."""
    vae = build_vae(ch=32, V=32, Cvae=8, patch_nums=(1, 2))
    return build_var(vae, depth=1, width=24, heads=3, num_classes=4), vae


def npz(path: Path) -> None:
    """The npz of samples, whose parts fit and whose whole does not."""
    job = Job((0,), 8, 0, Settings())
    output = Npz(path, job)
    np.save(output.parts / "000000.npy", NOISE)
    output.finish()


def write_vector(path: Path) -> None:
    """A vector figure alone: `save` would fail with the picture that it writes first."""
    with atomic_file(path) as file:
        figure().savefig(file, format=path.suffix[1:])


NOISE = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
WRITERS: dict[str, Callable[[Path], object]] = {
    "var_d1.pth": lambda path: save_official(path.parent, *models()),
    "vae.safetensors": lambda path: save_pretrained(path.parent, *models()),
    "model.safetensors": lambda path: save_varhf(path.parent, *models()),
    "tokenizer.safetensors": lambda path: save_tokenizer(models()[1], path),
    "statistics.npz": lambda path: Statistics(2, torch.zeros(64), torch.zeros(64, 64)).save(
        path, "x"
    ),
    "samples.npz": npz,
    "samples.npz.parts/000000.npy": lambda path: Npz(
        path.parent.with_name("samples.npz"), Job((0,), 8, 0, Settings())
    ).write(0, [*range(8)], NOISE),
    "000000.png": lambda path: PngFolder(path.parent, Job((0,), 8, 0, Settings())).write(
        0, [0], NOISE.reshape(1, 32, 64, 3)
    ),
    "grid.png": lambda path: write_grid(NOISE[None], path),
    "figure.png": lambda path: save(figure(), path.parent, "figure"),
    "only.svg": write_vector,
    "only.pdf": write_vector,
    "val-000000.tar": lambda path: write_tokens(path.parent, "val", 8, "x", [1, 2], 8, 0),
    "config.yaml": lambda path: write_config(load("study/tiny"), path),
    "any.json": lambda path: write_json(path, [0] * 1000),
    "download.tar": lambda path: fetch((path.parent.parent / "source").as_uri(), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_for_every_writer(name: str, tmp_path: Path) -> None:
    """Whatever library writes: the file is named, and nothing of it stays."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "source").write_bytes(bytes(5000))
    if name == "samples.npz":
        path.with_name("samples.npz.parts").mkdir()
    limit = 1000 if name != "samples.npz" else NOISE.nbytes + 200
    with full_disk(limit), raises("file.disk-full", path):
        WRITERS[name](path)
    assert not path.exists() and not list(tmp_path.glob("**/.*.tmp"))
    WRITERS[name](path)
    assert path.stat().st_size > 1000
    assert not list(tmp_path.glob("**/.*.tmp"))


def test_the_error_of_the_disk_is_not_blamed_for_others(tmp_path: Path) -> None:
    """An error that has nothing to do with writing stays itself."""
    with pytest.raises(RuntimeError, match="other"), atomic_file(tmp_path / "x") as file:
        file.write(b"x")
        raise RuntimeError("other")
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_its_code_on_the_way_from_a_worker() -> None:
    """A worker process sends its error as a pickle."""
    error = pickle.loads(pickle.dumps(UserError("a line", code="file.disk-full", exit_code=3)))
    assert (str(error), error.code, error.exit_code) == ("a line", "file.disk-full", 3)


def test_a_full_disk_in_a_worker_process(tmp_path: Path) -> None:
    """The parent gets the error of the worker and does not take it for killed."""
    for number in range(4):
        path = tmp_path / "images" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE[number]).save(path)
    arguments = (tmp_path / "images", tmp_path / "out", None, 0, 4, 0.0, 1)
    with full_disk(), raises("file.disk-full", tmp_path / "out" / "train-000000.tar"):
        shard_images(*arguments)
    assert shard_images(*arguments)["train"].num_samples == 4


def test_a_full_disk_in_training_that_is_not_in_a_checkpoint() -> None:
    """Such as printing to the log of a rank."""
    error = OSError(errno.ENOSPC, "No space left on device")
    reason, cause = _explain(error, World(0, 1, CPU))
    assert cause == "file.disk-full" and "disk is full" in reason


def test_standard_output_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result that is redirected to a full disk is not lost in silence."""
    write_tokens(tmp_path, "val", 8, "tokenizer", [1, 2], 8, 0)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as stop:
            main(["data", "info", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.endswith("[file.disk-full]\n"), error
    assert "standard output" in error and error.count("\n") == 1


def test_a_model_folder_on_a_full_disk(tmp_path: Path) -> None:
    """The same command can be run again: nothing stays of the files that fitted."""
    var, _ = models()
    source = Source(var, 4, [], {"precision": "fp32"})
    for form in ("ours", "official"):
        convert(source, tmp_path / form, form, "x")
        sizes = {path.name: path.stat().st_size for path in (tmp_path / form).iterdir()}
        out = tmp_path / f"{form}-again"
        largest = max(sizes, key=lambda name: sizes[name])
        assert len(sizes) > 1
        with full_disk(sizes[largest] - 1), raises("file.disk-full", out / largest):
            convert(source, out, form, "x")
        assert list(out.iterdir()) == []
        convert(source, out, form, "x")
        assert {path.name: path.stat().st_size for path in out.iterdir()} == sizes
    with raises("evaluate.folder-not-empty", out):
        convert(source, out, "ours", "x")
    assert {path.name: path.stat().st_size for path in out.iterdir()} == sizes
