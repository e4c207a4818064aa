"""A study's laws on wandb: one run in the study's group with pictures, tables and charts.

It is updated after every run of the study and with the report.
"""

from __future__ import annotations

from typing import Any

from var_scale.progress import say
from var_scale.records.analyse import StudyResult
from var_scale.records.record import METRICS
from var_scale.study.study import Study

PICTURES = ("laws", "compute", "isoflop", "residuals", "per_scale", "samples", "reconstructions")


def log_summary(study: Study, result: StudyResult) -> None:
    """Log the summary run, offline where the study logs offline.

    A failure of wandb is a warning only: the report is complete without it.
    """
    try:
        import wandb

        name = study.config.name
        run = wandb.init(
            project=study.config.log.wandb_project,
            group=name,
            name=f"{name}-summary",
            id=f"{name}-summary",
            resume="allow",
            job_type="summary",
            mode=study.config.log.wandb,
            dir=str(study.report),
            config={"study": name},
        )
        run.log(contents(study, result, wandb))
        run.summary.update(numbers(result))
        run.finish()
        say(f"wandb: run {name}-summary of the group {name}")
    except Exception as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        say(f"warning: wandb is not available ({text}); the report does not need it")


def numbers(result: StudyResult) -> dict[str, float]:
    """Exponents with their intervals, and the results of the hold-out test."""
    found: dict[str, float] = {}
    for metric in METRICS:
        fit, held = result.law(metric), result.holdout(metric)
        if fit.converged:
            low, high = fit.intervals["alpha"]
            named = {"alpha": fit.params["alpha"], "alpha_low": low, "alpha_high": high, "r": fit.r}
            found |= {f"{metric}/{key}": value for key, value in named.items()}
        if held.prediction:
            found |= {
                f"{metric}/held_out_error": held.relative_error,
                f"{metric}/held_out_inside": float(held.inside),
            }
    return found


def contents(study: Study, result: StudyResult, wandb: Any) -> dict[str, Any]:
    """Pictures, the table of runs, and for each metric a chart against N that wandb draws."""
    folder = study.report
    logged: dict[str, Any] = {
        name: wandb.Image(str(folder / f"{name}.png"))
        for name in PICTURES
        if (folder / f"{name}.png").exists()
    }
    columns = ["run", "depth", "seed", "N", "images", "train FLOP", *METRICS, "gate"]
    codes = {item.record.name: item.code for item in result.gate.excluded}
    rows = [
        [
            run.name,
            run.depth,
            run.seed,
            run.n,
            run.images,
            run.flops_exact,
            *(run.metric(metric) for metric in METRICS),
            codes.get(run.name, "kept"),
        ]
        for run in result.records
    ]
    table = wandb.Table(columns=columns, data=rows)
    logged["runs"] = table
    for metric in METRICS:
        title = f"{metric} against N"
        fields = {"x": "N", "y": metric, "run": "run", "kept": "gate"}
        chart = study.config.log.wandb_chart
        logged[f"charts/{metric}"] = (
            wandb.plot_table(chart, table, fields, {"title": title})
            if chart
            else wandb.plot.scatter(table, "N", metric, title=title)
        )
    laws = [[fit.metric, fit.form, fit.equation, fit.status] for fit in result.fits.values()]
    logged["laws_table"] = wandb.Table(columns=["metric", "form", "law", "status"], data=laws)
    return logged
