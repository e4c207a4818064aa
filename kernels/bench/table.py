"""The measured tables of kernels/README.md from kernels/bench/results/*.json: `python -m var_kernels.bench.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from var_kernels.bench.run import floor_seconds

START, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(results: dict[str, Any]) -> str:
    """One device's times as Markdown: milliseconds of ours, and each other form as a multiple of it."""
    lines = [f"**{results['device']}**, {results['date']}, commit {str(results['commit'])[:9]}, torch {results['versions']['torch']}, "
             f"triton {results['versions']['triton']}: copy {results['ceilings']['copy_bytes_per_s'] / 1e12:.2f} TB/s, product "
             f"{results['ceilings']['product_flop_per_s'] / 1e12:.0f} TFLOP/s. `{results['command']}`", ""]  # fmt: skip
    lines += ["| shape | operator | pass | ours, ms (20 to 80 %) | of the floor | others, times ours |", "|---|---|---|---:|---:|---|"]
    for row in results["rows"]:
        ours = row["forms"].get("ours", {})
        for place, what in enumerate(("forward", "backward", "both")):
            if what not in ours:
                continue
            others = [f"{name} {form[what]['p50'] / ours[what]['p50']:.2f}" if what in form else f"{name}: {next(iter(form.values()))}"
                      for name, form in row["forms"].items() if name != "ours" and (what in form or what == "forward")]  # fmt: skip
            time, floor = ours[what], floor_seconds(row, place, results["ceilings"]) if place < 2 else 0.0
            share = f"{100 * floor / (1e-3 * time['p50']):.0f} %" if floor else ""
            spread = f"{time['p50']:.4f} ({time['p20']:.4f} to {time['p80']:.4f})"
            lines.append(f"| {row['shape']} | {row['operator']} | {what} | {spread} | {share} | {', '.join(others)} |")
    return "\n".join(lines)


def measured(folder: Path) -> str:
    """All devices; says so where nothing was measured."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return "Not measured yet: no GPU was at hand. `var-scale bench kernels --out kernels/bench/results/DEVICE.json` fills this in."
    return "\n\n".join(table(json.loads(path.read_text())) for path in files)


def fill(text: str, folder: Path) -> str:
    """The README with its measured part made anew."""
    head, rest = text.split(START)
    return f"{head}{START}\n{measured(folder)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    readme = here.parent / "README.md"
    readme.write_text(fill(readme.read_text(), here / "results"))
