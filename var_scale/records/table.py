"""`var-scale fit`: a law for any table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_scale.errors import UserError
from var_scale.files import write_json
from var_scale.laws.adequacy import SIGNIFICANT, adequacy, bend_test
from var_scale.laws.api import fit, to_json
from var_scale.laws.curve import fit_law
from var_scale.laws.forms import SURFACES, Form
from var_scale.laws.forms import VARIABLES as LAW_VARIABLES
from var_scale.laws.hold_out import Along, HeldOut, hold_out_rows
from var_scale.laws.law import LawFit
from var_scale.laws.noise import GROWTH, noise_trend
from var_scale.laws.surface_draws import sizes_tell
from var_scale.laws.surface_objective import DELTA, ObjectiveName
from var_scale.progress import say
from var_scale.records.columns import Columns, N, read_columns, study_columns
from var_scale.records.runs_csv import is_runs_csv

VARIABLES = {
    "N": "N",
    "params_paper": "N",
    "params_total": "N",
    "params_per_token": "N",
    "flops_exact": "C",
    "flops_6nd": "C",
    "flops_paper": "C",
}
"""Columns of records whose unit the paper's beta knows."""
SURFACE_COLUMNS = {"D": "tokens", "U": "unique_tokens"}
"""Short names of the columns of records that a surface takes. N is a name of its own."""


@dataclass(frozen=True)
class FitOptions:
    """How a table is fitted; see `var_scale.laws.fit`."""

    weights: str = ""
    """Column of weights of a CSV."""
    objective: ObjectiveName = "huber_log"
    delta: float = DELTA
    rising: bool = False
    intervals: bool = True
    hold_out: Along | None = None
    """Rows to test the law on first."""

    @property
    def of_fit(self) -> dict[str, Any]:
        """Arguments of `fit`."""
        names = ("objective", "delta", "rising", "intervals")
        return {name: getattr(self, name) for name in names}


PLAIN = FitOptions()
SUCH = {
    1: "one variable",
    2: "two variables, such as --x N,D",
    3: "three variables, such as --x N,D,U with U different tokens",
}
"""What --x must give, by the number of variables of a form."""
EXIT_NO_LAW = 1


def fit_table(
    table: Path,
    x: str,
    y: str,
    form: Form,
    floor: float,
    out: Path | None = None,
    outliers: bool = True,
    seed: int = 0,
    options: FitOptions = PLAIN,
) -> LawFit:
    """Fit a table, write the law to `out`, and print it with its intervals and what was left out.
    Where rows are held out, their predictions come first.

    Raises:
        UserError: code `records.no-law` with exit code 1 for a fit that did not converge, or as
            `table_columns` raises it.
    """
    columns = table_columns(table, x, y, form, floor, options.weights)
    arguments = fit_arguments(columns, x, y, form, floor, outliers, seed) | options.of_fit
    law, held = fit(**arguments), None
    if options.hold_out:
        held = hold_out_rows(options.hold_out, **arguments)
    if out:
        more = {"hold_out": held.to_json()} if held else {}
        write_json(out, to_json(law) | more)
    for item in columns.excluded:
        say(f"gate: {item.record.name} excluded, {item.code}: {item.text}")
    if columns.training:
        say(f"gate: values of the training data, not of validation: {', '.join(columns.training)}")
    for row, code, text in law.excluded:
        say(f"left out: {row}, {code}: {text}")
    if not law.converged:
        raise UserError(
            f"{table}: there is no {form} law of {y} against {x}: {law.reason}",
            code="records.no-law",
            exit_code=EXIT_NO_LAW,
        )
    if x == N and columns.counted:
        say(f"N is {columns.counted}")
    of_held = held_lines(held) if held else []
    for line in (*of_held, *law_lines(law), *misfit_lines(law)):
        say(line)
    return law


def table_columns(
    table: Path, x: str, y: str, form: Form, floor: float, weights: str = ""
) -> Columns:
    """The columns `x` (names separated by commas), `y` and `weights` of a study, a table of records
    or a CSV.

    Raises:
        UserError: code `records.fit-floor`, `records.fit-variables`, `records.fit-weights`, or as
            the readers of `records.columns` raise it.
    """
    if floor and form not in ("power", "broken_power"):
        raise UserError(
            f"--floor: the form {form} fits the floor itself; leave --floor out, or use --form "
            "power",
            code="records.fit-floor",
        )
    names = [name.strip() for name in x.split(",")]
    need = len(LAW_VARIABLES[form])
    if len(names) != need:
        raise UserError(f"--x {x}: the form {form} has {SUCH[need]}", code="records.fit-variables")
    if not table.is_dir() and not is_runs_csv(table):
        return read_columns(table, names, y, weights)
    if weights:
        raise UserError(
            f"--weights {weights}: runs of a study have no weights; give a CSV of your own",
            code="records.fit-weights",
        )
    if form in SURFACES:
        names = [SURFACE_COLUMNS.get(name, name) for name in names]
    return study_columns(table, names, y)


def fit_arguments(
    columns: Columns, x: str, y: str, form: Form, floor: float, outliers: bool, seed: int
) -> dict[str, Any]:
    """The columns as arguments of `fit`."""
    first, d, unique = (*columns.variables, None, None)[:3]
    return {
        "x": first,
        "y": columns.values,
        "form": form,
        "d": d,
        "unique": unique,
        "floor": floor,
        "names": columns.names,
        "metric": y,
        "variable": VARIABLES.get(x, x),
        "outliers": outliers,
        "seed": seed,
        "weights": columns.weights,
    }


def held_lines(held: HeldOut) -> list[str]:
    """What the law of the other rows predicted for those held out."""
    what = f"rows of the {'largest size' if held.along == 'size' else 'longest training'}"
    if not held.rows:
        return [f"held out: the {what}, but there is no law of the others: {held.fit.reason}"]
    lines = []
    for row in held.rows:
        width = 100 * (row.high - row.low) / row.measured
        hit = (
            f", 95 % interval {row.low:.6g} to {row.high:.6g} ({width:.2g} % wide): "
            f"{'in' if row.inside else 'out'}side"
        )
        lines.append(
            f"held out: {row.name}, measured {row.measured:.6g}, predicted {row.predicted:.6g} "
            f"({100 * row.relative_error:+.3f} %){hit if math.isfinite(row.low) else ''}"
        )
    if (p := _bend(held.fit)[1]) < SIGNIFICANT:
        lines.append(
            f"held out: the other rows contradict this form (they bend, p = {p:.2g}), so a value "
            "inside means little"
        )
    return lines


def law_lines(law: LawFit) -> list[str]:
    """Equation, intervals, and what to know about them."""
    r = f", r = {law.r:.4f}, descriptive" if math.isfinite(law.r) else ""
    lines = [
        f"{law.equation}   ({len(law.x)} points{r}; residual sd {law.residual_sd:.2g} with "
        f"{law.freedom} degrees of freedom)"
    ]
    for name in dict.fromkeys((*law.params, *law.intervals)):
        if name in law.intervals:
            low, high = law.intervals[name]
            end = f"to {high:.6g}" if math.isfinite(high) else "upwards: the points do not bound it"
            value = f"{law.params[name]:.6g}" if name in law.params else ""
            lines.append(f"  {name:7} {value}   95 % interval {low:.6g} {end}")
    noise = f"  noise of a run in the intervals: {100 * law.noise.run.sd:.2g} %"
    if law.repeats.known:
        lines.append(
            f"{noise} with {law.noise.run.freedom:.1f} degrees of freedom, from the scatter about "
            "the law and between repeats"
        )
    elif law.residual_sd < law.noise_floor:
        lines.append(f"{noise}, above the scatter of these points")
    if law.form in SURFACES:
        audit = law.audit
        lines.append(
            f"  {audit['starts']} starts, {audit['descents']} descents, {audit['agree']} of them "
            "reached this optimum"
            + ("" if law.form == "tied" else "; split is the exponent of N in compute-optimal ")
            + ("" if law.form == "tied" else "training, N ~ C^split")
        )
        if audit.get("scheme") == "sizes":
            unknown = (
                "" if sizes_tell(law.x) else "; fewer than five sizes cannot show how large it is"
            )
            lines.append(
                "  the intervals allow for an error that the runs of a size share, as far as the "
                f"residuals do{unknown}"
            )
    if law.form == "broken_power":
        lines += _break_lines(law)
    if math.isfinite(law.aicc):
        lines.append(
            f"  AICc {law.aicc:.2f}: smaller is better between forms fitted to the same rows; "
            "differences below 2 mean nothing"
        )
    return lines + _noise_lines(law) + _bend_lines(law)


def misfit_lines(law: LawFit) -> list[str]:
    """A warning if a law of one variable misses the sizes by more than the noise between their
    repeats."""
    p = adequacy(law).p_noise if law.form in ("power", "power_floor") else math.nan
    if not p < SIGNIFICANT:
        return []
    return [
        f"  the points contradict this form: it misses them by more than the noise between repeats "
        f"(p = {p:.2g}), so its intervals are too narrow"
    ]


def _noise_lines(law: LawFit) -> list[str]:
    """A warning if the noise grows with size, or if the points could not show it."""
    trend, size = noise_trend(law), law.variable.partition(",")[0]
    beyond = f"the interval of a run beyond the largest {size} is too narrow"
    if trend.grows:
        return [
            f"  the noise grows with {size} (p = {trend.p:.2g}): {beyond}; repeat the runs at the "
            f"largest {size} with other seeds"
        ]
    if not trend.undecided:
        return []
    return [
        f"  {len(law.x)} points cannot show whether the noise grows with {size} (power "
        f"{100 * trend.power:.0f} % for a factor of {GROWTH:g}); if it does, {beyond}"
    ]


def _break_lines(law: LawFit) -> list[str]:
    """Whether the points need the break."""
    straight = fit(law.x, law.y, floor=law.params["E"], outliers=False)
    if law.aicc < straight.aicc - 2:
        return []
    if math.isfinite(law.aicc):
        return ["  a power law without a break fits these points as well"]
    return [f"  {len(law.x)} points are too few to tell this from a power law without a break"]


def _bend(law: LawFit) -> tuple[float, float]:
    """Coefficient and p-value of a bend of the form power; NaN for other forms."""
    rival = None
    # The test for a floor is for falling laws of points of equal weight.
    if law.form == "power" and "exponent" not in law.params and len(set(law.given_weights())) == 1:
        rival = fit_law(
            "power_floor", law.x, law.y, noise_floor=law.noise_floor, repeats=law.repeats
        )
    return bend_test(law, rival)


def _bend_lines(law: LawFit) -> list[str]:
    """What the form power leaves open."""
    bend, p = _bend(law)
    if p < SIGNIFICANT:
        floor = "--form power_floor fits a floor"
        steeper = "the curve steepens; --form broken_power fits a break"
        if "exponent" in law.params:
            return [f"  the points bend (p = {p:.2g}), so the interval is too narrow"]
        return [
            f"  the points bend (p = {p:.2g}), so the "
            f"interval is too narrow: {floor if bend > 0 else steeper}"
        ]
    if law.form == "power" and not law.params["E"] and "exponent" not in law.params:
        return [
            "  with E = 0: an irreducible part changes the exponent; --form power_floor fits it, "
            "--floor assumes one"
        ]
    if law.form == "power_floor" and law.params["E"] == 0:
        return ["  E is at its bound of 0: the points do not bend upwards"]
    return []
