"""Files from and to a hub: a server on the loopback device with the answers that these need."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants

from tests.raises import raises
from var_scale.cli import main
from var_scale.errors import UserError
from var_scale.model import build_vae, build_var, hub
from var_scale.model.hub import weights_file
from var_scale.model.pretrained import load_pretrained, save_official, save_pretrained, save_varhf

CONTENT = b"weights" * 1000


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

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


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that sets the hub's environment variables, which its client reads when it is
    imported."""

    def put(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        importlib.reload(constants)

    yield put
    monkeypatch.undo()
    importlib.reload(constants)


def start(handler: type[BaseHTTPRequestHandler]) -> tuple[ThreadingHTTPServer, str]:
    """A server and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def test_weights_from_a_hub(tmp_path: Path, variables: Callable[..., None]) -> None:
    """A file is downloaded once and then found without the server. A missing file and a server that
    does not answer are errors of one line."""
    server, address = start(Hub)
    variables(HF_ENDPOINT=address, HF_HOME=tmp_path, HF_HUB_DISABLE_XET=1)
    files = "hf://FoundationVision/var/"
    path = weights_file(files + "vae.pth")
    assert path.read_bytes() == CONTENT and path.is_relative_to(tmp_path)
    with raises("model.hub-failed", files + "none.pth"):
        weights_file(files + "none.pth")
    server.shutdown()
    server.server_close()
    for offline in ("0", "1"):
        variables(HF_HUB_OFFLINE=offline)
        assert weights_file(files + "vae.pth") == path
        with pytest.raises(UserError) as error:
            weights_file(files + "other.pth")
        text = str(error.value)
        assert error.value.code == "model.hub-failed" and files + "other.pth" in text
        assert address in text and ("HF_HUB_OFFLINE" in text) == (offline == "1")


def test_the_hub_is_tried_with_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection is tried before the hub's client, which tries for half a minute."""
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
    with raises("model.hub-address", "hf://FoundationVision/var", "hf://OWNER/NAME/FILE"):
        weights_file("hf://FoundationVision/var")


class Repositories(BaseHTTPRequestHandler):
    """The part of a hub's interface that creating a repository, a commit and a snapshot need."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
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
            self.reply(
                {
                    "files": [
                        {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for name in names
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['host']}/me/small/commit/{'b' * 40}"
            self.reply(
                {"commitUrl": url, "commitOid": "b" * 40, "pullRequestUrl": None, "success": True}
            )
        else:
            self.reply({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/me/small/tree/"):
            self.reply(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(body),
                        "oid": hashlib.sha1(body).hexdigest(),
                    }
                    for name, body in self.files.items()
                ]
            )
        elif path.startswith("/api/models/me/small"):
            siblings = [{"rfilename": name} for name in self.files]
            self.reply(
                {
                    "id": "me/small",
                    "sha": "b" * 40,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                }
            )
        elif (
            "/resolve/" in path
            and (name := path.rpartition("/resolve/")[2].partition("/")[2]) in self.files
        ):
            etag = hashlib.sha1(self.files[name]).hexdigest()
            self.reply(self.files[name], X_Repo_Commit="b" * 40, ETag=f'"{etag}"')
        else:
            self.reply({"error": "not found"}, 404, X_Error_Code="RepoNotFound")


def test_a_model_goes_up_and_comes_down(
    tmp_path: Path,
    variables: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model is pushed, pulled, and sampled by its name, also without the hub. A wrong token, a
    folder without a model and an unknown repository give errors of one line."""
    torch.manual_seed(0)
    vae = build_vae(arch="patch", hidden=8, V=32, Cvae=8, patch_nums=(1, 2, (2, 3)))
    var = build_var(vae, depth=2, width=16, heads=2, num_classes=5, shared_aln=True)
    save_pretrained(tmp_path / "small", var, vae, ["a", "b", "c", "d", "e"], {"run": "x"})
    again, tokens, config = load_pretrained(tmp_path / "small")
    assert again.patch_nums == (1, 2, (2, 3)) and config["class_names"][4] == "e"
    for one, two in ((var, again), (vae, tokens)):
        assert one.state_dict().keys() == two.state_dict().keys()
        assert all(
            torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items()
        )
    server, address = start(Repositories)
    home = tmp_path / "home"
    variables(HF_ENDPOINT=address, HF_HOME=home, HF_HUB_DISABLE_XET=1, HF_TOKEN="hf_right")
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and len(error.splitlines()) == 1, error
        return error

    main(["hub", "push", "small", "hf://me/small"])
    assert "commit/bbbb" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "vae.safetensors"} <= Repositories.files.keys()
    sent = Repositories.files["model.safetensors"]
    assert sent == (tmp_path / "small" / "model.safetensors").read_bytes()
    variables(HF_TOKEN="hf_wrong")
    assert "HF_TOKEN" in refused("hub", "push", "small", "hf://me/small")
    assert "home: " in refused("hub", "push", "home", "hf://me/small")
    main(["hub", "pull", "hf://me/small"])
    assert "depth 2, 5 classes" in capsys.readouterr().out
    server.shutdown()
    server.server_close()
    variables(HF_HUB_OFFLINE=1)
    main(["sample", "hf://me/small", "--out", "g.png", "--classes", "b", "--per-class", "2"])
    assert (tmp_path / "g.png").exists()
    assert "hf://me/other" in refused("hub", "pull", "hf://me/other")


def test_the_official_folder_form(tmp_path: Path) -> None:
    """The folder that VARHF.save_pretrained writes: arguments and the transformer. The tokenizer
    comes from a separate file, and must fit."""
    torch.manual_seed(0)
    vae = build_vae(ch=32, V=16, Cvae=8, patch_nums=(1, 2))
    var = build_var(vae, depth=1, width=64, heads=1, num_classes=3)
    save_varhf(tmp_path / "hf", var, vae)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (
        config["embed_dim"] == 64
        and config["vae_kwargs"]["v_patch_nums"] == [1, 2]
        and config["attn_l2_norm"]
    )
    with raises("model.tokenizer-missing", str(tmp_path / "hf")):
        load_pretrained(tmp_path / "hf")
    _, file = save_official(tmp_path / "pth", var, vae)
    again, tokens, _ = load_pretrained(tmp_path / "hf", file)
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in var.state_dict().items()
    )
    assert all(
        torch.equal(value, tokens.state_dict()[key]) for key, value in vae.state_dict().items()
    )
    other = build_vae(ch=32, V=8, Cvae=8, patch_nums=(1, 2))
    _, wrong = save_official(tmp_path / "other", var, other)
    with raises("model.tokenizer-differs", str(tmp_path / "hf"), str(wrong), "V=8"):
        load_pretrained(tmp_path / "hf", wrong)
    (tmp_path / "hf" / "config.json").write_text("[]")
    with raises("model.pretrained", str(tmp_path / "hf" / "config.json")):
        load_pretrained(tmp_path / "hf", file)
