"""Adopting WebDataset tars that lie at URLs: each is fetched once and looked at; index and manifest stay here, the tars there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from var_scale.data.manifest import Manifest, ShardInfo
from var_scale.data.remote import fetch
from var_scale.data.shards import PROGRESS_FOLDER, about_labels, adopt_shard, classes_of, read_index
from var_scale.errors import UserError
from var_scale.files import read_json, remove_tree, write_json
from var_scale.progress import progress


def index_urls(pattern: str, out: Path, split: str = "train", num_classes: int | None = None,
               class_names: Sequence[str] | None = None, label_key: str | None = None) -> Manifest:  # fmt: skip
    """Look at all tars of `pattern`, such as https://host/set/{00000..00099}.tar, and write their indices and a manifest into `out`, a
    folder that runs then read as any other. A killed run goes on after its last tar.

    UserError: tars of several folders, one that cannot be had or is not sound.
    """
    import braceexpand

    urls = sorted(braceexpand.braceexpand(pattern))
    base = urls[0].rpartition("/")[0]
    if odd := [url for url in urls if url.rpartition("/")[0] != base or not url.endswith(".tar")]:
        raise UserError(f"{odd[0]}: give the .tar files of one folder, such as {base}/{{00000..00099}}.tar")
    shards, largest = [], 0
    with progress(f"index {base}", len(urls), "shards") as bar:
        for done, url in enumerate(urls, 1):
            name = url.rpartition("/")[2]
            record = out / PROGRESS_FOLDER / f"{name}.json"
            if not record.exists():
                fetch(url, out / name)
                try:
                    write_json(record, asdict(adopt_shard(out, name, "image", label_key=label_key)))
                finally:
                    (out / name).unlink()
            found = read_json(record, "record of an indexed shard")
            shards.append(ShardInfo.of(found))
            largest = max(largest, int(read_index(out, shards[-1])["label"].max()))
            bar.update(done)
    source = {"name": base.rpartition("/")[2], "url": base} | about_labels(class_names, label_key)
    manifest = Manifest("image", split, classes_of(out, largest, num_classes, class_names), source, None, tuple(shards))
    manifest.write(out)
    remove_tree(out / PROGRESS_FOLDER)
    return manifest
