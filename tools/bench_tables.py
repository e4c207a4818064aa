"""The measured table of docs/reference/benchmarks.md, from bench/results/."""

from __future__ import annotations

from pathlib import Path

from var_scale.files import read_json, replace_between

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def results_table(folder: Path) -> str:
    """The results that `--out` wrote into a folder, as Markdown."""
    lines = [
        "| file | device | processes, engine, precision | batch | attention | step, ms | images/s "
        "| TFLOP/s | MFU |",
        "|---|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for path in sorted(folder.glob("*.json")):
        r = read_json(path, "bench result")
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else ""
        lines.append(
            f"| {path.stem} | {r['device']} | {r['world']}, {r['engine']['name']}, "
            f"{r['precision']} | {r['batch']} | {r['choices']['attention'].split(' (')[0]} | "
            f"{r['step_ms']:.0f} | {r['images_per_second']:.2f} | "
            f"{r['flops_per_second'] / 1e12:.3f} | {mfu} |"
        )
    return "\n".join(lines) if len(lines) > 2 else "Nothing measured yet."


def page() -> str:
    """docs/reference/benchmarks.md with its measured table rebuilt."""
    return replace_between(PAGE.read_text(), START, END, results_table(ROOT / "bench" / "results"))
