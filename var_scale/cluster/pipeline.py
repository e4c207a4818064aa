"""A study from images to a report on this machine. Every stage sees for itself whether it is done, so a study can be stopped
anywhere and run again: it continues, and when nothing is left it says so."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.config.load import config_hash, dump, merge, run_config, variants, write_config
from var_scale.config.schema import Config, EngineConfig
from var_scale.cost.from_config import with_flops
from var_scale.errors import UserError
from var_scale.files import canonical_hash, read_json, write_json
from var_scale.progress import say
from var_scale.run_folder import RunFolder, take_lock
from var_scale.scales import grid, length

if TYPE_CHECKING:
    from var_scale.study.analyse import StudyResult

ENDED = ("complete", "diverged")


class Study:
    """Paths and configs of one study: runs/NAME/{images,tokenizer,tokens,d02-s0,...,report}."""

    def __init__(self, config: Config, runs: Path):
        if config.study is None or not config.study.depths:
            raise UserError(f"study {config.name}: no runs; list the sizes in study.depths, such as [2, 3, 4, 5, 6]")
        self.config, self.spec = config, config.study
        self._check()
        self.folder = (runs / config.name).resolve()
        self.report = self.folder / "report"
        self.step_times: dict[str, float] = {}  # measured here for the plan

    def _check(self) -> None:
        """Refuse what could only fail later."""
        c, data = self.config, self.config.data
        if data.leaves and (data.images_train or data.images_val):
            raise UserError(f"study {c.name}: data.leaves and data.images_* are both given; set data.leaves=null to use your images")
        if data.leaves and (data.tokens_train or data.tokens_val):
            raise UserError(f"study {c.name}: data.leaves and data.tokens_* are both given; set data.leaves=null to use your tokens")
        if data.grammar and (data.leaves or data.images_train or data.tokens_train or data.online or c.tokenizer.weights):
            raise UserError(f"study {c.name}: data.grammar makes its own tokens and tokenizer; give no leaves, images, tokens or weights")
        if data.grammar and data.grammar.symbols * data.grammar.rules != c.tokenizer.vocab_size:
            raise UserError(f"study {c.name}: the grammar has {data.grammar.symbols} x {data.grammar.rules} tokens; set "
                            f"tokenizer.vocab_size={data.grammar.symbols * data.grammar.rules}")  # fmt: skip
        if (data.leaves or data.grammar) and c.train_samples < c.train.batch_size:
            raise UserError(f"study {c.name}: {c.train_samples} training samples are fewer than a batch of {c.train.batch_size}")
        size = c.tokenizer.image_size
        if data.leaves and grid(data.leaves.size) != size:
            wanted = size[0] if size[0] == size[1] else list(size)
            raise UserError(f"study {c.name}: the tokenizer takes images of {size[0]}x{size[1]} pixels; set data.leaves.size={wanted}")
        if c.tokenizer.weights and self.spec.device == "auto" and not _there(c.tokenizer.weights):
            raise UserError(f"tokenizer.weights: {c.tokenizer.weights} does not exist; give the file of the trained tokenizer")

    def with_files(self) -> Config:
        """The config with this study's own data and tokenizer filled in where none are given."""
        c, changes = self.config, {}
        if c.data.leaves:
            changes["data"] = {f"images_{s}": str(self.folder / "images" / s) for s in ("train", "val")}
        if not c.data.tokens_train:
            changes.setdefault("data", {}).update({f"tokens_{s}": str(self.folder / "tokens" / s) for s in ("train", "val")})
        if not c.tokenizer.weights:
            changes["tokenizer"] = {"weights": str(self.folder / "tokenizer" / "tokenizer.safetensors")}
        return Config.model_validate(merge(dump(c), changes))

    def runs(self) -> list[tuple[Config, RunFolder]]:
        """Every run, smallest first."""
        base = self.with_files()
        made = []
        for depth, point, seed in product(sorted(self.spec.depths), variants(self.spec), self.spec.seeds):
            config = run_config(base, depth, seed, point)
            made.append(with_flops(config, point.flops) if point.flops else config)
        return [(config, RunFolder(self.folder / config.name)) for config in made]

    def identity(self) -> str:
        """What the finished report depends on: the runs' configs and how they are shown."""
        return canonical_hash([*(config_hash(c) for c, _ in self.runs()), self.spec.model_dump(mode="json")])

    def data_hash(self) -> str | None:
        """Identity of the token shards as runs record it; None while they are not there."""
        data = self.with_files().data
        if data.online:
            return None  # the runs' own records say it
        paths = [Path(str(folder)) / "manifest.json" for folder in (data.tokens_train, data.tokens_val)]
        return ":".join(str(read_json(path, "manifest")["digest"]) for path in paths) if all(path.exists() for path in paths) else None

    def complete(self) -> bool:
        """Whether runs and report are there for this very study and its data. Images, tokens and checkpoints may have been removed
        to save space: a finished study does not need them."""
        path = self.report / "complete.json"
        if not path.exists() or not self.ended():
            return False
        stamp = read_json(path)
        return (
            stamp.get("identity") == self.identity()
            and self.data_hash() in (None, stamp.get("data_hash"))
            and all((self.report / name).exists() for name in stamp.get("files", ["report.html"]))
        )

    def ended(self) -> bool:
        """Whether no run is left to do. A diverged run has ended too."""
        return all(run.status()["state"] in ENDED for _, run in self.runs())

    def mark_complete(self) -> None:
        """Keep what the report belongs to, and its files."""
        files = sorted(path.name for path in self.report.iterdir() if path.is_file())
        write_json(self.report / "complete.json", {"identity": self.identity(), "data_hash": self.data_hash(), "files": files})


def run_study(config: Config, runs: Path) -> Path:
    """Run what is missing; returns the report folder. KeyboardInterrupt (Ctrl-C) lets the run save first.

    UserError at the end when no run is healthy: there is a report, but nothing in it."""
    study = Study(config, runs)
    check_runs(study)
    if study.complete():
        say(f"study {config.name} is complete, nothing to do. Report: {study.report / 'report.html'}")
        return study.report
    require_sources(study)
    lock = take_lock(study.folder / ".lock")
    if lock is None:
        raise UserError(f"{study.folder}: another process is running this study; wait for it or stop it")
    refuse_queued(study)
    check_machine(study)
    write_config(config, study.folder / "study.yaml")
    if not study.ended():
        prepare_data(study)
        show_plan(study)
        train_all(study)
    result = make_report(study)
    if not result.gate.kept:
        raise UserError(f"{study.folder}: no run is healthy, so there is no law; the report says why: {study.report / 'report.md'}")
    study.mark_complete()
    say(f"done. Report: {study.report / 'report.html'}")
    return study.report


def refuse_queued(study: Study) -> None:
    """Refuse a study that SLURM still has jobs of."""
    path = study.folder / "slurm" / "jobs.json"
    if path.exists() and shutil.which("squeue"):
        from var_scale.cluster.slurm import active_jobs

        jobs = [*read_json(path, "list of jobs").values(), *(run.status().get("job", "") for _, run in study.runs())]
        if there := active_jobs(jobs):
            raise UserError(f"{study.folder}: SLURM has jobs of this study ({', '.join(sorted(there)[:3])}); wait for them, or take them "
                            "back with `var-scale study stop`")  # fmt: skip


def check_machine(study: Study) -> None:
    """Refuse runs that cannot begin here."""
    for config, _ in study.runs():
        check_config(config)


def check_config(config: Config, world: int | None = None) -> None:
    """Refuse a run that cannot begin here: batches and shards that do not divide over its processes, attention back-ends that cannot train
    here, DeepSpeed keys that contradict the recipe. `world`: of a run on other machines, on so many processes."""
    import torch

    from var_scale.cluster.local import process_count
    from var_scale.data.order import rank_slice
    from var_scale.model.attention import require_trainable

    engine, c, processes = config.engine, config.train, world or process_count(config.engine)
    if world is None:
        require_trainable(config.model.attention, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rank_slice(c.batch_size, processes, 0, c.accumulate, 0)
    if world is None and 0 < torch.cuda.device_count() < processes:
        raise UserError(f"engine.processes: {processes} processes, but this machine has {torch.cuda.device_count()} GPUs; use as many")
    if engine.shard and processes % engine.shard:
        raise UserError(f"engine.shard: {processes} processes do not divide into groups of {engine.shard}")
    if engine.name == "deepspeed":
        from var_scale.train.engine.deepspeed import engine_config

        engine_config(engine.deepspeed, processes, c.batch_size, c.accumulate, c.clip)


def check_runs(study: Study) -> None:
    """Refuse folders of other runs."""
    from var_scale.config.load import load

    data_hash = study.data_hash()
    for config, run in study.runs():
        described = run.path / "run.json"
        if data_hash and described.exists() and read_json(described, "run description")["data_hash"] != data_hash:
            raise UserError(f"{run.path}: this run saw other tokens than the study has now; give the study another name, or remove it")
        if run.config.exists() and config_hash(load(str(run.config))) != config_hash(config):
            raise UserError(f"{run.path}: holds a run with another config; give the study another name or remove {study.folder}")


def require_sources(study: Study) -> None:
    """Refuse a study whose data come from nowhere."""
    c = study.config
    images = c.data.leaves or c.data.grammar or (c.data.images_train and c.data.images_val)
    if not images and not (c.data.tokens_train and c.data.tokens_val and c.tokenizer.weights):
        raise UserError(f"study {c.name}: give data.images_train and data.images_val (folders of image shards), or data.leaves, or "
                        "data.tokens_train, data.tokens_val and tokenizer.weights")  # fmt: skip


def prepare_data(study: Study) -> None:
    """Stages 1 to 3: images, tokenizer, tokens. Each returns at once when it is done."""
    config = study.with_files()
    if study.config.data.grammar:
        make_grammar(config)
        return
    if study.config.data.leaves:
        make_leaves(config)
    if not study.config.tokenizer.weights:
        train_tokenizer_stage(config, Path(str(config.tokenizer.weights)).parent)
    if not study.config.data.tokens_train and not config.data.online:
        tokenize_stage(config)


def _there(weights: str) -> bool:
    """Whether a file of weights exists; one of the hub is fetched now, before ranks ask for it."""
    from var_scale.model.hub import weights_file

    return weights_file(weights).exists()


def require_inputs(config: Config) -> None:
    """Refuse a run without its tokens or tokenizer before its folder is made."""
    from var_scale.data.manifest import load_manifest
    from var_scale.data.remote import located
    from var_scale.train.inputs import NO_TOKENS

    data = config.data
    folders = (data.images_train, data.images_val) if data.online else (data.tokens_train, data.tokens_val)
    if not all(folders):
        raise UserError("data.images_train and data.images_val are needed with data.online=true" if data.online else NO_TOKENS)
    if not config.tokenizer.weights or not _there(config.tokenizer.weights):
        raise UserError(f"tokenizer.weights: {config.tokenizer.weights or 'nothing'} is given but does not exist; train it with "
                        "`var-scale tokenizer train`, or give its file")  # fmt: skip
    for folder in folders:
        if isinstance(place := located(str(folder), data.cache, data.cache_gb), Path):
            load_manifest(place)


def make_leaves(config: Config) -> None:
    """Generate the embedded image set as WebDataset shards."""
    from var_scale.data.embedded import LeavesSettings, write_leaves

    leaves = config.data.leaves
    assert leaves is not None
    settings = LeavesSettings(**leaves.model_dump(exclude={"train_images", "val_images"}))
    for split, count in (("train", leaves.train_images), ("val", leaves.val_images)):
        folder = Path(str(getattr(config.data, f"images_{split}")))
        manifest = write_leaves(folder, split, count, settings, config.data.samples_per_shard)
        say(f"images {split}: {manifest.num_samples:,} in {len(manifest.shards)} shards ({folder})")


def make_grammar(config: Config) -> None:
    """Generate the embedded token set, and a tokenizer whose codebook is random: there are no images to encode."""
    import torch

    from var_scale.data.grammar import GrammarSettings, bayes, write_grammar
    from var_scale.files import sha256_file
    from var_scale.model.load import new_tokenizer, save_tokenizer

    grammar = config.data.grammar
    assert grammar is not None
    settings = GrammarSettings(config.tokenizer.patch_nums, **grammar.model_dump(exclude={"train_samples", "val_samples"}))
    weights = Path(str(config.tokenizer.weights))
    if not weights.exists():
        torch.manual_seed(grammar.seed)
        vae = new_tokenizer(config.tokenizer)
        torch.nn.init.normal_(vae.quantize.embedding.weight)
        save_tokenizer(vae, weights)
    for split, count in (("train", grammar.train_samples), ("val", grammar.val_samples)):
        folder = Path(str(getattr(config.data, f"tokens_{split}")))
        manifest = write_grammar(folder, split, count, settings, sha256_file(weights), config.data.samples_per_shard)
        say(f"grammar {split}: {manifest.num_samples:,} in {len(manifest.shards)} shards ({folder})")
    floor = bayes(settings)
    say(f"no model can have less than loss_avg {floor['loss_avg']:.4f}, loss_last {floor['loss_last']:.4f}")


def train_tokenizer_stage(config: Config, folder: Path, processes: int = 1) -> None:
    """Train the tokenizer on the image shards, in this process or with torchrun on several."""
    from var_scale.train.inputs import open_images
    from var_scale.train.tokenizer import train_tokenizer

    train, val = (open_images(config, images, processes) for images in (config.data.images_train, config.data.images_val))
    if processes == 1:
        train_tokenizer(config, train, val, folder)
        return
    from var_scale.cluster.local import run_workers

    if (batch := config.tokenizer.train.batch_size) % processes:
        raise UserError(f"tokenizer.train.batch_size: {batch} does not divide into {processes} processes; change it or --processes")
    engine = EngineConfig(name="ddp", processes=processes, threads=config.engine.threads)
    config = config.model_copy(update={"engine": engine, "study": None})
    write_config(config, folder / "config.yaml")
    run_workers(config, folder, "var_scale.train.tokenizer")


def tokenize_stage(config: Config) -> None:
    """Image shards to token shards, both splits."""
    from var_scale.train.encode import tokenize

    data = config.data
    given = [split for split in ("train", "val") if getattr(data, f"images_{split}") or getattr(data, f"tokens_{split}")]
    for split in given:
        if not getattr(data, f"images_{split}") or not getattr(data, f"tokens_{split}"):
            raise UserError(f"data.images_{split} and data.tokens_{split} are needed to tokenise; set both, or neither to leave it out")
    if not given:
        raise UserError("data.images_train and data.tokens_train are needed to tokenise; set both")
    for split in given:
        manifest = tokenize(config, split)
        say(f"tokens {split}: {manifest.num_samples:,} x {length(config.tokenizer.patch_nums)} ({getattr(config.data, f'tokens_{split}')})")


def show_plan(study: Study) -> None:
    """Stage 4: the table of runs with cost and expected time; the largest size is held out."""
    from var_scale.cluster.plan import plan_table

    plan_table(study, save=True)


def train_all(study: Study) -> None:
    """Stage 5: every run that is not complete, smallest first. A diverged run does not stop the others."""
    from var_scale.cluster.local import train_here
    from var_scale.train.loop import create_run

    pending = study.runs()
    for number, (config, run) in enumerate(pending, 1):
        state = run.status()["state"]
        if state in ENDED:
            say(f"run {config.name}: {state} ({number}/{len(pending)})")
            continue
        create_run(config, run.path)
        train_here(config, run, f"train {config.name} ({number}/{len(pending)})", may_diverge=True)
        if config.log.wandb != "disabled" and number < len(pending):
            make_report(study)  # the summary run on wandb follows the study


def make_report(study: Study) -> StudyResult:
    """Stages 6 and 7: gate, fit, hold-out test, report, samples of the largest model."""
    from var_scale.cluster.report import build_report

    check_runs(study)
    return build_report(study)
