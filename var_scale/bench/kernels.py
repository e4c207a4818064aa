"""`var-scale bench kernels`: the benchmarks of the package var_kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from var_kernels.bench import launches
from var_kernels.bench.run import run, run_sweep

from var_scale.errors import UserError
from var_scale.files import disk_errors


def bench_kernels(
    operators: list[str],
    shapes: list[str],
    forms: list[str],
    *,
    out: Path | None,
    sweep: bool,
) -> None:
    """Time the fused operators, or with `sweep` the launch settings of their kernels.

    Args: see `var_kernels.bench.run`.

    Raises:
        UserError: an argument names nothing that can be timed (code `bench.kernels`).
    """
    with _user_errors(out or Path()):
        if sweep:
            run_sweep(operators, out)
        else:
            run(operators, shapes, out, forms)


def bench_launches(out: Path | None) -> None:
    """Time the launch of one operation; see `var_kernels.bench.launches`.

    Raises:
        UserError: `out` cannot be written (code `bench.kernels`).
    """
    with _user_errors(out or Path()):
        launches.run(out)


@contextmanager
def _user_errors(place: Path) -> Iterator[None]:
    """Errors of var_kernels, which knows no UserError, and of the disk that `place` is on."""
    try:
        with disk_errors(place):
            yield
    except ValueError as error:
        raise UserError(str(error), code="bench.kernels") from None
