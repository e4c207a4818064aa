"""README.md of a published model: what it is, the study's numbers, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from var_scale.cost.flops import count_flops
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.files import read_json, write_text
from var_scale.model.var import VAR
from var_scale.study.plan import short
from var_scale.study.record import METRICS, read_run


def shape_of_model(var: VAR) -> ModelShape:
    """The numbers that fix a model's cost."""
    return ModelShape(var.depth, var.C, var.num_heads, round(var.C * var.mlp_ratio), var.patch_nums, var.V, var.Cvae, var.num_classes,
                      var.shared_aln, var.attn_l2_norm)  # fmt: skip


DISTANCES = ("FID", "sFID", "FD-tok", "IS", "precision", "recall")
"""what `study quality` may have measured"""


def _quality(run: Path) -> list[dict[str, Any]]:
    """The run's own row of its study's quality.json; none where it was not measured."""
    path = run.parent / "report" / "quality.json"
    rows = read_json(path, "quality of samples")["runs"] if path.exists() else []
    return [row for row in rows if row["run"] == run.name]


def numbers_of(run: Path) -> dict[str, str]:
    """What the card says of a run folder: its training, its losses, its samples, and the law of its study, where there are some."""
    record = read_run(run)
    found = {"images seen": f"{record.images:,}", "training FLOP": f"{record.flops_exact:.3g}"}
    found |= {f"{metric}, validation": f"{record.metric(metric):.4f}" for metric in METRICS}
    found |= {f"{key}, {row['samples']:,} samples": f"{row[key]:.4g}" for row in _quality(run) for key in row if key in DISTANCES}
    fits = run.parent / "report" / "fit.json"
    for fit in read_json(fits, "fits")["fits"] if fits.exists() else []:
        if fit["metric"] == "loss_avg" and fit["form"] == "power" and fit["status"] == "converged":
            low, high = fit["intervals"]["alpha"]
            law = f"{fit['params']['alpha']:.4f} ({low:.4f} to {high:.4f}), E = {fit['params']['E']:g}"
            found["exponent of its study's average loss"] = law
    return found


def write_card(folder: Path, name: str, var: VAR, what: dict[str, Any], numbers: dict[str, str]) -> None:
    """Write README.md with the hub's front matter, what the model was made from, and the numbers of `numbers_of`."""
    shape = shape_of_model(var)
    params, flops = count_params(shape), count_flops(shape)
    lines = ["---", "library_name: var-scale", "tags: [image-generation, visual-autoregressive, var]", "---", ""]
    lines += [
        f"# {name}", "",
        f"A VAR image model (next-scale prediction, arXiv 2404.02905): depth {var.depth}, width {var.C}, {short(params.total)} parameters, "
        f"{short(params.paper)} by the paper's count, {var.num_classes} classes, scales {', '.join(map(str, var.patch_nums))}, "
        f"{2 * flops.forward_macs:.3g} FLOP an image forward.", "",
        "```python", "from pathlib import Path", "from var_scale.model.pretrained import load_pretrained", "",
        'var, vae, _ = load_pretrained(Path("FOLDER"))',
        "images = var.autoregressive_infer_cfg(B=8, label_B=None, g_seed=0, cfg=1.5, top_k=900, top_p=0.96)  # [0, 1]", "```", "",
    ]  # fmt: skip
    if numbers:
        lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in numbers.items()), ""]
    lines += ["Made from:", "", *(f"- {key}: `{value}`" for key, value in what.items()), ""]
    write_text(folder / "README.md", "\n".join(lines))
