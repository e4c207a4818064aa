"""The loop of one training run, from its newest checkpoint to its last evaluation."""

from __future__ import annotations

import secrets
import time

from var_scale.config.load import config_hash, load
from var_scale.run_folder import EXIT_DIVERGED, EXIT_REQUEUE, RunFolder, State
from var_scale.scales import cells
from var_scale.train.assemble import Parts, assemble, newest_agreed, verify_shared
from var_scale.train.evaluate import evaluate
from var_scale.train.monitor import Monitor, Window
from var_scale.train.recorder import Recorder
from var_scale.train.save import CheckpointWriter
from var_scale.train.stopping import StopRequest
from var_scale.train.watchdog import Watchdog
from var_scale.train.world import World

STOP_SECONDS = 2.0
"""Seconds between two agreements of the ranks on stop requests, unless a step takes longer."""


def open_run(folder: RunFolder, world: World, stop: StopRequest) -> Run:
    """The run of a folder, ready to train: its parts, its watchdog, and its stop requests."""
    watchdog = Watchdog(folder, world, load(str(folder.config)).train.hang_seconds)
    stop.watch()
    try:
        return Run(assemble(folder, world, lambda: watchdog.beat("start", 0)), watchdog, stop)
    except BaseException:
        watchdog.close()
        stop.close()
        raise


class Run:
    """One attempt of a run on one rank. `train` brings it to its end or to a stop."""

    def __init__(self, parts: Parts, watchdog: Watchdog, stop: StopRequest):
        self.parts, self.watchdog, self.stop = parts, watchdog, stop
        self.config, self.world, self.folder = parts.config, parts.world, parts.folder
        self.stepper, self.engine = parts.stepper, parts.stepper.engine
        self.total, c = parts.stepper.schedule.total_steps, parts.config.train
        state = parts.resume.state if parts.resume else {}
        self.start = parts.resume.step if parts.resume else 0
        self.skipped_samples = int(state.get("skipped_samples", 0))
        """how many steps' worth of the sample stream rollbacks have skipped"""
        self.rollbacks = int(state.get("rollbacks", 0))
        self.evaluation_pending = bool(state.get("evaluation_pending", False))
        self.check_every = 1
        """steps between two agreements on stop requests"""
        self.kept = {*c.keep_steps, *(max(1, round(share * self.total)) for share in c.keep_at)}
        """steps whose checkpoints stay"""
        # The same on all ranks, and another one at every start: the ranks write into one temporary
        # folder, and never into that of an attempt that was killed.
        attempt = f"{self.world.agree(secrets.randbits(31)):08x}"
        self.writer = CheckpointWriter(
            self.folder.checkpoints,
            self.world.rank,
            self.world.size,
            attempt,
            c.keep_checkpoints,
            self.kept,
        )
        lengths = cells(self.config.tokenizer.patch_nums)
        self.monitor = Monitor(self.world, lengths, scaled=parts.precision == "fp16")
        self.recorder: Recorder | None = None
        self.last_save = time.monotonic()

    def close(self) -> None:
        """Stop the threads and finish the mirrors of the metrics."""
        self.watchdog.close()  # first: a mirror may be slow, but it does not hang the run
        self.stop.close()
        self.parts.close()
        if self.recorder:
            self.recorder.close()

    def train(self) -> int:
        """Train to the end (returns 0), to a stop after saving (85), or to divergence (3).

        At every step the row comes first, then the evaluation, then the checkpoint. A checkpoint
        therefore means that all rows up to it exist, except for an evaluation that a stop
        postponed (`evaluation_pending`); the next attempt starts with it.
        """
        if self.world.main:
            self.recorder = Recorder(self.parts)
            self.recorder.attempt(self.start, self.evaluation_pending)
        c, done = self.config.train, self.start
        evaluations = {round(self.total * k / c.evals) for k in range(1, c.evals + 1)}
        pending = self.evaluation_pending and not self._evaluate(self.start)
        stop = pending
        while done < self.total and not stop:
            self._step(done)
            done += 1
            save = done == self.total or done in self.kept
            row = done == self.total or done % self.config.log.every == 0
            # A stop must not wait for the next row, which may be minutes away.
            stop = not row and done % self.check_every == 0 and self._asked_to_stop()
            if row or stop:
                window = self._exchange(done)
                stop, save = stop or window.stop, save or window.save
                if verdict := self._verdict(window):
                    return self._diverged(done, verdict)
                if window.bad and c.nonfinite == "rollback":
                    if (back := self._roll_back(done)) is None:
                        return self._diverged(
                            done, "no finite loss or gradient before the first checkpoint"
                        )
                    # A request to stop is still noted; the next exchange finds it.
                    done, stop = back, False
                    continue
            pending = done in evaluations and (stop or not self._evaluate(done))
            stop = stop or pending
            if stop or save:
                self._save(done, pending)
        self._finish_saving(done)
        stopped = done < self.total or pending
        if self.world.main:
            saved = time.monotonic() - self.stop.since
            reason = f"{self.stop.reason} (saved {saved:.1f} s later)" if stopped else ""
            state: State = "preempted" if stopped else "complete"
            self.folder.set_status(state, reason, cause="stopped" if stopped else "", step=done)
        return EXIT_REQUEUE if stopped else 0

    def _step(self, step: int) -> None:
        """One optimiser step."""
        if self.recorder and self.recorder.activations:
            # Only the last step before a row is measured, because only it is shown.
            self.recorder.activations.armed = (step + 1) % self.config.log.every == 0
        result = self.stepper.step(
            step, step + self.skipped_samples, lambda phase: self.watchdog.beat(phase, step)
        )
        self.monitor.add(result.losses, result.ce_BL, result.stats)
        self.monitor.data_seconds += result.data_seconds

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop. Every rank calls it: ranks that disagreed would wait
        for each other forever in the next exchange."""
        asked = bool(self.world.largest(bool(self.stop.reason)))
        if asked:
            self.stop.note("another rank was asked to stop")
        return asked

    def _exchange(self, done: int) -> Window:
        """The facts of the steps since the last row, the same on all ranks; rank 0 records them.

        This is the only place that reads the values of the steps: reading them after every step
        would make the device wait for the host.
        """
        self.watchdog.beat("exchange", done - 1)
        self.writer.check()
        # Rank 0's clock decides on a save: the ranks' clocks differ.
        due = time.monotonic() - self.last_save >= self.config.train.checkpoint_seconds
        window = self.monitor.look(stop=bool(self.stop.reason), save=due)
        if window.stop:
            self.stop.note("another rank was asked to stop")
        # From rank 0's clock, so that all ranks ask each other after the same steps.
        self.check_every = max(1, int(STOP_SECONDS * window.steps / window.seconds))
        self.watchdog.beat("log", done - 1)
        if self.recorder:
            self.recorder.window(done, window, self.writer.stall_seconds)
        return window

    def _verdict(self, window: Window) -> str:
        """Why the run ends as diverged; empty if it continues."""
        c = self.config.train
        if window.bad and c.nonfinite == "stop":
            return f"{window.bad} of {window.steps} steps had no finite loss or gradient"
        if window.streak >= c.nonfinite_limit:
            return f"{window.streak} steps in a row had no finite loss or gradient"
        if window.bad and c.nonfinite == "rollback" and self.rollbacks >= c.nonfinite_limit:
            return f"training was already rolled back {self.rollbacks} times"
        return ""

    def _roll_back(self, done: int) -> int | None:
        """Load the newest checkpoint and skip the samples from there to here.

        Returns the step to continue from; None if there is no checkpoint. Training on the same
        samples again would most likely end in the same way.
        """
        self.writer.wait()
        self.world.barrier()  # no rank lists the folder while rank 0 still changes it
        back = newest_agreed(self.folder, self.world)
        if back is None:
            return None
        verify_shared(back, self.world)
        back.load_weights(self.engine)
        back.load_state(self.engine)
        self.skipped_samples += done - back.step
        self.rollbacks += 1
        self.monitor.streak = None  # the bad steps no longer count
        if self.recorder:
            self.recorder.rolled_back(back.step, done, self.skipped_samples)
        return back.step

    def _save(self, done: int, evaluation_pending: bool) -> None:
        """Start writing a checkpoint; training continues while it is written."""
        began = time.monotonic()

        def beat() -> None:
            self.watchdog.beat("save", done - 1)

        beat()
        state = {
            "step": done,
            "config_hash": config_hash(self.config),
            "data_hash": self.parts.data_hash,
            # Rank 0 writes the state; the others' value is not used.
            "seconds": self.recorder.seconds if self.recorder else 0.0,
            "skipped_samples": self.skipped_samples,
            "rollbacks": self.rollbacks,
            "precision": self.parts.precision,
            "evaluation_pending": evaluation_pending,
        }
        if self.world.main:
            self.folder.sync_metrics()
        self.writer.save(self.engine, state, beat)
        self.last_save = time.monotonic()
        self.monitor.pause(self.last_save - began)

    def _finish_saving(self, done: int) -> None:
        """Wait until the checkpoint of this step is complete on disk."""
        self.writer.wait(lambda: self.watchdog.beat("end", done - 1))
        self.world.barrier()

    def _evaluate(self, done: int) -> bool:
        """Evaluate and record; false, and no row, if a stop interrupted it."""
        began, faults = time.monotonic(), self.stepper.faults

        def go_on() -> bool:
            self.watchdog.beat("evaluate", done - 1)
            if faults:
                faults.in_evaluation()
            return not self._asked_to_stop()

        arguments = (
            self.engine,
            self.parts.val,
            self.world,
            self.config.train.eval_batch,
            go_on,
        )
        if (result := evaluate(*arguments)) is None:
            return False
        if self.engine.average:
            with self.engine.averaged():
                average = evaluate(*arguments)
            if average is None:
                return False
            result |= {f"ema_{key}": value for key, value in average.items() if key != "samples"}
        if self.recorder:
            self.recorder.evaluation(done, result)
        self.monitor.pause(time.monotonic() - began)
        return True

    def _diverged(self, done: int, verdict: str) -> int:
        """Record why the run ends, and let a save in the background finish."""
        if self.world.main:
            reason = f"step {done}: {verdict}; lower train.base_lr or set train.precision=fp32"
            self.folder.set_status("diverged", reason, cause="nonfinite", step=done)
        self.writer.wait()
        self.world.barrier()
        return EXIT_DIVERGED
