"""metrics.jsonl is the truth; TensorBoard and wandb mirror it and may fail without harm.

env.json records what ran where.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from var_scale.config.schema import Config
from var_scale.files import write_json
from var_scale.machine import processor_name
from var_scale.progress import say
from var_scale.run_folder import RunFolder
from var_scale.train.world import World

PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "webdataset",
    "triton",
    "flash-attn",
    "xformers",
    "safetensors",
    "wandb",
)
WANDB_SECONDS = 30.0
"""How long wandb may try to reach its server, at the start and at the end."""


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter; None: not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def commit() -> str | None:
    """Commit of the checkout that this runs from, with `+changes` if files differ; None outside of
    a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        changes = "+changes" if _git(root, "status", "--porcelain", "-uno") else ""
        return _git(root, "rev-parse", "HEAD") + changes
    except (OSError, subprocess.SubprocessError):
        return None


def environment(world: World, choices: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware, and every choice of `auto`."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "host": platform.node(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "device": world.device_name,
        "world_size": world.size,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "choices": choices,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Telemetry:
    """The writer of metrics.jsonl and its mirrors, on rank 0."""

    def __init__(self, folder: RunFolder, config: Config, env: dict[str, Any]):
        self.folder = folder
        self.closers: list[Callable[[], object]] = []
        write_json(folder.env, env)
        self.mirrors = [m for m in (self._tensorboard(config), self._wandb(config, env)) if m]

    def row(self, row: dict[str, Any]) -> None:
        """Append to metrics.jsonl, with null for values that are not finite (JSON has no NaN), then
        mirror the numbers, except the parts of an evaluation, which nobody looks at."""
        row = {
            key: [_finite(v) for v in value] if isinstance(value, list) else _finite(value)
            for key, value in row.items()
        }
        self.folder.append_metrics(row)
        numbers = {
            f"{row['kind']}/{k}": v
            for k, v in row.items()
            if isinstance(v, int | float) and k != "step"
        }
        numbers |= {
            f"{row['kind']}/{k}/{i}": v
            for k, vs in row.items()
            if isinstance(vs, list) and not k.endswith("_blocks")
            for i, v in enumerate(vs)
            if v is not None
        }
        for mirror in list(self.mirrors):
            try:
                mirror(numbers, row["step"])
            except Exception as error:
                say(
                    f"warning: a mirror of the metrics failed and is disabled ({error}); "
                    "metrics.jsonl is complete"
                )
                self.mirrors.remove(mirror)

    def close(self) -> None:
        """Let the mirrors finish; metrics.jsonl has what they cannot write."""
        for close in self.closers:
            try:
                close()
            except Exception as error:
                say(
                    f"warning: a mirror of the metrics did not finish ({error}); "
                    "metrics.jsonl is complete"
                )
        self.closers = []

    def _tensorboard(self, config: Config) -> Any:
        """The mirror to TensorBoard; None where it is switched off or not available."""
        if not config.log.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder.log / "tensorboard"))
        except Exception as error:
            say(f"warning: TensorBoard is not available ({error}); metrics.jsonl is complete")
            return None

        self.closers.append(writer.close)

        def mirror(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return mirror

    def _wandb(self, config: Config, env: dict[str, Any]) -> Any:
        """The mirror to wandb, offline where its server cannot be reached; None as above."""
        if config.log.wandb == "disabled":
            return None
        try:
            import wandb

            self.folder.log.mkdir(parents=True, exist_ok=True)
            kept = self.folder.log.resolve() / "wandb"
            run_id = f"{self.folder.path.resolve().parent.name}-{config.name}"
            arguments: dict[str, Any] = {
                "project": config.log.wandb_project,
                "group": self.folder.path.resolve().parent.name,
                "name": config.name,
                "id": run_id,
                "resume": "allow",
                "dir": str(self.folder.log),
                "config": {**config.model_dump(mode="json"), "env": env},
                "settings": wandb.Settings(
                    init_timeout=WANDB_SECONDS,
                    finish_timeout=WANDB_SECONDS,
                    finish_timeout_raises=True,
                ),
            }
            try:
                run = wandb.init(mode=config.log.wandb, **arguments)
            except Exception as error:
                if config.log.wandb != "online":
                    raise
                first = (str(error) or type(error).__name__).splitlines()[0]
                say(
                    f"warning: wandb cannot be reached ({first}) and records offline; `wandb sync "
                    f"{kept}/offline-*` sends everything later"
                )
                wandb.teardown()  # the first attempt holds the id of the run
                run = wandb.init(mode="offline", **arguments)
        except Exception as error:
            say(f"warning: wandb is not available ({error}); metrics.jsonl is complete")
            return None

        def finish() -> None:
            try:
                run.finish()
            except TimeoutError:
                say(
                    f"warning: wandb could not be reached at the end; `wandb sync --no-skip-online "
                    f"{kept}/run-*` sends the rest"
                )

        self.closers.append(finish)
        return lambda numbers, step: run.log(numbers, step=step)
