"""A study as a plain value: its folder, the configs of its runs, and what its own JSON files say.

Nothing here reads images, tokens or weights, uses the network, or imports torch. What has to hold
before work begins is in `checks`, the work itself in `stages`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import product
from pathlib import Path

from var_scale.config.load import config_hash, dump, find_table, merge, run_config, variants
from var_scale.config.schema import Config
from var_scale.cost.from_config import with_flops
from var_scale.data.manifest import MANIFEST_NAME
from var_scale.errors import UserError
from var_scale.files import canonical_hash, read_json, sha256_file, write_text
from var_scale.run_folder import RunFolder, tokenizer_file

ENDED = ("complete", "diverged")
"""States of a run after which nothing is left to do."""


RATES_NAME = "rates.csv"
"""The study's copy of the table `study.rates`, in its folder."""
QUALITY_NAME = "quality.json"
"""What was measured of samples, in the folder of the report."""


class Study:
    """One study and its folder RUNS/NAME/{images,tokenizer,tokens,d02-s0,...,report}.

    Raises:
        UserError: the config has no sizes (code `study.depths-missing`).
    """

    def __init__(self, config: Config, runs: Path):
        if config.study is None or not config.study.depths:
            raise UserError(
                f"study {config.name}: study.depths is empty; list the sizes, "
                "such as study.depths=[2,3,4,5,6]",
                code="study.depths-missing",
            )
        self.config, self.spec = config, config.study
        self.folder = (runs / config.name).resolve()
        self.report = self.folder / "report"

    def with_files(self) -> Config:
        """The config, with the study's own shards and tokenizer where the config names none."""
        c, changes = self.config, {}
        if c.data.shapes:
            changes["data"] = {
                f"images_{s}": str(self.folder / "images" / s) for s in ("train", "val")
            }
        if not c.data.tokens_train:
            changes.setdefault("data", {}).update(
                {f"tokens_{s}": str(self.folder / "tokens" / s) for s in ("train", "val")}
            )
        if not c.tokenizer.weights:
            changes["tokenizer"] = {"weights": str(tokenizer_file(self.folder / "tokenizer"))}
        return Config.model_validate(merge(dump(c), changes))

    def runs(self) -> tuple[tuple[Config, RunFolder], ...]:
        """The config and the folder of every run, smallest model first."""
        return self._runs

    @cached_property
    def _runs(self) -> tuple[tuple[Config, RunFolder], ...]:
        base = self.with_files()
        configs = []
        for depth in sorted(self.spec.depths):
            seeds = self.spec.depth_seeds.get(depth, self.spec.seeds)
            for point, seed in product(variants(self.spec, depth), seeds):
                config = run_config(base, depth, seed, point)
                configs.append(with_flops(config, point.flops) if point.flops else config)
        return tuple((config, RunFolder(self.folder / config.name)) for config in configs)

    def rates_table(self) -> Path | None:
        """The table that `study.rates` names, or the study's copy of it; None without `rates`.

        Raises:
            UserError: neither exists (code `config.not-found`).
        """
        if not self.spec.rates:
            return None
        copy = self.folder / RATES_NAME
        try:
            return find_table(self.spec.rates)
        except UserError:
            if copy.exists():
                return copy
            raise

    def keep_rates(self) -> None:
        """Copy the table into the study's folder: its path may be relative, and the study move."""
        table = self.rates_table()
        if table and table != self.folder / RATES_NAME:
            write_text(self.folder / RATES_NAME, table.read_text())

    def needs_data(self) -> bool:
        """Whether images, tokenizer or tokens still have to be made. URLs count as existing."""
        config = self.with_files()
        weights = str(config.tokenizer.weights)
        needed = [Path(place) / MANIFEST_NAME for place in data_folders(config) if local(place)]
        needed += [Path(weights)] if local(weights) else []
        return not all(path.exists() for path in needed)

    def data_hash(self) -> str | None:
        """Identity of the token shards as runs record it; None before they exist.

        None also with `data.online`, where only the runs' own records state it.
        """
        config = self.with_files()
        if config.data.online:
            return None
        paths = [Path(folder) / MANIFEST_NAME for folder in data_folders(config)]
        return (
            ":".join(str(read_json(path, "manifest")["digest"]) for path in paths)
            if all(path.exists() for path in paths)
            else None
        )

    def submitted_jobs(self) -> dict[str, str]:
        """Numbers of the SLURM jobs that were submitted last, by name; empty without SLURM."""
        path = self.folder / "slurm" / "jobs.json"
        return dict(read_json(path, "list of jobs")) if path.exists() else {}

    def job_ids(self) -> list[str]:
        """Numbers of all jobs that may still belong to the study."""
        return [*self.submitted_jobs().values(), *run_jobs(run for _, run in self.runs())]

    def identity(self) -> str:
        """Hash of what the finished report depends on: the runs' configs, how they are shown, and
        the table of rates."""
        configs = [config_hash(config) for config, _ in self.runs()]
        rates = self.rates_table()
        tables = [sha256_file(rates)] if rates else []
        return canonical_hash([*configs, self.spec.model_dump(mode="json"), *tables])

    def ended(self) -> bool:
        """Whether every run has ended. A diverged run has ended too."""
        return not self.unfinished()

    def unfinished(self) -> list[tuple[str, str]]:
        """Name and state of every run that has not ended."""
        states = [(config.name, str(run.status()["state"])) for config, run in self.runs()]
        return [(name, state) for name, state in states if state not in ENDED]

    def complete(self) -> bool:
        """Whether runs and report exist for exactly this study and its data.

        Images, tokens and checkpoints may have been removed to save space: a finished study does
        not need them.
        """
        path = self.report / "complete.json"
        if not path.exists() or not self.ended():
            return False
        stamp = read_json(path)
        return (
            stamp.get("identity") == self.identity()
            and self.data_hash() in (None, stamp.get("data_hash"))
            and all((self.report / name).exists() for name in stamp.get("files", ["report.html"]))
        )


def data_folders(config: Config) -> list[str]:
    """Paths or URLs of the training and validation shards that a run reads."""
    kind = "images" if config.data.online else "tokens"
    return [str(getattr(config.data, f"{kind}_{split}")) for split in ("train", "val")]


def local(place: str) -> bool:
    """Whether this is a path and not a URL."""
    return "://" not in place


def run_jobs(runs: Iterable[RunFolder]) -> list[str]:
    """Numbers of the runs' SLURM jobs; runs without one are left out."""
    return [job for run in runs if (job := run.status().get("job", ""))]
