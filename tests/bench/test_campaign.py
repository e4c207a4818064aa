"""The campaign: stages are real processes."""

from __future__ import annotations

import json
import operator
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from var_kernels.bench.operators import OPERATORS, SHAPES

from tests.raises import raises
from var_scale.bench import campaign as module
from var_scale.bench.campaign import NAME, Row, Stage, Value, campaign, show, table, this_device
from var_scale.bench.campaign_stages import STAGES
from var_scale.cli import build_parser
from var_scale.config.load import load

WRITE = "python -c \"import json; json.dump({'ms': %d}, open('{out}', 'w')); print('done')\""
MS = (Value("step", lambda r: r["ms"], 4.0, 6.0, at_least=False),)


@pytest.fixture(scope="module")
def gpu() -> bool:
    return this_device()[1]


@pytest.fixture
def stage(gpu: bool) -> Any:
    """A stage that runs on this machine."""

    def make(name: str, command: str, seconds: int = 60, values: Any = MS) -> Stage:
        return Stage(name, seconds, command, "?", values, gpu)

    return make


def states(rows: list[Row]) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in rows}


def alive(pid: int) -> bool:
    return module.process_fields(pid)[:1] not in ([], ["Z"])


def test_every_end_of_a_stage_becomes_a_row(
    tmp_path: Path, stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result, a failure, a stage without its result, and one that takes too long and whose child
    in a session of its own is killed with it. The next call repeats what failed, after what is
    missing, and what took too long only with more time."""
    sleeper = (
        "import subprocess; child = subprocess.Popen(['sleep', '600'], start_new_session=True); "
        "open('{work}/pid', 'w').write(str(child.pid)); open('{work}/kept', 'a').write('x'); "
        "child.wait()"
    )
    stages = [
        stage("good", WRITE % 5),
        stage("bad", "python -c \"import sys; print('why it failed'); sys.exit(3)\""),
        stage("empty", "python -c \"print('{out}')\""),
        stage("slow", f'python -c "{sleeper}"', seconds=4),
        stage("official", "python -c \"print('{checkout}')\"", values=()),
    ]
    rows = campaign(stages[:4], tmp_path, 120)
    assert states(rows) == {
        "good": "ok",
        "bad": "failed (3)",
        "empty": "failed (no result)",
        "slow": "too long",
    }
    assert json.loads((tmp_path / NAME).read_text())["rows"] == rows
    assert str(tmp_path) not in (tmp_path / NAME).read_text()
    assert not alive(int((tmp_path / "slow" / "pid").read_text()))
    cells = {line[0]: line[1:] for line in table(stages, rows)}
    assert cells["good"] == ["step", "4", "5", "≤ 6", "met, 25 % above the prediction"]
    assert cells["bad"][2:] == ["failed (3): why it failed", "≤ 6", ""]
    assert cells["official"][2] == "not run"

    capsys.readouterr()
    again = campaign([*stages[:4], stage("new", WRITE % 6)], tmp_path, 120)
    assert [row["stage"] for row in again] == ["good", "slow", "new", "bad", "empty"]
    assert again[:2] == [rows[0], rows[3]]
    assert "slow is left out: 4 s were too few before" in capsys.readouterr().out
    longer = campaign([stages[3]._replace(seconds=6)], tmp_path, 120)
    assert longer[-1]["limit"] == 6 and (tmp_path / "slow" / "kept").read_text() == "xx"

    campaign(stages[4:], tmp_path, 120)
    assert "official is left out: it compares with the official code" in capsys.readouterr().out
    with raises("bench.not-official", "trainer.py"):
        campaign(stages[4:], tmp_path, 120, tmp_path)
    (tmp_path / "trainer.py").touch()
    with_checkout = campaign(stages[4:], tmp_path, 120, tmp_path)
    assert str(tmp_path.resolve()) in with_checkout[-1]["tail"]
    campaign(stages, tmp_path, 120, only=["good"])
    assert "good is left out: it is complete" in capsys.readouterr().out
    with raises("bench.campaign-stage", "--only other"):
        campaign(stages, tmp_path, 120, only=["other"])


def test_a_part_of_the_results_is_shown_as_such(tmp_path: Path, stage: Any) -> None:
    """It has no verdict, and a later attempt without results does not replace it."""
    partly = stage("partly", (WRITE % 5)[:-1] + '; raise SystemExit(1)"')
    rows = campaign([partly], tmp_path, 60)
    assert table([partly], rows)[0][3:] == ["5", "≤ 6", "failed (1): done"]
    assert campaign([stage("partly", "python -c 'raise SystemExit(2)'")], tmp_path, 60) == rows


def test_other_code_is_measured_again(
    tmp_path: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder. Rows of other code stay, and the newest row of a stage counts."""
    stages = [stage("good", WRITE % 5)]
    campaign(stages, tmp_path, 60)
    (tmp_path / "good" / "old").touch()
    monkeypatch.setattr(module, "version", lambda: "other")
    time.sleep(1.1)  # the dates of rows are whole seconds
    rows = campaign([stages[0]._replace(command=WRITE % 7)], tmp_path, 60)
    assert [row["result"]["ms"] for row in rows] == [5, 7]
    assert table(stages, rows)[0][3] == "7" == table(stages, rows[::-1])[0][3]
    assert not (tmp_path / "good" / "old").exists()


def test_no_stage_starts_without_time(
    tmp_path: Path, stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert campaign([stage("good", WRITE % 5)], tmp_path, 10) == []
    assert "no time left for good" in capsys.readouterr().out


def test_a_campaign_that_is_interrupted_continues(tmp_path: Path, stage: Any, gpu: bool) -> None:
    """Ctrl-C stops the stage that runs; what was measured before stays."""
    text = (
        "import sys; from pathlib import Path\n"
        "from tests.bench.test_campaign import MS, WRITE, Stage, campaign\n"
        "slow = 'python -c \"import os, time; print(os.getpid(), flush=True); time.sleep(600)\"'\n"
        "commands = {'good': WRITE % 5, 'slow': slow}\n"
        f"stages = [Stage(n, 60, c, '?', MS, {gpu}) for n, c in commands.items()]\n"
        "campaign(stages, Path(sys.argv[1]), 120)"
    )
    child = subprocess.Popen([sys.executable, "-c", text, str(tmp_path)], start_new_session=True)
    log = tmp_path / "slow" / "log.txt"
    end = time.monotonic() + 120
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    assert alive(int(log.read_text()))
    child.send_signal(signal.SIGINT)
    assert child.wait(60) != 0
    assert not alive(int(log.read_text()))
    rows = campaign([stage("good", WRITE % 6), stage("slow", WRITE % 7)], tmp_path, 60)
    assert [(r["stage"], r["result"]["ms"]) for r in rows] == [("good", 5), ("slow", 7)]


def test_the_commands_of_all_stages_exist() -> None:
    """Their options, configs, operators, shapes and forms are known, and each that has values
    writes them."""
    parser = build_parser()
    assert len({s.name for s in STAGES}) == len(STAGES)
    for s in STAGES:
        assert set(re.findall("{.*?}", s.command)) <= {"{out}", "{work}", "{checkout}"}
        assert s.values == () or "{out}" in s.command
        words = shlex.split(s.command)
        if words[0] != "var-scale":
            assert words[:3] == ["python", "-m", "pytest"], s.command
            continue
        given = parser.parse_args([word.replace("{out}", "o.json") for word in words[1:]])
        if hasattr(given, "config"):
            config = load(given.config, given.overrides)
            for key, _, value in (text.partition("=") for text in given.overrides):
                if "." in key:
                    assert str(operator.attrgetter(key)(config)).lower() == value, s.name
        for kind, names in (("operators", OPERATORS), ("shapes", [one.name for one in SHAPES])):
            for start in getattr(given, kind, ()) if "--sweep" not in words else ():
                assert any(name.startswith(start) for name in names), (s.name, start)


def test_the_values_of_gpu_stages() -> None:
    """Of results as the benches write them: the worst shape counts, and a form without a time gives
    no value."""

    def time(ms: float) -> dict[str, dict[str, float]]:
        return {what: {"p50": ms} for what in ("forward", "backward", "both")}

    def kernels(operator: str, ours: float, forms: dict[str, Any]) -> dict[str, Any]:
        row = {"operator": operator, "bytes": [1e9, 1e9], "flops": [1e12, 1e12], "serial": False}
        row |= {"forms": {"ours": time(ours), "eager": time(9.0), **forms}}
        slower = row | {"forms": row["forms"] | {"ours": time(2 * ours)}}
        ceilings = {"copy_bytes_per_s": 1e12, "product_flop_per_s": 1e15}
        return {"ceilings": ceilings, "rows": [row, slower]}

    step = {"step_ms": 80.0, "in_a_row_ms": 64.0, "device_ms": 60.0, "mfu": 0.4}
    side = {"ratio": 2.5, "images_per_second": {"ours": 90.0, "official": 36.0}}
    results: dict[str, Any] = {
        "launches": {"microseconds": dict.fromkeys(("plain", "triton", "operator", "autograd"), 3)},
        "train-d16-b32": step | {"memory_bytes": 2**30, "images_per_second": 400.0},
        "official-d16": {"ratio": 2.9, "ratio_from_tokens": 1.8},
        "attention-680": kernels("block_attention", 4.0, {}),
        "adaln": kernels("gate_adaptive_layer_norm", 1.0, {"compile": time(4.0)}),
        "head": kernels("linear_cross_entropy", 1.0, {"compile": {"failed": "no"}}),
        "mlp": kernels("gelu_mlp", 1.0, {"compile": time(1.0), "products": time(1.9)}),
        "sample-d16": [side | {"batch": 1}, side | {"batch": 64, "ratio": 1.5}],
        "save-d30": {"save": {"stall_ms": 1.0, "seconds": 2.0, "steps_ms": 3.0}},
    }
    row = {"state": "ok", "date": "d", "tail": ""}
    found = {
        (line[0], line[1]): (line[3], line[5])
        for line in table(STAGES, [row | {"stage": k, "result": v} for k, v in results.items()])
        if line[0] in results
    }
    assert found["train-d16-b32", "images/s"] == ("500", "met, 9 % above the prediction")
    assert found["train-d16-b32", "MFU"] == ("0.5", "met, 19 % above the prediction")
    assert found["train-d16-b32", "GPU without work, ms"] == ("4", "")
    assert found["attention-680", "forward, share of the product rate"] == ("0.125", "MISSED")
    assert found["adaln", "backward, share of the copy rate"] == ("0.5", "MISSED")
    assert found["adaln", "time, times compile"] == ("0.5", "met")
    assert found["head", "time, times compile"] == ("no such value", "")
    assert found["mlp", "time, times products"] == ("1.05", "met")
    assert found["official-d16", "both from tokens, times official"] == ("1.8", "")
    assert found["sample-d16", "batch 64: times official"] == ("1.5", "MISSED")
    assert found["save-d30", "training waits, ms"] == ("1", "")
    assert all(cells[0] != "no such value" for key, cells in found.items() if key[0] != "head")


def test_the_table_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is printed whole where output is cut after 12,000 characters, also if every stage fails
    with a long reason."""
    monkeypatch.setattr(module, "this_device", lambda: ("H", True))
    row = {"device": "H", "state": "failed (1)", "date": "d", "tail": 300 * "x", "result": None}
    show(STAGES, [row | {"stage": s.name} for s in STAGES])
    text = capsys.readouterr().out
    assert len(text) < 12000 and len(text.splitlines()) > 40 and "failed (1): xxx" in text


@pytest.mark.slow
def test_the_stages_of_a_cpu(tmp_path: Path, gpu: bool) -> None:
    """Every stage of a machine without a GPU but the longest runs, and its values are found. Time
    limits are no matter here: tests share the cores."""
    if gpu:
        pytest.skip("these are the stages of machines without a GPU")
    stages = [s._replace(seconds=900) for s in STAGES if not s.gpu and s.name != "cpu-step-d8"]
    rows = campaign(stages, tmp_path, 3600)
    assert set(states(rows).values()) == {"ok"}, rows
    for line in table(stages, rows):
        assert line[3] == "ok" or float(line[3].replace(",", "")) > 0, line
