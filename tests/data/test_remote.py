"""Shards behind a URL: a real server on loopback, which may also fail, truncate files and send
wrong bytes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from tests.data.data_samples import write_images, write_tokens
from tests.raises import raises
from tests.runs import losses, run, small_config
from var_scale.cli import main
from var_scale.data import remote
from var_scale.data.image_loader import ImageData
from var_scale.data.index_urls import index_urls
from var_scale.data.indexing import index_folder
from var_scale.data.loader import TokenData
from var_scale.data.remote import RemoteShards, located


class Server(ThreadingHTTPServer):
    """Serves a folder. `wrong`: how often a file is sent wrongly before it is sent correctly, and
    in which way."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked: Counter[str] = Counter()
        self.wrong: dict[str, tuple[int, str]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that disconnects."""


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked[name] += 1
        times, how = self.server.wrong.get(name, (0, ""))
        if self.server.asked[name] > times:
            super().do_GET()
        elif how == "error":
            self.send_error(503)
        else:
            content = bytearray(Path(self.translate_path(self.path)).read_bytes())
            if how == "lie":
                content[700] ^= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if how == "cut" else content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    (tmp_path / "there").mkdir()
    found = Server(tmp_path / "there")
    yield found
    found.shutdown()


@pytest.mark.slow
def test_a_run_from_a_url(server: Server, tmp_path: Path) -> None:
    """Two ranks of one node have the losses of the local run; every shard is fetched once, and a
    second run fetches none."""
    engine = {"name": "ddp", "processes": 2}
    config = small_config(tmp_path / "there", engine=engine)
    code, here = run(config, tmp_path / "here")
    assert code == 0
    data = {f"tokens_{split}": f"{server.url}/{split}" for split in ("train", "val")} | {
        "cache": str(tmp_path / "cache")
    }
    for name in ("one", "two"):
        code, there = run(
            small_config(tmp_path / "there", engine=engine, data=data), tmp_path / name
        )
        assert code == 0 and losses(there) == losses(here), (there.log / "launch.log").read_text()[
            -2000:
        ]
    shards = [
        path.name
        for split in ("train", "val")
        for path in (tmp_path / "there" / split).glob("*.tar")
    ]
    assert len(shards) == 6 and all(server.asked[name] == 1 for name in shards)


@pytest.mark.parametrize("how", ["error", "cut", "lie"])
def test_what_comes_wrong_is_fetched_again(
    how: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a server fails twice, drops the connection or sends other bytes, the right bytes arrive in
    the end, or the run stops and names the file."""
    tokens = write_tokens(tmp_path / "there" / "t")
    server.wrong = {"train-000001.tar": (2, how), "train-000002.idx": (1, how)}
    data = TokenData(located(f"{server.url}/t/", str(tmp_path / "cache")))
    np.testing.assert_array_equal(data.gather(np.arange(20), 1)[0], tokens[:, 1])
    assert server.asked["train-000001.tar"] == 3 and "train-000001.tar" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "there" / "t")
    other = write_tokens(tmp_path / "there" / "t", per_shard=10)  # rewritten with the same names
    data = TokenData(located(f"{server.url}/t", str(tmp_path / "cache")))
    np.testing.assert_array_equal(data.gather(np.arange(20), 1)[0], other[:, 1])
    server.wrong = {"train-000000.tar": (999, how)}
    shutil.rmtree(tmp_path / "cache")
    with raises("data.download-failed", "t/train-000000.tar", 5):
        TokenData(located(f"{server.url}/t", str(tmp_path / "cache")))
    assert not list((tmp_path / "cache").glob("*/*.tar")) and not list(
        (tmp_path / "cache").glob("*/.*tmp")
    )


def test_the_cache_has_a_limit_and_is_not_believed_blindly(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data sets are removed to make space, the oldest first; too small a cache is refused; a
    shard that changed in the cache is fetched again."""
    for name in ("a", "b"):
        write_images(tmp_path / "there" / name, 20, 8)
    size = sum(path.stat().st_size for path in (tmp_path / "there" / "a").glob("*.tar"))
    cache = tmp_path / "cache"
    one = RemoteShards(f"{server.url}/a", cache, int(1.5 * size))
    first = ImageData(one).images(np.arange(20))
    assert len(list(one.folder.glob("*.tar"))) == 3
    two = RemoteShards(f"{server.url}/b", cache, int(1.5 * size))
    np.testing.assert_array_equal(ImageData(two).images(np.arange(20)), first)
    assert len(list(two.folder.glob("*.tar"))) == 3 and len(list(one.folder.glob("*.tar"))) < 3
    assert sum(path.stat().st_size for path in cache.glob("*/*.tar")) <= 1.5 * size
    with raises("data.cache-size", "data.cache_gb"):
        RemoteShards(f"{server.url}/a", cache, size - 1)
    (shard,) = two.folder.glob("*-train-000001.tar")
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    data = ImageData(two)
    assert data.damaged() == [] and "damaged in the cache" in capsys.readouterr().out
    np.testing.assert_array_equal(ImageData(two).images(np.arange(20)), first)


def test_tars_of_others_behind_a_url(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tars of any origin are scanned once, in one pass that can be interrupted; afterwards they are
    read exactly like our own. A bad tar is named."""
    write_images(tmp_path / "there" / "t", 20, 8)
    tars = sorted((tmp_path / "there" / "t").glob("*.tar"))
    for path in (tmp_path / "there" / "t").glob("*"):
        path.unlink() if path.suffix != ".tar" else None
    whole = tars[2].read_bytes()
    tars[2].write_bytes(whole[:-1500])
    urls, out = f"{server.url}/t/train-{{000000..000002}}.tar", tmp_path / "here"
    with raises("data.tar-damaged", "train-000002.tar"):
        index_urls(urls, out)
    assert not (out / "manifest.json").exists() and not list(out.glob("*.tar"))
    tars[2].write_bytes(whole)
    main(["data", "index", urls, "--out", str(out)])
    assert server.asked == {"train-000000.tar": 1, "train-000001.tar": 1, "train-000002.tar": 2}
    data = ImageData(located(str(out), str(tmp_path / "cache")))
    assert data.num_samples == 20 and sorted(path.suffix for path in out.iterdir()) == [
        ".idx",
        ".idx",
        ".idx",
        ".json",
    ]
    index_folder(tmp_path / "there" / "t")
    np.testing.assert_array_equal(
        data.images(np.arange(20)), ImageData(tmp_path / "there" / "t").images(np.arange(20))
    )
    main(["data", "info", str(out)])
    assert "20" in capsys.readouterr().out
    for wrong in (f"{server.url}/t/a.tar,b", f"{server.url}/{{t,u}}/a.tar"):
        with raises("data.url-pattern", server.url):
            index_urls(wrong, tmp_path / "no")
    with pytest.raises(SystemExit):
        main(["data", "index", urls])
    assert "--out" in capsys.readouterr().err


def test_other_protocols(tmp_path: Path) -> None:
    """fsspec opens the other protocols; an unknown one gives an error of one clear line."""
    tokens = write_tokens(tmp_path / "t")
    data = TokenData(located(f"file://{tmp_path}/t", str(tmp_path / "cache")))
    np.testing.assert_array_equal(data.gather(np.arange(20))[0], tokens[:, 0])
    with raises("data.url-scheme", "nonsense://x"):
        located("nonsense://x", str(tmp_path / "cache"))
