"""Rebuilds the generated pages: `python -m tools.docs`, which `make docs` runs.

`--check` writes nothing and fails with the names of the pages that differ. The tables of
simulated coverage take long and are rebuilt separately (`make docs-coverage`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tools import (
    bench_tables,
    communication_table,
    config_reference,
    error_codes,
    kernel_tables,
    plans_page,
    presets_page,
    truth_coverage,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/config.md": config_reference.page,
    "docs/reference/errors.md": error_codes.page,
    "docs/reference/plans.md": plans_page.page,
    "docs/reference/presets.md": presets_page.page,
    "docs/reference/benchmarks.md": bench_tables.page,
    "docs/explanation/scaling-out.md": communication_table.page,
    "docs/explanation/intervals.md": truth_coverage.page,
    "kernels/README.md": kernel_tables.page,
}
"""Every generated page, and the function that returns its text."""


def outdated() -> dict[Path, str]:
    """The pages that differ from what their generators return, with the new text."""
    texts = {ROOT / name: page() for name, page in PAGES.items()}
    return {
        path: text for path, text in texts.items() if not path.exists() or path.read_text() != text
    }


def main() -> None:
    """Write the pages that differ, or with --check exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    pages = outdated()
    for path, text in pages.items():
        if not check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'differs; run `make docs`' if check else 'rebuilt'}")
    if check and pages:
        sys.exit(1)


if __name__ == "__main__":
    main()
