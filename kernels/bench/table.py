"""The measured tables of kernels/README.md from kernels/bench/results/*.json: `python -m var_kernels.bench.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from var_kernels.bench.run import floor_seconds

START, END = "<!-- measured: begin -->", "<!-- measured: end -->"


TARGETS = {
    ("adaptive_layer_norm", 680): (0.90, 0.85),
    ("gate_adaptive_layer_norm", 680): (0.90, 0.80),
    ("block_attention", 680): (0.30, 0.25),
    ("block_attention", 2240): (0.40, 0.33),
    ("linear_cross_entropy", 680): (0.85, 0.85),
}
"""share of the floor that an H200 is to reach, forward and backward; the MLP: 0.92 of its own products' time"""


def target_of(row: dict[str, Any], place: int) -> float | None:
    """The target of a row's forward (0) or backward (1) pass."""
    found = TARGETS.get((row["operator"], int(row["shape"].rpartition("=")[2])))
    return found[place] if found and place < 2 else None


def verdict(row: dict[str, Any], what: str, reached: float | None, wanted: float | None) -> str:
    """Which targets a pass meets: its share of the floor, the MLP's of its products, and no slower than torch.compile."""
    ours, said = row["forms"]["ours"][what]["p50"], []
    if wanted and reached is not None:
        said.append(f"{'met' if reached >= wanted else 'MISSED'} ({100 * wanted:.0f} %)")
    if "products" in row["forms"] and what in row["forms"]["products"]:
        share = row["forms"]["products"][what]["p50"] / ours
        said.append(f"{'met' if share >= 0.92 else 'MISSED'} ({100 * share:.0f} of 92 % of its products)")
    compiled = row["forms"].get("compile", {}).get(what)
    if compiled and compiled["p50"] < ours:
        said.append("MISSED (slower than torch.compile)")
    return ", ".join(said)


def steps_table(results: dict[str, Any]) -> str:
    """Blocks and steps with the operators and without, as `bench step` timed them."""
    lines = [f"**{results['device']}**, {results['date']}, commit {str(results['commit'])[:9]}. `{results['command']}`", "",
             "| config | batch | form | block, ms | step, ms | peak, GiB | attention | kernels |",
             "|---|---:|---|---:|---:|---:|---|---|"]  # fmt: skip
    for row in results["rows"]:
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else ""
        lines.append(f"| {row['config']} | {row['batch']} | {row['form']} | {row['block_ms']:.3f} | {row['step_ms']:.2f} | {peak} | "
                     f"{row['attention']} | {row['kernels']} |")  # fmt: skip
    return "\n".join(lines)


def sweep_table(results: dict[str, Any]) -> str:
    """The fastest settings of each kernel and shape, and the slowest."""
    lines = [head(results), "", "| kernel | shape | fastest settings, ms | of the copy rate | slowest, ms |", "|---|---|---|---:|---|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
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


def head(results: dict[str, Any]) -> str:
    """What was measured, where and how."""
    return (f"**{results['device']}**, {results['date']}, commit {results['commit']}, torch {results['versions']['torch']}, "
            f"triton {results['versions']['triton']}: copy {results['ceilings']['copy_bytes_per_s'] / 1e12:.2f} TB/s, product "
            f"{results['ceilings']['product_flop_per_s'] / 1e12:.0f} TFLOP/s. Times of {results['timing']}. `{results['command']}`"
            + (f" {results['note']}" if "note" in results else ""))  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """One device's times as Markdown: milliseconds of ours, and each other form as a multiple of it."""
    lines = [head(results), ""]
    lines += ["| shape | operator | pass | ours, ms (20 to 80 %) | of the floor | target | others, times ours |",
              "|---|---|---|---:|---:|---|---|"]  # fmt: skip
    for row in results["rows"]:
        ours = row["forms"].get("ours", {})
        for place, what in enumerate(("forward", "backward", "both", "called")):
            if what not in ours:
                continue
            others = [f"{name} {form[what]['p50'] / ours[what]['p50']:.2f}" if what in form else f"{name}: {next(iter(form.values()))}"
                      for name, form in row["forms"].items() if name != "ours" and (what in form or what == "forward")]  # fmt: skip
            time, floor = ours[what], floor_seconds(row, place, results["ceilings"]) if place < 2 else 0.0
            reached = floor / (1e-3 * time["p50"]) if floor else None
            share = f"{100 * reached:.0f} %" if reached else ""
            spread = f"{time['p50']:.4f} ({time['p20']:.4f} to {time['p80']:.4f})"
            lines.append(f"| {row['shape']} | {row['operator']} | {what} | {spread} | {share} | "
                         f"{verdict(row, what, reached, target_of(row, place))} | {', '.join(others)} |")  # fmt: skip
    return "\n".join(lines)


def measured(folder: Path) -> str:
    """All GPUs; says so where nothing was measured. A CPU's times say nothing about the kernels and are left out."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [results for results in found if not results["device"].startswith("CPU")]
    if not found:
        return ("Not measured yet: no GPU was at hand. `var-scale bench kernels --out kernels/bench/results/DEVICE.json`, then "
                "`python -m var_kernels.bench.table`, fill this in.")  # fmt: skip
    forms = [sweep_table(results) if "sweep" in results else table(results) if "ceilings" in results else steps_table(results)
             for results in found]  # fmt: skip
    return "\n\n".join(forms)


def fill(text: str, folder: Path) -> str:
    """The README with its measured part made anew."""
    head, rest = text.split(START)
    return f"{head}{START}\n{measured(folder)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    readme = here.parent / "README.md"
    readme.write_text(fill(readme.read_text(), here / "results"))
