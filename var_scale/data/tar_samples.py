"""What makes a sample of a WebDataset tar: its members, its payload and its label.

WebDataset itself drops what does not fit without a message. Here every image and label either
becomes part of a sample, or is refused or counted.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from var_scale.data.findings import Tally
from var_scale.data.image_files import FORMATS, HEIF, hidden
from var_scale.errors import UserError

PAYLOADS = {"image": FORMATS, "tokens": ("tok.npy",)}
FIX = "copy or write the shard again"
SORT = "unpack the tar and pack it again, sorted by name (tar --sort=name)"
Parts = Mapping[str, tarfile.TarInfo]
"""The members of one sample by extension, in lower case."""


def group(
    path: Path, members: Iterator[tarfile.TarInfo], unused: Tally
) -> Iterator[tuple[str, Parts]]:
    """Group adjacent members by key (the path up to the first dot of the file name), as WebDataset
    does."""
    current = ""
    parts: dict[str, tarfile.TarInfo] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if any(map(hidden, member.name.split("/"))):
            continue
        if not extension:
            unused.add(f"{path}: {member.name}")
            continue
        if key != current:
            if parts:
                yield current, parts
            current, parts = key, {}
        if extension in parts:
            raise UserError(
                f"{path}: sample {key} has two members .{extension} ({parts[extension].name} and "
                f"{member.name}); give every sample a name of its own",
                code="data.sample-twice",
            )
        parts[extension] = member
    if parts:
        yield current, parts


def apart(path: Path, key: str) -> UserError:
    """The error of a sample whose key occurs again after another one."""
    return UserError(
        f"{path}: the members of sample {key} are not adjacent, or two samples have this name; "
        f"{SORT}, or rename one sample",
        code="data.sample-twice",
    )


@dataclass(frozen=True)
class Wanted:
    """What makes a sample: a payload of `kind` and a label in the member .cls or .json."""

    kind: str
    holder: str

    def payload(
        self,
        path: Path,
        key: str,
        parts: Parts,
        later: Iterator[tuple[str, Parts]],
        unused: Tally,
    ) -> tarfile.TarInfo | None:
        """The payload of a sample that has both; None if it has neither.

        Args:
            later: the samples that follow, which are read to find out why this one is incomplete.

        Raises:
            UserError: it has only one of them, two payloads, or a link.
        """
        payloads = [extension for extension in parts if extension in PAYLOADS[self.kind]]
        dotted = self._dotted(parts)
        if not payloads and self.holder not in parts and not dotted:
            for member in parts.values():
                unused.add(f"{path}: {member.name}")
            return None
        if not payloads or self.holder not in parts:
            if any(key == other for other, _ in later):
                raise apart(path, key)
            raise self._incomplete(path, key, parts, not payloads)
        if len(payloads) > 1:
            names = " and ".join(parts[extension].name for extension in payloads)
            raise UserError(
                f"{path}: sample {key} has {len(payloads)} images for one label ({names}); give "
                "each image a key and a label of its own",
                code="data.sample-images",
            )
        for prefix, extensions in dotted.items():
            if self.holder in extensions and len(extensions) > 1:
                raise self._dots(path, key, parts[f"{prefix}.{extensions[0]}"].name)
            for extension in extensions:
                unused.add(f"{path}: {parts[f'{prefix}.{extension}'].name}")
        for extension in (payloads[0], self.holder):
            if not parts[extension].isreg():
                raise UserError(
                    f"{path}: {parts[extension].name} is a link to {parts[extension].linkname} and "
                    "holds no data; pack the tar with --dereference --hard-dereference",
                    code="data.tar-link",
                )
        return parts[payloads[0]]

    def _dotted(self, parts: Parts) -> dict[str, list[str]]:
        """The images and labels whose extension has more dots, such as 001.jpg of img.001.jpg, by
        what is before the usual extension."""
        found: dict[str, list[str]] = {}
        for extension in parts:
            if "." in extension and extension not in PAYLOADS[self.kind]:
                for usual in (*PAYLOADS[self.kind], self.holder):
                    if extension.endswith(f".{usual}"):
                        found.setdefault(extension.removesuffix(f".{usual}"), []).append(usual)
        return found

    def _incomplete(self, path: Path, key: str, parts: Parts, no_payload: bool) -> UserError:
        """The error of a sample without a payload or without a label."""
        for prefix, extensions in self._dotted(parts).items():
            for extension in extensions:
                needed = self.holder not in parts if extension == self.holder else no_payload
                if needed:
                    return self._dots(path, key, parts[f"{prefix}.{extension}"].name)
        missing = f"no .{self.holder}"
        if no_payload:
            missing = "no image of a known format" if self.kind == "image" else "no .tok.npy"
        fix = FIX
        if no_payload and any(extension in HEIF for extension in parts):
            fix = "install the package pillow-heif, or convert the image"
        elif not no_payload and self.holder == "cls" and "json" in parts:
            fix = "if its class is a field of the .json, name the field with --label-key"
        present = ", ".join(f".{extension}" for extension in parts)
        return UserError(
            f"{path}: incomplete sample: {key} has {present} but {missing}; {fix}",
            code="data.sample-incomplete",
        )

    def _dots(self, path: Path, key: str, name: str) -> UserError:
        return UserError(
            f"{path}: {name} belongs to the sample {key}, because a key ends at the first dot; "
            "rename the members so that only the extension follows a dot",
            code="data.sample-dots",
        )


def label_of(path: Path, file: IO[bytes], member: tarfile.TarInfo, label_key: str | None) -> int:
    """The class in a member: all of its text, or the field `label_key` of its JSON.

    Raises:
        UserError: it is not a whole number from 0 up. Numbers are never rounded.
    """
    file.seek(member.offset_data)
    text = file.read(member.size)
    found: object = text.decode(errors="replace")
    try:
        found = json.loads(text)[label_key] if label_key else found
        problem = f"contains {found!r:.40}, which is not a class number"
        if label_key:
            problem = f"its field {label_key} is {json.dumps(found):.40}, not a class number"
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON ({error})"
    except (KeyError, TypeError):
        problem = f"is not an object with the field {label_key}"
    else:
        if isinstance(found, str) and re.fullmatch(r"\s*[0-9]{1,20}\s*", found):
            found = int(found)
        # True is an int in Python.
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**31:
            return found
    raise UserError(
        f"{path}: {member.name}: {problem}; write an integer from 0 up",
        code="data.sample-label",
    )
