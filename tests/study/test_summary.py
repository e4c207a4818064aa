"""The summary of a study on wandb."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from var_scale.config.load import config_root
from var_scale.records.analyse import StudyResult
from var_scale.study.summary import log_summary, numbers


def test_the_summary_on_wandb(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fitted_ladder: StudyResult,
) -> None:
    """A real offline run has pictures, tables, charts and numbers; a failure of wandb is a
    warning."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    report = tmp_path / "s" / "report"
    report.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(report / "laws.png")
    log = SimpleNamespace(wandb="offline", wandb_project="p", wandb_chart="me/scaling-law")
    study = SimpleNamespace(config=SimpleNamespace(name="s", log=log), report=report)
    log_summary(study, fitted_ladder)  # type: ignore[arg-type]
    assert "s-summary" in capsys.readouterr().out
    (folder,) = (report / "wandb").glob("offline-run-*s-summary")
    media = [path.name for path in folder.glob("files/media/**/*") if path.is_file()]
    assert any("laws" in name for name in media)
    assert sum(name.endswith(".table.json") for name in media) >= 2
    # Every field that is logged has its place in the chart.
    chart = json.loads((config_root() / "wandb" / "scaling-law.json").read_text())
    assert set(re.findall(r"\$\{field:(\w+)\}", json.dumps(chart))) == {"x", "y", "run", "kept"}
    alpha = fitted_ladder.fits["loss_avg", "power"].params["alpha"]
    assert numbers(fitted_ladder)["loss_avg/alpha"] == alpha
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    log_summary(study, fitted_ladder)  # type: ignore[arg-type]
    assert "warning: wandb" in capsys.readouterr().out
