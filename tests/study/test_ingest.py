"""Runs from elsewhere: the official trainer's files, wandb's offline files and server, CSVs of others."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from synthetic_study import ladder, write_folder

from var_scale.cli import main
from var_scale.config.load import dump, load
from var_scale.cost.flops import count_flops
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.study.gate import gate
from var_scale.study.ingest import read_all, read_records
from var_scale.study.record import write_runs_csv

COMMAND = "--depth=16 --bs=768 --ep=30 --fp16=1 --alng=1e-3 --wpe=0.1"


def official(folder: Path, epochs: list[int], total: int = 30) -> Path:
    """log.txt as utils/arg_util.py writes it: JSON with indent 0, then the repr of a dict each epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"is_master": True, "name": "text", "cmd": COMMAND, "commit": "x", "tb_log_dir_path": "y"}, indent=0)
    lines = []
    for epoch in epochs:
        row: dict[str, Any] = {"it": None, "ep": f"{epoch}/{total}", "lr": 3e-4 * (1 if epoch < total else 0.1), "wd": 0.05, "L_mean": 1.0,
                               "L_tail": 1.0, "acc_mean": 9.0, "acc_tail": 9.0}  # fmt: skip
        if epoch >= 10:
            row |= {"vL_mean": 7 - epoch / 100, "vL_tail": 6 - epoch / 100, "vacc_mean": 5.0, "vacc_tail": 8.0}
        lines.append(f"{row}\n")
    (folder / "log.txt").write_text(f"{head}\n{''.join(lines)}")
    return folder


def test_the_official_log(tmp_path: Path) -> None:
    """Validation numbers at the epochs that validate; a life that did epochs again; an unfinished run has no values; a console log, whose
    (val) line holds training numbers, is refused."""
    (run,) = read_records(str(official(tmp_path / "a", [*range(1, 16), *range(11, 31)])))
    shape = ModelShape.official(16)
    assert (run.name, run.depth, run.state, run.params_paper) == ("text", 16, "complete", 18 * 16 * 1024**2)
    assert [point.loss_avg for point in run.curve] == pytest.approx([6.9, 6.8, 6.7]) and run.loss_last == pytest.approx(5.7)
    assert (run.err_avg, run.err_last) == pytest.approx((0.95, 0.92)) and run.final_lr_fraction == pytest.approx(0.1)
    assert run.images == 30 * 1669 * 768 and run.flops_exact == run.images * count_flops(shape).training
    assert gate([run]).kept == (run,)
    (half,) = read_records(str(official(tmp_path / "b", list(range(1, 25)))))
    assert half.state == "running" and math.isnan(half.loss_avg) and len(half.curve) == 2 and gate([half]).excluded[0].code == "incomplete"
    (tmp_path / "console.txt").write_text(" [*] [ep9]  (val 50000)  Lm: 6.5, Lt: 5.9\n     [ep9]  (training )  Lm: 6.5\n")
    with pytest.raises(UserError, match="holds training numbers"):
        read_records(str(tmp_path / "console.txt"))
    (tmp_path / "other.txt").write_text("hello\n")
    with pytest.raises(UserError, match=r"not the log.txt"):
        read_records(str(tmp_path / "other.txt"))


def test_the_official_tensorboard(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path / "out" / "tb-VARd16__pn1_2_3_4_5_6_8_10_13_16__b768ep30adamlr0.0001wd0.05"
    writer = SummaryWriter(str(folder))
    for epoch in range(1, 31):
        writer.add_scalar("AR_ep_loss/L_mean", 1.0, epoch)
        if epoch % 10 == 0:
            for name, value in (("vL_mean", 7 - epoch / 100), ("vL_tail", 6 - epoch / 100), ("vacc_mean", 5.0), ("vacc_tail", 8.0)):
                writer.add_scalar(f"AR_ep_loss/{name}", value, epoch)
    writer.close()
    (run,) = read_records(str(tmp_path / "out"))
    (log,) = read_records(str(official(tmp_path / "a", list(range(1, 31)))))
    assert (run.depth, run.images, run.state) == (log.depth, log.images, "complete")
    assert run.loss_last == pytest.approx(log.loss_last) and run.err_avg == pytest.approx(log.err_avg, abs=1e-6)
    assert len(run.curve) == 3 and run.curve[-1].flops_exact == log.curve[-1].flops_exact


def test_wandb_offline_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real offline run, as training records it, and one that was cut; the lives of a run are one record."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = load("model/d6")
    for life, steps in enumerate(((10, 20), (30,))):
        run = wandb.init(mode="offline", dir=str(tmp_path / "w"), project="p", group="tiny", name="d06-s0", id=f"tiny-d06-s0-{life}",
                         config={**dump(config), "env": {"x": 1}})  # fmt: skip
        for step in steps:
            run.log({"train/loss": 5.0, "train/lr": 1e-3 if step < 30 else 1e-4, "train/images": step * 768}, step=step)
            run.log({"eval/loss_avg": 6 - step / 100, "eval/loss_last": 5 - step / 100, "eval/err_avg": 0.9, "eval/err_last": 0.8,
                     "eval/images": step * 768, "eval/samples": 500, "eval/final": step == 30}, step=step)  # fmt: skip
        run.finish()
    (record,) = read_records(str(tmp_path / "w"))
    assert (record.name, record.depth, record.state, record.restarts) == ("d06-s0", 6, "complete", 1)
    assert [point.step for point in record.curve] == [10, 20, 30] and record.loss_avg == pytest.approx(5.7)
    assert record.images == 30 * 768 and record.eval_samples == 500
    first = sorted((tmp_path / "w").glob("**/*-0.wandb"))
    cut = tmp_path / "cut.wandb"
    cut.write_bytes(first[0].read_bytes()[:-40])
    (short,) = read_records(str(cut))
    assert short.state == "running" and math.isnan(short.loss_avg) and short.depth == 6
    cut.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a file of wandb"):
        read_records(str(cut))


class WandbServer(BaseHTTPRequestHandler):
    """As much of wandb's server as its public API asks for: an account, the runs of a project, a run's history."""

    rows: ClassVar[dict[str, list[dict[str, Any]]]] = {}
    config: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[list[dict[str, Any]]] = []
    known: ClassVar[bool] = True
    """whether the key is an account's"""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        data: dict[str, Any] = {}
        if self.path == "/graphql":
            query = json.loads(body)
            text, given = query["query"], query.get("variables") or {}
            if "viewer" in text:
                account = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
                data["viewer"] = account if self.known else None
            if "runs(" in text:
                self.asked.append(json.loads(given["filters"]))
                edges = [{"node": self.run(name), "cursor": name} for name in self.rows]
                data["project"] = {"internalId": "1", "runCount": len(edges), "readOnly": True,
                                   "runs": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}  # fmt: skip
            elif "run(" in text:
                name = str(given.get("name") or given.get("run") or given.get("runName"))
                history = {"history": [json.dumps(row) for row in self.rows[name]],
                           "parquetHistory": {"liveData": self.rows[name], "parquetUrls": []}}  # fmt: skip
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
        return {"id": name, "name": name, "displayName": "d06-s0", "state": "finished", "group": "tiny", "config": json.dumps(wrapped),
                "jobType": "summary" if summary else "train", "summaryMetrics": "{}", "systemMetrics": "{}", "tags": [], "commit": None,
                "historyLineCount": len(self.rows[name]), "readOnly": True,
                "historyKeys": {"lastStep": max((row["_step"] for row in self.rows[name]), default=0)},
                "createdAt": "2026-11-01T00:00:00", "heartbeatAt": "2026-11-01T00:00:00", "description": "", "notes": "",
                "sweepName": None, "projectId": "1", "user": {"name": "me", "username": "me"}}  # fmt: skip

    def log_message(self, *_: Any) -> None:
        pass


def test_wandbs_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own client against a server on loopback: the group's runs, lives of a run as one record, its summary run passed over; a
    key that is nobody's is one line."""
    WandbServer.config = {**dump(load("model/d6")), "env": {"x": 1}}
    WandbServer.rows = {
        f"tiny-d06-s0-{life}": [
            {"_step": step, "train/lr": 1e-3 if step < 30 else 1e-4, "eval/loss_avg": 6 - step / 100, "eval/loss_last": 5 - step / 100,
             "eval/err_avg": 0.9, "eval/err_last": 0.8, "eval/images": step * 768, "eval/samples": 500, "eval/final": step == 30}
            for step in steps
        ] for life, steps in enumerate(((10, 20), (30,)))
    } | {"tiny-summary": []}  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    try:
        (record,) = read_records("wandb:me/proj/tiny")
        assert WandbServer.asked[-1] == {"group": "tiny"}
        assert (record.name, record.depth, record.state, record.restarts) == ("d06-s0", 6, "complete", 1)
        assert [point.step for point in record.curve] == [10, 20, 30] and record.loss_avg == pytest.approx(5.7)
        with pytest.raises(UserError, match="give wandb:ENTITY/PROJECT"):
            read_records("wandb:proj")
        monkeypatch.setattr(WandbServer, "known", False)
        with pytest.raises(UserError, match=r"wandb:me/proj: .*credentials"):
            read_records("wandb:me/proj")
    finally:
        server.shutdown()


def test_any_csv_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns by a mapping; several sources in one table, whose law comes with the gate; what comes twice is refused."""
    rows = "".join(f"{d},{8 * (18 * d * (64 * d) ** 2) ** -0.02},{1e9}\n" for d in (4, 6, 8, 12))
    (tmp_path / "t.csv").write_text(f"layers,val,seen\n{rows}16,,1e9\n")
    for run in ladder((2, 3)):
        write_folder(run, tmp_path / "study" / run.name)
    main(["records", str(tmp_path / "t.csv"), str(tmp_path / "study"), "--map", "depth=layers,loss_avg=val,tokens=seen", "--out",
          str(tmp_path / "all.csv")])  # fmt: skip
    assert "missing_evaluation" in capsys.readouterr().out
    main(["records", str(tmp_path / "t.csv"), "--map", "depth=layers,loss_avg=val", "--out", str(tmp_path / "one.csv")])
    capsys.readouterr()
    main(["fit", str(tmp_path / "one.csv"), "--x", "params_paper", "--y", "loss_avg"])
    out = capsys.readouterr().out
    assert "0.0200" in out and "4 points" in out and "gate: line 6 excluded" in out
    runs = ladder((2,))
    write_runs_csv(runs, tmp_path / "a.csv")
    write_runs_csv([type(runs[0])(**{**runs[0].__dict__, "loss_avg": 1.0})], tmp_path / "b.csv")
    with pytest.raises(UserError, match="with other numbers"):
        read_all([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert len(read_all([str(tmp_path / "a.csv")] * 2)) == 1
    for mapping, words in (({"depth": "layers"}, "are needed"), ({"depth": "x", "loss_avg": "val"}, "no column x"),
                           ({"depth": "layers", "loss_avg": "val", "colour": "seen"}, "colour")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_records(str(tmp_path / "t.csv"), mapping)
    with pytest.raises(UserError, match="does not exist"):
        read_records(str(tmp_path / "nothing"))
