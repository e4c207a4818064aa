"""Files that are written whole: a kill at any moment leaves the old file or the new one."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from var_scale.errors import UserError

LFS_START = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that Git leaves in place of a file that Git LFS has not fetched."""
LFS_POINTER = "is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository"


def full_disk(error: Exception, place: Path | str) -> UserError | None:
    """The error for people about a full disk, a used-up quota or a limit of the size of files;
    None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"{place}: the disk is full; free some space and run the same command again",
            code="file.disk-full",
        )
    return None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into a UserError that names `path`.

    Raises:
        UserError: codes `file.disk-full` and `file.not-writable`.
    """
    try:
        yield
    except OSError as error:
        if full := full_disk(error, path):
            raise full from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); choose another folder",
                code="file.not-writable",
            ) from None
        raise


class _Watched(io.BufferedIOBase):
    """A file that is written, and the first error of the system in writing it.

    Libraries hide that error: torch.save raises "unexpected pos", and zipfile that the file is
    still open. numpy and Pillow write to the descriptor of a file that has one, and then only count
    the missing bytes, so this one has none.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, like any file."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Write what is buffered. The garbage collector calls it once more, after the end."""
        if not self.file.closed:
            self.file.flush()

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place: zip files need it."""
        return self.file.seek(place, whence)

    def tell(self) -> int:
        """The present place."""
        return self.file.tell()

    def seekable(self) -> bool:
        """As every file on a disk."""
        return True

    def writable(self) -> bool:
        """It is only written."""
        return True


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that becomes `path` at the end: the one way to write a file
    that a user asked for.

    On success it is synced to the disk and renamed to `path`; on an error it is removed.

    Raises:
        UserError: codes `file.disk-full` and `file.not-writable`, whatever the library that wrote
            made of the error.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                watched = _Watched(file)
                try:
                    yield cast(BinaryIO, watched)
                except Exception:
                    if watched.error:
                        raise watched.error from None
                    raise
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.filename == str(temporary):
                error.filename = str(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; bytes of file names that are not UTF-8 are escaped."""
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def require_exists(path: Path) -> None:
    """Refuse a file or folder that does not exist, before a search in it finds nothing.

    Raises:
        UserError: code `file.missing`.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: does not exist; check its name", code="file.missing")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS; False also if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_START)) == LFS_START
    except OSError:
        return False


def require_content(path: Path) -> None:
    """Refuse a pointer of Git LFS, which would be called damaged or of another kind.

    Raises:
        UserError: code `file.lfs-pointer`.
    """
    if is_lfs_pointer(path):
        raise UserError(f"{path}: {LFS_POINTER}", code="file.lfs-pointer")


def read_json(path: Path, what: str = "file") -> Any:
    """Read a JSON file; `what` names the kind of file in messages.

    Raises:
        UserError: codes `file.missing`, `file.lfs-pointer` and `file.not-json`.
    """
    require_content(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: this {what} does not exist", code="file.missing") from None
    except ValueError as error:
        raise UserError(
            f"{path}: this {what} is not valid JSON ({error}); restore it, or delete what it "
            "belongs to and create it again",
            code="file.not-json",
        ) from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark, whatever the locale is;
    without empty lines at its end.

    Raises:
        UserError: codes `file.missing`, `file.lfs-pointer` and `file.not-text`.
    """
    require_content(path)
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: this file does not exist", code="file.missing") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not a text in UTF-8 ({error}); convert the file", code="file.not-text"
        ) from None


def csv_rows(text: str, path: Path) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """The column names of a CSV, and each row with the number of the line that it ends in.

    Cells may have any length. A row with too many cells has the rest under the key None, and a row
    with too few has None in the last columns.

    Args:
        path: the file of the text, for messages.

    Raises:
        UserError: code `file.csv-quote` for a quote that takes the rest of the file into one cell.
    """
    csv.field_size_limit(2**31 - 1)  # the csv module refuses cells of more than 128 KiB otherwise
    # An open quote takes in whatever follows: a last row that is known shows whether one is open.
    *_, end = csv.reader(io.StringIO(f"{text}\nend\n"))
    if end != ["end"]:
        opened = text.count("\n") + 3 - end[-1].count("\n")
        raise UserError(
            f"{path}: line {opened}: a quote opens and does not close; correct the line",
            code="file.csv-quote",
        )
    reader = csv.DictReader(io.StringIO(text))
    reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
    return columns, [(reader.line_num, row) for row in reader]


def replace_between(text: str, start: str, end: str, new: str) -> str:
    """`text` with `new` between the lines of two markers that it contains."""
    head, rest = text.split(start)
    return f"{head}{start}\n{new}\n{end}{rest.split(end)[1]}"


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found.update(flat(item, f"{prefix}{key}."))
        else:
            found[prefix + key] = item
    return found


def first_difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key in which two nested mappings differ as JSON, with both values; None if they are
    equal.

    A key that one of them lacks has the value None there. A tuple equals the list that a file
    returns for it.
    """
    a, b = (flat(json.loads(json.dumps(value))) for value in (one, two))
    differ = (key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))
    key = next(differ, None)
    return None if key is None else (key, a.get(key), b.get(key))


def canonical_hash(value: Any) -> str:
    """sha256 of a JSON value, written with sorted keys and without spaces.

    Equal values have equal hashes on every machine.
    """
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(path: Path) -> None:
    """Remove a folder if it exists."""
    if Path(path).exists():
        shutil.rmtree(path)
