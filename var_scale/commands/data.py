"""`data`: image and token shards."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from var_scale.commands.arguments import (
    Commands,
    LabelArguments,
    StudyArguments,
    argument,
    command,
    family,
    folder_path,
    option,
    picture_file,
    positive,
)


def data_synth(arguments: StudyArguments) -> None:
    """Generate the embedded data set of a config (data.shapes or data.teacher) as
    WebDataset shards."""
    from var_scale.study.single import generate_data

    generate_data(arguments.load(), arguments.runs)


def data_tokenize(arguments: StudyArguments) -> None:
    """Encode image shards as token shards with the tokenizer of the config."""
    from var_scale.study.single import tokenize_images

    tokenize_images(arguments.load(), arguments.runs)


@dataclass(frozen=True, kw_only=True)
class DataShard(LabelArguments):
    source: Path = argument(
        "folder of class folders, folder with train and val of such folders, .csv file with path "
        "and label, or folder of tars"
    )
    out: Path = argument("folder for the shards")
    split: str | None = option("name of the split if SOURCE is one; default: train", None)
    seed: int = option("seed of the shuffle", 0)
    samples_per_shard: int = option("images in each shard", 1024, type=positive)
    max_broken: float = option("fraction of images that may be unreadable", 0.01)
    apply_exif: bool = option(
        "write images with an EXIF orientation upright, as PNG; default: ignore it, as the "
        "official code",
        False,
    )
    processes: int | None = option("worker processes; default: one per core", None, type=positive)


def data_shard(arguments: DataShard) -> None:
    """Write images as globally shuffled WebDataset shards. The images are class folders, ImageNet's
    train and val, a CSV of paths and labels, or tars."""
    from var_scale.data.convert import shard_images
    from var_scale.progress import say

    done = shard_images(
        arguments.source,
        arguments.out,
        arguments.split,
        arguments.seed,
        arguments.samples_per_shard,
        arguments.max_broken,
        arguments.processes,
        arguments.label_key,
        arguments.names(),
        arguments.apply_exif,
    )
    for split, manifest in done.items():
        images = f"{manifest.num_samples:,} images of {manifest.num_classes} classes"
        say(f"{split}: {images} in {len(manifest.shards)} shards ({arguments.out})")


@dataclass(frozen=True, kw_only=True)
class DataIndex(LabelArguments):
    folder: str = argument(
        "folder of the tars, or their URLs such as https://host/set/{00000..00099}.tar; tars at "
        "URLs are not copied",
        type=expanduser,
    )
    out: Path | None = option(
        "for URLs: folder for index and manifest, read like shards", None, type=folder_path
    )
    split: str = option("name of the split", "train")
    num_classes: int | None = option("classes; default: largest label + 1", None, type=positive)


def data_index(arguments: DataIndex) -> None:
    """Adopt existing WebDataset tars, in a folder or at URLs: check every member, write an index
    and manifest.json."""
    from var_scale.data.adopt import adopt_tars
    from var_scale.progress import say

    place, manifest = adopt_tars(
        arguments.folder,
        arguments.out,
        split=arguments.split,
        num_classes=arguments.num_classes,
        class_names=arguments.names(),
        label_key=arguments.label_key,
    )
    say(f"{place}: {manifest.num_samples:,} samples in {len(manifest.shards)} shards indexed")


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    folder: Path = argument("folder of the shards", type=folder_path)


@dataclass(frozen=True, kw_only=True)
class DataVerify(ShardFolder):
    drop_bad: bool = option("rewrite the manifest without the shards that have a problem", False)


def data_verify(arguments: DataVerify) -> None:
    """Check sizes, checksums and every sample of shards against manifest.json."""
    from var_scale.data.adopt import require_sound
    from var_scale.progress import say

    require_sound(arguments.folder, arguments.drop_bad)
    say(f"{arguments.folder}: all shards are complete and undamaged")


@dataclass(frozen=True, kw_only=True)
class DataInfo(ShardFolder):
    sheet: Path | None = option(
        "picture with one row per class", None, type=picture_file, metavar="FILE.png"
    )


def data_info(arguments: DataInfo) -> None:
    """Print counts, classes, sizes and provenance of shards."""
    from var_scale.data.verify import describe_folder
    from var_scale.progress import say

    for key, value in describe_folder(arguments.folder).items():
        say(f"{key:24} {value}")
    if arguments.sheet:
        from var_scale.evaluate.pictures import contact_sheet

        contact_sheet(arguments.folder, arguments.sheet)
        say(f"{'sheet':24} {arguments.sheet}")


def add(commands: Commands) -> None:
    """Add these commands."""
    data = family(
        commands, "data", "image and token shards: synth, shard, index, verify, info, tokenize"
    )
    command(data, "synth", data_synth, StudyArguments)
    command(data, "tokenize", data_tokenize, StudyArguments)
    command(data, "shard", data_shard, DataShard)
    command(data, "index", data_index, DataIndex)
    command(data, "verify", data_verify, DataVerify)
    command(data, "info", data_info, DataInfo)
