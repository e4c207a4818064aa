"""Start many small runs without importing torch for each of them.

A nursery is a process that has imported everything a run needs and trains nothing itself. Each
run is a fork of it, with a session, a log and a status of its own, exactly as if
`python -m var_scale.train.worker FOLDER` had been started. That saves three to six seconds per run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.05


class Child:
    """A run that a nursery started, with the part of `subprocess.Popen` that its launcher needs."""

    def __init__(self) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.begun, self.ended = threading.Event(), threading.Event()

    def fail(self) -> None:
        """Nobody will report the end of this run any more."""
        if not self.ended.is_set():
            self.returncode = 1
        self.begun.set()
        self.ended.set()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.returncode if self.ended.is_set() else None


class Nursery:
    """A nursery and the runs that it started. `close` ends it, and its runs then save and stop.

    Args:
        env: the environment of the runs.
    """

    def __init__(self, env: dict[str, str]):
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._children = threading.Lock(), dict[int, Child]()

    def start(self, folder: Path, log: IO[bytes]) -> Child:
        """Start the worker of a run; its output is appended to the open file `log`.

        So is that of a nursery which is started for this run, such as why it cannot import torch.
        """
        child = Child()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._begin(log)
            number = len(self._children)
            self._children[number] = child
            order = {"number": number, "folder": str(folder), "log": log.name}
            assert self._process and self._process.stdin
            try:
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:  # it died a moment ago, and `_listen` may have ended already
                child.fail()
        child.begun.wait()
        return child

    def _begin(self, log: IO[bytes]) -> None:
        """Start the nursery: for the first run, or after it was killed."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "var_scale.jobs.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=self._env,
            start_new_session=True,
        )
        self._children = {}
        known = (self._process, self._children)
        threading.Thread(target=self._listen, args=known, daemon=True).start()

    def close(self) -> None:
        """End the nursery; it has no work of its own to lose."""
        if self._process and self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()

    def _listen(self, process: subprocess.Popen[bytes], children: dict[int, Child]) -> None:
        """Take note of what a nursery reports, until it ends."""
        assert process.stdout
        for line in process.stdout:
            report = json.loads(line)
            child = children[report["number"]]
            child.pid = report["pid"]
            child.begun.set()
            if (code := report.get("code")) is not None:
                child.returncode = code
                child.ended.set()
        with self._lock:
            for child in children.values():
                child.fail()


def serve() -> None:
    """The nursery: read orders from stdin, fork, and report starts and ends on stdout, until stdin
    is closed."""
    reports = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no report
    import torch._dynamo  # noqa: F401  # torch's optimisers import it, which takes two seconds

    import var_scale.train.loop  # noqa: F401

    running, orders = dict[int, int](), b""
    while True:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, orders = (orders + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _run(order)
                running[pid] = order["number"]
                _report(reports, number=order["number"], pid=pid)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                _report(reports, number=running.pop(pid), pid=pid, code=code)


def _report(file: int, **report: Any) -> None:
    os.write(file, json.dumps(report).encode() + b"\n")


def _run(order: dict[str, Any]) -> None:
    """In the fork: become the worker of a run."""
    from var_scale.train.worker import main

    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, file in ((0, nothing), (1, log), (2, log)):
        os.dup2(file, stream)
    sys.argv = ["worker", order["folder"]]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
