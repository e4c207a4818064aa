"""Weights from a hub: a server on loopback that speaks as much of it as a download needs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch

from var_scale.errors import UserError
from var_scale.model import build_vae, build_var, hub
from var_scale.model.hub import weights_file
from var_scale.model.pretrained import load_pretrained, save_official, save_pretrained, save_varhf

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
    server.server_close()
    for offline in ("0", "1"):
        assert ask("hf://FoundationVision/var/vae.pth", HF_HUB_OFFLINE=offline) == str(path)
        said = ask("hf://FoundationVision/var/other.pth", HF_HUB_OFFLINE=offline)
        why = "is not asked, as HF_HUB_OFFLINE says" if offline == "1" else "cannot be reached"
        assert said.startswith("error: hf://") and f"not in the hub's cache, and {env['HF_ENDPOINT']} {why}" in said


def test_the_hub_is_tried_with_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the client is asked, which alone tries for half a minute."""
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub._reachable()
    server.server_close()
    assert not hub._reachable()
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    assert hub._reachable(), "a proxy may reach what we do not"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub._reachable()


def test_a_path_stays_a_path() -> None:
    assert weights_file("some/file.pth") == Path("some/file.pth")
    with pytest.raises(UserError, match="give hf://OWNER/NAME/FILE"):
        weights_file("hf://FoundationVision/var")


class Repositories(BaseHTTPRequestHandler):
    """As much of a hub as making a repository, a commit and a snapshot ask for."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append(self.path)
        if self.headers.get("authorization") != "Bearer hf_right":
            self.reply({"error": "unauthorized"}, 401)
        elif self.path == "/api/repos/create":
            self.reply({"url": f"http://{self.headers['host']}/me/small", "id": "me/small"})
        elif "/preupload/" in self.path:
            names = [item["path"] for item in json.loads(body)["files"]]
            self.reply({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['host']}/me/small/commit/{'b' * 40}"
            self.reply({"commitUrl": url, "commitOid": "b" * 40, "pullRequestUrl": None, "success": True})
        else:
            self.reply({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/me/small/tree/"):
            self.reply([{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                        for name, body in self.files.items()])  # fmt: skip
        elif path.startswith("/api/models/me/small"):
            siblings = [{"rfilename": name} for name in self.files]
            self.reply({"id": "me/small", "sha": "b" * 40, "siblings": siblings, "private": False, "tags": []})
        elif "/resolve/" in path and (name := path.rpartition("/resolve/")[2].partition("/")[2]) in self.files:
            etag = hashlib.sha1(self.files[name]).hexdigest()
            self.reply(self.files[name], X_Repo_Commit="b" * 40, ETag=f'"{etag}"')
        else:
            self.reply({"error": "not found"}, 404, X_Error_Code="RepoNotFound")


def test_a_model_goes_up_and_comes_down(tmp_path: Path) -> None:
    """Converted, pushed, pulled and sampled by its name; a wrong token and what is no model are one line; found again without the hub."""
    torch.manual_seed(0)
    vae = build_vae(arch="patch", hidden=8, V=32, Cvae=8, patch_nums=(1, 2, (2, 3)))
    var = build_var(vae, depth=2, width=16, heads=2, num_classes=5, shared_aln=True)
    save_pretrained(tmp_path / "small", var, vae, ["a", "b", "c", "d", "e"], {"run": "x"})
    again, tokens, config = load_pretrained(tmp_path / "small")
    assert again.patch_nums == (1, 2, (2, 3)) and config["class_names"][4] == "e"
    for one, two in ((var, again), (vae, tokens)):
        assert one.state_dict().keys() == two.state_dict().keys()
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Repositories)
    Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_right"}  # fmt: skip

    def call(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "var_scale.cli", *arguments]
        return subprocess.run(command, env={**env, **more}, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = call("hub", "push", str(tmp_path / "small"), "hf://me/small")
    assert done.returncode == 0 and "commit/bbbb" in done.stdout, done.stderr
    assert {"config.json", "model.safetensors", "vae.safetensors"} <= Repositories.files.keys()
    assert Repositories.files["model.safetensors"] == (tmp_path / "small" / "model.safetensors").read_bytes()
    wrong = call("hub", "push", str(tmp_path / "small"), "hf://me/small", HF_TOKEN="hf_wrong")
    assert wrong.returncode == 2 and "log in with" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1, wrong.stderr
    assert "no folder of a model" in call("hub", "push", str(tmp_path), "hf://me/small").stderr
    done = call("hub", "pull", "hf://me/small")
    assert done.returncode == 0 and "depth 2, 5 classes" in done.stdout, done.stderr
    server.shutdown()
    done = call("sample", "hf://me/small", "--out", "g.png", "--classes", "b", "--per-class", "2", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and (tmp_path / "g.png").exists(), done.stderr
    assert "cannot be had" in call("hub", "pull", "hf://me/other", HF_HUB_OFFLINE="1").stderr


def test_the_official_folder_form(tmp_path: Path) -> None:
    """What VARHF.save_pretrained writes: arguments and the transformer; the tokenizer comes from its own file, and must fit."""
    torch.manual_seed(0)
    vae = build_vae(ch=32, V=16, Cvae=8, patch_nums=(1, 2))
    var = build_var(vae, depth=1, width=64, heads=1, num_classes=3)
    save_varhf(tmp_path / "hf", var, vae)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["embed_dim"] == 64 and config["vae_kwargs"]["v_patch_nums"] == [1, 2] and config["attn_l2_norm"]
    with pytest.raises(UserError, match="no tokenizer in it"):
        load_pretrained(tmp_path / "hf")
    _, file = save_official(tmp_path / "pth", var, vae)
    again, tokens, _ = load_pretrained(tmp_path / "hf", file)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in var.state_dict().items())
    assert all(torch.equal(value, tokens.state_dict()[key]) for key, value in vae.state_dict().items())
    other = build_vae(ch=32, V=8, Cvae=8, patch_nums=(1, 2))
    _, wrong = save_official(tmp_path / "other", var, other)
    with pytest.raises(UserError, match="another tokenizer"):
        load_pretrained(tmp_path / "hf", wrong)
    (tmp_path / "hf" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not the description"):
        load_pretrained(tmp_path / "hf", file)
