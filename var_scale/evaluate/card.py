"""The model card of a published model (README.md): what it is, its results, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from var_scale.cost.flops import count_flops
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.files import read_json, write_text
from var_scale.model.var import VAR
from var_scale.progress import short
from var_scale.records.record import METRICS, read_run

DISTANCES = ("FID", "sFID", "FD-tok", "IS", "precision", "recall")
"""What `study quality` may have measured."""


def shape_of_model(var: VAR) -> ModelShape:
    """The shape of a model, from which its cost follows."""
    return ModelShape(
        var.depth,
        var.C,
        var.num_heads,
        round(var.C * var.mlp_ratio),
        var.patch_nums,
        var.V,
        var.Cvae,
        var.num_classes,
        var.shared_aln,
        var.attn_l2_norm,
    )


def _quality(run: Path) -> list[dict[str, Any]]:
    """The rows of a run in the quality.json of its study; empty if it was not measured."""
    path = run.parent / "report" / "quality.json"
    rows = read_json(path, "quality of samples")["runs"] if path.exists() else []
    return [row for row in rows if row["run"] == run.name and row.get("share", 1) == 1]


def numbers_of(run: Path) -> dict[str, str]:
    """The results of a run for its card: training, losses, sample quality, and the law of its
    study, as far as they exist."""
    record = read_run(run)
    found = {"images seen": f"{record.images:,}", "training FLOP": f"{record.flops_exact:.3g}"}
    found |= {f"{metric}, validation": f"{record.metric(metric):.4f}" for metric in METRICS}
    found |= {
        f"{key}, {row['samples']:,} samples": f"{row[key]:.4g}"
        for row in _quality(run)
        for key in row
        if key in DISTANCES
    }
    fits = run.parent / "report" / "fit.json"
    for fit in read_json(fits, "fits")["fits"] if fits.exists() else []:
        if fit["metric"] == "loss_avg" and fit["form"] == "power" and fit["status"] == "converged":
            (low, high), values = fit["intervals"]["alpha"], fit["params"]
            found["exponent of its study's average loss"] = (
                f"{values['alpha']:.4f} ({low:.4f} to {high:.4f}), E = {values['E']:g}"
            )
    return found


def write_card(
    folder: Path, name: str, var: VAR, what: dict[str, Any], numbers: dict[str, str]
) -> None:
    """Write README.md with the front matter of the hub, the provenance of the model (`what`), and
    the results of `numbers_of`."""
    shape = shape_of_model(var)
    params, flops = count_params(shape), count_flops(shape)
    lines = [
        "---",
        "library_name: var-scale",
        "tags: [image-generation, visual-autoregressive, var]",
        "---",
        "",
    ]
    lines += [
        f"# {name}",
        "",
        f"A VAR image model (next-scale prediction, arXiv 2404.02905): depth {var.depth}, width "
        f"{var.C}, {short(params.total)} parameters, {short(params.paper)} as the paper counts "
        f"them, {var.num_classes} classes, scales {', '.join(map(str, var.patch_nums))}, "
        f"{2 * flops.forward_macs:.3g} FLOP per image in the forward pass.",
        "",
        "```python",
        "from pathlib import Path",
        "from var_scale.model.pretrained import load_pretrained",
        "",
        'var, vae, _ = load_pretrained(Path("FOLDER"))',
        "images = var.autoregressive_infer_cfg(",
        "    B=8, label_B=None, g_seed=0, cfg=1.5, top_k=900, top_p=0.96",
        ")  # in [0, 1]",
        "```",
        "",
    ]
    if numbers:
        lines += [
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in numbers.items()),
            "",
        ]
    lines += ["Made from:", "", *(f"- {key}: `{value}`" for key, value in what.items()), ""]
    write_text(folder / "README.md", "\n".join(lines))
