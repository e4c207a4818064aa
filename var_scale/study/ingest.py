"""Runs from elsewhere as records: wandb (its server, its files of offline runs), the official trainer's log.txt and TensorBoard files, CSV.

The official trainer's console line marked "(val ...)" holds training numbers: console logs are refused, log.txt and TensorBoard have the
validation numbers. What it calls validation drops a tenth of the labels, unlike ours.
"""

from __future__ import annotations

import ast
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from var_scale.cost.flops import FlopCount, count_flops
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.files import canonical_hash
from var_scale.scales import PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024
from var_scale.study.record import METRICS, CurvePoint, RunRecord, read_run, read_runs_csv, read_study

IMAGENET, VALIDATION = 1281167, 50000
SCHEDULES = {"256": PATCH_NUMS_256, "512": PATCH_NUMS_512, "1024": PATCH_NUMS_1024}


def read_records(source: str, mapping: dict[str, str] | None = None, train_samples: int = IMAGENET) -> list[RunRecord]:
    """The runs of a source: a run folder, a study's folder, a wandb offline folder or .wandb file, `wandb:ENTITY/PROJECT[/GROUP]`, the
    official trainer's output folder, log.txt or TensorBoard folder, a CSV of records, or with `mapping` (field of a record: column) any
    CSV.

    `train_samples`: training images of official runs. UserError: none of these, or not readable as such.
    """
    if source.startswith("wandb:"):
        return read_wandb_project(source.removeprefix("wandb:"))
    path = Path(source)
    if path.suffix == ".csv":
        return read_mapped_csv(path, mapping) if mapping else read_runs_csv(path)
    if path.suffix == ".wandb":
        return [read_wandb_file(path)]
    if path.is_file():
        return [read_official_log(path, train_samples)]
    if not path.is_dir():
        raise UserError(f"{source}: does not exist; give a folder or file of runs, or wandb:ENTITY/PROJECT")
    if (path / "run.json").exists():
        return [read_run(path)]
    if any(path.glob("*/run.json")):
        return read_study(path)
    if files := sorted(path.glob("**/*.wandb")):
        return merge_lives([read_wandb_file(file) for file in files])
    if (path / "log.txt").exists():
        return [read_official_log(path / "log.txt", train_samples)]
    if any(path.glob("**/events.out.tfevents.*")):
        return [read_official_tensorboard(path, train_samples)]
    raise UserError(f"{source}: no runs here; give a run or study folder, a wandb folder, or the official trainer's output folder")


def read_all(sources: Sequence[str], mapping: dict[str, str] | None = None, train_samples: int = IMAGENET) -> list[RunRecord]:
    """The runs of several sources, smallest first. UserError for a run that comes twice."""
    found: dict[str, tuple[str, RunRecord]] = {}
    for source in sources:
        for record in read_records(source, mapping, train_samples):
            if record.name in found and found[record.name][1] != record:
                raise UserError(f"run {record.name} is in {found[record.name][0]} and, with other numbers, in {source}; leave one out")
            found[record.name] = (source, record)
    return sorted((record for _, record in found.values()), key=lambda run: (run.params_paper, run.seed, run.name))


def _record(shape: ModelShape, *, images: int, curve: Sequence[CurvePoint], **values: Any) -> RunRecord:
    """A record of a shape's run: its counts, its compute, its losses those of the last point of the curve."""
    params, flops = count_params(shape), count_flops(shape)
    last = dict(zip(METRICS, curve[-1][2:], strict=True)) if curve else dict.fromkeys(METRICS, math.nan)
    plain: dict[str, Any] = {
        "depth": shape.depth, "seed": 0, "params_total": params.total, "params_paper": params.paper, "params_per_token": params.per_token,
        "images": images, "tokens": images * flops.tokens, "flops_exact": images * flops.training, "flops_6nd": images * flops.training_6nd,
        "flops_paper": images * flops.paper, **last, "loss_per_scale": (), "err_per_scale": (), "eval_samples": VALIDATION if curve else 0,
        "reason": "", "data_hash": "imagenet", "seconds": 0.0, "restarts": 0, "curve": tuple(curve), "unique_tokens": 0,
    }  # fmt: skip
    return RunRecord(**(plain | values))


# ---------------------------------------------------------------- the official trainer


def official_shape(command: str, where: Path) -> tuple[ModelShape, dict[str, str]]:
    """The model and the flags of an official command line. UserError without --depth."""
    flags = {name: value for name, value in re.findall(r"--(\w+)[= ]([^\s]+)", command)}
    if "depth" not in flags:
        raise UserError(f"{where}: its command has no --depth ({command[:80]!r}); give the official trainer's own log.txt")
    sides = flags.get("pn", "256")
    schedule = SCHEDULES[sides] if sides in SCHEDULES else tuple(int(side) for side in re.split(r"[_-]", sides))
    shared = flags.get("saln", "0") in ("1", "True", "true")
    return ModelShape.official(int(flags["depth"]), schedule, shared_aln=shared), flags


def read_official_log(path: Path, train_samples: int = IMAGENET) -> RunRecord:
    """The official trainer's log.txt: a JSON head with its command, then a line each epoch. Epochs that a resumed life did again count as
    the later life has them."""
    text = path.read_text(errors="replace")
    if "(training )" in text or "(val " in text:
        raise UserError(f"{path}: is the console's output, whose line marked (val) holds training numbers; give log.txt of the output "
                        "folder, or its TensorBoard folder")  # fmt: skip
    try:
        head, end = json.JSONDecoder().raw_decode(text)
        rows = [ast.literal_eval(line) for line in text[end:].splitlines() if line.strip().startswith("{")]
        shape, flags = official_shape(str(head["cmd"]), path)
        epochs = {int(str(row["ep"]).partition("/")[0]): row for row in rows}
        total = int(str(rows[-1]["ep"]).partition("/")[2])
    except (ValueError, SyntaxError, KeyError, IndexError, TypeError):
        raise UserError(f"{path}: is not the log.txt of the official trainer; give that file, or a folder of runs") from None
    return _official(shape, flags, epochs, total, str(head.get("name") or ""), train_samples)


def read_official_tensorboard(folder: Path, train_samples: int = IMAGENET) -> RunRecord:
    """The official trainer's TensorBoard folder; depth, schedule, batch and epochs are in its name (tb-VARd16__pn1_2...__b768ep200...)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    inner = next((found.parent for found in folder.glob("**/events.out.tfevents.*") if "tb-VARd" in str(found.parent)), folder)
    match = re.search(r"tb-VARd(\d+)__pn([\d_-]+)__b(\d+)ep(\d+)\D*lr([\d.e-]+?)wd", inner.resolve().name)
    if not match:
        raise UserError(f"{inner}: is not a TensorBoard folder of the official trainer, whose name tells depth, batch and epochs")
    depth, schedule, batch, total, lr = match.groups()
    flags = {"depth": depth, "pn": schedule, "bs": batch, "ep": total, "tblr": lr}
    events = EventAccumulator(str(inner), {"scalars": 0})
    events.Reload()
    epochs: dict[int, dict[str, Any]] = {}
    for name in ("vL_mean", "vL_tail", "vacc_mean", "vacc_tail", "L_mean"):
        tag = f"AR_ep_loss/{name}"
        for event in events.Scalars(tag) if tag in events.Tags()["scalars"] else ():
            epochs.setdefault(event.step, {})[name] = event.value
    if not epochs:
        raise UserError(f"{inner}: holds no AR_ep_loss; give the official trainer's TensorBoard folder")
    shape, _ = official_shape(f"--depth={depth} --pn={schedule}", inner)
    return _official(shape, flags, epochs, int(total), "", train_samples)


def _official(
    shape: ModelShape, flags: dict[str, str], epochs: dict[int, dict[str, Any]], total: int, name: str, train_samples: int
) -> RunRecord:
    """Epochs of an official run as a record; validation numbers count at the epochs where it validates, every tenth and the last."""
    batch = int(flags.get("bs", "768"))
    per_epoch = -(-train_samples // batch) * batch
    flops, done = count_flops(shape), max(epochs)
    curve = []
    for epoch in sorted(epochs):
        row = epochs[epoch]
        if row.get("vL_mean") not in (None, 999) and (epoch % 10 == 0 or epoch == total):
            errors = [1 - float(row[key]) / 100 for key in ("vacc_tail", "vacc_mean")]
            curve.append(CurvePoint(epoch * per_epoch // batch, float(epoch * per_epoch * flops.training), float(row["vL_tail"]),
                                    float(row["vL_mean"]), *errors))  # fmt: skip
    peak = int(flags.get("ac", "1")) * float(flags.get("tblr", "1e-4")) * batch / 256
    rate = epochs[done].get("lr")
    ended = float(rate) / peak if rate else (float(flags["wpe"]) if "wpe" in flags else 0.01) if done == total else math.nan
    at_the_end = curve if curve and curve[-1].step == total * per_epoch // batch else []
    record = _record(
        shape, images=done * per_epoch, curve=curve, name=name or f"official-d{shape.depth}",
        state="complete" if done == total else "running",
        reason="" if done == total else f"{done} of {total} epochs", final_lr_fraction=ended, config_hash=canonical_hash(flags),
        unique_tokens=train_samples * flops.tokens,
    )  # fmt: skip
    return record if at_the_end else _without_values(record)


def _without_values(record: RunRecord) -> RunRecord:
    from dataclasses import replace

    return replace(record, eval_samples=0, **dict.fromkeys(METRICS, math.nan))  # type: ignore[arg-type]


# ---------------------------------------------------------------- wandb


def read_wandb_file(path: Path) -> RunRecord:
    """A run that var-scale recorded with wandb, from the file of an offline run (run-ID.wandb)."""
    try:
        from wandb.proto import wandb_internal_pb2 as messages
    except ImportError:
        raise UserError("wandb is needed to read its files: pip install wandb") from None
    name, rows = "", list[dict[str, Any]]()
    config: dict[str, Any] = {}
    for data in _wandb_log(path):
        record = messages.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.display_name
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({**values, "_step": values.get("_step", record.history.step.num)})
    return _wandb_record(path.name, name, config, rows)


def _wandb_log(path: Path) -> Iterator[bytes]:
    """The messages of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, type of each piece) after a head of seven
    bytes. A file cut by a kill ends with its last whole message."""
    content = path.read_bytes()
    if content[:4] != b":W&B":
        raise UserError(f"{path}: is not a file of wandb")
    place, message, block = 7, b"", 32768
    while place + 7 <= len(content):
        left = block - place % block
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if kind == 0 or place + 7 + length > len(content):
            return
        message = (b"" if kind in (1, 2) else message) + content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield message


def read_wandb_project(name: str) -> list[RunRecord]:
    """The runs of ENTITY/PROJECT, or of one GROUP (a study) in it, from wandb's server, as the account of this machine sees them."""
    import wandb

    parts = name.split("/")
    if len(parts) not in (2, 3):
        raise UserError(f"wandb:{name}: give wandb:ENTITY/PROJECT, or wandb:ENTITY/PROJECT/STUDY")
    try:
        runs = wandb.Api().runs("/".join(parts[:2]), filters={"group": parts[2]} if len(parts) == 3 else None)
        runs = [run for run in runs if run.job_type != "summary"]  # a study's own summary beside its runs
        return merge_lives([_wandb_record(f"{name}/{run.id}", run.name, dict(run.config), list(run.scan_history())) for run in runs])
    except UserError:
        raise
    except Exception as error:  # wandb's errors of many kinds: no login, no such project, no connection
        raise UserError(f"wandb:{name}: {str(error).splitlines()[0]}") from None


def _wandb_record(where: str, name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> RunRecord:
    """Config and history rows (eval/loss_avg, train/lr, ...) of a run that var-scale recorded."""
    from var_scale.config.load import check, config_hash
    from var_scale.cost.from_config import shape_of

    tree = {key: value for key, value in config.items() if key in ("name", "data", "tokenizer", "model", "train", "engine", "log")}
    try:
        settings = check(tree, where)
    except UserError as error:
        raise UserError(f"{where}: was not recorded by var-scale ({error})") from None
    shape = shape_of(settings)
    flops: FlopCount = count_flops(shape)
    evaluations = [row for row in rows if "eval/loss_avg" in row]
    curve = [CurvePoint(int(row["_step"]), float(row.get("eval/flops_exact") or row["eval/images"] * flops.training),
                        *(math.nan if (value := row.get(f"eval/{metric}")) is None else float(value) for metric in METRICS))
             for row in evaluations]  # fmt: skip
    rates = [float(row["train/lr"]) for row in rows if row.get("train/lr")]
    final = bool(evaluations and evaluations[-1].get("eval/final"))
    images = int(evaluations[-1]["eval/images"]) if evaluations else max((int(row.get("train/images") or 0) for row in rows), default=0)
    record = _record(
        shape, images=images, curve=curve, name=name or settings.name, seed=settings.train.seed, state="complete" if final else "running",
        reason="" if final else "no final evaluation was recorded", final_lr_fraction=rates[-1] / max(rates) if rates else math.nan,
        config_hash=config_hash(settings), data_hash="", restarts=sum("restart/step" in row for row in rows),
        eval_samples=int(evaluations[-1].get("eval/samples") or 0) if evaluations else 0,
        seconds=float(max((row.get("eval/seconds") or 0 for row in evaluations), default=0.0)),
        unique_tokens=settings.train_samples * flops.tokens,
    )  # fmt: skip
    return record if final else _without_values(record)


def merge_lives(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Several files of one run, a life each: the one that came furthest stands for it, with the evaluations of all."""
    from dataclasses import replace

    runs: dict[str, list[RunRecord]] = {}
    for record in records:
        runs.setdefault(record.name, []).append(record)
    merged = []
    for name, lives in runs.items():
        if len({life.config_hash for life in lives}) > 1:
            raise UserError(f"run {name}: files with different configs; give those of one run")
        best = max(lives, key=lambda life: (life.state == "complete", life.images))
        points = {point.step: point for life in sorted(lives, key=lambda life: life.images) for point in life.curve}
        merged.append(replace(best, curve=tuple(points[step] for step in sorted(points)), restarts=len(lives) - 1))
    return merged


# ---------------------------------------------------------------- CSV


def read_mapped_csv(path: Path, mapping: dict[str, str]) -> list[RunRecord]:
    """Any CSV, a row a run: `mapping` says which column holds which field. Needed: depth and loss_avg or loss_last; images or tokens, which
    the model's length turns into each other; others as they come."""
    import csv
    import io

    from var_scale.study.record import read_table

    known = {"name", "depth", "seed", "images", "tokens", *METRICS, "final_lr_fraction", "seconds", "data_hash"}
    if wrong := sorted(set(mapping) - known):
        raise UserError(f"--map {wrong[0]}: is no field of a record here; known: {', '.join(sorted(known))}")
    if "depth" not in mapping or not {"loss_avg", "loss_last"} & set(mapping):
        raise UserError("--map: depth and loss_avg or loss_last are needed, such as depth=layers,loss_avg=val_loss")
    reader = csv.DictReader(io.StringIO(read_table(path)))
    if missing := [column for column in mapping.values() if column not in (reader.fieldnames or ())]:
        raise UserError(f"{path}: has no column {missing[0]}; columns: {', '.join(reader.fieldnames or ())}")
    records = []
    for line, row in enumerate(reader, 2):
        values: dict[str, Any] = {}
        for field, column in mapping.items():
            cell = (row[column] or "").strip()
            try:
                values[field] = cell if field in ("name", "data_hash") else float(cell) if cell else math.nan
            except ValueError:
                raise UserError(f"{path}: line {line}, column {column}: {cell!r} is not a number") from None
        if not values["depth"] >= 1:
            raise UserError(f"{path}: line {line}: depth {values['depth']:g} is not a number of blocks")
        shape = ModelShape.official(int(values.pop("depth")))
        tokens = values.pop("tokens", math.nan)
        images = values.pop("images", math.nan)
        images = int(images if math.isfinite(images) else tokens / shape.length if math.isfinite(tokens) else 0)
        losses = {metric: values.pop(metric, math.nan) for metric in METRICS}
        fine = any(math.isfinite(value) for value in losses.values())
        given = {"name": f"line {line}", "state": "complete", "final_lr_fraction": 0.0, "data_hash": "", "config_hash": "",
                 "eval_samples": VALIDATION if fine else 0, **losses, **values, "seed": int(values.get("seed", 0))}  # fmt: skip
        records.append(_record(shape, images=images, curve=(), **given))
    return records
