"""Documentation pages that must stay complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools.bench_tables import campaign_tables
from tools.docs import PAGES, ROOT
from tools.kernel_tables import operators_table, target_of, verdict
from var_scale.cli import build_parser
from var_scale.config.schema import Config
from var_scale.records.record import METRICS

DOCS = Path(__file__).parents[1] / "docs"
FLAGS = [
    "data_path",
    "local_debug",
    "exp_name",
    "vfast",
    "tfast",
    "depth",
    "ini",
    "hd",
    "aln",
    "alng",
    "fp16",
    "tblr",
    "tlr",
    "twd",
    "twde",
    "tclip",
    "ls",
    "bs",
    "ac",
    "ep",
    "wp",
    "wp0",
    "wpe",
    "sche",
    "opt",
    "afuse",
    "saln",
    "anorm",
    "fuse",
    "pn",
    "patch_size",
    "mid_reso",
    "hflip",
    "workers",
    "pg",
    "pg0",
    "pgwp",
    "tf32",
    "seed",
    "same_seed_for_all_ranks",
    "local_out_dir_path",
]
"""what a user may set of the official train.py"""


def test_every_official_flag_has_its_place() -> None:
    """No flag is missing; every key, field and command that the page names exists."""
    text = (DOCS / "reference" / "from-official.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `--")]
    assert [re.findall(r"`--(\w+)`", row[0])[0] for row in rows] == FLAGS
    for row in rows:
        for key in re.findall(r"`([a-z_]+\.[a-z_0-9]+)`", row[1]):
            section, name = key.split(".")
            assert name in Config.model_fields[section].annotation.model_fields, key  # type: ignore[union-attr]
        assert row[1].strip() or row[2].strip(), row
    assert all(f"`{metric}`" in text for metric in METRICS)
    parser = build_parser()
    for command in re.findall(r"`var-scale ((?:[a-z]+ ?)+)", text):
        words = command.split()
        names = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        assert words[0] in names, command  # type: ignore[operator]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    """A page in docs/ is what its generator returns; `make docs` writes it."""
    assert (ROOT / name).read_text() == PAGES[name]()


def test_kernel_tables_show_shares_and_targets() -> None:
    """The time of our operators, the others as multiples of it, and which targets are met."""
    time = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    forms = {
        "ours": {"forward": time},
        "eager": {"forward": time | {"p50": 5.0}},
        "flex": {"failed": "no"},
    }
    row = {
        "shape": "d16 B=1 L=680",
        "operator": "x",
        "forms": forms,
        "bytes": [1e9, 0],
        "flops": [0, 0],
        "serial": False,
    }
    shown = operators_table(
        {
            "device": "H",
            "date": "d",
            "commit": None,
            "versions": {"torch": "1", "triton": "2"},
            "command": "c",
            "timing": "t",
            "ceilings": {"copy_bytes_per_s": 1e12, "product_flop_per_s": 1e12},
            "rows": [row],
        }
    )
    assert (
        "| d16 B=1 L=680 | x | forward | 2.0000 (1.0000 to 3.0000) | 50 % |  | eager 2.50, flex: "
        "no |" in shown
    )
    named = row | {
        "operator": "adaptive_layer_norm",
        "forms": forms | {"compile": {"forward": time | {"p50": 1.9}}},
    }
    assert (
        verdict(named, "forward", 0.5, target_of(named, 0))
        == "MISSED (90 %), MISSED (slower than torch.compile)"
    )
    assert verdict(named, "forward", 0.93, target_of(named, 0)).startswith("met (90 %)")


def test_campaign_tables_show_what_missed_and_what_failed(tmp_path: Path) -> None:
    """Every stage of a GPU has its row, with its verdict, its reason, or "not run"; the kernels of
    a step follow. A CPU shows its own stages."""
    row = {
        "commit": "c" * 40,
        "code": "x",
        "date": "2026-01-02 10:00:00",
        "tail": "",
        "state": "ok",
    }
    step = {"step_ms": 80.0, "images_per_second": 400.0, "mfu": 0.37, "in_a_row_ms": 80.0}
    step |= {
        "memory_bytes": 2**30,
        "device_ms": 70.0,
        "top": [{"name": "gemm", "calls": 9, "ms": 40.0}],
    }
    rows = [
        row | {"stage": "train-d16-b32", "device": "H", "result": step},
        row
        | {"stage": "mlp", "device": "H", "state": "failed (1)", "tail": "no memory\n"}
        | {"result": None},
        row | {"stage": "cpu-step-short", "device": "CPU (x)", "result": {"step_ms": 17.0}},
    ]
    (tmp_path / "h.json").write_text(json.dumps({"version": 1, "rows": rows}))
    shown = campaign_tables(tmp_path)
    assert (
        "| train-d16-b32 | images/s | 459 | 400 | ≥ 500 | MISSED, 13 % below the prediction "
        "| ccccccccc, 2026-01-02 |" in shown
    )
    assert (
        "| mlp | time, times compile |  | failed (1): no memory | ≤ 1 |  | ccccccccc, 2026-01-02 |"
        in shown
    )
    assert "| head | time, times compile |  | not run | ≤ 1 |  |  |" in shown
    assert "| `gemm` | 9 | 40.000 |" in shown and "No campaign" not in shown
    assert shown.index("**H**") < shown.index("**CPU (x)**")
    assert shown.count("cpu-step-short") == 1 and "cpu-data" not in shown
    (tmp_path / "h.json").write_text(json.dumps({"version": 1, "rows": rows[2:]}))
    assert campaign_tables(tmp_path).startswith("No campaign ran on a GPU yet.")
