"""One training run, from its folder to its last evaluation."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from var_scale.config.load import config_hash, difference, load
from var_scale.config.schema import Config
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.cost.time import peak_of
from var_scale.data.loader import Ahead
from var_scale.errors import UserError
from var_scale.files import write_json
from var_scale.model.load import build_model, load_tokenizer
from var_scale.progress import say
from var_scale.run_folder import EXIT_DIVERGED, EXIT_REQUEUE, RunFolder
from var_scale.scales import cells
from var_scale.train.activations import ActivationNorms
from var_scale.train.checkpoint import Checkpoint, checkpoints, damaged_message
from var_scale.train.engine.base import Engine
from var_scale.train.engine.build import build_engine
from var_scale.train.evaluate import evaluate
from var_scale.train.inputs import open_data
from var_scale.train.monitor import Monitor, Spikes, Window
from var_scale.train.noise import StepNoise
from var_scale.train.save import CheckpointWriter
from var_scale.train.schedule import Schedule
from var_scale.train.step import TrainStep
from var_scale.train.stopping import StopRequest
from var_scale.train.telemetry import Telemetry, environment, peak_memory
from var_scale.train.watchdog import Watchdog
from var_scale.train.world import World, choose_precision

STOP_SECONDS = 2.0  # between two looks at whether a rank was asked to stop, unless a step takes longer
SLOW_SHARE = 0.1  # of the time spent waiting for data, from which on the rank is named
SEEN_SECONDS = 120.0  # how long a rank waits for a checkpoint that rank 0 sees


class Run:
    """Everything one rank holds for a run. `train` brings it to its end or to a stop."""

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = RunFolder(folder), world
        self.telemetry: Telemetry | None = None
        self.config = config = load(str(self.folder.config))
        c = config.train
        self.watchdog = Watchdog(self.folder, world, c.hang_seconds)
        self.stop = StopRequest(folder / "STOP")
        tokenizer, tokenizer_hash = load_tokenizer(config.tokenizer, world.device)
        self.data, self.val = open_data(config, tokenizer, tokenizer_hash, world, lambda: self.watchdog.beat("start", 0))
        self.schedule = Schedule.of(c, self.data.num_samples)
        self.loader = Ahead(self.data.loader(c.seed, c.batch_size, world.size, world.rank, c.accumulate))
        self.precision = choose_precision(c.precision, world.device)
        torch.set_float32_matmul_precision("high" if c.tf32 else "highest")
        self.shape = shape_of(config)

        resume = self._newest()
        self.engine = self._build_engine(tokenizer, resume)
        self.start = resume.step if resume else 0
        self.passed_over = int(resume.state["passed_over"]) if resume else 0
        self.times_back = int(resume.state["times_back"]) if resume else 0
        self.seconds_before = float(resume.state["seconds"]) if resume else 0.0
        self.owed = bool(resume and resume.state["evaluation_owed"])
        self.peek_every = 1
        self.slow = -1
        life = world.agree(secrets.randbits(31))
        self.kept = {*c.keep_steps, *(max(1, round(share * self.schedule.total_steps)) for share in c.keep_at)}
        self.writer = CheckpointWriter(self.folder.checkpoints, world.rank, world.size, f"{life:08x}", c.keep_checkpoints, self.kept)
        lengths = cells(config.tokenizer.patch_nums)
        self.monitor = Monitor(world, lengths, scaled=self.precision == "fp16")
        self.spikes = Spikes()
        blocks = self.engine.train_step_module().var.blocks
        self.activations = ActivationNorms(blocks) if config.log.activations and world.main else None
        self.began = self.last_save = time.monotonic()

    def _build_engine(self, tokenizer: Any, resume: Checkpoint | None) -> Engine:
        config = self.config
        torch.manual_seed(config.train.seed)
        var = build_model(config, tokenizer, self.world.device)
        if resume:
            check_resume(resume, config, self.data_hash)
            if resume.state["precision"] != self.precision:
                raise UserError(f"{resume.folder}: was trained in {resume.state['precision']}, here it would be {self.precision}; set "
                                f"train.precision={resume.state['precision']}")  # fmt: skip
            self._verify(resume)
            resume.load_into(var)
        module = TrainStep(var, tokenizer.quantize, config.train, self.precision)
        engine = build_engine(config.engine, config.train, module.to(self.world.device))
        engine.module.train()
        if resume:
            resume.load_state(engine)
        return engine

    def _newest(self) -> Checkpoint | None:
        """The newest checkpoint, chosen by rank 0 for all: on a shared disk another rank may not see it yet, or still see an older one."""
        chosen = self.world.agree(max((c.step for c in checkpoints(self.folder.checkpoints)), default=0) if self.world.main else 0)
        if not chosen:
            return None
        deadline = time.monotonic() + SEEN_SECONDS
        while not (found := [c for c in checkpoints(self.folder.checkpoints) if c.step == chosen]):
            if time.monotonic() > deadline:
                raise UserError(f"{self.folder.checkpoints}: rank {self.world.rank} does not see step {chosen}, which rank 0 sees; is the "
                                "folder on a disk that all nodes share?")  # fmt: skip
            time.sleep(0.5)
        return found[0]

    def _verify(self, checkpoint: Checkpoint) -> None:
        """The checksums of all files, shared among the ranks."""
        damaged = checkpoint.verify(self.world.rank, self.world.size)
        number = int(damaged.rpartition("-")[2].partition(".")[0]) + 1 if damaged else 0
        if worst := self.world.largest(number):
            raise UserError(damaged_message(str(checkpoint.folder / f"part-{worst - 1:05d}.safetensors"), checkpoint.folder))

    @property
    def data_hash(self) -> str:
        """Identity of training and validation tokens."""
        return f"{self.data.digest}:{self.val.digest}"

    def close(self) -> None:
        """Finish the mirrors; nothing hangs any more."""
        self.watchdog.close()
        if self.telemetry:
            self.telemetry.close()

    @property
    def seconds(self) -> float:
        """Training time over all lives of the run."""
        return self.seconds_before + time.monotonic() - self.began

    def describe(self) -> None:
        """Write run.json and env.json, start the recorder, say what was chosen."""
        c = self.config
        write_json(
            self.folder.path / "run.json",
            {
                "name": c.name, "depth": c.model.depth, "seed": c.train.seed, "shape": dataclasses.asdict(self.shape),
                "total_steps": self.schedule.total_steps, "global_batch": c.train.batch_size, "config_hash": config_hash(c),
                "data_hash": self.data_hash, "peak_lr": self.schedule.peak_lr,
                "final_lr_fraction": self.schedule.lr(self.schedule.total_steps - 1) / self.schedule.peak_lr,
                "train_samples": self.data.num_samples, "val_samples": self.val.num_samples,
                "eval_label_dropout": c.train.eval_label_dropout, "class_names": self.data.manifest.class_names,
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
            self.folder.append_metrics({"kind": "restart", "step": self.start, **({"evaluation_owed": True} if self.owed else {})})
        restarts = self.folder.status().get("restarts", 0) + lived
        self.folder.set_status("running", step=self.start, total_steps=self.schedule.total_steps, restarts=restarts)

    def train(self) -> int:
        """Run to the end: 0. Stopped on request after saving: 85. Loss not finite: 3.

        At each step first the row, then the evaluation, then the checkpoint: a checkpoint means that all rows up to it are there, but for
        an evaluation that a stop put off (`evaluation_owed`); the next life begins with it.
        """
        total, c = self.schedule.total_steps, self.config.train
        if self.world.main:
            self.describe()
        evals = {round(total * k / c.evals) for k in range(1, c.evals + 1)}
        done, owed = self.start, self.owed and not self._evaluate(self.start)
        stop = owed
        while done < total and not stop:
            self._step(done)
            done += 1
            save, row = done == total or done in self.kept, done == total or done % self.config.log.every == 0
            stop = not row and done % self.peek_every == 0 and self._asked()
            if row or stop:
                window = self._look(done)
                stop, save = stop or window.stop, save or window.save
                if verdict := self._verdict(window):
                    return self._diverged(done, verdict)
                if window.bad and c.nonfinite == "rollback":
                    if (back := self._go_back(done)) is None:
                        return self._diverged(done, "no finite loss or gradient before the first checkpoint")
                    done, stop = back, False
                    continue
            owed = done in evals and (stop or not self._evaluate(done))
            stop = stop or owed
            if stop or save:
                self._save(done, owed)
        self._finish_saving(done)
        stopped = done < total or owed
        if self.world.main:
            reason = f"{self.stop.reason} (saved {time.monotonic() - self.stop.since:.1f} s later)" if stopped else ""
            self.folder.set_status("preempted" if stopped else "complete", reason, step=done)
        return EXIT_REQUEUE if stopped else 0

    def _asked(self) -> bool:
        """Whether any rank was asked to stop; every rank asks."""
        asked = bool(self.world.largest(bool(self.stop.reason)))
        if asked:
            self.stop.note("another rank was asked to stop")
        return asked

    def _step(self, step: int) -> None:
        """One optimiser step."""
        engine, beat, place = self.engine, self.watchdog.beat, step + self.passed_over
        engine.set_rates(self.schedule.lr(step), self.schedule.wd(step))
        stage, newest = self.schedule.stage(step, len(self.config.tokenizer.patch_nums))
        if self.activations:
            self.activations.armed = (step + 1) % self.config.log.every == 0
        noise, losses, waited = StepNoise(self.config, place), [], 0.0
        for micro in range(self.config.train.accumulate):
            beat("data", step)
            began = time.monotonic()
            batch = self.loader.batch(place, micro)
            waited += time.monotonic() - began
            engine.prepare(last=micro == self.config.train.accumulate - 1)
            inputs = (*self.data.tensors(batch), *noise.of(batch, self.world))
            beat("forward", step)
            loss, ce_BL, _ = engine.module(*inputs, stage, newest)
            beat("backward", step)
            engine.backward(loss)
            losses.append(loss.detach())
        beat("optimiser", step)
        stats = engine.step()
        engine.skipped += stats.skipped
        self.monitor.add(losses, ce_BL, stats)
        if engine.average:
            engine.average.update(engine)
        self.monitor.data_seconds += waited

    def _look(self, done: int) -> Window:
        """The window's facts, the same on all ranks, and their row in the metrics."""
        self.watchdog.beat("exchange", done - 1)
        self.writer.check()
        due = time.monotonic() - self.last_save >= self.config.train.checkpoint_seconds
        window = self.monitor.look(stop=bool(self.stop.reason), save=due)
        if window.stop:
            self.stop.note("another rank was asked to stop")
        self.peek_every = max(1, int(STOP_SECONDS * window.steps / window.seconds))
        self.watchdog.beat("log", done - 1)
        if self.world.main:
            self._log(done, window)
        return window

    def _log(self, done: int, window: Window) -> None:
        c, telemetry = self.config.train, self.telemetry
        assert telemetry
        stage, _ = self.schedule.stage(done - 1, len(self.config.tokenizer.patch_nums))
        per_step, per_image = window.seconds / window.steps, count_flops(self.shape.shown(stage))
        flops = per_image.training * c.batch_size / per_step
        peak = peak_of(self.world.device_name, self.precision)
        row = {
            "kind": "train", "step": done, "steps": window.steps, "images": done * c.batch_size, "loss": window.loss,
            "grad_norm": window.grad_norm, "lr": self.schedule.lr(done - 1), "weight_decay": self.schedule.wd(done - 1),
            "seconds": self.seconds,
            "images_per_second": c.batch_size / per_step, "tokens_per_second": c.batch_size * per_image.tokens / per_step,
            "step_seconds": per_step, "data_seconds": window.data_seconds / window.steps, "flops_per_second": flops,
            "mfu": flops / (peak * self.world.size) if peak else None, "memory_bytes": peak_memory(self.world.device),
            "checkpoint_stall_seconds": self.writer.stall_seconds, "loss_per_scale": window.loss_per_scale,
        }  # fmt: skip
        if self.activations:
            row |= self.activations.read()
        if window.skipped:
            row |= {"skipped": window.skipped}
        if self.engine.scaler:
            row |= {"loss_scale": float(self.engine.scaler.scale)}
        if slow := window.data_seconds > SLOW_SHARE * window.seconds:
            row |= {"slowest_rank": window.slowest_rank}
            if self.slow != window.slowest_rank:
                share = window.data_seconds / window.seconds
                say(f"warning: step {done}: rank {window.slowest_rank} waits for data {share:.0%} of the time")
        self.slow = window.slowest_rank if slow else -1
        if stage >= 0:
            row |= {"stage": stage}
        telemetry.row(row)
        for name, value in (("loss", window.loss_largest), ("grad_norm", window.grad_norm_largest)):
            if spike := self.spikes.look(name, value):
                telemetry.row({"kind": "spike", "step": done, "what": name, "value": value})
                say(f"warning: step {done}: {spike}")

    def _verdict(self, window: Window) -> str:
        """Why the run stops as diverged; empty when it goes on."""
        c = self.config.train
        if window.bad and c.nonfinite == "stop":
            return f"{window.bad} of {window.steps} steps had no finite loss or gradient"
        if window.streak >= c.nonfinite_limit:
            return f"{window.streak} steps in a row had no finite loss or gradient"
        if window.bad and c.nonfinite == "rollback" and self.times_back >= c.nonfinite_limit:
            return f"gone back {self.times_back} times"
        return ""

    def _go_back(self, done: int) -> int | None:
        """Load the last checkpoint and pass over the samples from there to here; returns the step to go on from, None if there is none."""
        self.writer.wait()
        self.world.barrier()  # no rank lists the folder while rank 0 still changes it
        back = self._newest()
        if back is None:
            return None
        self._verify(back)
        back.load_weights(self.engine)
        back.load_state(self.engine)
        self.passed_over += done - back.step
        self.times_back += 1
        self.monitor.streak = None
        if self.telemetry:
            self.telemetry.row({"kind": "restart", "step": back.step, "from": done, "why": "not finite", "passed_over": self.passed_over})
            say(f"warning: step {done}: loss or gradient not finite; going on from step {back.step} with the samples after this step")
        return back.step

    def _save(self, done: int, owed: bool) -> None:
        """Begin a checkpoint; `owed`: the evaluation that belongs to this step was put off."""
        began = time.monotonic()

        def beat() -> None:
            self.watchdog.beat("save", done - 1)

        beat()
        state = {"step": done, "config_hash": config_hash(self.config), "data_hash": self.data_hash, "seconds": self.seconds,
                 "passed_over": self.passed_over, "times_back": self.times_back, "precision": self.precision,
                 "evaluation_owed": owed}  # fmt: skip
        if self.world.main:
            self.folder.sync_metrics()
        self.writer.save(self.engine, state, beat)
        self.last_save = time.monotonic()
        self.monitor.pause(self.last_save - began)

    def _finish_saving(self, done: int) -> None:
        """Until the checkpoint of this step is whole on disk."""
        self.writer.wait(lambda: self.watchdog.beat("end", done - 1))
        self.world.barrier()

    def _evaluate(self, done: int) -> bool:
        """The row of an evaluation; false, and no row, if a stop came before it was through."""
        began = time.monotonic()

        def go_on() -> bool:
            self.watchdog.beat("evaluate", done - 1)
            return not self._asked()

        arguments = (self.engine, self.val, self.world, self.config.train.eval_batch, go_on)
        if (result := evaluate(*arguments)) is None:
            return False
        if self.engine.average:
            with self.engine.averaged():
                average = evaluate(*arguments)
            if average is None:
                return False
            result |= {f"ema_{key}": value for key, value in average.items() if key != "samples"}
        if self.telemetry:
            images = done * self.config.train.batch_size
            seen = self._compute(done) if self.config.train.progressive else {}
            self.telemetry.row({"kind": "eval", "step": done, "images": images, "final": done == self.schedule.total_steps,
                                "seconds": self.seconds, **seen, **result})  # fmt: skip
        self.monitor.pause(time.monotonic() - began)
        return True

    def _compute(self, done: int) -> dict[str, int]:
        """Exact training FLOPs and tokens of progressive training so far, which sees short sequences first."""
        scales, batch = len(self.config.tokenizer.patch_nums), self.config.train.batch_size
        steps = Counter(self.schedule.stage(step, scales)[0] for step in range(done))
        counts = {stage: count_flops(self.shape.shown(stage)) for stage in steps}
        return {"flops_exact": sum(n * batch * counts[stage].training for stage, n in steps.items()),
                "tokens": sum(n * batch * counts[stage].tokens for stage, n in steps.items())}  # fmt: skip

    def _diverged(self, done: int, verdict: str) -> int:
        if self.world.main:
            self.folder.set_status("diverged", f"step {done}: {verdict}; lower train.base_lr or use precision fp32", step=done)
        self.writer.wait()
        self.world.barrier()
        return EXIT_DIVERGED


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
    if run.config.exists() and config_hash(there := load(str(run.config))) != config_hash(config):
        raise UserError(f"{folder}: holds a run with another config ({difference(there, config)}); choose another folder or remove it")
    write_config(config, run.config)
    if not (folder / "status.json").exists():
        run.set_status("created")
    return run


def newest_checkpoint(folder: Path, step: int | None = None) -> tuple[Config, Checkpoint]:
    """Config and newest complete checkpoint of a run, or that of `step`."""
    run = RunFolder(folder)
    if not run.config.exists():
        raise UserError(f"{folder}: is not a run folder (no config.yaml)")
    found = checkpoints(run.checkpoints)
    if not found:
        raise UserError(f"{folder}: has no complete checkpoint; train it first")
    if step is not None and step not in (there := [c.step for c in found]):
        raise UserError(f"{folder}: has no checkpoint of step {step}; there are those of {', '.join(map(str, there))}")
    return load(str(run.config)), next(c for c in reversed(found) if step in (None, c.step))
