"""The command as a person meets it: help, bad input, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import small_config
from var_scale.cli import main
from var_scale.config.load import write_config


def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "var_scale.cli", *arguments], capture_output=True, text=True, cwd=cwd, check=False)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text
    return text


def test_help_is_quick_and_names_every_command() -> None:
    """No heavy import before the command is known: the best of three under half a second."""
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        result = call("--help")
        best = min(best, time.perf_counter() - start)
    assert result.returncode == 0 and best < 0.5
    for name in ("doctor", "data", "tokenizer", "train", "study", "sample", "fit"):
        assert name in result.stdout


@pytest.mark.parametrize("command", ["doctor", "data synth", "data index", "data verify", "data info", "data tokenize", "tokenizer train",
                                     "train", "study plan", "study run", "study status", "study report", "sample", "fit",
                                     "bench kernels", "bench step"])  # fmt: skip
def test_help_of_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every subcommand explains itself."""
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 100


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    """Says what is here and what each missing piece costs."""
    main(["doctor"])
    text = capsys.readouterr().out
    assert "deepspeed" in text and "precision auto" in text


def test_wrong_key_and_missing_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A wrong key is named with the nearest right one, an unknown config with the nearest preset."""
    assert "did you mean base_lr" in fails(capsys, "study", "plan", "study/tiny", "train.base_l=1")
    assert "did you mean study/tiny" in fails(capsys, "study", "run", "study/tinny", "--runs", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    twice = tmp_path / "twice.yaml"
    twice.write_text("include: study/tiny\ntrain:\n  batch_size: 64\n  batch_size: 32\n")
    assert "line 4 is not valid YAML (key batch_size is given twice)" in fails(capsys, "study", "plan", str(twice))
    twice.write_bytes(b"\xff\xfe\x00binary")
    assert "UTF-8" in fails(capsys, "study", "plan", str(twice))
    assert "patch_nums" in fails(capsys, "study", "plan", "study/tiny", "tokenizer.patch_nums=[]")
    assert "unknown key train.clib" in fails(capsys, "study", "plan", "study/tiny", "study.overrides={2: {train.clib: 1.0}}")
    assert "does not exist" in fails(capsys, "study", "plan", "study/tiny", "tokenizer.weights=nothing.pth")
    assert "model.depth is set by study.depths" in fails(capsys, "study", "plan", "study/tiny", "model.depth=8")
    assert "train.adam_betas" in fails(capsys, "study", "plan", "study/tiny", "train.adam_betas=[0.9,2]")
    assert "train.base_lr" in fails(capsys, "study", "plan", "study/tiny", "train.base_lr=.inf")
    assert "not shorter than the run" in fails(capsys, "study", "plan", "study/tiny", "train.warmup_epochs=100")
    assert "fewer than a batch" in fails(capsys, "study", "plan", "study/tiny", "data.leaves.train_images=32")
    assert "tokens_* are both given" in fails(capsys, "study", "plan", "study/tiny", "data.tokens_train=x")
    dotted = tmp_path / "dotted.yaml"
    dotted.write_text("include: study/tiny\ntrain.batch_size: 32\n")
    assert "in a file write a section" in fails(capsys, "study", "plan", str(dotted))


def test_study_without_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No sizes: one line, nothing written."""
    assert "study.depths" in fails(capsys, "study", "run", "study/tiny", "study.depths=[]", "--runs", str(tmp_path))
    assert "study.depths" in fails(capsys, "study", "run", "model/d16", "--runs", str(tmp_path))
    assert "data.images_train" in fails(capsys, "study", "run", "study/var_paper", "--runs", str(tmp_path))
    assert "data.images_train" in fails(capsys, "tokenizer", "train", "study/var_paper", "--runs", str(tmp_path))
    assert "no such study here" in fails(capsys, "study", "status", "study/tiny", "--runs", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_depth_that_does_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    """Heads that do not divide the width."""
    assert "does not divide into 5 heads" in fails(capsys, "study", "plan", "study/tiny", "model.heads=5")


def test_batch_that_does_not_divide_over_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Found by the ranks, said by the command."""
    assert "does not divide into 3 processes" in fails(capsys, "study", "plan", "study/tiny", "engine.processes=3")
    write_config(small_config(tmp_path, engine={"name": "ddp", "processes": 3}), tmp_path / "c.yaml")
    assert "does not divide into 3 processes" in fails(capsys, "train", str(tmp_path / "c.yaml"), "--runs", str(tmp_path / "runs"))


def test_tokens_of_another_tokenizer_and_missing_shard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Tokens name their tokenizer; shards that are gone are named."""
    config = small_config(tmp_path)
    path = tmp_path / "c.yaml"
    write_config(config, path)
    weights = Path(str(config.tokenizer.weights))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "were made by tokenizer" in fails(capsys, "train", str(path), "--runs", str(tmp_path / "a"))
    weights.write_bytes(whole)
    shard = sorted((tmp_path / "train").glob("*.tar"))[0]
    shard.rename(tmp_path / "gone.tar")
    assert shard.name in fails(capsys, "train", str(path), "--runs", str(tmp_path / "b"))
    weights.unlink()
    assert "tokenizer.weights" in fails(capsys, "train", str(path), "--runs", str(tmp_path / "b"))
    assert "tokenizer.weights" in fails(capsys, "train", "study/tiny", "--depth", "1", "--runs", str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_truncated_tar(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A shard cut short is named by verify and refused by index."""
    small_config(tmp_path)
    shard = sorted((tmp_path / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-3000])
    assert "problem" in fails(capsys, "data", "verify", str(tmp_path / "train"))
    assert shard.name in fails(capsys, "data", "index", str(tmp_path / "train"))


def test_fit_of_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A power law is found; wrong columns, bad cells and too few points are one line."""
    table = tmp_path / "t.csv"
    table.write_text("n,loss\n" + "".join(f"{n},{3.0 * n**-0.1}\n" for n in (1e3, 1e4, 1e5, 1e6)))
    main(["fit", str(table), "--x", "n", "--y", "loss"])
    assert "0.1000" in capsys.readouterr().out
    assert "has no column lost" in fails(capsys, "fit", str(table), "--x", "n", "--y", "lost")
    table.write_text("n,loss\n1,a\n")
    assert "line 2" in fails(capsys, "fit", str(table), "--x", "n", "--y", "loss")
    table.write_text("n,loss\n1,2\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", str(table), "--x", "n", "--y", "loss", "--json", str(tmp_path / "none.json")])
    assert stop.value.code == 1 and "1 size for 2 parameters" in capsys.readouterr().err
    none = json.loads((tmp_path / "none.json").read_text())
    assert none["status"] == "not-converged" and none["params"] == {} and "1 size" in none["reason"]
    for line, words in (("1,2,3", "more cells than the header"), ("1,x", "is not a number"), ("-1,2", "not a positive number")):
        table.write_text(f"n,loss\n1,2\n{line}\n")
        assert "line 3" in (text := fails(capsys, "fit", str(table), "--x", "n", "--y", "loss")) and words in text
    table.write_text("\ufeffn, loss\n" + "".join(f"{n},{2 + 3.0 * n**-0.3}\n" for n in (1e1, 1e2, 1e3, 1e4, 1e5)))
    main(["fit", str(table), "--x", "n", "--y", "loss"])
    assert "the points bend" in (out := capsys.readouterr().out) and "--form power_floor" in out and "(n/1e3)" in out
    main(["fit", str(table), "--x", "n", "--y", "loss", "--form", "power_floor"])
    assert "2.0000 + " in capsys.readouterr().out
    table.write_text("n,loss,loss\n1,2,3\n")
    assert "more than one column loss" in fails(capsys, "fit", str(table), "--x", "n", "--y", "loss")
    table.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in fails(capsys, "fit", str(table), "--x", "n", "--y", "loss")
    assert "no report/runs.csv" in fails(capsys, "fit", str(tmp_path))
    assert "has two variables" in fails(capsys, "fit", str(table), "--form", "chinchilla", "--x", "n", "--y", "loss")
    assert "has one variable" in fails(capsys, "fit", str(table), "--x", "n,d", "--y", "loss")
    assert "fits the floor itself" in fails(capsys, "fit", str(table), "--form", "power_floor", "--floor", "1")
    assert "nan is not a number" in fails(capsys, "fit", str(table), "--floor", "nan")


def test_sample_of_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Not a run folder."""
    assert "neither a run folder" in fails(capsys, "sample", str(tmp_path))


@pytest.mark.parametrize("argument", ["--cfg=nan", "--cfg=-5", "--top-k=-3", "--top-p=1.5", "--seed=99999999999999999999", "--per-class=0",
                                      "--out=grid.jpg", "--out=.", "--runs=pyproject.toml"])  # fmt: skip
def test_arguments_out_of_range(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is loaded."""
    command = ["study", "status", "study/tiny"] if "runs" in argument else ["sample", "nothing"]
    text = fails(capsys, *command, argument)
    assert argument.partition("=")[0] in text and argument.partition("=")[2] in text
