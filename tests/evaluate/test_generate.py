"""Models are loaded by every kind of name, and generate many images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.raises import raises
from tests.runs import run_here, small_config
from var_scale.cli import main
from var_scale.data.verify import verify_folder
from var_scale.evaluate import generate as g
from var_scale.evaluate.read_images import read_images
from var_scale.evaluate.source import Source, load_source
from var_scale.files import write_json
from var_scale.model.sampling import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with averaged weights and two checkpoints."""
    root = tmp_path_factory.mktemp("run")
    config = small_config(root, train={"steps": 6, "keep_steps": [3], "ema": 0.9})
    code, made = run_here(config, root / "r")
    assert code == 0
    return made.path


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return load_source(str(folder), torch.device("cpu"))


def images(path: Path) -> np.ndarray:
    return np.concatenate(list(read_images(path, 7)))


def test_sources(folder: Path, source: Source, tmp_path: Path) -> None:
    """A run is loaded by its newest checkpoint, by another one, or with its averaged weights; the
    same model is loaded from our folder, from official files, and as VARHF, also in lower
    precision; any other name gives an error of one line."""
    cpu = torch.device("cpu")
    logits = lambda s: s.var(torch.tensor([1]), torch.zeros(1, 13, 8))  # noqa: E731
    with torch.no_grad():
        whole = logits(source)
        assert not torch.equal(logits(load_source(str(folder), cpu, step=3)), whole)
        assert not torch.equal(logits(load_source(str(folder), cpu, averaged=True)), whole)
        quality = {
            "runs": [
                {"run": folder.name, "loss_avg": 1.0, "FD-tok": 0.25, "samples": 1000},
                {"run": "other", "FD-tok": 9.0},
            ]
        }
        write_json(folder.parent / "report" / "quality.json", quality)
        main(["hub", "convert", str(folder), str(tmp_path / "ours"), "--precision", "bf16"])
        kept = load_file(tmp_path / "ours" / "vae.safetensors")
        assert all(
            torch.equal(kept[name], value)
            for name, value in source.var.vae_proxy[0].state_dict().items()
        ), "not as it was saved"
        shutil.rmtree(tmp_path / "ours")
        main(["hub", "convert", str(folder), str(tmp_path / "ours")])
        ours = load_source(str(tmp_path / "ours"), cpu)
        assert torch.equal(logits(ours), whole) and ours.classes == 4
        main(
            [
                "hub",
                "convert",
                str(tmp_path / "ours"),
                str(tmp_path / "official"),
                "--to",
                "official",
            ]
        )
        files = {p.name.split("_")[0]: p for p in tmp_path.glob("official/*.pth")}
        var, vae = files["var"], files["vae"]
        assert torch.equal(logits(load_source(str(var), cpu, vae=str(vae))), whole)
        assert (
            load_source(str(folder), cpu, precision="bf16").var.head.weight.dtype == torch.bfloat16
        )
    first, second = (torch.load(p, weights_only=True) for p in (var, vae))
    assert (
        all(torch.equal(first[k], v) for k, v in source.var.state_dict().items())
        and "encoder.1.weight" in second
    )
    with raises("model.official-form"):
        main_error(["hub", "convert", str(folder), str(tmp_path / "hf"), "--to", "varhf"])
    for text, more, code, name in (
        (str(tmp_path / "no"), {}, "evaluate.no-model", "no"),
        (str(tmp_path), {}, "evaluate.no-model", "config.yaml"),
        (str(var), {}, "model.tokenizer-missing", var.name),
        (str(folder), {"step": 4}, "train.no-checkpoint", "step 4"),
        (str(var), {"step": 3, "vae": str(vae)}, "evaluate.option-unfit", "--step"),
        (str(folder), {"precision": "int4"}, "evaluate.option-unfit", "int4"),
    ):
        with raises(code, name):
            load_source(text, cpu, **more)  # type: ignore[arg-type]
    card = (tmp_path / "ours" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: var-scale") and "loss_avg, validation" in card
    assert (
        "| FD-tok, 1,000 samples | 0.25 |" in card
        and "9" not in card.split("FD-tok")[1].split("|")[1]
    )
    main(["hub", "convert", str(tmp_path / "ours"), str(tmp_path / "again"), "--name", "ours"])
    assert (tmp_path / "again" / "README.md").read_text() == card, (
        "the study's numbers and the run are kept"
    )
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["format"] = 9
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with raises("model.pretrained", 9):
        load_source(str(tmp_path / "ours"), cpu)


def main_error(argv: list[str]) -> None:
    """The UserError of a command."""
    from var_scale.cli import build_parser

    args = build_parser().parse_args(argv)
    args.function(args)


def test_classes_by_name() -> None:
    named = Source(None, 4, ["tench, Tinca tinca", "goldfish", "great white shark", "tiger shark"])  # type: ignore[arg-type]
    assert named.find(["2", "-1", "goldfish", "tinca tinca", "tiger"]) == [2, -1, 1, 0, 3]
    for text, names in (
        ("shark", ("2 great white shark", "3 tiger shark")),
        ("cat", ("cat",)),
        ("4", ("0 to 3",)),
    ):
        with raises("evaluate.class", *names):
            named.find([text])
    with raises("evaluate.class", "goldfish,1"):
        named.find(["goldfish", "0", "1"])


def test_images_are_shared_out_evenly() -> None:
    """Every image has its class and number; the classes have equal parts; the seeds differ."""
    job = g.Job((3, 1, 7), 10, 5, Settings())
    placed = [job.image(i) for i in range(10)]
    assert [sum(label == c for label, _ in placed) for c in (3, 1, 7)] == [4, 3, 3] and len(
        set(placed)
    ) == 10
    assert placed[:5] == [(3, 0), (3, 1), (3, 2), (3, 3), (1, 0)]
    keys = {
        g.seed_of(seed, label, number)
        for seed in (0, 1)
        for label in (-1, 0, 5)
        for number in range(50)
    }
    assert len(keys) == 300 and max(keys) < 2**128


def test_the_same_images_in_every_form_batch_and_part(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PNGs, shards and npz contain the same images; parts, batches and an interruption change
    nothing; a finished job is not repeated; another job in its place is refused."""
    monkeypatch.setattr(g, "UNIT", 8)
    job = g.Job((0, 1, 3), 30, 7, Settings(2.0, 10, 0.9))
    assert g.generate(source, job, tmp_path / "png", "png", 8)
    whole = images(tmp_path / "png")
    assert (
        whole.shape == (30, *source.var.vae_proxy[0].image_size, 3)
        and len(np.unique(whole, axis=0)) > 20
    )
    assert (tmp_path / "png" / "labels.csv").read_text().splitlines()[11:13] == [
        "000010.png,1",
        "000011.png,1",
    ]
    assert not g.generate(source, job, tmp_path / "a.npz", "npz", 3, (1, 2))
    assert g.generate(source, job, tmp_path / "a.npz", "npz", 5, (0, 2))
    assert g.generate(source, job, tmp_path / "s", "shards", 4)
    assert np.array_equal(images(tmp_path / "a.npz"), whole) and np.array_equal(
        images(tmp_path / "s"), whole
    )
    assert verify_folder(tmp_path / "s") == [] and not (tmp_path / "a.npz.parts").exists()
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].tolist() == [
            job.image(i)[0] for i in range(30)
        ]
    for lost in (3, 17):
        (tmp_path / "png" / f"{lost:06d}.png").unlink()
    made: list[int] = []
    draw = g.draw
    monkeypatch.setattr(
        g,
        "draw",
        lambda source, labels, *rest: (made.append(len(labels)), draw(source, labels, *rest))[1],
    )
    assert g.generate(source, job, tmp_path / "png", "png", 8) and sum(made) == 2
    assert np.array_equal(images(tmp_path / "png"), whole)
    whole_file = (tmp_path / "png" / "000004.png").read_bytes()
    (tmp_path / "png" / "000004.png").write_bytes(whole_file[:-20])
    assert g.generate(source, job, tmp_path / "png", "png", 8) and sum(made) == 3
    assert (tmp_path / "png" / "000004.png").read_bytes() == whole_file
    for kind, name in (("png", "png"), ("npz", "a.npz"), ("shards", "s")):
        assert g.generate(source, job, tmp_path / name, kind, 8) and sum(made) == 3
        with raises(
            "evaluate.other-settings",
            "seed",
            7,
            8,
        ):
            g.generate(source, g.Job((0, 1, 3), 30, 8, job.settings), tmp_path / name, kind, 8)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:1000])
    assert g.generate(source, job, tmp_path / "a.npz", "npz", 8) and np.array_equal(
        images(tmp_path / "a.npz"), whole
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with raises("evaluate.out-in-use", "mine"):
        g.generate(source, job, tmp_path / "mine", "png", 8)


def test_one_generator_draws_as_the_official_call(source: Source) -> None:
    labels, settings = torch.tensor([1, 1, 0, 0]), Settings(2.0, 5, 0.9)
    grid = g.grid_of_classes(source, [1, 0], 2, 3, settings, one_generator=True)
    official = source.var.autoregressive_infer_cfg(4, labels, g_seed=3, cfg=2.0, top_k=5, top_p=0.9)
    assert np.array_equal(grid.reshape(-1, *grid.shape[2:]), g.to_uint8(official))  # type: ignore[arg-type]
    assert not np.array_equal(grid, g.grid_of_classes(source, [1, 0], 2, 3, settings))


def test_the_command(
    folder: Path,
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command writes a grid with a picture of the scales, and one npz from two processes; wrong
    calls give an error of one line."""
    monkeypatch.chdir(tmp_path)
    grid = ["--out", "g.png", "--classes", "1,-1", "--per-class", "3", "--cfg", "0,1,2"]
    main(["sample", str(folder), *grid, "--steps-picture", "steps.png"])
    side = source.var.vae_proxy[0].image_size[0]
    assert Image.open("g.png").size == (3 * (side + 2) - 2, 2 * (side + 2 + 14) - 2)
    assert Image.open("steps.png").size[0] == 3 * (side + 2) - 2
    many = ["--out", "x.npz", "--count", "300", "--processes", "2", "--top-k", "5"]
    monkeypatch.setattr(sys, "argv", ["var-scale", "sample", str(folder), *many])
    main()  # the other process gets its arguments from those of this one
    assert np.load("x.npz")["arr_0"].shape[0] == 300
    for name in ("d.npz", "h"):
        (tmp_path / name).mkdir()
    (tmp_path / "h" / "samples.json").touch()
    for arguments, words in (
        (["--out", "g.png", "--count", "5"], "[evaluate.options-conflict]"),
        (["--out", "f", "--format", "npz"], "[evaluate.out-form]"),
        (["--out", "f", "--part", "4/4"], "is not a part"),
        (["--cfg", "1,2"], "[model.settings]"),
        (["--device", "gpu"], "[evaluate.device]"),
        (["--device", "cuda:99"], "[evaluate.device]"),
        (["--paper", "--cfg", "4", "--out", "p"], "[evaluate.options-conflict]"),
        (["--vae", "x.pth"], "[evaluate.option-unfit]"),
        (["--out", "d.npz", "--count", "3"], "[evaluate.out-form]"),
        (["--one-generator", "--out", "f"], "[evaluate.options-conflict]"),
        (["--steps-picture", "samples.png"], "[evaluate.options-conflict]"),
        (["--out", "h/0.png"], "[evaluate.out-in-use]"),
        (["--process", "2"], "--process"),
        (["--classes", "9"], "[evaluate.class]"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["sample", str(folder), *arguments])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and words in said and len(said.strip().splitlines()) == 1, (
            said
        )


def test_a_damaged_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / folder.name)
    (part,) = sorted((tmp_path / folder.name / "checkpoints").glob("step-*"))[-1].glob(
        "part-*.safetensors"
    )
    part.write_bytes(part.read_bytes()[:1000])
    with raises("train.checkpoint-damaged", part.name):
        load_source(str(tmp_path / folder.name), torch.device("cpu"))


def test_weights_that_are_not_finite_are_named(folder: Path, tmp_path: Path) -> None:
    """A checkpoint with a NaN, and weights that are too large for the precision of sampling."""
    cpu = torch.device("cpu")
    name, part = "blocks.0.ffn.fc1.bias", "part-00000.safetensors"
    for value, precision in ((float("nan"), "fp32"), (1e6, "fp16")):
        run = tmp_path / precision
        shutil.copytree(folder, run)
        path = max(run.glob("checkpoints/step-*")) / part
        tensors = load_file(path)
        tensors[f"weight/{name}@0"][1] = value
        save_file(tensors, path)
        with raises("model.weights-nonfinite", name, run):
            load_source(str(run), cpu, precision=precision)
    assert load_source(str(tmp_path / "fp16"), cpu, precision="bf16").var.head.bias.isfinite().all()


def test_images_of_other_weights_or_form_do_not_mix(
    folder: Path, source: Source, tmp_path: Path
) -> None:
    """After the same run is retrained, its checkpoint has other checksums. A folder of PNGs accepts
    no shards."""
    job = g.Job((0, 1), 4, 0, Settings())
    assert g.generate(source, job, tmp_path / "s", "png", 4)
    other = Source(source.var, source.classes, [], {**source.what, "weights": "0" * 16})
    with raises("evaluate.other-settings", "weights"):
        g.generate(other, job, tmp_path / "s", "png", 4)
    with raises("evaluate.other-settings", "format"):
        g.generate(source, job, tmp_path / "s", "shards", 4)
    again = load_source(str(folder), torch.device("cpu"))
    assert (
        again.what == source.what
        and again.what["weights"]
        != load_source(str(folder), torch.device("cpu"), step=3).what["weights"]
    )
    (tmp_path / "s" / "000001.png").write_bytes(b"x")
    with raises("data.image-invalid", "000001.png"):
        list(read_images(tmp_path / "s"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_command_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    """SIGTERM to the first of two processes ends the other too."""
    command = [
        sys.executable,
        "-m",
        "var_scale.cli",
        "sample",
        str(folder),
        "--out",
        "x.npz",
        "--count",
        "100000",
        "--processes",
        "2",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as parent:
        me, end = psutil.Process(parent.pid), time.monotonic() + 60
        while (
            not (list(tmp_path.glob("x.npz.parts/*.npy")) and me.children())
            and time.monotonic() < end
        ):
            time.sleep(0.2)
        children = me.children()
        assert len(children) == 1
        parent.terminate()
        assert parent.wait(60) != 0
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive and len(gone) == 1


def test_files_that_hold_no_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", arr_0=np.zeros((2, 4), np.float32))
    (tmp_path / "t.npz").write_text("x")
    (tmp_path / "e").mkdir()
    (tmp_path / "two").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, size)).save(tmp_path / "two" / f"{size}.png")
    codes = {"two": "data.image-sizes", "no.npz": "file.missing"}
    for name in ("f.npz", "t.npz", "e", "two", "no.npz"):
        with raises(codes.get(name, "evaluate.no-images"), name):
            list(read_images(tmp_path / name))
