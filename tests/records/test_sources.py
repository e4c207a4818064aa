"""Runs from elsewhere: files of the official trainer, wandb's server, CSVs of others."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.raises import raises
from tests.synthetic_study import ladder, write_folder
from var_scale.cli import main
from var_scale.config.load import dump, load
from var_scale.cost.flops import count_flops
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.records.gate import gate
from var_scale.records.record import CurvePoint
from var_scale.records.runs_csv import read_runs_csv, write_runs_csv
from var_scale.records.sources import read_all, read_records
from var_scale.records.table import fit_table

COMMAND = "--depth=16 --bs=768 --ep=30 --fp16=1 --alng=1e-3 --wpe=0.1"


def official(folder: Path, epochs: list[int], total: int = 30) -> Path:
    """log.txt as utils/arg_util.py writes it: JSON with indent 0, then one dict per epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps(
        {"is_master": True, "name": "text", "cmd": COMMAND, "commit": "x", "tb_log_dir_path": "y"},
        indent=0,
    )
    lines = []
    for epoch in epochs:
        row: dict[str, Any] = {
            "it": None,
            "ep": f"{epoch}/{total}",
            "lr": 3e-4 * (1 if epoch < total else 0.1),
            "wd": 0.05,
            "L_mean": 1.0,
            "L_tail": 1.0,
            "acc_mean": 9.0,
            "acc_tail": 9.0,
        }
        if epoch >= 10:
            row |= {
                "vL_mean": 7 - epoch / 100,
                "vL_tail": 6 - epoch / 100,
                "vacc_mean": 5.0,
                "vacc_tail": 8.0,
            }
        lines.append(f"{row}\n")
    (folder / "log.txt").write_text(f"{head}\n{''.join(lines)}")
    return folder


def refused(
    source: Path | str, code: str, name: str, mapping: dict[str, str] | None = None
) -> None:
    """The source is refused with this code, and the message names `name`."""
    with raises(code, name):
        read_records(str(source), mapping)


def test_the_official_log(tmp_path: Path) -> None:
    """Validation numbers at the epochs that validate; an attempt that repeated epochs; an
    unfinished run has no values; a console log, whose (val) line holds training numbers, is
    refused."""
    (run,) = read_records(str(official(tmp_path / "a", [*range(1, 16), *range(11, 31)])))
    shape = ModelShape.official(16)
    assert (run.name, run.depth, run.state, run.params_paper) == (
        "official-d16-a",
        16,
        "complete",
        18 * 16 * 1024**2,
    )
    assert [point.loss_avg for point in run.curve] == pytest.approx(
        [6.9, 6.8, 6.7]
    ) and run.loss_last == pytest.approx(5.7)
    assert (run.err_avg, run.err_last) == pytest.approx(
        (0.95, 0.92)
    ) and run.final_lr_fraction == pytest.approx(0.1)
    assert (
        run.images == 30 * 1669 * 768
        and run.flops_exact == run.images * count_flops(shape).training
    )
    assert gate([run]).kept == (run,)
    (half,) = read_records(str(official(tmp_path / "b", list(range(1, 25)))))
    assert (
        half.state == "running"
        and math.isnan(half.loss_avg)
        and len(half.curve) == 2
        and gate([half]).excluded[0].code == "incomplete"
    )
    (tmp_path / "console.txt").write_text(
        " [*] [ep9]  (val 50000)  Lm: 6.5, Lt: 5.9\n     [ep9]  (training )  Lm: 6.5\n"
    )
    (tmp_path / "other.txt").write_text("hello\n")
    (tmp_path / "no-depth.txt").write_text('{"cmd": "--bs=768"}\n{"ep": "1/30"}\n')
    refused(tmp_path / "console.txt", "records.official-console", "console.txt")
    refused(tmp_path / "other.txt", "records.official-log", "other.txt")
    refused(tmp_path / "no-depth.txt", "records.official-log", "--depth")


def console(epochs: range, depth: int = 16) -> str:
    """What the official trainer prints: its arguments, and two lines per epoch. The (val) line
    holds the same numbers as the other."""
    arguments = {
        "depth": depth,
        "tblr": 0.0001,
        "glb_batch_size": 768,
        "ac": 1,
        "ep": 30,
        "wpe": 0.1,
        "saln": False,
        "pn": "1_2_3_4_5_6_8_10_13_16",
    }
    lines = [f"  {name:20}: {value}" for name, value in arguments.items()]
    for k in epochs:
        lines.append(f"[05-16] (t.py, line 217)=>  [*] [ep{k}]  (val 50000)  Lm: 9.0, Lt: 9.0")
        lines.append(
            f"[05-16] (t.py, line 234)=>      [ep{k}]  (training )  Lm: {7 - k / 100:.3f} (6.0), "
            f"Lt: {6 - k / 100:.3f} (5.0),  Acc m&t: 5.23 7.88,  Remain: 0:00:19"
        )
    return "\n".join([*lines, "", ""])


def test_training_values_of_the_official_console(tmp_path: Path) -> None:
    """Only where they are requested: attempts are joined, the record is marked, and the gate keeps
    it out of a fit of validation values."""
    restart = "=====   RESTART [05-16 07:56:24]   =====\n"
    log = tmp_path / "run.log"
    log.write_text(console(range(20)) + restart + console(range(10, 30)) + restart + "  depth: 3\n")
    refused(log, "records.official-console", "--train-values")
    (run,) = read_records(str(log), train_values=True)
    assert (run.name, run.depth, run.state, run.split) == (
        "official-d16-run",
        16,
        "complete",
        "training",
    )
    assert (run.loss_avg, run.loss_last) == pytest.approx((6.71, 5.71))
    assert (run.err_avg, run.err_last) == pytest.approx((0.9477, 0.9212))
    assert len(run.curve) == 30 and run.images == 30 * 1669 * 768 and run.eval_samples == 5 * 768
    write_runs_csv([run], tmp_path / "runs.csv")
    assert read_runs_csv(tmp_path / "runs.csv") == [run]
    alone = gate([run])
    assert alone.kept == (run,) and alone.training == ("official-d16-run",)
    (other,) = read_records(str(official(tmp_path / "a", list(range(1, 31)))))
    other = replace(other, depth=20, params_paper=2 * run.params_paper)
    both = gate([run, other])
    assert both.kept == (other,) and both.training == ()
    assert [item.code for item in both.excluded] == ["training_values"]
    assert gate([run, other], keep={run.name: "all the same"}).training == (run.name,)
    half = tmp_path / "half.log"
    half.write_text(console(range(20)))
    (running,) = read_records(str(half), train_values=True)
    assert running.state == "running" and math.isnan(running.loss_avg)
    for text in (console(range(5)) + restart + console(range(5), 20), "(training ) and no epoch"):
        log.write_text(text)
        with raises("records.official-console", "run.log"):
            read_records(str(log), train_values=True)


def test_official_logs_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """An infinite gradient norm changes nothing, a loss of nan is a run that diverged, and a last
    line that a kill cut is no epoch."""
    log = official(tmp_path / "whole", list(range(1, 31))) / "log.txt"
    (whole,) = read_records(str(log))
    text = log.read_text()
    log.write_text(text.replace("'wd': 0.05", "'grad_norm': inf, 'wd': 0.05", 1))
    assert read_records(str(log)) == [whole]
    log.write_text(text + "{'it': None, 'ep': '30/3")
    assert read_records(str(log)) == [whole]
    start = text.index("{'it': None, 'ep': '23/30'")
    lost = text[start:].replace("'L_mean': 1.0", "'L_mean': nan").replace("6.7,", "nan,")
    log.write_text(text[:start] + lost)
    (diverged,) = read_records(str(log))
    assert diverged.state == "diverged" and "epoch 23" in diverged.reason, diverged
    assert gate([diverged]).excluded[0].code == "diverged"
    assert all(math.isfinite(point.loss_avg) for point in diverged.curve)


@pytest.mark.parametrize("option", ["--bs=0", "--bs=x", "--tblr=0"])
def test_an_official_command_without_a_batch_or_rate(option: str, tmp_path: Path) -> None:
    log = official(tmp_path, list(range(1, 31))) / "log.txt"
    log.write_text(log.read_text().replace("--bs=768", option))
    refused(log, "records.official-log", option)


def test_official_runs_with_the_default_name(tmp_path: Path) -> None:
    """Two runs that nobody named are two runs."""
    folders = [official(tmp_path / name / "local_output", [*range(1, 31)]) for name in "ab"]
    names = [run.name for run in read_all([str(folder) for folder in folders])]
    assert names == ["official-d16-a", "official-d16-b"]


def test_a_run_with_many_evaluations(tmp_path: Path) -> None:
    """Its cell is longer than what Python's csv module reads by default."""
    (run,) = ladder((2,))
    curve = tuple(CurvePoint(k, 1e9 * k, 4 + 1 / k, 5.1, 0.9, 0.95) for k in range(1, 2001))
    many = replace(run, curve=curve)
    write_runs_csv([many], tmp_path / "runs.csv")
    assert read_runs_csv(tmp_path / "runs.csv") == [many]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        ("inf,,9,4.0", ["layers", "inf"]),
        ("2.7,,9,4.0", ["layers", "2.7"]),
        (",,9,4.0", ["layers"]),
        ("4,1.5,9,4.0", ["seed", "1.5"]),
        ("4,,-5,4.0", ["seen", "-5"]),
        ("4,,nan,4.0", ["seen", "nan"]),
        ("4,,9,low", ["val", "low"]),
    ],
)
def test_cells_of_a_mapped_table(cells: str, names: list[str], tmp_path: Path) -> None:
    """The message names the line, blank lines counted, and the column."""
    mapping = {"depth": "layers", "seed": "seed", "images": "seen", "loss_avg": "val"}
    table = tmp_path / "T.CSV"
    table.write_text(f"layers,seed,seen,val\n\n4,,9,4.0\n\n{cells}\n")
    with raises("records.table-cell", "line 5", *names):
        read_records(str(table), mapping)
    table.write_text("layers,seed,seen,val\n\n4,,9,4.0\n6,1,,\n")
    first, second = read_records(str(table), mapping)
    assert (first.seed, first.images, second.seed, second.images) == (0, 9, 1, 0)
    assert math.isnan(second.loss_avg)


def test_the_official_tensorboard(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path / "out" / "tb-VARd16__pn1_2_3_4_5_6_8_10_13_16__b768ep30adamlr0.0001wd0.05"
    writer = SummaryWriter(str(folder))
    for epoch in range(1, 31):
        writer.add_scalar("AR_ep_loss/L_mean", 1.0, epoch)
        if epoch % 10 == 0:
            for name, value in (
                ("vL_mean", 7 - epoch / 100),
                ("vL_tail", 6 - epoch / 100),
                ("vacc_mean", 5.0),
                ("vacc_tail", 8.0),
            ):
                writer.add_scalar(f"AR_ep_loss/{name}", value, epoch)
    writer.close()
    (run,) = read_records(str(tmp_path / "out"))
    (log,) = read_records(str(official(tmp_path / "a", list(range(1, 31)))))
    assert (run.depth, run.images, run.state) == (log.depth, log.images, "complete")
    assert run.loss_last == pytest.approx(log.loss_last) and run.err_avg == pytest.approx(
        log.err_avg, abs=1e-6
    )
    assert len(run.curve) == 3 and run.curve[-1].flops_exact == log.curve[-1].flops_exact


def test_wandb_offline_files_are_refused(tmp_path: Path) -> None:
    """The folder of an offline run and its file are refused; the message names what to give."""
    file = tmp_path / "wandb" / "offline-run-20261101_000000-d06" / "run-d06.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(b":W&B")
    for source in (tmp_path / "wandb", file):
        refused(source, "records.wandb-offline", str(source))
        refused(source, "records.wandb-offline", "metrics.jsonl")


class WandbServer(BaseHTTPRequestHandler):
    """The part of wandb's server that its public API needs: an account, the runs of a project, the
    history of a run."""

    rows: ClassVar[dict[str, list[dict[str, Any]]]] = {}
    config: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[list[dict[str, Any]]] = []
    known: ClassVar[bool] = True
    """Whether the key belongs to an account."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        data: dict[str, Any] = {}
        if self.path == "/graphql":
            query = json.loads(body)
            text, given = query["query"], query.get("variables") or {}
            if "viewer" in text:
                account = {
                    "id": "u",
                    "entity": "me",
                    "username": "me",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
                data["viewer"] = account if self.known else None
            if "runs(" in text:
                self.asked.append(json.loads(given["filters"]))
                edges = [{"node": self.run(name), "cursor": name} for name in self.rows]
                data["project"] = {
                    "internalId": "1",
                    "runCount": len(edges),
                    "readOnly": True,
                    "runs": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}},
                }
            elif "run(" in text:
                name = str(given.get("name") or given.get("run") or given.get("runName"))
                history = {
                    "history": [json.dumps(row) for row in self.rows[name]],
                    "parquetHistory": {"liveData": self.rows[name], "parquetUrls": []},
                }
                data["project"] = {"run": self.run(name) | history}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def run(self, name: str) -> dict[str, Any]:
        summary = name.endswith("summary")
        wrapped = {} if summary else {key: {"value": value} for key, value in self.config.items()}
        return {
            "id": name,
            "name": name,
            "displayName": "d06-s0",
            "state": "finished",
            "group": "tiny",
            "config": json.dumps(wrapped),
            "jobType": "summary" if summary else "train",
            "summaryMetrics": "{}",
            "systemMetrics": "{}",
            "tags": [],
            "commit": None,
            "historyLineCount": len(self.rows[name]),
            "readOnly": True,
            "historyKeys": {"lastStep": max((row["_step"] for row in self.rows[name]), default=0)},
            "createdAt": "2026-11-01T00:00:00",
            "heartbeatAt": "2026-11-01T00:00:00",
            "description": "",
            "notes": "",
            "sweepName": None,
            "projectId": "1",
            "user": {"name": "me", "username": "me"},
        }

    def log_message(self, *_: Any) -> None:
        pass


def test_wandbs_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own client against a server on loopback: the runs of the group, attempts of a run as
    one record, its summary run skipped; a key that belongs to nobody is one line."""
    WandbServer.config = {**dump(load("model/d6")), "env": {"x": 1}}
    WandbServer.rows = {
        f"tiny-d06-s0-{attempt}": [
            {
                "_step": step,
                "train/lr": 1e-3 if step < 30 else 1e-4,
                "eval/loss_avg": 6 - step / 100,
                "eval/loss_last": 5 - step / 100,
                "eval/err_avg": 0.9,
                "eval/err_last": 0.8,
                "eval/images": step * 768,
                "eval/samples": 500,
                "eval/final": step == 30,
            }
            for step in steps
        ]
        for attempt, steps in enumerate(((10, 20), (30,)))
    } | {"tiny-summary": []}
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    try:
        (record,) = read_records("wandb:me/proj/tiny")
        assert WandbServer.asked[-1] == {"group": "tiny"}
        assert (record.name, record.depth, record.state, record.restarts) == (
            "d06-s0",
            6,
            "complete",
            1,
        )
        assert [point.step for point in record.curve] == [
            10,
            20,
            30,
        ] and record.loss_avg == pytest.approx(5.7)
        refused("wandb:proj", "records.wandb-name", "wandb:proj")
        monkeypatch.setattr(WandbServer, "config", {"model": {"depth": "none"}})
        refused("wandb:me/proj/tiny", "records.wandb-foreign", "tiny-d06-s0-0")
        monkeypatch.setattr(WandbServer, "known", False)
        refused("wandb:me/proj", "records.wandb-server", "wandb:me/proj")
    finally:
        server.shutdown()


def test_any_csv_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns by a mapping; several sources in one table, whose law comes with the gate; a run that
    two sources give differently is refused."""
    rows = "".join(f"{d},{8 * (18 * d * (64 * d) ** 2) ** -0.02},{1e9}\n" for d in (4, 6, 8, 12))
    (tmp_path / "t.csv").write_text(f"layers,val,seen\n{rows}16,,1e9\n")
    for run in ladder((2, 3)):
        write_folder(run, tmp_path / "study" / run.name)
    main(
        [
            "records",
            str(tmp_path / "t.csv"),
            str(tmp_path / "study"),
            "--map",
            "depth=layers,loss_avg=val,tokens=seen",
            "--out",
            str(tmp_path / "all.csv"),
        ]
    )
    assert "missing_evaluation" in capsys.readouterr().out
    main(
        [
            "records",
            str(tmp_path / "t.csv"),
            "--map",
            "depth=layers,loss_avg=val",
            "--out",
            str(tmp_path / "one.csv"),
        ]
    )
    capsys.readouterr()
    main(["fit", str(tmp_path / "one.csv"), "--x", "params_paper", "--y", "loss_avg"])
    out = capsys.readouterr().out
    assert "0.0200" in out and "4 points" in out and "gate: line 6 excluded" in out
    runs = ladder((2,))
    write_runs_csv(runs, tmp_path / "a.csv")
    write_runs_csv([type(runs[0])(**{**runs[0].__dict__, "loss_avg": 1.0})], tmp_path / "b.csv")
    with pytest.raises(UserError, match=runs[0].name) as error:
        read_all([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert error.value.code == "records.run-twice"
    assert len(read_all([str(tmp_path / "a.csv")] * 2)) == 1
    for mapping, code, name in (
        ({"depth": "layers"}, "records.map-field", "loss_avg"),
        ({"depth": "x", "loss_avg": "val"}, "records.table-column", " x;"),
        (
            {"depth": "layers", "loss_avg": "val", "colour": "seen"},
            "records.map-field",
            "colour",
        ),
    ):
        refused(tmp_path / "t.csv", code, name, mapping)
    refused(tmp_path / "nothing", "records.source-missing", "nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "records.source-unknown", "empty")


def test_the_command_fit_needs_no_torch(tmp_path: Path) -> None:
    """It starts quickly: neither torch nor matplotlib is imported on the way to a law."""
    rows = "".join(f"{n},{3 * n**-0.1}\n" for n in (1e6, 2e6, 4e6, 8e6))
    (tmp_path / "t.csv").write_text(f"n,y\n{rows}")
    code = (
        "import sys; from var_scale.cli import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    )
    command = ["fit", str(tmp_path / "t.csv"), "--x", "n", "--y", "y"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0.1000" in done.stdout and done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("text", "arguments", "code", "names"),
    [
        ("", {}, "records.table-empty", ["t.csv"]),
        ("n;y\n1;2\n", {}, "records.table-separator", ["t.csv"]),
        ("n,z\n1,2\n", {}, "records.table-column", ["t.csv", " y;"]),
        ("n,y,y\n1,2,3\n", {}, "records.table-column", ["t.csv", " y;"]),
        ("n,y\n1,2\n-1,2\n", {}, "records.table-cell", ["line 3", "n='-1'"]),
        ("n,y\n1,two\n", {}, "records.table-cell", ["line 2", "y='two'"]),
        ("n,y\n1,2,3\n", {}, "records.table-cell", ["line 2"]),
        ("n,y\n1,2\n", {"floor": 1.0, "form": "power_floor"}, "records.fit-floor", ["--floor"]),
        ("n,y\n1,2\n", {"x": "n,m"}, "records.fit-variables", ["--x n,m"]),
        ("n,y\n1,2\n", {}, "records.no-law", ["t.csv", "power", "y", "n"]),
    ],
)
def test_tables_that_cannot_be_fitted(
    tmp_path: Path, text: str, arguments: dict[str, Any], code: str, names: list[str]
) -> None:
    (tmp_path / "t.csv").write_text(text)
    given: dict[str, Any] = {"x": "n", "y": "y", "form": "power", "floor": 0.0}
    with pytest.raises(UserError) as error:
        fit_table(tmp_path / "t.csv", **(given | arguments))
    assert error.value.code == code and all(name in str(error.value) for name in names)
    assert error.value.exit_code == (1 if code == "records.no-law" else 2)
