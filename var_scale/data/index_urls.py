"""Indexing WebDataset tars at URLs: each is downloaded once; index and manifest stay here, the tars
at their URLs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from var_scale.data.findings import Findings, say_from_one
from var_scale.data.indexing import about_labels, adopt_shard, classes_of
from var_scale.data.manifest import Manifest, ShardInfo
from var_scale.data.remote import fetch
from var_scale.data.shards import PROGRESS_FOLDER, read_index
from var_scale.errors import UserError
from var_scale.files import read_json, remove_tree, write_json
from var_scale.progress import progress


def index_urls(
    pattern: str,
    out: Path,
    split: str = "train",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    label_key: str | None = None,
) -> Manifest:
    """Index all tars of `pattern`, such as https://host/set/{00000..00099}.tar.

    Writes their indices and a manifest into `out`, which runs then read like any other folder. A
    killed run continues after its last tar.

    Raises:
        UserError: the tars are in several folders, or one cannot be downloaded or is damaged.
    """
    import braceexpand

    urls = sorted(braceexpand.braceexpand(pattern))
    base = urls[0].rpartition("/")[0]
    if odd := [url for url in urls if url.rpartition("/")[0] != base or not url.endswith(".tar")]:
        raise UserError(
            f"{odd[0]}: give the .tar files of one folder, such as {base}/{{00000..00099}}.tar",
            code="data.url-pattern",
        )
    shards, findings = list[ShardInfo](), Findings()
    smallest, largest = 2**31, 0
    with progress(f"index {base}", len(urls), "shards") as bar:
        for done, url in enumerate(urls, 1):
            name = url.rpartition("/")[2]
            record = out / PROGRESS_FOLDER / f"{name}.json"
            if not record.exists():
                fetch(url, out / name)
                try:
                    shard, seen = adopt_shard(out, name, "image", label_key=label_key)
                    write_json(record, {**asdict(shard), "findings": asdict(seen)})
                finally:
                    (out / name).unlink()
            found = read_json(record, "record of an indexed shard")
            shards.append(ShardInfo.of(found))
            findings.merge(found.get("findings", {}))
            labels = read_index(out, shards[-1])["label"]
            smallest, largest = min(smallest, int(labels.min())), max(largest, int(labels.max()))
            bar.update(done)
    source = {"name": base.rpartition("/")[2], "url": base} | about_labels(class_names, label_key)
    manifest = Manifest(
        "image",
        split,
        classes_of(out, largest, num_classes, class_names),
        source,
        None,
        tuple(shards),
    )
    manifest.write(out)
    findings.say(base)
    say_from_one(base, smallest, largest)
    remove_tree(out / PROGRESS_FOLDER)
    return manifest
