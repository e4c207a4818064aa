"""Invented studies with a known law, as records and as run folders."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from var_scale.cost import ModelShape, count_flops, count_params
from var_scale.laws.forms import law_value
from var_scale.records.record import CurvePoint, RunRecord

LAWS = {
    "loss_last": (3.0, 0.10),
    "loss_avg": (3.6, 0.08),
    "err_last": (0.93, 0.02),
    "err_avg": (0.95, 0.015),
}
PATCHES = (1, 2, 3, 4)


def law(metric: str, n: float) -> float:
    scale, alpha = LAWS[metric]
    return scale * (n / 1e6) ** -alpha


def shape(depth: int) -> ModelShape:
    return ModelShape(depth, 32 * depth, depth, 128 * depth, PATCHES, 512, 16, 10)


def record(depth: int, seed: int = 0, noise: float = 0.0, **changes: Any) -> RunRecord:
    s = shape(depth)
    params, flops, images = count_params(s), count_flops(s), 100_000
    rng = np.random.default_rng([depth, seed])
    final = {m: law(m, params.paper) * float(np.exp(noise * rng.standard_normal())) for m in LAWS}
    curve = []
    for i in range(1, 9):
        share = i / 8
        rise = {m: 1 + (0.12 if m.startswith("loss") else 0.01) * (share**-0.5 - 1) for m in LAWS}
        curve.append(
            CurvePoint(
                i * 100, flops.training * images * share, *(final[m] * rise[m] for m in LAWS)
            )
        )
    scales = len(PATCHES)
    base = RunRecord(
        name=f"d{depth}-s{seed}",
        depth=depth,
        seed=seed,
        params_total=params.total,
        params_paper=params.paper,
        params_per_token=params.per_token,
        images=images,
        tokens=images * flops.tokens,
        flops_exact=images * flops.training,
        flops_6nd=images * flops.training_6nd,
        flops_paper=images * flops.paper,
        **final,
        loss_per_scale=tuple(final["loss_avg"] * (0.7 + 0.1 * k) for k in range(scales)),
        err_per_scale=tuple(final["err_avg"] * (0.7 + 0.1 * k) for k in range(scales)),
        eval_samples=8192,
        state="complete",
        reason="",
        final_lr_fraction=0.01,
        data_hash="data0",
        config_hash=f"c{depth}{seed}",
        seconds=60.0 * depth,
        restarts=0,
        curve=tuple(curve),
        peak_lr=1e-3,
    )
    return replace(base, **changes)


def ladder(depths: tuple[int, ...] = (2, 3, 4, 5, 6, 8), noise: float = 0.001) -> list[RunRecord]:
    return [record(depth, noise=noise) for depth in depths]


def write_folder(run: RunRecord, folder: Path) -> None:
    """A run folder that `read_run` turns back into `run`."""
    folder.mkdir(parents=True)
    s, batch = shape(run.depth), run.images // 800
    description = {
        "name": run.name,
        "depth": run.depth,
        "seed": run.seed,
        "shape": asdict(s),
        "total_steps": 800,
        "global_batch": batch,
        "config_hash": run.config_hash,
        "data_hash": run.data_hash,
        "peak_lr": 1e-3,
        "final_lr_fraction": run.final_lr_fraction,
    }
    (folder / "run.json").write_text(json.dumps(description))
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "status.json").write_text(
        json.dumps({"state": run.state, "reason": run.reason, "restarts": run.restarts})
    )
    rows: list[dict[str, Any]] = []
    for point in run.curve:
        done = point.step * batch
        rows.append(
            {
                "kind": "train",
                "step": point.step,
                "loss": point.loss_avg,
                "lr": 1e-3 * (1 - point.step / 800),
                "grad_norm": 1.0,
                "images": done,
                "seconds": run.seconds * point.step / 800,
            }
        )
        rows.append(
            {
                "kind": "eval",
                "step": point.step,
                "images": done,
                "final": point.step == 800,
                "samples": run.eval_samples,
                "loss_avg": point.loss_avg,
                "loss_last": point.loss_last,
                "err_avg": point.err_avg,
                "err_last": point.err_last,
                "loss_per_scale": run.loss_per_scale,
                "err_per_scale": run.err_per_scale,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


GRID = {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.34, "beta": 0.34, "r_star": 5.0}
"""The surface of `grid`: its optimum is at N = D = (C / 6)^0.5."""


def grid(
    budgets: tuple[float, ...] = (1e17, 1e18, 1e19), sizes: int = 7, unique: int = 0
) -> list[RunRecord]:
    """Runs of the surface GRID with C = 6 N D, sizes around the optimum of each budget. With
    `unique` tokens the data repeat."""
    runs = []
    for budget in budgets:
        for k in range(sizes):
            n = (budget / 6) ** 0.5 * 2.0 ** (k - sizes // 2)
            d = budget / (6 * n)
            form = "repeated" if unique else "chinchilla"
            changes: dict[str, Any] = {
                "name": f"c{budget:g}-{k}",
                "params_paper": round(n),
                "tokens": round(d),
                "unique_tokens": unique,
                "images": round(d) // 680,
                "flops_exact": round(budget),
                "loss_avg": float(law_value(form, GRID, n, d, unique or 1.0)),
                "curve": (),
            }
            runs.append(record(4, **changes))
    return runs
