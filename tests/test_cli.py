"""The command as its users see it: help, wrong input, exit codes, error codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import small_config
from var_scale.cli import build_parser, main
from var_scale.config.load import write_config
from var_scale.progress import say

Capture = pytest.CaptureFixture[str]
HEAVY = ("torch", "numpy", "scipy", "pydantic", "rich", "yaml")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: str = "") -> str:
    """The one line that an error prints. Checks exit code 2 and the error's code, if one is
    given."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text
    assert not code or text.endswith(f" [{code}]"), text
    return text


def test_help_is_quick_and_names_every_command() -> None:
    """Help imports no large package, which is what keeps it quick, and lists every command."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "var_scale.cli", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and not imported & set(HEAVY)
    (commands,) = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    assert commands.choices and all(name in result.stdout for name in commands.choices)


@pytest.mark.parametrize(
    "command",
    [
        "doctor",
        "data synth",
        "data shard",
        "data index",
        "data verify",
        "data info",
        "data tokenize",
        "tokenizer train",
        "train",
        "checkpoint export",
        "checkpoint import",
        "study plan",
        "study run",
        "study status",
        "study retry",
        "study report",
        "sample",
        "edit",
        "records",
        "fit",
        "evaluate loss",
        "evaluate samples",
        "evaluate stats",
        "hub convert",
        "hub pull",
        "hub push",
        "bench kernels",
        "bench step",
        "bench official",
        "bench sample",
        "bench train",
    ],
)
def test_help_of_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every subcommand has a help text."""
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 100


def test_order_of_positional_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Inherited positional arguments keep their places."""
    for command, order in (
        ("checkpoint import", "checkpoint config [key=value ...]"),
        ("bench official", "checkout config [key=value ...]"),
        ("hub convert", "model out"),
        ("evaluate samples", "samples"),
        ("evaluate stats", "images out"),
        ("data shard", "source out"),
    ):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        usage = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
        assert usage.endswith(f"] {order}") or usage.endswith(f" {order}"), usage


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    """The table names optional packages and the precision that would be used."""
    main(["doctor"])
    text = capsys.readouterr().out
    assert "deepspeed" in text and "precision auto" in text


@pytest.mark.parametrize(
    ("override", "code", "names"),
    [
        ("train.base_l=1", "config.unknown-key", ("train.base_l", "base_lr")),
        (
            "study.overrides={2: {train.clib: 1.0}}",
            "config.unknown-key",
            ("depth 2", "train.clib", "clip"),
        ),
        ("model.depth=8", "config.value", ("model.depth", "study.depths")),
        ("model.heads=3", "config.value", ("3 heads",)),
        ("tokenizer.weights=nothing.pth", "study.weights-missing", ("nothing.pth",)),
        ("data.shapes.train_images=8", "study.too-few-samples", ("8", "16")),
        ("data.tokens_train=x", "study.sources-conflict", ("data.shapes", "tokens")),
    ],
)
def test_wrong_settings_of_a_study(
    override: str, code: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan names the wrong key or value. The messages of the config have tests in
    tests/config."""
    text = fails(capsys, "study", "plan", "study/tiny", override, code=code)
    assert all(name in text for name in names), text


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("evaluate loss {}", "evaluate.no-model"),
        ("evaluate stats {} out.npz --extractor tok:x", "file.missing"),
        ("evaluate samples {} --reference x --extractor tok:x", "file.missing"),
        ("checkpoint export {} out.pth", "file.missing"),
        ("sample {}", "evaluate.no-model"),
        ("data shard {} out", "data.no-source"),
        ("data shard {}.csv out", "data.no-source"),
        ("data index {}", "file.missing"),
        ("data verify {}", "file.missing"),
        ("data info {}", "file.missing"),
        ("hub push {} hf://a/b", "file.missing"),
        ("records {} --out out.csv", "records.source-missing"),
        ("fit {}", "records.table-missing"),
        ("study retry {}", "file.missing"),
        ("study status study/tiny --runs {}", "study.folder-missing"),
        ("study stop study/tiny --runs {}", "study.folder-missing"),
        ("study report study/tiny --runs {}", "study.folder-missing"),
        ("study quality study/tiny --runs {}", "study.folder-missing"),
        ("study next study/tiny --hours 1 --runs {}", "study.folder-missing"),
        (
            "study run study/tiny data.shapes=null data.images_train={} data.images_val=x",
            "file.missing",
        ),
        (
            "study run study/tiny data.shapes=null data.tokens_train={} data.tokens_val=x "
            "tokenizer.weights=vae.pth",
            "file.missing",
        ),
        ("bench official {} study/tiny", "file.missing"),
    ],
)
def test_a_folder_that_does_not_exist_is_called_that(
    command: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Not empty, incomplete or of a wrong kind; `~` is the home folder; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("var_scale.evaluate.score.load_extractor", lambda *_: None)
    text = fails(capsys, *(word.format("~/none") for word in command.split()), code=code)
    assert str(tmp_path / "home" / "none") in text and "does not exist" in text
    assert list(tmp_path.iterdir()) == []


def test_overrides_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    """key=value may come after options; other arguments that are not known are named."""
    plan = ("study", "plan", "study/tiny", "--runs", "runs")
    assert "train.clib" in fails(capsys, *plan, "train.clib=1", code="config.unknown-key")
    assert "--jobs" in fails(capsys, *plan, "--jobs", "train.clip=1")


def test_a_study_without_runs_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The preset does not exist, or no sizes, no data or no folder are given."""
    runs = ("--runs", str(tmp_path))
    text = fails(capsys, "study", "run", "study/tinny", *runs, code="config.not-found")
    assert "study/tiny" in text
    for command, code, name in (
        (("study", "run", "study/tiny", "study.depths=[]"), "depths-missing", "study.depths"),
        (("study", "run", "model/d16"), "depths-missing", "study.depths"),
        (("study", "run", "study/var_paper"), "sources-missing", "data.images_train"),
        (("study", "status", "study/tiny"), "folder-missing", "--runs"),
        (("train", "study/tiny", "--depth", "9"), "run-unknown", "--depth"),
        (("train", "study/tiny"), "run-unknown", "--depth"),
        (("bench", "train", "study/tiny"), "run-unknown", "--depth"),
        (("data", "synth", "model/d16"), "nothing-to-generate", "data.shapes"),
    ):
        place = () if command[0] == "bench" else runs
        assert name in fails(capsys, *command, *place, code=f"study.{code}")
    assert "data.images_train" in fails(capsys, "tokenizer", "train", "study/var_paper", *runs)
    assert list(tmp_path.iterdir()) == []


def test_options_that_exclude_or_need_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """Such options are refused before the config is read."""
    bench = ("bench", "train", "study/nothing", "--world", "8")
    assert "--dry-run" in fails(capsys, *bench, code="argument.combination")


def test_batch_that_does_not_divide_over_processes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`train` refuses it before ranks are started."""
    config = small_config(tmp_path, engine={"name": "ddp", "processes": 3})
    write_config(config, tmp_path / "c.yaml")
    command = ("train", str(tmp_path / "c.yaml"), "--runs", str(tmp_path / "runs"))
    assert "3 processes" in fails(capsys, *command, code="study.batch-indivisible")


def test_tokens_of_another_tokenizer_and_missing_shard(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Tokens name their tokenizer; missing shards and weights are named."""
    config = small_config(tmp_path)
    path = tmp_path / "c.yaml"
    write_config(config, path)
    weights = Path(str(config.tokenizer.weights))
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    text = fails(capsys, "train", str(path), "--runs", str(tmp_path / "a"))
    assert str(tmp_path / "train") in text and "tokenizer" in text
    weights.write_bytes(original)
    shard = sorted((tmp_path / "train").glob("*.tar"))[0]
    shard.rename(tmp_path / "gone.tar")
    runs = ("--runs", str(tmp_path / "b"))
    assert shard.name in fails(capsys, "train", str(path), *runs)
    weights.unlink()
    for command in (("train", str(path)), ("train", "study/tiny", "--depth", "1")):
        text = fails(capsys, *command, *runs, code="study.weights-missing")
        assert "tokenizer.weights" in text
    assert not (tmp_path / "b").exists()


def test_truncated_tar(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A truncated shard is reported by verify and refused by index."""
    small_config(tmp_path)
    folder = tmp_path / "train"
    shard = sorted(folder.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-3000])
    with pytest.raises(SystemExit):
        main(["data", "verify", str(folder)])
    printed = capsys.readouterr()
    assert shard.name in printed.out and "[data.shards-damaged]" in printed.err
    assert shard.name in fails(capsys, "data", "index", str(folder))
    index = ("data", "index", str(folder), "--out", str(tmp_path / "index"))
    assert "--out" in fails(capsys, *index, code="data.index-folder")
    tars = "https://host.invalid/{0..1}.tar"
    assert "--out" in fails(capsys, "data", "index", tars, code="data.index-folder")


def power_law(start: float, *exponents: int, floor: float = 0.0, alpha: float = -0.1) -> str:
    """A CSV file of points on a power law."""
    points = [(f"1e{k}", floor + start * 10 ** (k * alpha)) for k in exponents]
    return "n,loss\n" + "".join(f"{n},{loss}\n" for n, loss in points)


def test_fit_of_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A power law is found; the output suggests a floor where the points bend."""
    table = tmp_path / "t.csv"
    command = ["fit", str(table), "--x", "n", "--y", "loss"]
    table.write_text(power_law(3.0, 3, 4, 5, 6))
    main(command)
    assert "0.1000" in capsys.readouterr().out
    bent = power_law(3.0, 1, 2, 3, 4, 5, floor=2.0, alpha=-0.3)
    table.write_text("\ufeff" + bent.replace("n,loss", "n, loss"))
    main(command)
    out = capsys.readouterr().out
    assert "--form power_floor" in out and "(n/1e3)" in out
    main([*command, "--form", "power_floor"])
    assert "2.0000 + " in capsys.readouterr().out


def test_fit_without_a_law(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Too few points: exit code 1, and a result that states that the fit did not converge."""
    table, out = tmp_path / "t.csv", tmp_path / "none.json"
    table.write_text("n,loss\n1,2\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", str(table), "--x", "n", "--y", "loss", "--json", str(out)])
    assert stop.value.code == 1 and str(table) in capsys.readouterr().err
    none = json.loads(out.read_text())
    assert none["status"] == "not-converged" and none["params"] == {} and none["reason"]


@pytest.mark.parametrize(
    ("content", "options", "names"),
    [
        ("n,lost\n1,2\n", "", ("column loss",)),
        ("n,loss,loss\n1,2,3\n", "", ("column loss",)),
        ("n,loss\n1,a\n", "", ("line 2", "loss")),
        ("n,loss\n1,2\n1,2,3\n", "", ("line 3",)),
        ("n,loss\n1,2\n1,x\n", "", ("line 3", "x")),
        ("n,loss\n1,2\n-1,2\n", "", ("line 3", "-1")),
        ("\xff\x00", "", ("UTF-8",)),
        ("n,loss\n1,2\n", "--form chinchilla", ("--x n", "chinchilla")),
        ("n,loss\n1,2\n", "--x n,d", ("--x n,d", "power")),
        ("n,loss\n1,2\n", "--form power_floor --floor 1", ("--floor", "power_floor")),
        ("n,loss\n1,2\n", "--floor nan", ("--floor", "nan")),
    ],
)
def test_wrong_tables(
    content: str,
    options: str,
    names: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The line, the column or the option at fault is named."""
    table = tmp_path / "t.csv"
    table.write_bytes(content.encode("latin-1"))
    text = fails(capsys, "fit", str(table), "--x", "n", "--y", "loss", *options.split())
    assert all(name in text for name in names), text


def test_folders_without_what_a_command_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An empty folder is neither a study, nor a run, nor a model."""
    assert "runs.csv" in fails(capsys, "fit", str(tmp_path))
    assert str(tmp_path) in fails(capsys, "sample", str(tmp_path))
    push = ("hub", "push", str(tmp_path), "hf://me/model")
    assert str(tmp_path) in fails(capsys, *push, code="evaluate.not-a-model")
    full = tmp_path / "full"
    (full / "inner").mkdir(parents=True)
    convert = ("hub", "convert", "nothing", str(full))
    assert str(full) in fails(capsys, *convert, code="evaluate.folder-not-empty")
    assert "model.pth" in fails(capsys, "hub", "pull", "model.pth", code="evaluate.hub-address")


def test_unknown_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The device is refused before anything is loaded."""
    for device in ("abacus", "cuda:99"):
        command = ("hub", "pull", "hf://me/model", "--device", device)
        assert device in fails(capsys, *command, code="evaluate.device")


@pytest.mark.parametrize(
    "argument",
    [
        "--cfg=nan",
        "--cfg=-5",
        "--top-k=-3",
        "--top-p=1.5",
        "--seed=99999999999999999999",
        "--per-class=0",
        "--out=grid.jpg",
        "--out=.",
        "--runs=pyproject.toml",
    ],
)
def test_arguments_out_of_range(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The argument is refused before anything is loaded; the message has the option and the
    value."""
    command = ["study", "status", "study/tiny"] if "runs" in argument else ["sample", "nothing"]
    text = fails(capsys, *command, argument)
    option, _, value = argument.partition("=")
    assert re.search(rf"{option}\b", text) and value in text


def test_work_goes_on_when_nobody_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `| head`. (A run whose reader leaves: tests/jobs/test_local.py.)"""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        for text in ("one", "two"):
            say(text)
        monkeypatch.undo()


def test_a_command_whose_output_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by >&-."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    main(["--version"])
    main(["study", "plan", "study/var_paper"])
