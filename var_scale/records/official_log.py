"""Runs of the official VAR trainer as records, from its log.txt or its TensorBoard folder.

Its console line marked "(val ...)" holds training numbers, so the output of the console is only
read for training values; log.txt and TensorBoard have the validation numbers. What it calls
validation drops a tenth of the labels, unlike the evaluation here.
"""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

from var_scale.cost.flops import count_flops
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.files import canonical_hash, require_content
from var_scale.records.cells import number, shown, whole
from var_scale.records.foreign import IMAGENET, foreign_record
from var_scale.records.record import CurvePoint, RunRecord
from var_scale.scales import PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024

SCHEDULES = {"256": PATCH_NUMS_256, "512": PATCH_NUMS_512, "1024": PATCH_NUMS_1024}
ARGUMENT = re.compile(r"^  (\w+) +: (\S+)$", re.MULTILINE)
"""A line of the arguments that the console shows."""
EPOCH = re.compile(
    r"\[ep(\d+)\] +\(training \) +Lm: (\S+) \([^)]*\), Lt: (\S+) \([^)]*\), +Acc m&t: (\S+) (\S+),"
)
"""The line of the console at the end of an epoch, which is counted from 0."""
DEFAULT_NAME, OUTPUT = "text", "local_output"
"""Name of a run and of its output folder where the command of the official trainer gives none."""
NOT_FINITE = re.compile(r"(?<=[:,\[(] )([-+]?(?:inf|nan))(?=[,}\])])")
Epochs = dict[int, dict[str, Any]]
"""Numbers of each epoch by their official names."""


def read_official_log(
    path: Path, train_samples: int = IMAGENET, train_values: bool = False
) -> RunRecord:
    """Read log.txt: a JSON head with the command line, then one line per epoch.

    With `train_values` the output of the console is read too, for its training numbers. Epochs that
    a resumed attempt repeated count as the later attempt has them.

    Raises:
        UserError: code `records.official-console` for the output of the console,
            `records.official-log` for anything else that is not such a file, has no epoch yet, or
            has a damaged command or row.
    """
    require_content(path)
    text = path.read_text(errors="replace")
    if "(training )" in text or "(val " in text:
        if train_values:
            return _read_console(path, text, train_samples)
        raise UserError(
            f"{path}: this is the output of the console, whose line marked (val) holds training "
            "numbers; give log.txt of the output folder, or its TensorBoard folder, or use "
            "--train-values to take training numbers",
            code="records.official-console",
        )
    try:
        head, end = json.JSONDecoder().raw_decode(text)
        command = str(head["cmd"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _bad(
            path,
            "it does not begin with a JSON object that has the command as cmd, as the log.txt of "
            "the official trainer does; give that file, or a folder of runs",
        ) from None
    flags = dict(re.findall(r"--(\w+)[= ]([^\s]+)", command))
    if "depth" not in flags:
        raise _bad(path, "the command of this run has no --depth; add it to the command")
    shape = _shape(path, flags)
    epochs, total = _rows(path, text, end)
    name = str(head.get("name") or "")
    if name in ("", DEFAULT_NAME):
        name = f"official-d{shape.depth}-{output_folder(path).name}"
    return _record(path, shape, flags, epochs, total, name, train_samples)


def _read_console(path: Path, text: str, train_samples: int) -> RunRecord:
    """The run in the output of the console: its training numbers, rounded to 3 digits.

    Every attempt prints its arguments; attempts that reached no epoch do not count.

    Raises:
        UserError: code `records.official-console` if the output has no epoch, no arguments, or
            attempts of different runs.
    """
    attempts = [
        (dict(ARGUMENT.findall(part)), list(EPOCH.finditer(part)))
        for part in re.split(r"^=+ +RESTART ", text, flags=re.MULTILINE)
    ]
    names = ("depth", "pn", "glb_batch_size", "ep", "tblr", "ac", "wpe", "saln")
    runs = [tuple(given.get(name, "") for name in names) for given, epochs in attempts if epochs]
    if not runs or len(set(runs)) > 1 or not all(runs[0][:4]):
        raise UserError(
            f"{path}: it has {len(set(runs))} runs with epochs, or one without its arguments; give "
            "the output of one run from its start",
            code="records.official-console",
        )
    epochs: Epochs = {}
    for _, found in attempts:
        for match in found:
            values = dict(
                zip(("L_mean", "L_tail", "acc_mean", "acc_tail"), match.groups()[1:], strict=True)
            )
            epochs[int(match[1]) + 1] = values
    given = {name: value for name, value in zip(names, runs[0], strict=True) if value}
    flags = given | {"bs": given["glb_batch_size"]}
    shape = _shape(path, flags)
    name = f"official-d{shape.depth}-{path.stem}"
    return _record(path, shape, flags, epochs, _total(path, flags), name, train_samples, "")


def _bad(path: Path, what: str) -> UserError:
    """The error about a file of the official trainer."""
    return UserError(f"{path}: {what}", code="records.official-log")


def _rows(path: Path, text: str, start: int) -> tuple[Epochs, int]:
    """The rows of the epochs after the head, which ends at `start`, and the number of epochs of the
    run. A row that a kill has cut is none, also where the next attempt wrote on in its line.

    Python prints inf and nan, such as the gradient norm of an epoch whose loss scale was too large,
    in a form that it does not read again.
    """
    epochs: Epochs = {}
    total = 0
    first = text.count("\n", 0, start) + 1
    for place, written in enumerate(text[start:].split("\n"), first):
        line = NOT_FINITE.sub(r"'\1'", written.strip())
        parts = [line] if _row(line) else [f"{{{part}" for part in line.split("{")[1:]]
        for row in filter(None, map(_row, parts)):
            found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", str(row["ep"]))
            if not found or not 1 <= int(found[1]) <= int(found[2]):
                raise _bad(
                    path,
                    f"line {place}: ep is {shown(row['ep'])}, not an epoch and their number such "
                    "as 3/30; correct the line",
                )
            epochs[int(found[1])], total = row, int(found[2])
    if not epochs:
        raise _bad(path, "this run has no whole epoch yet; wait for one, or leave the run out")
    return epochs, total


def _row(text: str) -> dict[str, Any] | None:
    """The dict that a row is; None for anything else."""
    try:
        row = ast.literal_eval(text) if text.startswith("{") else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return row if isinstance(row, dict) and "ep" in row else None


def output_folder(path: Path) -> Path:
    """The folder that names a run: the one that the user chose for the output of the trainer.

    Args:
        path: log.txt, the output folder, or a TensorBoard folder in it.
    """
    folder = path.parent if path.is_file() else path
    if path.is_dir() and not (path / "log.txt").exists():
        folder = _events_folder(path)
    folder = folder.resolve()
    while folder.name == OUTPUT or folder.name.startswith("tb-"):
        folder = folder.parent
    return folder


def _events_folder(folder: Path) -> Path:
    """The TensorBoard folder of the official trainer in `folder`, or `folder`."""
    parents = [found.parent for found in folder.glob("**/events.out.tfevents.*")]
    return next((parent for parent in parents if "tb-VARd" in str(parent)), folder)


def read_official_tensorboard(folder: Path, train_samples: int = IMAGENET) -> RunRecord:
    """Read a TensorBoard folder of the official trainer.

    Depth, schedule, batch and epochs are in its name (tb-VARd16__pn1_2...__b768ep200...).

    Raises:
        UserError: code `records.official-tensorboard`.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    inner = _events_folder(folder)
    pattern = r"tb-VARd(\d+)__pn([\d_-]+)__b(\d+)ep(\d+)\D*lr([\d.e-]+?)wd"
    if not (match := re.search(pattern, inner.resolve().name)):
        raise UserError(
            f"{inner}: this is not a TensorBoard folder of the official trainer, whose name "
            "contains depth, batch and epochs",
            code="records.official-tensorboard",
        )
    flags = dict(zip(("depth", "pn", "bs", "ep", "tblr"), match.groups(), strict=True))
    events = EventAccumulator(str(inner), {"scalars": 0})
    events.Reload()
    epochs: Epochs = {}
    for name in ("vL_mean", "vL_tail", "vacc_mean", "vacc_tail", "L_mean"):
        tag = f"AR_ep_loss/{name}"
        for event in events.Scalars(tag) if tag in events.Tags()["scalars"] else ():
            epochs.setdefault(event.step, {})[name] = event.value
    if not epochs:
        raise UserError(
            f"{inner}: it has no AR_ep_loss; give the TensorBoard folder of the official trainer",
            code="records.official-tensorboard",
        )
    shape = _shape(inner, flags)
    name = f"official-d{shape.depth}-{output_folder(inner).name}"
    return _record(inner, shape, flags, epochs, _total(inner, flags), name, train_samples)


def _shape(path: Path, flags: dict[str, str]) -> ModelShape:
    """The model of an official command line."""
    sides = flags.get("pn", "256")
    shared = flags.get("saln", "0") in ("1", "True", "true")
    try:
        schedule = SCHEDULES.get(sides) or tuple(map(whole, re.split(r"[_-]", sides)))
        return ModelShape.official(whole(flags["depth"]), schedule, shared_aln=shared)
    except (ValueError, UserError) as error:
        given = ", ".join(f"--{key}={flags[key]}"[:60] for key in ("depth", "pn") if key in flags)
        raise _bad(
            path,
            f"the command of this run has {given}, which is no model ({error}); correct the "
            "command",
        ) from None


def _total(path: Path, flags: dict[str, str]) -> int:
    """The number of epochs in a command line."""
    try:
        if (total := whole(flags["ep"])) > 0:
            return total
    except ValueError:
        pass
    raise _bad(path, f"ep is {shown(flags['ep'])}, not a number of epochs; correct the command")


def _numbers(path: Path, flags: dict[str, str]) -> tuple[int, float, float]:
    """The batch size, the peak learning rate, and the share of it at the end of the run."""
    try:
        batch, end = whole(flags.get("bs", "768")), number(flags.get("wpe", "0.01"))
        peak = whole(flags.get("ac", "1")) * number(flags.get("tblr", "1e-4")) * batch / 256
        if batch > 0 and 0 < peak < math.inf and 0 <= end < math.inf:
            return batch, peak, end
    except ValueError:
        pass
    names = ("bs", "ac", "tblr", "wpe")
    given = ", ".join(f"--{key}={flags[key]}"[:60] for key in names if key in flags)
    raise _bad(
        path,
        f"the command of this run has {given}, which gives no batch size or learning rate; correct "
        "the line with the command",
    )


def _checked(path: Path, epochs: Epochs, mark: str) -> dict[int, dict[str, float]]:
    """The numbers of each epoch as floats; no evaluation is 999 or missing."""
    evaluation = [f"{mark}{key}" for key in ("L_mean", "L_tail", "acc_mean", "acc_tail")]
    found: dict[int, dict[str, float]] = {}
    for epoch, row in sorted(epochs.items()):
        values = found[epoch] = {}
        for key in {"L_mean", "lr", *evaluation}:
            if (value := row.get(key)) is not None:
                try:
                    values[key] = number(str(value))
                except ValueError as error:
                    raise _bad(path, f"epoch {epoch}: {key}: {error}; correct the row") from None
        lacks = [key for key in evaluation if key not in values]
        if lacks and values.get(evaluation[0], 999) != 999:
            raise _bad(path, f"epoch {epoch} has no {lacks[0]}; correct the row")
    return found


def _end(epochs: dict[int, dict[str, float]], total: int, lost: list[int]) -> tuple[str, str]:
    """State and reason of a run: the last rows decide, because an attempt or a smaller loss scale
    may recover from a loss that is not finite.

    Args:
        lost: epochs with a validation loss that is not finite, after the last finite one.
    """
    done, since = max(epochs), 0
    for epoch in sorted(epochs, reverse=True):
        if math.isfinite(epochs[epoch].get("L_mean", 0)):
            break
        since = epoch
    if since:
        return "diverged", f"the loss is not finite from epoch {since} on"
    if done != total:
        return "running", f"{done} of {total} epochs"
    if lost:
        return "diverged", f"the validation loss is not finite from epoch {lost[0]} on"
    return "complete", ""


def _record(
    path: Path,
    shape: ModelShape,
    flags: dict[str, str],
    epochs: Epochs,
    total: int,
    name: str,
    train_samples: int,
    mark: str = "v",
) -> RunRecord:
    """Validation numbers count at the epochs that validate: every tenth and the last.

    Args:
        mark: prefix of the numbers: v for validation, empty for training.
    """
    loss, last = f"{mark}L_mean", f"{mark}L_tail"
    batch, peak, last_share = _numbers(path, flags)
    per_epoch = -(-train_samples // batch) * batch
    flops, done = count_flops(shape), max(epochs)
    curve: list[CurvePoint] = []
    lost: list[int] = []
    numbers = _checked(path, epochs, mark)
    for epoch, row in numbers.items():
        # Before the first validation the trainer logs 999, between validations the last value.
        if row.get(loss, 999) != 999 and (epoch % 10 == 0 or epoch == total or not mark):
            losses = [row[last], row[loss]]
            if not all(map(math.isfinite, losses)):
                lost.append(epoch)
                continue
            lost.clear()
            errors = [1 - row[f"{mark}{key}"] / 100 for key in ("acc_tail", "acc_mean")]
            compute = float(epoch * per_epoch * flops.training)
            curve.append(CurvePoint(epoch * per_epoch // batch, compute, *losses, *errors))
    # TensorBoard has no rates; at the end of a run the rate is the share `wpe` of the peak.
    ended = math.nan
    if rate := numbers[done].get("lr"):
        ended = rate / peak
    elif done == total:
        ended = last_share
    state, reason = _end(numbers, total, lost)
    return foreign_record(
        shape,
        done * per_epoch,
        curve,
        bool(curve) and curve[-1].step == total * per_epoch // batch,
        name=name,
        state=state,
        reason=reason,
        final_lr_fraction=ended,
        config_hash=canonical_hash(flags),
        unique_tokens=train_samples * flops.tokens,
        # Training numbers are the means of five batches of the last epoch.
        **({} if mark else {"split": "training", "eval_samples": 5 * batch}),
    )
