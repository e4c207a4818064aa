"""One kind of lock for every folder that only one process may write to."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from var_scale.files import disk_errors


@contextmanager
def lock(path: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold an exclusive lock on a file. Yields False where another process holds it.

    Use it as `with lock(folder / ".lock") as held:`. The system releases the lock of a process that
    is killed, so no lock is ever left behind.

    Args:
        path: the file of the lock; it is created and stays.
        wait_seconds: how long to wait for another process to release the lock.
    """
    handle = take_lock(path, wait_seconds)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def take_lock(path: Path, wait_seconds: float = 0.0) -> int | None:
    """The open file of a lock, held until the file is closed or this process ends (see `lock`).

    None where another process holds the lock. File systems without locks give the file and a
    warning.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                return None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(handle)
                raise
            print(
                f"warning: {path}: this file system has no locks; make sure that no other process "
                "writes to this folder",
                flush=True,
            )
            return handle
