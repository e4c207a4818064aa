"""wandb's server stops: training continues, and its records can be sent later. A server on loopback
keeps the rows that it receives."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.runs import losses, run, small_config
from var_scale.run_folder import RunFolder


class Server(ThreadingHTTPServer):
    """Answers the requests of wandb, unless it is down."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: dict[int, dict[str, Any]] = {}
        self.down = False
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that disconnects during a request."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(503 if self.server.down else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def do_PUT(self) -> None:
        self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/graphql" and not self.server.down:
            variables = json.loads(body).get("variables") or {}
            project = {"id": "p", "name": "var-scale", "entity": {"id": "e", "name": "me"}}
            bucket = {
                "id": "r",
                "name": variables.get("name") or "r",
                "displayName": "r",
                "config": "{}",
                "historyLineCount": 0,
                "project": project,
            }
            url = f"http://127.0.0.1:{self.server.server_port}/file"
            files = [{"name": name, "uploadUrl": url} for name in variables.get("files", [])]
            self.answer(
                {
                    "data": {
                        "viewer": {
                            "id": "u",
                            "username": "me",
                            "entity": "me",
                            "flags": "{}",
                            "teams": {"edges": []},
                        },
                        "upsertBucket": {"bucket": bucket, "inserted": True},
                        "model": {"bucket": None},
                        "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files},
                    }
                }
            )
            return
        if self.path.endswith("file_stream") and not self.server.down:
            history = (
                json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            )
            self.server.rows |= {row["_step"]: row for row in map(json.loads, history)}
        self.answer({})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield found
    found.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["never", "in the middle", "from the start"])
def test_wandb_goes_down(when: str, server: Server, tmp_path: Path) -> None:
    """The run ends as it would with the server; afterwards the command that the run names sends
    every row to the server."""
    server.down = when == "from the start"

    def fail(folder: RunFolder) -> None:
        while len(folder.read_metrics()) < 5:
            time.sleep(0.05)
        server.down = True

    if when == "in the middle":
        Thread(target=fail, args=(RunFolder(tmp_path / "run"),), daemon=True).start()
    code, folder = run(
        small_config(tmp_path, train={"steps": 400}, log={"wandb": "online", "every": 10}),
        tmp_path / "run",
    )
    log = (folder.log / "launch.log").read_text()
    assert code == 0 and len(losses(folder)) == 40, log[-3000:]
    if when != "never":
        assert server.down and len(server.rows) < 40
        assert ("wandb cannot be reached" in log) == (when == "from the start")
        server.down = False
        (said,) = re.findall(r"^warning: wandb .* `wandb sync (.*)` sends", log, re.MULTILINE)
        *options, kept = said.split()
        command = [
            str(Path(sys.executable).with_name("wandb")),
            "sync",
            *options,
            *map(str, Path("/").glob(kept.lstrip("/"))),
        ]
        sent = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert sent.returncode == 0, sent.stdout + sent.stderr
    rows = {row["step"]: row["loss"] for row in folder.read_metrics() if row["kind"] == "train"}
    assert {step: row["train/loss"] for step, row in server.rows.items()} == pytest.approx(rows)
