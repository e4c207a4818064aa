"""The campaign: stages are real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.raises import raises
from var_scale.bench import campaign as module
from var_scale.bench.campaign import NAME, Row, Stage, Value, campaign, table, this_device
from var_scale.bench.campaign_stages import STAGES

WRITE = "python -c \"import json; json.dump({'ms': %d}, open('{out}', 'w')); print('done')\""
ON_GPU = this_device()[1]


def stage(name: str, command: str, seconds: int = 60, **more: object) -> Stage:
    return Stage(name, seconds, command, "?", gpu=ON_GPU, **more)  # type: ignore[arg-type]


def states(rows: list[Row]) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in rows}


def test_every_end_of_a_stage_becomes_a_row(tmp_path: Path) -> None:
    """A result, a failure, a stage without its result, and one that takes too long and whose child
    is killed with it. The next call repeats what is not complete, and only that."""
    sleeper = (
        f"import subprocess; subprocess.Popen(['sleep', '{60 + os.getpid() % 1000}.5']).wait()"
    )
    ms = (Value("step", lambda r: r["ms"], 4.0, 6.0, at_least=False),)
    stages = [
        stage("good", WRITE % 5, values=ms),
        stage("bad", "python -c \"import sys; print('why it failed'); sys.exit(3)\"", values=ms),
        stage("empty", "python -c \"print('{out}')\"", values=ms),
        stage("slow", f'python -c "{sleeper}"', seconds=1),
        stage("official", "python -c \"print('{checkout}')\""),
    ]
    rows = campaign(stages, tmp_path, 120)
    assert states(rows) == {
        "good": "ok",
        "bad": "failed (3)",
        "empty": "failed (no result)",
        "slow": "too long",
    }
    assert json.loads((tmp_path / NAME).read_text())["rows"] == rows
    found = subprocess.run(["pgrep", "-f", sleeper], capture_output=True, text=True, check=False)
    assert not found.stdout and next(r for r in rows if r["stage"] == "slow")["seconds"] < 20
    cells = {line[0]: line[1:] for line in table(stages, rows)}
    assert cells["good"] == ["step", "4", "5", "≤ 6", "met, +25 % of the prediction"]
    assert cells["bad"][2] == "failed (3): why it failed"
    assert cells["official"][2] == "not run"

    before = rows
    again = campaign(stages[:3], tmp_path, 120, only=["good", "bad"])
    assert [r for r in again if r["stage"] == "good"] == [before[0]]
    assert len(again) == 4 and again[-1]["stage"] == "bad"
    with_checkout = campaign(stages[4:], tmp_path, 120, tmp_path)
    assert str(tmp_path.resolve()) in with_checkout[-1]["tail"]
    with raises("bench.campaign-stage", "--only other"):
        campaign(stages, tmp_path, 120, only=["other"])


def test_other_code_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other code stay in the file, and the newest row of a stage counts."""
    stages = [stage("good", WRITE % 5, values=(Value("step", lambda r: r["ms"]),))]
    campaign(stages, tmp_path, 60)
    monkeypatch.setattr(module, "version", lambda: "other")
    time.sleep(1.1)  # the dates of rows are whole seconds
    rows = campaign([stages[0]._replace(command=WRITE % 7)], tmp_path, 60)
    assert [row["result"]["ms"] for row in rows] == [5, 7]
    assert table(stages, rows)[0][3] == "7" == table(stages, rows[::-1])[0][3]


def test_no_stage_starts_without_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign([stage("good", WRITE % 5)], tmp_path, 10) == []
    assert "no time left for good" in capsys.readouterr().out


def test_a_campaign_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    """Ctrl-C stops the stage that runs; what was measured before stays."""
    text = (
        "from tests.bench.test_campaign import WRITE, campaign, stage; from pathlib import Path; "
        "import sys\n"
        "slow = 'python -c \"import time; print(1, flush=True); time.sleep(97)\"'\n"
        "campaign([stage('good', WRITE % 5), stage('slow', slow)], Path(sys.argv[1]), 120)"
    )
    child = subprocess.Popen([sys.executable, "-c", text, str(tmp_path)], start_new_session=True)
    log = tmp_path / "slow" / "log.txt"
    end = time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) != 0
    assert subprocess.run(["pgrep", "-f", "time.sleep.97."], check=False).returncode == 1
    rows = campaign([stage("good", WRITE % 6), stage("slow", WRITE % 7)], tmp_path, 60)
    assert [(r["stage"], r["result"]["ms"]) for r in rows] == [("good", 5), ("slow", 7)]


def test_the_stages_fit_together() -> None:
    """Their names are unique, their commands have no other fields than those that are filled in,
    and the table of a GPU on which nothing ran is short enough to be printed whole."""
    assert len({s.name for s in STAGES}) == len(STAGES)
    for s in STAGES:
        assert s.command.split()[0] in ("var-scale", "python") and s.seconds <= 240
        assert set(re.findall("{.*?}", s.command)) <= {"{out}", "{work}", "{checkout}"}
        assert s.values == () or "{out}" in s.command
    lines = table([s for s in STAGES if s.gpu], [])
    assert len(lines) > 40 and len("\n".join("  ".join(line) for line in lines)) < 6000


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="these are the stages of machines without a GPU")
def test_the_stages_of_a_cpu(tmp_path: Path) -> None:
    """Every stage of a machine without a GPU runs, and its values are found."""
    rows = campaign(STAGES, tmp_path, 600)
    assert set(states(rows).values()) == {"ok"}, rows
    for line in table([s for s in STAGES if not s.gpu], rows):
        assert line[3] == "ok" or float(line[3].replace(",", "")) > 0, line
