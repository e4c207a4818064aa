"""Weights from a hub: a server on loopback that speaks as much of it as a download needs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from var_scale.errors import UserError
from var_scale.model.hub import weights_file

CONTENT = b"weights" * 1000


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def answer(self, body: bool) -> None:
        found = self.path == "/FoundationVision/var/resolve/main/vae.pth"
        content = CONTENT if found else b"Entry not found"
        self.send_response(200 if found else 404)
        if found:
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{hashlib.sha1(CONTENT).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)


ASK = """
import sys
from var_scale.errors import UserError
from var_scale.model.hub import weights_file
try:
    print(weights_file(sys.argv[1]))
except UserError as error:
    print("error:", error)
"""


def test_weights_from_a_hub(tmp_path: Path) -> None:
    """Downloaded once and then found without the server; a file that is not there and an absent server are one line."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}

    def ask(file: str, **more: str) -> str:
        done = subprocess.run([sys.executable, "-c", ASK, file], env={**env, **more}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    path = Path(ask("hf://FoundationVision/var/vae.pth"))
    assert path.read_bytes() == CONTENT
    missing = ask("hf://FoundationVision/var/none.pth")
    assert missing.startswith("error: hf://FoundationVision/var/none.pth: cannot be had") and "\n" not in missing
    server.shutdown()
    assert ask("hf://FoundationVision/var/vae.pth", HF_HUB_OFFLINE="1") == str(path)
    assert ask("hf://FoundationVision/var/other.pth", HF_HUB_OFFLINE="1").startswith("error: hf://")


def test_a_path_stays_a_path() -> None:
    assert weights_file("some/file.pth") == Path("some/file.pth")
    with pytest.raises(UserError, match="give hf://OWNER/NAME/FILE"):
        weights_file("hf://FoundationVision/var")
