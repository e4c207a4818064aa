"""The stage of a study whose data are a generated token set: tokens, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.config.schema import Config
from var_scale.files import canonical_hash, read_json, sha256_file, write_json
from var_scale.progress import say
from var_scale.study.study import Study

if TYPE_CHECKING:
    from var_scale.data.teacher import Teacher

FLOOR_NAME = "floor.json"
COUNTS = {"train_samples", "val_samples"}
OF_FILES = {*COUNTS, "floor_precision"}
"""Settings that do not change the samples. The floor is computed again only for another precision
or other samples, not for another number of them."""


def make_tokens(study: Study) -> None:
    """Generate the embedded token set of a study, both splits, and a tokenizer for it.

    The tokenizer's codebook is random: there are no images to encode. STUDY/floor.json keeps the
    smallest possible losses: their expectation (`exact`) and what one who knows the teacher scores
    on these validation tokens (`validation`).
    """
    from var_scale.data.teacher import floor, score_split, teacher_set

    config, path = study.with_files(), study.folder / FLOOR_NAME
    embedded, weights = config.data.teacher, Path(str(config.tokenizer.weights))
    assert embedded is not None
    if not weights.exists():
        _new_tokenizer(config, embedded.seed, weights)
    tokenizer_hash = sha256_file(weights)
    key = canonical_hash(
        [
            tokenizer_hash,
            config.tokenizer.patch_nums,
            embedded.model_dump(mode="json", exclude=COUNTS),
        ]
    )
    known = read_json(path, "floor") if path.exists() else {}
    exact = known["exact"] if known.get("key") == key else None
    teacher = _teacher(config)
    if exact is None:
        say(
            "computing the lowest possible loss of the data to "
            f"{100 * embedded.floor_precision:g} %, which takes up to a minute"
        )
    tokens = teacher_set(teacher, exact or floor(teacher, embedded.floor_precision))
    write_json(path, {"key": key, "exact": tokens.bayes})
    for split, count in (("train", embedded.train_samples), ("val", embedded.val_samples)):
        folder = Path(str(getattr(config.data, f"tokens_{split}")))
        manifest = tokens.write(folder, split, count, tokenizer_hash, config.data.samples_per_shard)
        shards = len(manifest.shards)
        say(f"{tokens.name} {split}: {manifest.num_samples:,} in {shards} shards ({folder})")
    scored = score_split(teacher, Path(str(config.data.tokens_val)))
    write_json(path, {"key": key, "exact": tokens.bayes, "validation": scored})
    say(
        f"the lowest losses that any model can reach: loss_avg {tokens.bayes['loss_avg']:.4f}, "
        f"loss_last {tokens.bayes['loss_last']:.4f}"
    )


def _new_tokenizer(config: Config, seed: int, path: Path) -> None:
    """Write the weights of a tokenizer with a random codebook."""
    import torch

    from var_scale.model.load import new_tokenizer, save_tokenizer

    torch.manual_seed(seed)
    vae = new_tokenizer(config.tokenizer)
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    save_tokenizer(vae, path)


def _teacher(config: Config) -> Teacher:
    import torch

    from var_scale.data.teacher import Teacher, TeacherSettings
    from var_scale.model.load import load_tokenizer

    assert config.data.teacher is not None
    vae, _ = load_tokenizer(config.tokenizer, torch.device("cpu"))
    return Teacher(
        TeacherSettings(
            config.tokenizer.patch_nums,
            config.tokenizer.vocab_size,
            **config.data.teacher.model_dump(exclude=OF_FILES),
        ),
        vae.quantize,
    )
