"""How good a model is."""

from __future__ import annotations

import argparse
from pathlib import Path

from var_scale.commands.arguments import Commands, Parser, command, family, number_in
from var_scale.commands.sample import device_of, load_model, model_arguments
from var_scale.errors import UserError


def _say(found: dict[str, object], out: Path | None) -> None:
    """Print one line a value, write them to `out`."""
    from var_scale.files import flat, write_json
    from var_scale.progress import say

    for name, value in flat(found).items():
        text = f"{value:.5g}" if isinstance(value, float) else " ".join(f"{v:.4f}" for v in value) if isinstance(value, list) else value
        say(f"{name:16} {text}")
    if out:
        write_json(out, found)


def evaluate_loss(args: argparse.Namespace) -> None:
    """Validation loss and error per scale over a whole split of token shards, with clean labels or as the reference drops them."""
    from var_scale.evaluate.loss import validation

    source = load_model(args)
    folder = args.tokens
    if folder is None:
        from var_scale.config.load import load

        config = Path(args.model) / "config.yaml"
        given = load(str(config)).data.tokens_val if config.exists() else None
        if not given:
            raise UserError(f"{args.model}: does not say where its validation tokens lie; give --tokens FOLDER")
        folder = Path(given)
    _say(validation(source, folder, args.batch, args.label_dropout), args.json)


def _extractor(sub: Parser) -> None:
    sub.add_argument("--extractor", required=True, help="tok:MODEL (FD-tok), or Inception: script:FILE.pt, fidelity:FILE.pth")
    sub.add_argument("--device", default=None, help="default the first GPU, else the CPU")


def evaluate_stats(args: argparse.Namespace) -> None:
    """Reference statistics of images (npz, folder of PNGs or JPEGs, image shards) as one npz in the ADM form."""
    from var_scale.evaluate.extract import load_extractor, statistics
    from var_scale.evaluate.generate import read_images
    from var_scale.progress import say

    if args.out.suffix != ".npz" or args.out.exists():
        wrong = "is there already; remove it, or choose another name" if args.out.exists() else "give a name that ends in .npz"
        raise UserError(f"{args.out}: {wrong}")
    extractor = load_extractor(args.extractor, device_of(args))
    found = statistics(read_images(args.images), extractor, label=f"features of {args.images.name}")
    found.save(args.out, extractor.name)
    say(f"{args.out}: {found.count:,} images, {len(found.mean_D)} features, {extractor.name}")


def evaluate_samples(args: argparse.Namespace) -> None:
    """FID, sFID, IS, precision and recall of samples against a reference, those of them that the extractor's features allow."""
    from var_scale.evaluate.extract import compare_sets, load_extractor, read_reference, say_if_few, statistics
    from var_scale.evaluate.generate import RECORD, read_images
    from var_scale.files import read_json

    extractor = load_extractor(args.extractor, device_of(args))
    reference = read_reference(args.reference, extractor)
    samples = statistics(read_images(args.samples), extractor, label=f"features of {args.samples.name}")
    record = args.samples / RECORD if args.samples.is_dir() else args.samples.with_name(f"{args.samples.name}.json")
    made = {"made": read_json(record, "description of samples")} if record.exists() else {}
    if made and (wanted := made["made"].get("count", samples.count)) != samples.count:
        raise UserError(f"{args.samples}: holds {samples.count:,} of {wanted:,} images; make the rest with the same `sample` command first")
    found = compare_sets(reference, samples, extractor)
    say_if_few(samples, extractor)
    _say(found | {"samples_from": str(args.samples), "reference_from": str(args.reference)} | made, args.json)


def add(commands: Commands) -> None:
    """Add these commands."""
    group = family(commands, "evaluate", "how good a model is: loss, samples, stats")
    sub = command(group, "loss", evaluate_loss)
    model_arguments(sub)
    sub.add_argument("--tokens", type=Path, default=None, metavar="FOLDER", help="token shards; default those of the run's config")
    sub.add_argument("--label-dropout", action="store_true", help="drop a tenth of the labels, as the reference does")
    sub.add_argument("--batch", type=number_in(int, 1), default=64, help="samples at a time")
    sub.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the result")
    sub = command(group, "samples", evaluate_samples)
    sub.add_argument("samples", type=Path, help="npz, folder of PNGs, or image shards")
    sub.add_argument("--reference", type=Path, required=True, help="images, or statistics: ours, ADM's VIRTUAL_*.npz, MAR's mu and sigma")
    _extractor(sub)
    sub.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the result")
    sub = command(group, "stats", evaluate_stats)
    sub.add_argument("images", type=Path, help="npz, folder of PNGs or JPEGs, or image shards")
    sub.add_argument("out", type=Path, help="file to write, .npz")
    _extractor(sub)
