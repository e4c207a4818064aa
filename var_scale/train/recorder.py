"""What rank 0 writes about a run: run.json, env.json, the rows of metrics.jsonl, warnings."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Any

from var_scale.config.load import config_hash
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.cost.time import peak_of
from var_scale.files import write_json
from var_scale.progress import say
from var_scale.train.activations import ActivationNorms
from var_scale.train.assemble import Parts
from var_scale.train.monitor import Spikes, Window
from var_scale.train.telemetry import Telemetry, environment, peak_memory

SLOW_SHARE = 0.1
"""Share of the time spent waiting for data from which on the slowest rank is named."""


class Recorder:
    """Rank 0's record of one attempt; on other ranks nothing makes one."""

    def __init__(self, parts: Parts):
        self.parts, self.folder, self.config = parts, parts.folder, parts.config
        self.schedule, self.shape = parts.stepper.schedule, shape_of(parts.config)
        self.seconds_before = float(parts.resume.state["seconds"]) if parts.resume else 0.0
        self.began = time.monotonic()
        self.spikes, self.slow_rank = Spikes(), -1
        blocks = parts.stepper.engine.train_step_module().var.blocks
        self.activations = ActivationNorms(blocks) if self.config.log.activations else None
        self.telemetry = self._start()

    @property
    def seconds(self) -> float:
        """Training time over all attempts."""
        return self.seconds_before + time.monotonic() - self.began

    def close(self) -> None:
        """Let TensorBoard and wandb finish."""
        self.telemetry.close()

    def _start(self) -> Telemetry:
        """Write run.json and env.json, print what was chosen, and start the mirrors."""
        c, parts, data = self.config, self.parts, self.parts.stepper.data
        last_lr = self.schedule.lr(self.schedule.total_steps - 1)
        description = {
            "name": c.name,
            "depth": c.model.depth,
            "seed": c.train.seed,
            "shape": dataclasses.asdict(self.shape),
            "total_steps": self.schedule.total_steps,
            "global_batch": c.train.batch_size,
            "config_hash": config_hash(c),
            "data_hash": parts.data_hash,
            "peak_lr": self.schedule.peak_lr,
            "final_lr_fraction": last_lr / self.schedule.peak_lr,
            "train_samples": data.num_samples,
            "val_samples": parts.val.num_samples,
            "eval_label_dropout": c.train.eval_label_dropout,
            "class_names": data.manifest.class_names,
        }
        write_json(self.folder.path / "run.json", description)
        choices = {
            "engine": c.engine.name,
            "zero_stage": c.engine.zero_stage if c.engine.name == "deepspeed" else None,
            "precision": parts.precision,
            **parts.stepper.engine.train_step_module().var.choices(),
            **parts.stepper.engine.choices(),
        }
        env = environment(parts.world, choices)
        chosen = " ".join(f"{key}={value}" for key, value in choices.items() if value is not None)
        say(f"{chosen} world={parts.world.size} device={env['device']}")
        return Telemetry(self.folder, c, env)

    def attempt(self, step: int, evaluation_pending: bool) -> None:
        """Record that a new attempt starts from `step`; rows of later steps no longer count."""
        earlier = self.folder.metrics.exists()
        if earlier:
            row: dict[str, Any] = {"kind": "restart", "step": step}
            if evaluation_pending:
                row["evaluation_pending"] = True
            self.folder.append_metrics(row)
        restarts = self.folder.status().get("restarts", 0) + earlier
        total = self.schedule.total_steps
        self.folder.set_status("running", step=step, total_steps=total, restarts=restarts)

    def rolled_back(self, step: int, done: int, skipped_samples: int) -> None:
        """Training continues from the checkpoint at `step` after a step that was not finite."""
        self.telemetry.row(
            {
                "kind": "restart",
                "step": step,
                "from": done,
                "why": "not finite",
                "skipped_samples": skipped_samples,
            }
        )
        say(
            f"warning: step {done}: the loss or gradient is not finite; training continues from "
            f"step {step} and skips the samples used since"
        )

    def window(self, done: int, window: Window, stall_seconds: float) -> None:
        """The row of the steps since the last row, and warnings about them."""
        c, world = self.config.train, self.parts.world
        stage, _ = self.parts.stepper.stage(done - 1)
        per_step = window.seconds / window.steps
        per_image = count_flops(self.shape.shown(stage))
        flops = per_image.training * c.batch_size / per_step
        peak = peak_of(world.device_name, self.parts.precision)
        row = {
            "kind": "train",
            "step": done,
            "steps": window.steps,
            "images": done * c.batch_size,
            "loss": window.loss,
            "grad_norm": window.grad_norm,
            "lr": self.schedule.lr(done - 1),
            "weight_decay": self.schedule.wd(done - 1),
            "seconds": self.seconds,
            "images_per_second": c.batch_size / per_step,
            "tokens_per_second": c.batch_size * per_image.tokens / per_step,
            "step_seconds": per_step,
            "data_seconds": window.data_seconds / window.steps,
            "flops_per_second": flops,
            "mfu": flops / (peak * world.size) if peak else None,
            "memory_bytes": peak_memory(world.device),
            "checkpoint_stall_seconds": stall_seconds,
            "loss_per_scale": window.loss_per_scale,
        }
        if self.activations:
            row |= self.activations.read()
        if window.skipped:
            row["skipped"] = window.skipped
        if scaler := self.parts.stepper.engine.scaler:
            row["loss_scale"] = float(scaler.scale)
        if window.data_seconds > SLOW_SHARE * window.seconds:
            row["slowest_rank"] = window.slowest_rank
        if stage >= 0:
            row["stage"] = stage
        self.telemetry.row(row)
        self._warn(done, window)

    def _warn(self, done: int, window: Window) -> None:
        """Warn about spikes, and about slow data whenever another rank becomes the slowest."""
        slow = window.slowest_rank if window.data_seconds > SLOW_SHARE * window.seconds else -1
        if slow not in (-1, self.slow_rank):
            share = window.data_seconds / window.seconds
            say(f"warning: step {done}: rank {slow} waits for data {share:.0%} of the time")
        self.slow_rank = slow
        for name, value in (("loss", window.loss_largest), ("grad_norm", window.grad_norm_largest)):
            if spike := self.spikes.look(name, value):
                self.telemetry.row({"kind": "spike", "step": done, "what": name, "value": value})
                say(f"warning: step {done}: {spike}")

    def evaluation(self, done: int, result: dict[str, Any]) -> None:
        """The row of an evaluation."""
        seen = self._compute(done) if self.config.train.progressive else {}
        self.telemetry.row(
            {
                "kind": "eval",
                "step": done,
                "images": done * self.config.train.batch_size,
                "final": done == self.schedule.total_steps,
                "seconds": self.seconds,
                **seen,
                **result,
            }
        )

    def _compute(self, done: int) -> dict[str, int]:
        """Exact training FLOPs and tokens so far of progressive training, which begins with short
        sequences."""
        batch, stepper = self.config.train.batch_size, self.parts.stepper
        steps = Counter(stepper.stage(step)[0] for step in range(done))
        counts = {stage: count_flops(self.shape.shown(stage)) for stage in steps}
        return {
            "flops_exact": sum(n * batch * counts[stage].training for stage, n in steps.items()),
            "tokens": sum(n * batch * counts[stage].tokens for stage, n in steps.items()),
        }
