"""`var-scale bench campaign`: measures a machine stage by stage within a bounded time.

Every stage is a process of its own. After each of them DIR/campaign.json is written, so that a call
that is cut off loses one stage at most, and the next call with the same DIR continues.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from var_scale.bench.train import require_checkout
from var_scale.errors import UserError
from var_scale.files import canonical_hash, read_json, remove_tree, sha256_file, write_json
from var_scale.locks import lock
from var_scale.progress import duration, say
from var_scale.train.stopping import process_fields
from var_scale.train.telemetry import commit

NAME = "campaign.json"
LEAST = 20.0
"""Seconds without which no stage is started."""
GRACE = 10.0
"""Seconds between the request to stop and the kill of a stage that takes too long."""
TAIL = 2500
"""Characters of a stage's output that are kept."""
HEAD = ["stage", "value", "predicted", "measured", "target", "verdict"]
"""What `table` returns."""
TOO_LONG = "too long"
OTHER_MACHINE = ("it needs a GPU", "it is for machines without a GPU")
ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


class Value(NamedTuple):
    """A number that a stage measures."""

    name: str
    read: Callable[[Any], float]
    """Takes it from the JSON that the stage's command wrote."""
    predicted: float | None = None
    target: float | None = None
    at_least: bool = True
    """Whether the target is a lower limit."""


class Stage(NamedTuple):
    """One measurement."""

    name: str
    seconds: int
    """Its time limit."""
    command: str
    """`var-scale ...` or `python ...`; {out} is the JSON file for its results, {work} a folder for
    its other files, {checkout} the official code."""
    question: str
    values: tuple[Value, ...] = ()
    gpu: bool = True
    """Whether it runs only on a GPU; otherwise only where there is none."""


def campaign(
    stages: Sequence[Stage],
    folder: Path,
    seconds: float,
    checkout: Path | None = None,
    only: Sequence[str] = (),
) -> list[Row]:
    """Run the stages of this kind of machine in their order until the time is over.

    A stage that `folder` holds as complete for this code and device is skipped. Those that failed
    follow after the others, and those that took too long if there is more time for them.

    Args:
        seconds: time for the whole call. A stage gets the rest of it if its own limit is longer.
        checkout: the official code; without it, stages that need it are left out.
        only: names of stages; all if empty.

    Returns:
        The rows of `folder`, also those of other code and devices.

    Raises:
        UserError: an unknown name, `checkout` is not the official code, or another campaign is
            running in `folder`.
    """
    if unknown := set(only) - {stage.name for stage in stages}:
        raise UserError(
            f"--only {min(unknown)}: no stage has this name; use some of "
            f"{', '.join(stage.name for stage in stages)}",
            code="bench.campaign-stage",
        )
    if checkout:
        require_checkout(checkout, "trainer.py")
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock") as free:
        if not free:
            raise UserError(
                f"{folder}: another campaign is running here; wait for it or use another folder",
                code="bench.campaign-running",
            )
        rows, (device, gpu) = known(folder), this_device()
        code = version()
        about = {"code": code, "commit": commit(), "device": device}
        say(f"{device}, code {code}: the stages that are missing, for at most {duration(seconds)}")
        asked = [stage for stage in stages if not only or stage.name in only]
        mine = {row["stage"]: row for row in rows if (row["code"], row["device"]) == (code, device)}
        todo = []
        for stage in asked:
            if obstacle := why_not(stage, gpu, checkout, mine.get(stage.name)):
                if only or obstacle not in OTHER_MACHINE:
                    say(f"{stage.name} is left out: {obstacle}")
            else:
                todo.append(stage)
        todo.sort(key=lambda stage: stage.name in mine)
        for place, stage in enumerate(todo):
            # A stage that does not stop when asked takes the grace twice.
            left = seconds - (time.monotonic() - began) - 2 * GRACE
            old, limit = mine.get(stage.name), min(stage.seconds, left)
            if left < LEAST:
                say(f"no time left for {', '.join(s.name for s in todo[place:])}; call this again")
                break
            if old and old["state"] == TOO_LONG and limit <= old["limit"]:
                say(f"{stage.name} is left out: {duration(old['limit'])} were too few before")
                continue
            say(f"{place + 1}/{len(todo)} {stage.name}: {stage.question}")
            row = run(stage, folder, limit, checkout, go_on=old is not None)
            row |= about
            say(f"    {row['state']} after {duration(row['seconds'])}: {last_line(row)}")
            if old and old["result"] and not row["result"]:
                continue  # a part of the results is better than none
            rows = [other for other in rows if other is not old] + [row]
            write_json(folder / NAME, {"version": 1, "rows": rows})
    return rows


def why_not(stage: Stage, gpu: bool, checkout: Path | None, row: Row | None) -> str:
    """Why a stage is not to be run; empty if it is. `row`: its row of this code and device."""
    if stage.gpu != gpu:
        return OTHER_MACHINE[gpu]
    if not checkout and "{checkout}" in stage.command:
        return "it compares with the official code, whose folder --checkout names"
    return "it is complete for this code and device" if row and row["state"] == "ok" else ""


def known(folder: Path) -> list[Row]:
    """The rows that earlier calls measured."""
    path = folder / NAME
    return list(read_json(path, "campaign")["rows"]) if path.exists() else []


@cache
def this_device() -> tuple[str, bool]:
    """Name of the device, and whether it is a GPU. Asked in another process, because CUDA would
    keep memory of the GPU while the stages run."""
    text = (
        "import torch; from var_scale.machine import processor_name; "
        "gpu = torch.cuda.is_available(); "
        "print(int(gpu), torch.cuda.get_device_name() if gpu else f'CPU ({processor_name()})')"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    gpu, _, name = done.stdout.strip().splitlines()[-1].partition(" ")
    return name, gpu == "1"


def version() -> str:
    """A hash of the code, which other files of the checkout do not change."""
    import var_kernels
    import var_scale

    roots = [Path(str(package.__file__)).parent for package in (var_scale, var_kernels)]
    files = [path for root in roots for path in sorted(root.rglob("*.py"))]
    return canonical_hash([sha256_file(path) for path in files])[:12]


def run(
    stage: Stage, folder: Path, limit: float, checkout: Path | None, go_on: bool = False
) -> Row:
    """Run one stage for at most `limit` seconds. Whatever happens to it becomes a row.

    `go_on`: keep the files of an earlier attempt, such as a part of a study.
    """
    work = folder.resolve() / stage.name
    if not go_on:
        remove_tree(work)
    work.mkdir(exist_ok=True)
    out, log = work / "result.json", work / "log.txt"
    out.unlink(missing_ok=True)
    places = {"{out}": out, "{work}": work, "{checkout}": checkout and checkout.resolve()}
    words = shlex.split(stage.command)
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    module = ["-m", "var_scale.cli"] if words[0] == "var-scale" else []
    began = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, *module, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT if (ROOT / "tests").is_dir() else None,
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            stop(child)
            code = None
        except BaseException:
            stop(child)
            raise
    result: Any = None
    with suppress(UserError):  # none, or cut off
        result = json.loads(shared(json.dumps(read_json(out)), work))
    state = TOO_LONG if code is None else "ok" if code == 0 else f"failed ({code})"
    if state == "ok" and "{out}" in stage.command and result is None:
        state = "failed (no result)"
    return {
        "stage": stage.name,
        "state": state,
        "seconds": round(time.monotonic() - began, 1),
        "limit": round(limit, 1),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": stage.command,
        "question": stage.question,
        "tail": shared(log.read_text(errors="replace"), work)[-TAIL:],
        "result": result,
    }


def shared(text: str, work: Path) -> str:
    """A text that can be published: without the place of this machine's folder."""
    return text.replace(str(work), "{work}")


def stop(child: subprocess.Popen[bytes]) -> None:
    """Ask a stage to stop, then kill it with all that it started, also in other sessions."""
    family = descendants(child.pid)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    for pid in {*family, *descendants(child.pid)}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)


def descendants(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := process_fields(int(folder.name)):
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for one in found:  # which grows
        found += parents.get(one, [])
    return found


def last_line(row: Row) -> str:
    """The end of a stage's output."""
    lines = [line for line in row["tail"].splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "no output"


def table(stages: Iterable[Stage], rows: Sequence[Row], width: int = 0) -> list[list[str]]:
    """Prediction, measurement, target and verdict of every value of every stage.

    Args:
        rows: of one device. Of several rows of a stage, the newest counts.
        width: characters to which a reason why there is no value is cut; 0 for all.
    """
    lines = []
    for stage in stages:
        row = newest(rows, stage.name)
        state = row["state"] if row else "not run"
        if row and state != "ok":
            state = f"{state}: {last_line(row)}"[: width or None]
        for value in stage.values or (Value("passes", lambda _: 1.0),):
            measured = number(value, row["result"]) if row and stage.values else None
            if measured is None:
                cells = ["no such value" if stage.values and state == "ok" else state, ""]
            elif state == "ok":
                cells = [short(measured), verdict(value, measured)]
            else:  # a part of the results
                cells = [short(measured), state]
            predicted = "" if value.predicted is None else short(value.predicted)
            sign = "≥" if value.at_least else "≤"
            target = "" if value.target is None else f"{sign} {short(value.target)}"
            lines.append([stage.name, value.name, predicted, cells[0], target, cells[1]])
    return lines


def newest(rows: Sequence[Row], stage: str) -> Row | None:
    """The newest row of a stage."""
    found = [row for row in rows if row["stage"] == stage]
    return max(found, key=lambda row: row["date"]) if found else None


def number(value: Value, result: Any) -> float | None:
    """The value in a stage's result; None if it is not there."""
    try:
        return float(value.read(result))
    except (LookupError, TypeError, ValueError, StopIteration):
        return None


def verdict(value: Value, measured: float) -> str:
    """Whether the target is met, and how far the prediction was off."""
    parts = []
    if value.target is not None:
        met = measured >= value.target if value.at_least else measured <= value.target
        parts.append("met" if met else "MISSED")
    if value.predicted:
        off = 100 * (measured / value.predicted - 1)
        parts.append(f"{abs(off):.0f} % {'above' if off > 0 else 'below'} the prediction")
    return ", ".join(parts)


def short(value: float) -> str:
    """A number with three digits, or all digits before its point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show(stages: Sequence[Stage], rows: Sequence[Row]) -> None:
    """Print the table of this machine, in less than 12,000 characters."""
    device, gpu = this_device()
    mine = [row for row in rows if row["device"] == device]
    lines = [HEAD, *table([s for s in stages if s.gpu == gpu], mine, width=60)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    for line in lines:
        cells = zip(line, widths, strict=True)
        say("  ".join(cell.ljust(size) for cell, size in cells).rstrip())


def show_stages(stages: Sequence[Stage]) -> None:
    """Print what would be run."""
    for stage in stages:
        machine = "GPU" if stage.gpu else "CPU"
        say(f"{stage.name:22} {machine} {stage.seconds:4} s  {stage.question}\n    {stage.command}")
