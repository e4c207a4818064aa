"""The measured tables of docs/reference/benchmarks.md, from bench/results/."""

from __future__ import annotations

from pathlib import Path

from var_scale.bench.campaign import HEAD, Row, newest, table
from var_scale.bench.campaign_stages import STAGES
from var_scale.files import read_json, replace_between

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PROFILED = ("train-d16-b32", "train-d30-b32")
CAMPAIGN = "<!-- campaign: begin -->", "<!-- campaign: end -->"


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


def campaign_tables(folder: Path) -> str:
    """The tables of all machines on which a campaign ran, GPUs first: the newest row of each
    stage."""
    rows = [row for path in folder.glob("*.json") for row in read_json(path, "campaign")["rows"]]
    devices = sorted({row["device"] for row in rows}, key=lambda name: (name[:3] == "CPU", name))
    parts = []
    if all(name.startswith("CPU") for name in devices):
        parts.append("No campaign ran on a GPU yet.")
    for device in devices:
        gpu, mine = not device.startswith("CPU"), [row for row in rows if row["device"] == device]
        lines = [
            f"**{device}**:",
            "",
            f"| {' | '.join([*HEAD, 'code, date'])} |",
            "|---|---|---:|---:|---:|---|---|",
        ]
        for stage in STAGES:
            row = newest(mine, stage.name)
            if stage.gpu == gpu and (row or gpu):
                made = f"{code(row)}, {row['date'][:10]}" if row else ""
                lines += [line_of([*line, made]) for line in table([stage], mine)]
        parts.append("\n".join(lines))
        profiled = [newest(mine, name) for name in PROFILED]
        parts += [top_table(row) for row in profiled if row and row["result"]]
    return "\n\n".join(parts)


def code(row: Row) -> str:
    """What a row measured: the commit, `+changes` if files differed from it, or a hash."""
    commit, _, changes = (row["commit"] or "").partition("+")
    return commit[:9] + ("+changes" if changes else "") if commit else f"code {row['code']}"


def line_of(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def top_table(row: Row) -> str:
    """The operations that take most of a training step."""
    result = row["result"]
    lines = [
        f"The largest {len(result['top'])} kernels of `{row['stage']}`, of a step of "
        f"{result['in_a_row_ms']:.1f} ms ({code(row)}):",
        "",
        "| kernel | calls | ms |",
        "|---|---:|---:|",
        *(
            line_of([f"`{one['name']}`", str(one["calls"]), f"{one['ms']:.3f}"])
            for one in result["top"]
        ),
    ]
    return "\n".join(lines)


def page() -> str:
    """docs/reference/benchmarks.md with its measured tables rebuilt."""
    results = ROOT / "bench" / "results"
    text = replace_between(PAGE.read_text(), START, END, results_table(results))
    return replace_between(text, *CAMPAIGN, campaign_tables(results / "campaign"))
