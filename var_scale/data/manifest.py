"""manifest.json: what a folder of shards holds, written last, so that its presence means the folder is complete."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from var_scale.errors import UserError
from var_scale.files import canonical_hash, read_json, write_json

FORMAT = "var-scale-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
KINDS = ("image", "tokens")
TOKEN_FIELDS = ("dtype", "views", "length", "patch_nums", "vocab_size", "tokenizer_hash")


@dataclass(frozen=True)
class ShardInfo:
    """One tar and its index: file names, samples, bytes of the tar, sha256 of both."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> ShardInfo:
        """Of a progress record, which may say more than a manifest keeps."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Manifest:
    """A complete folder of shards.

    `source` says where the samples come from. `tokens` is None for images, else
    {dtype, views, length, patch_nums, vocab_size, tokenizer_hash}.
    """

    kind: str
    split: str
    num_classes: int
    source: dict[str, Any]
    tokens: dict[str, Any] | None
    shards: tuple[ShardInfo, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def url(self) -> str | None:
        """Where the tars are, if only their indices are here."""
        return self.source.get("url")

    @property
    def class_names(self) -> list[str] | None:
        """Names by class number, of the images or those the tokens were made of; None where they are not known."""
        source = self.source.get("images") if self.kind == "tokens" else self.source
        names = source.get("class_names") if isinstance(source, dict) else None
        return list(names) if names else None

    @property
    def digest(self) -> str:
        """The data hash: sha256 over the canonical JSON of everything else in the manifest."""
        return canonical_hash(self._body())

    def _body(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "kind": self.kind, "split": self.split, "num_samples": self.num_samples,
                "num_classes": self.num_classes, "source": self.source, "tokens": self.tokens,
                "shards": [asdict(shard) for shard in self.shards]}

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        write_json(Path(folder) / MANIFEST_NAME, {**self._body(), "digest": self.digest})


def load_manifest(folder: Path, check_files: bool = True) -> Manifest:
    """Read and check `folder`/manifest.json; with `check_files` every shard and index must be there with the right size.

    UserError: no manifest, wrong format or version, missing or altered fields, a missing shard, a shard of the wrong size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.exists():
        if below := sorted(str(found.parent) for found in folder.glob(f"*/{MANIFEST_NAME}")):
            raise UserError(f"{folder}: no {MANIFEST_NAME} here, but in {', '.join(below)}; give one of these")
        raise UserError(f"{folder}: no {MANIFEST_NAME} here; finish writing the shards, or run `var-scale data index {folder}` on tars")
    raw = read_json(path, "manifest")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{path}: not a manifest of var-scale shards (its format is not "{FORMAT}"); index the folder again')
    if raw.get("version") != VERSION:
        raise UserError(f"{path}: manifest version {raw.get('version')}, this program reads version {VERSION}; index the folder again")
    manifest = _parse(path, raw)
    if raw.get("digest") != manifest.digest or raw.get("num_samples") != manifest.num_samples:
        raise UserError(f"{path}: the digest does not fit the contents, the file was altered; index the folder again")
    if check_files:
        problems = missing_files(folder, manifest)
        if problems:
            raise UserError(problems[0])
    return manifest


def _parse(path: Path, raw: dict[str, Any]) -> Manifest:
    try:
        shards = tuple(ShardInfo(**shard) for shard in raw["shards"])
        rest = {field.name: raw[field.name] for field in fields(Manifest) if field.name != "shards"}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a field is missing or unknown ({error}); index the folder again") from None
    if rest["kind"] not in KINDS:
        raise UserError(f"{path}: kind {rest['kind']!r} is not one of {', '.join(KINDS)}; index the folder again")
    if rest["kind"] == "tokens" and sorted(rest["tokens"] or ()) != sorted(TOKEN_FIELDS):
        raise UserError(f"{path}: a token manifest needs the fields {', '.join(TOKEN_FIELDS)} in `tokens`; index the folder again")
    return Manifest(shards=shards, **rest)


def missing_files(folder: Path, manifest: Manifest) -> list[str]:
    """One line for each shard or index of `manifest` that is missing or has the wrong size."""
    problems = []
    for shard in manifest.shards:
        for name, size in ((shard.name, shard.bytes), (shard.index, shard.samples * 16)):
            if name == shard.name and manifest.url:
                continue
            path = Path(folder) / name
            if not path.exists():
                problems.append(f"{path}: this shard file is in the manifest but missing on disk; restore it or make the data again")
            elif path.stat().st_size != size:
                problems.append(f"{path}: {path.stat().st_size} bytes on disk, {size} in the manifest; "
                                "the file was cut or changed, restore it or make the data again")
    return problems
