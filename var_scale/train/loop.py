"""One training run, from its folder to its last evaluation."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from var_scale.config.load import config_hash, load
from var_scale.config.schema import Config
from var_scale.cost.from_config import shape_of
from var_scale.data.loader import Batch, TokenData, TokenLoader
from var_scale.data.order import uniform
from var_scale.errors import UserError
from var_scale.files import write_json
from var_scale.model.build import default_drop_path
from var_scale.model.load import build_model, load_tokenizer
from var_scale.progress import say
from var_scale.run_folder import EXIT_REQUEUE, RunFolder
from var_scale.train.checkpoint import Checkpoint, checkpoints, save_checkpoint
from var_scale.train.engine.base import Engine, StepStats
from var_scale.train.engine.build import build_engine
from var_scale.train.evaluate import evaluate
from var_scale.train.schedule import Schedule
from var_scale.train.step import TrainStep
from var_scale.train.stopping import StopRequest
from var_scale.train.telemetry import Telemetry, environment
from var_scale.train.world import World, choose_precision

DIVERGED = 3  # exit code of a run whose loss is no longer finite


class Run:
    """Everything one rank holds for a run. `train` brings it to its end or to a stop."""

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = RunFolder(folder), world
        self.telemetry: Telemetry | None = None
        self.config = config = load(str(self.folder.config))
        self.stop = StopRequest(folder / "STOP")
        tokenizer, tokenizer_hash = load_tokenizer(config.tokenizer, world.device)
        self.data = self._open_data(config.data.tokens_train, tokenizer_hash)
        self.val = self._open_data(config.data.tokens_val, tokenizer_hash)
        self.schedule = Schedule.of(config.train, self.data.num_samples)
        c = config.train
        self.loader = TokenLoader(self.data, c.seed, c.batch_size, world.size, world.rank, c.accumulate)
        self.precision = choose_precision(c.precision, world.device)
        torch.set_float32_matmul_precision("high" if c.tf32 else "highest")

        resume = max(checkpoints(self.folder.checkpoints), key=lambda p: p.step, default=None)
        self.engine = self._build_engine(tokenizer, resume)
        self.start = resume.step if resume else 0
        self.seconds_before = float(resume.state["seconds"]) if resume else 0.0
        self.began = time.monotonic()

    def _open_data(self, folder: str | None, tokenizer_hash: str) -> TokenData:
        if not folder:
            raise UserError("data.tokens_train and data.tokens_val are needed for training; make them with `var-scale data tokenize`")
        data = TokenData(Path(folder), tokenizer_hash, self.config.tokenizer.patch_nums)
        if data.num_classes > self.config.classes:
            raise UserError(f"{folder}: has {data.num_classes} classes, the config says {self.config.classes}; set data.num_classes")
        return data

    def _build_engine(self, tokenizer: Any, resume: Checkpoint | None) -> Engine:
        config = self.config
        torch.manual_seed(config.train.seed)
        var = build_model(config, tokenizer, self.world.device)
        if resume:
            check_resume(resume, config, self.data_hash)
            resume.load_into(var)
        module = TrainStep(var, tokenizer.quantize, config.tokenizer.patch_nums, self.precision == "bf16", config.train.label_smoothing)
        engine = build_engine(config.engine, config.train, module.to(self.world.device))
        engine.module.train()
        if resume:
            engine.load_moments(resume.moments(), resume.step)
        return engine

    @property
    def data_hash(self) -> str:
        """Identity of training and validation tokens."""
        return f"{self.data.digest}:{self.val.digest}"

    def close(self) -> None:
        """Finish the mirrors."""
        if self.telemetry:
            self.telemetry.close()

    @property
    def seconds(self) -> float:
        """Training time over all lives of the run."""
        return self.seconds_before + time.monotonic() - self.began

    def describe(self) -> None:
        """Write run.json and env.json, start the recorder, say what was chosen."""
        c = self.config
        shape = shape_of(c)
        write_json(
            self.folder.path / "run.json",
            {
                "name": c.name, "depth": c.model.depth, "seed": c.train.seed, "shape": dataclasses.asdict(shape),
                "total_steps": self.schedule.total_steps, "global_batch": c.train.batch_size, "config_hash": config_hash(c),
                "data_hash": self.data_hash, "peak_lr": self.schedule.peak_lr,
                "final_lr_fraction": self.schedule.lr(self.schedule.total_steps - 1) / self.schedule.peak_lr,
                "train_samples": self.data.num_samples, "val_samples": self.val.num_samples,
                "eval_label_dropout": c.train.eval_label_dropout,
            },
        )  # fmt: skip
        var = self.engine.train_step_module().var
        choices = {"engine": c.engine.name, "zero_stage": c.engine.zero_stage if c.engine.name == "deepspeed" else None,
                   "precision": self.precision, **var.choices()}  # fmt: skip
        env = environment(self.world, choices)
        say(" ".join(f"{k}={v}" for k, v in choices.items() if v is not None) + f" world={self.world.size} device={env['device']}")
        self.telemetry = Telemetry(self.folder, c, env)
        lived = self.folder.metrics.exists()
        if lived:
            self.folder.append_metrics({"kind": "restart", "step": self.start})
        restarts = self.folder.status().get("restarts", 0) + lived
        self.folder.set_status("running", step=self.start, total_steps=self.schedule.total_steps, restarts=restarts)

    def train(self) -> int:
        """Run to the end: 0. Stopped on request after saving: 85. Loss not finite: 3.

        At each step first the row, then the evaluation, then the checkpoint: a checkpoint means that all rows up to it are there.
        """
        total, every = self.schedule.total_steps, self.config.log.every
        if self.world.main:
            self.describe()
        evals = {round(total * k / self.config.train.evals) for k in range(1, self.config.train.evals + 1)}
        window: list[torch.Tensor] = []
        last_save = time.monotonic()
        for step in range(self.start, total):
            loss, stats = self._step(step)
            window.append(loss)
            done = step + 1
            stop = save = False
            if done % every == 0 or done == total:
                mean, stop, save = self._agree(window, time.monotonic() - last_save)
                window = []
                if self.world.main:
                    self._log(done, mean, stats)
                if not math.isfinite(mean):
                    return self._diverged(done, mean)
            if done in evals:
                self._evaluate(done, final=done == total)
            if stop or save or done == total:
                self._save(done)
                last_save = time.monotonic()
            if stop and done < total:
                if self.world.main:
                    self.folder.set_status("preempted", self.stop.reason or "asked to stop", step=done)
                return EXIT_REQUEUE
        if self.world.main:
            self.folder.set_status("complete", step=total)
        return 0

    def _step(self, step: int) -> tuple[torch.Tensor, StepStats]:
        """One optimiser step; the mean loss of this rank's samples and the engine's statistics."""
        self.engine.set_rates(self.schedule.lr(step), self.schedule.wd(step))
        noise = StepNoise(self.config, step)
        losses = []
        for micro in range(self.config.train.accumulate):
            self.engine.prepare(last=micro == self.config.train.accumulate - 1)
            batch = self.loader.batch(step, micro)
            loss, _, _ = self.engine.module(*self._tensors(batch), *noise.of(batch, self.world.device))
            self.engine.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean(), self.engine.step()

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L) and labels (B,) on the device."""
        tokens_BL = torch.as_tensor(batch.tokens_BL).to(self.world.device, non_blocking=True).long()
        return tokens_BL, torch.as_tensor(batch.labels_B).to(self.world.device, non_blocking=True).long()

    def _agree(self, window: list[torch.Tensor], since_save: float) -> tuple[float, bool, bool]:
        """Mean loss over ranks and steps; whether any rank was asked to stop; whether rank 0 wants a checkpoint. One exchange."""
        due = self.world.main and since_save >= self.config.train.checkpoint_seconds
        flags = torch.tensor([bool(self.stop.reason), due], dtype=torch.float64, device=self.world.device)
        facts = torch.cat([torch.stack(window).mean().double()[None], flags])
        mean, stop, save = self.world.reduce(facts).tolist()
        return mean / self.world.size, stop > 0, save > 0

    def _log(self, done: int, mean: float, stats: StepStats) -> None:
        c = self.config.train
        images = done * c.batch_size
        speed = (done - self.start) * c.batch_size / (time.monotonic() - self.began)
        assert self.telemetry
        self.telemetry.row(
            {
                "kind": "train", "step": done, "images": images, "loss": mean, "grad_norm": float(stats.grad_norm),
                "lr": self.schedule.lr(done - 1), "weight_decay": self.schedule.wd(done - 1), "seconds": self.seconds,
                "images_per_second": speed, "tokens_per_second": speed * self.data.length,
            }
        )  # fmt: skip

    def _save(self, done: int) -> None:
        state = {"step": done, "config_hash": config_hash(self.config), "data_hash": self.data_hash, "seconds": self.seconds}
        save_checkpoint(self.folder.checkpoints, self.engine, self.world, state, self.config.train.keep_checkpoints)
        if self.world.main:
            self.folder.set_status("running", step=done)

    def _evaluate(self, done: int, final: bool) -> None:
        result = evaluate(self.engine, self.val, self.world, self.config.train.eval_batch)
        if self.telemetry:
            images = done * self.config.train.batch_size
            self.telemetry.row({"kind": "eval", "step": done, "images": images, "final": final, "seconds": self.seconds, **result})

    def _diverged(self, done: int, mean: float) -> int:
        if self.world.main:
            self.folder.set_status("diverged", f"the loss is {mean} at step {done}; lower train.base_lr or use precision fp32", step=done)
        return DIVERGED


class StepNoise:
    """Label dropout and drop-path of one step, drawn per sample of the global batch: the same for any world size."""

    def __init__(self, config: Config, step: int):
        model, self.batch_size = config.model, config.train.batch_size
        self.first = step * self.batch_size
        rate = default_drop_path(model.depth) if model.drop_path_rate is None else model.drop_path_rate
        seed = config.train.seed
        self.drop_B = torch.from_numpy(uniform(seed, "label", step, self.batch_size) < model.cond_drop_rate)
        self.keep_D2B = None
        if rate > 0:
            rate_D11 = torch.linspace(0, rate, model.depth, dtype=torch.float64)[:, None, None]
            u = torch.from_numpy(uniform(seed, "path", step, model.depth * 2 * self.batch_size))
            self.keep_D2B = u.view(model.depth, 2, self.batch_size) >= rate_D11

    def of(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The parts of this batch's samples: (B,) true: drop the label; (depth, 2, B) true: keep the path of attention / MLP."""
        place = torch.as_tensor(batch.sample_positions_B) - self.first
        return self.drop_B[place].to(device), None if self.keep_D2B is None else self.keep_D2B[:, :, place].to(device)


def check_resume(resume: Checkpoint, config: Config, data_hash: str) -> None:
    """Refuse a checkpoint of another run or of other data."""
    for key, now in (("config_hash", config_hash(config)), ("data_hash", data_hash)):
        if resume.state[key] != now:
            what = "config" if key == "config_hash" else "data"
            raise UserError(f"{resume.folder}: was written with another {what}; use another run folder, or remove {resume.folder.parent}")


def create_run(config: Config, folder: Path) -> RunFolder:
    """Make the run folder with its config, or check that the folder there is of the same run."""
    from var_scale.config.load import write_config

    run = RunFolder(folder)
    if run.config.exists() and config_hash(load(str(run.config))) != config_hash(config):
        raise UserError(f"{folder}: holds a run with another config; choose another name or remove the folder")
    write_config(config, run.config)
    if not (folder / "status.json").exists():
        run.set_status("created")
    return run


def newest_checkpoint(folder: Path) -> tuple[Config, Checkpoint]:
    """Config and newest complete checkpoint of a run."""
    run = RunFolder(folder)
    if not run.config.exists():
        raise UserError(f"{folder}: is not a run folder (no config.yaml)")
    found = checkpoints(run.checkpoints)
    if not found:
        raise UserError(f"{folder}: has no complete checkpoint; train it first")
    return load(str(run.config)), found[-1]
