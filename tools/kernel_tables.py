"""Writes the measured tables of kernels/README.md from kernels/bench/results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from var_kernels.bench import targets
from var_kernels.bench.run import floor_seconds

from var_scale.files import replace_between

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Results = dict[str, Any]


def page() -> str:
    """kernels/README.md with its measured part rebuilt."""
    readme = KERNELS / "README.md"
    return replace_between(readme.read_text(), START, END, measured(KERNELS / "bench" / "results"))


def measured(folder: Path) -> str:
    """The tables of all GPUs. Times on a CPU are left out: they say nothing about the kernels."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [results for results in found if not results["device"].startswith("CPU")]
    if not found:
        return (
            "Not measured yet: no GPU was available. `var-scale bench kernels --out "
            "kernels/bench/results/DEVICE.json` measures, then `make docs` fills in this part."
        )
    return "\n\n".join(
        sweep_table(results)
        if "sweep" in results
        else operators_table(results)
        if "ceilings" in results
        else steps_table(results)
        for results in found
    )


def head(results: Results) -> str:
    """What was measured, where and how."""
    copy = results["ceilings"]["copy_bytes_per_s"] / 1e12
    product = results["ceilings"]["product_flop_per_s"] / 1e12
    return (
        f"**{results['device']}**, {results['date']}, commit {results['commit']}, "
        f"torch {results['versions']['torch']}, triton {results['versions']['triton']}: "
        f"copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s. Times of {results['timing']}. "
        f"`{results['command']}`" + (f" {results['note']}" if "note" in results else "")
    )


def operators_table(results: Results) -> str:
    """Times of one device: milliseconds of our operators, and the others as multiples of them."""
    lines = [
        head(results),
        "",
        "| shape | operator | pass | ours, ms (20 to 80 %) | of the floor | target | "
        "others, times ours |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for row in results["rows"]:
        for place, what in enumerate(("forward", "backward", "both", "called")):
            if what in row["forms"].get("ours", {}):
                lines.append(operator_row(row, place, what, results["ceilings"]))
    return "\n".join(lines)


def operator_row(row: Results, place: int, what: str, ceilings: dict[str, float]) -> str:
    """One pass of one operator. Only forward and backward passes have a floor."""
    time = row["forms"]["ours"][what]
    floor = floor_seconds(row, place, ceilings) if place < 2 else 0.0
    reached = floor / (1e-3 * time["p50"]) if floor else None
    share = f"{100 * reached:.0f} %" if reached else ""
    spread = f"{time['p50']:.4f} ({time['p20']:.4f} to {time['p80']:.4f})"
    others = [
        f"{name} {form[what]['p50'] / time['p50']:.2f}"
        if what in form
        else f"{name}: {next(iter(form.values()))}"  # the reason why it was not timed
        for name, form in row["forms"].items()
        if name != "ours" and (what in form or what == "forward")
    ]
    return (
        f"| {row['shape']} | {row['operator']} | {what} | {spread} | {share} | "
        f"{verdict(row, what, reached, target_of(row, place))} | {', '.join(others)} |"
    )


def target_of(row: Results, place: int) -> float | None:
    """The target of a row's forward (0) or backward (1) pass."""
    found = targets.FLOOR.get((row["operator"], int(row["shape"].rpartition("=")[2])))
    return found[place] if found and place < 2 else None


def verdict(row: Results, what: str, reached: float | None, wanted: float | None) -> str:
    """Which targets a pass meets: its share of the floor, for the MLP the share of its products'
    time, and that torch.compile is not faster."""
    ours = row["forms"]["ours"][what]["p50"]
    outcomes = []
    if wanted and reached is not None:
        outcomes.append(f"{'met' if reached >= wanted else 'MISSED'} ({100 * wanted:.0f} %)")
    if what in row["forms"].get("products", {}):
        share = row["forms"]["products"][what]["p50"] / ours
        outcome = "met" if share >= targets.MLP else "MISSED"
        limit = f"{100 * share:.0f} of {100 * targets.MLP:.0f} %"
        outcomes.append(f"{outcome} ({limit} of its products)")
    compiled = row["forms"].get("compile", {}).get(what)
    if compiled and compiled["p50"] < ours:
        outcomes.append("MISSED (slower than torch.compile)")
    return ", ".join(outcomes)


def steps_table(results: Results) -> str:
    """Blocks and training steps with the operators and without, as `bench step` timed them."""
    lines = [
        f"**{results['device']}**, {results['date']}, commit {str(results['commit'])[:9]}. "
        f"`{results['command']}`",
        "",
        "| config | batch | form | block, ms | step, ms | peak, GiB | attention | kernels |",
        "|---|---:|---|---:|---:|---:|---|---|",
    ]
    for row in results["rows"]:
        if "failed" in row:
            head = f"| {row['config']} | {row['batch']} | {row['form']} "
            lines.append(f"{head}| {row['failed']} | | | | |")
            continue
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else ""
        lines.append(
            f"| {row['config']} | {row['batch']} | {row['form']} | {row['block_ms']:.3f} | "
            f"{row['step_ms']:.2f} | {peak} | {row['attention']} | {row['kernels']} |"
        )
    return "\n".join(lines)


def sweep_table(results: Results) -> str:
    """The fastest launch settings of each kernel and shape, and the slowest."""
    lines = [
        head(results),
        "",
        "| kernel | shape | fastest settings, ms | of the copy rate | slowest, ms |",
        "|---|---|---|---:|---|",
    ]
    groups: dict[tuple[str, str], list[Results]] = {}
    for row in results["sweep"]:
        if "ms" in row:
            groups.setdefault((row["kernel"], row["shape"]), []).append(row)
    for (kernel, shape), rows in groups.items():
        rows.sort(key=lambda row: row["ms"])
        texts = [f"{row['ms']:.4g} ({row['setting']})" for row in (*rows[:3], rows[-1])]
        floor = 1e3 * rows[0]["bytes"] / results["ceilings"]["copy_bytes_per_s"]
        share = f"{100 * floor / rows[0]['ms']:.0f} %" if floor else ""
        lines.append(f"| {kernel} | {shape} | {'; '.join(texts[:-1])} | {share} | {texts[-1]} |")
    return "\n".join(lines)
