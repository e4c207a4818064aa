"""Export to and import from the official trainer's checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.raises import raises
from tests.runs import losses, rewind, run_here, small_config
from var_scale.model.load import build_model, load_tokenizer
from var_scale.train.checkpoint import checkpoints
from var_scale.train.official import export_checkpoint, import_checkpoint

NO_DECAY = {
    "cls_token",
    "start_token",
    "task_token",
    "cfg_uncond",
    "pos_embed",
    "pos_1LC",
    "pos_start",
    "start_pos",
    "lvl_embed",
    "gamma",
    "beta",
    "ada_gss",
    "moe_bias",
    "scale_mul",
}


def official_groups(var: torch.nn.Module) -> list[dict]:
    """Parameter groups as the official filter_params makes them, in the order of their first
    parameters."""
    groups: dict[str, dict] = {}
    for name, p in var.named_parameters():
        kind = (
            "ND"
            if p.ndim == 1 or name.endswith("bias") or any(key in name for key in NO_DECAY)
            else "D"
        )
        groups.setdefault(kind, {"params": [], "wd_sc": float(kind == "D"), "lr_sc": 1.0})[
            "params"
        ].append(p)
    return list(groups.values())


@pytest.mark.parametrize("shared_aln", [False, True])
def test_there_and_back(shared_aln: bool, tmp_path: Path) -> None:
    """Exported after an epoch, it loads into the official optimiser. Imported again, training ends
    with the same bits."""
    config = small_config(
        tmp_path,
        train={"steps": None, "epochs": 2, "keep_steps": [13]},
        model={"shared_aln": shared_aln},
    )
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0
    whole, end = losses(folder), checkpoints(folder.checkpoints)[-1].state["files"]
    rewind(folder, 13)
    assert export_checkpoint(folder.path, tmp_path / "ar-ckpt-last.pth") == 1

    content = torch.load(tmp_path / "ar-ckpt-last.pth", weights_only=True)
    trainer = content["trainer"]
    assert (
        content["epoch"] == 1
        and content["iter"] == 0
        and set(trainer) == {"config", "var_wo_ddp", "vae_local", "var_opt"}
    )
    tokenizer, _ = load_tokenizer(config.tokenizer, torch.device("cpu"))
    var = build_model(config, tokenizer, torch.device("cpu"))
    var.load_state_dict(trainer["var_wo_ddp"], strict=True)
    optimizer = torch.optim.AdamW(
        official_groups(var), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    optimizer.load_state_dict(trainer["var_opt"]["optimizer"])
    saved = checkpoints(folder.checkpoints)[-1].tensors("exp_avg")
    for name, p in var.named_parameters():
        assert (
            torch.equal(optimizer.state[p]["exp_avg"], saved[name])
            and float(optimizer.state[p]["step"]) == 13
        ), name
    assert [group["wd_sc"] for group in optimizer.param_groups] == [0.0, 1.0]

    assert import_checkpoint(tmp_path / "ar-ckpt-last.pth", config, tmp_path / "again") == 13
    code, again = run_here(config, tmp_path / "again")
    assert code == 0 and losses(again) == whole[13:]
    assert checkpoints(again.checkpoints)[-1].state["files"] == end
    with raises("train.run-has-checkpoints"):
        import_checkpoint(tmp_path / "ar-ckpt-last.pth", config, tmp_path / "again")


def test_what_cannot_be_imported(tmp_path: Path) -> None:
    """Bare weights, another model, and a run that has ended cannot be imported."""
    config = small_config(tmp_path, train={"steps": 13})
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0
    file = tmp_path / "ar-ckpt-last.pth"
    export_checkpoint(folder.path, file)
    with raises("train.official-finished"):
        import_checkpoint(file, config, tmp_path / "a")
    with raises("train.official-other-model"):
        import_checkpoint(
            file, small_config(tmp_path, train={"steps": 20}, model={"depth": 3}), tmp_path / "b"
        )
    torch.save(torch.load(file, weights_only=True)["trainer"]["var_wo_ddp"], file)
    with raises("train.not-official"):
        import_checkpoint(file, config, tmp_path / "c")
