"""Schedules and the optimiser are compared with the golden trajectory of the reference and with its
closed forms."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden.weights import fill
from tests.runs import small_config
from var_scale.config.schema import TrainConfig
from var_scale.data.loader import TokenData, TokenLoader
from var_scale.model.build import build_vae_var
from var_scale.train.engine.base import LossScale
from var_scale.train.engine.single import SingleEngine
from var_scale.train.noise import StepNoise
from var_scale.train.optim import build_optimizer, decays
from var_scale.train.schedule import Schedule, lr_factor, weight_decay
from var_scale.train.step import TrainStep, token_weights
from var_scale.train.world import World

GOLDEN = Path(__file__).parents[1] / "golden"
HERE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", ["tiny", "tiny_shared_adaln"])
def test_golden_trajectory(name: str) -> None:
    """Thirty steps of the official optimiser, schedule and clipping give the same losses, gradient
    norms and rates."""
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    data = np.load(GOLDEN / f"{name}.npz")
    c, want = meta["config"], meta["metrics"]["trajectory"]
    vae, var = build_vae_var(
        V=c["V"],
        Cvae=c["Cvae"],
        ch=c["ch"],
        patch_nums=c["patch_nums"],
        num_classes=c["num_classes"],
        depth=c["depth"],
        shared_aln=c["shared_aln"],
        attn_l2_norm=c["attn_l2_norm"],
    )
    fill(vae.state_dict())
    fill(var.state_dict())
    var.cond_drop_rate = 0.0
    recipe = TrainConfig(steps=1, clip=want["clip"])
    step = TrainStep(var, vae.quantize, recipe, "fp32")
    # The trajectory was made in eval mode, without any dropout.
    step.eval()
    engine = SingleEngine(step, recipe)
    idx, labels = torch.from_numpy(data["idx"]).long(), torch.from_numpy(data["labels"]).long()
    steps, warmup = want["steps"], want["warmup_it"]
    for g in range(steps):
        lr = want["peak_lr"] * lr_factor(
            want["schedule"], g, steps, warmup, want["wp0"], want["wpe"]
        )
        wd = weight_decay(g, steps, want["wd_start"], want["wd_end"])
        assert lr == pytest.approx(want["lr"][g], rel=1e-9)
        assert wd == pytest.approx(want["wd"][g], rel=1e-9)
        engine.set_rates(lr, wd)
        engine.prepare(last=True)
        loss, _, _ = engine.module(idx[g % 3 : g % 3 + 1], labels[g % 3 : g % 3 + 1])
        engine.backward(loss)
        stats = engine.step()
        assert float(loss.detach()) == pytest.approx(want["loss"][g], abs=1e-4), g
        assert float(stats.grad_norm) == pytest.approx(want["grad_norm"][g], rel=2e-4), g


def test_no_decay_groups() -> None:
    """The weights of class_emb, word_embed and the head decay; positions, levels, gates, scales and
    biases do not."""
    decay = {
        "class_emb.weight": 2,
        "word_embed.weight": 2,
        "head.weight": 2,
        "blocks.0.ffn.fc1.weight": 2,
        "blocks.0.ada_lin.1.weight": 2,
    }
    still = {
        "pos_start": 3,
        "pos_1LC": 3,
        "lvl_embed.weight": 2,
        "blocks.0.ada_gss": 4,
        "blocks.0.attn.scale_mul_1H11": 4,
        "blocks.0.attn.q_bias": 1,
        "head.bias": 1,
    }
    for names, expected in ((decay, True), (still, False)):
        for name, ndim in names.items():
            assert decays(name, torch.empty([2] * ndim)) is expected, name


def test_label_and_path_dropout_do_not_depend_on_the_world_size(tmp_path: Path) -> None:
    """A sample of the global batch draws the same on one rank, on two ranks, and over
    micro-batches."""
    config = small_config(tmp_path, model={"drop_path_rate": 0.5})
    data = TokenData(tmp_path / "train")
    whole = StepNoise(config, 7).of(TokenLoader(data, 0, 8).batch(7), HERE)
    # The first block always keeps its path.
    assert 0 < whole[1].float().mean() < 1 and (whole[1][0]).all()
    for world, accumulate in ((2, 1), (1, 2), (2, 2)):
        parts = [
            StepNoise(config, 7).of(
                TokenLoader(data, 0, 8, world, rank, accumulate).batch(7, micro), HERE
            )
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts], dim=2), whole[1])


def test_frozen_parameter_is_refused() -> None:
    """The reference asserts that nothing is frozen."""
    with pytest.raises(ValueError, match="frozen"):
        build_optimizer([("w", nn.Parameter(torch.zeros(2), requires_grad=False))], (0.9, 0.95))


@pytest.mark.parametrize("schedule", ["lin0", "lin", "lin00", "cos", "exp", "lin0.8"])
def test_schedule_ends(schedule: str) -> None:
    """The schedule starts at lr_start, reaches 1 after the warm-up, and ends at lr_end."""
    total, warmup = 1000, 20
    assert lr_factor(schedule, 0, total, warmup, 0.005, 0.01) == pytest.approx(0.005)
    assert lr_factor(schedule, warmup, total, warmup, 0.005, 0.01) == pytest.approx(1.0)
    assert lr_factor(schedule, total - 1, total, warmup, 0.005, 0.01) == pytest.approx(0.01)
    values = [lr_factor(schedule, g, total, warmup, 0.005, 0.01) for g in range(warmup, total)]
    assert all(b <= a + 1e-12 for a, b in pairwise(values))


def test_closed_forms() -> None:
    """lin0.8 passes its middle value; cos is half way at half time; weight decay is a cosine."""
    total, warmup, end = 1001, 0, 0.1
    middle = (1 + end + 0.9 * 0.2) / 2
    assert lr_factor("lin0.8", 800, total, warmup, 0, end) == pytest.approx(middle)
    assert lr_factor("cos", 500, total, warmup, 0, end) == pytest.approx(end + 0.9 * 0.5)
    assert weight_decay(500, 1001, 0.05, 0.08) == pytest.approx(0.065)
    assert weight_decay(0, 1001, 0.05, 0.08) == pytest.approx(0.05)
    assert weight_decay(1000, 1001, 0.05, 0.08) == pytest.approx(0.08)


def test_epochs_peak_and_default_warmup() -> None:
    """The number of steps is epochs x ceil(samples / batch); the peak is base_lr x batch / 256; the
    default warm-up is a fiftieth."""
    schedule = Schedule.of(TrainConfig(epochs=200, batch_size=768), 1281167)
    assert schedule.total_steps == 200 * 1669
    assert schedule.peak_lr == pytest.approx(3e-4)
    assert schedule.warmup == round(200 * 1669 / 50)


@pytest.mark.parametrize(
    ("pg", "pg0", "pgwp"), [(0.8, 4, 0.0), (0.5, 0, 1.5), (1.0, 2, 0.3), (0.01, 1, 0.0)]
)
def test_progressive_stages_are_the_references(pg: float, pg0: int, pgwp: float) -> None:
    """The stage and weight of every step are compared with the reference's bookkeeping, written out
    here: it counts iterations within a stage as they come."""
    config = TrainConfig(
        epochs=20,
        batch_size=8,
        progressive=pg,
        progressive_start=pg0,
        progressive_warmup_epochs=pgwp,
    )
    schedule, scales = Schedule.of(config, 100), 10
    total, per_epoch = schedule.total_steps, 13
    warmup, grow = schedule.warmup, (pgwp or 20 / 300) * per_epoch
    last, first, within = -1, True, 0
    for g in range(total):
        if g <= warmup:
            stage = pg0
        elif g >= total * pg:
            stage = scales - 1
        else:
            share = min(max((g - warmup) / (total * pg - warmup), 0), 1)
            stage = pg0 + round(share * (scales - 1 - pg0))
        if last != stage:
            first, last, within = last == -1, stage, 0
        within += 1
        weight = 1.0 if first else max(min(within / grow, 1), 0.01)
        want = (-1, 1.0) if stage == scales - 1 else (stage, weight)
        assert schedule.stage(g, scales) == (want[0], pytest.approx(want[1])), g
    if pg < 1:
        assert schedule.lr(total - 1) == pytest.approx(schedule.peak_lr * config.lr_end)
    assert Schedule.of(TrainConfig(epochs=20, batch_size=8), 100).stage(3, scales) == (-1, 1.0)


def test_loss_scale_follows_the_references_rules() -> None:
    """The scale starts at 2^11. It doubles after 1000 good steps, up to 2^15. An overflow halves it
    and restarts the count. A checkpoint keeps it."""
    scale, good, bad = LossScale(torch.device("cpu")), torch.tensor(0.0), torch.tensor(1.0)
    values = []
    for number in range(6000):
        scale.update(good)
        if number in (998, 999, 1999, 4999, 5999):
            values.append(float(scale.scale))
    assert values == [2.0**11, 2.0**12, 2.0**13, 2.0**15, 2.0**15]
    scale.update(bad)
    assert float(scale.scale) == 2.0**14
    for _ in range(999):
        scale.update(good)
    again = LossScale(torch.device("cpu"))
    again.load(scale.state())
    for each in (scale, again):
        assert float(each.scale) == 2.0**14
        each.update(good)
        assert float(each.scale) == 2.0**15


def test_token_weights() -> None:
    """The weights have mean 1: every scale has the same weight, or the tokens of each scale have a
    factor."""
    assert token_weights("token", (1, 2, 3)) is None
    for given, sums in (("scale", [1 / 3] * 3), ([1.0, 0.0, 1.0], [0.1, 0.0, 0.9])):
        weight_L = token_weights(given, (1, 2, 3))
        assert weight_L is not None and float(weight_L.mean()) == pytest.approx(1)
        assert [float(part.sum() / 14) for part in weight_L.split([1, 4, 9])] == pytest.approx(sums)


def test_z_loss_and_weights_in_both_forms() -> None:
    """The loss of TrainStep is compared with the formula, with and without the fused operators, and
    also for the first scales only."""
    recipe = TrainConfig(steps=1, z_loss=0.01, label_smoothing=0.1, scale_weights="scale")
    torch.manual_seed(0)
    tokens_BL, label_B = torch.randint(32, (3, 14)), torch.tensor([0, 1, 2])
    for kernels in ("off", "on"):
        vae, var = build_vae_var(V=32, Cvae=8, ch=32, patch_nums=(1, 2, 3), num_classes=4, depth=2)
        var.kernels = kernels
        for block in var.blocks:
            block.kernels = block.ffn.kernels = kernels
        fill(vae.state_dict())
        fill(var.state_dict())
        step = TrainStep(var, vae.quantize, recipe, "fp32").train()
        quiet = {
            "label_drop_B": torch.zeros(3, dtype=torch.bool),
            "path_keep_D2B": torch.ones(2, 2, 3, dtype=torch.bool),
        }
        for stage, newest in ((-1, 1.0), (1, 0.25), (0, 1.0)):
            loss = step(tokens_BL, label_B, **quiet, stage=stage, newest=newest)[0]
            end = (1, 5, 14)[stage]
            x = vae.quantize.idxBl_to_var_input(
                [tokens_BL[:, :1], tokens_BL[:, 1:5], tokens_BL[:, 5:]][: stage + 1 or None]
            )
            logits = var(
                label_B, x, label_drop_B=quiet["label_drop_B"], path_keep_DB=quiet["path_keep_D2B"]
            )
            each = nn.functional.cross_entropy(
                logits.flatten(0, 1),
                tokens_BL[:, :end].flatten(),
                reduction="none",
                label_smoothing=0.1,
            )
            each = (each + 0.01 * logits.flatten(0, 1).logsumexp(-1).square()).view(3, end)
            weight_L = torch.tensor([14 / 3] + [14 / 12] * 4 + [14 / 27] * 9)[:end]
            weight_L[(0, 1, 5)[stage] :] *= newest
            torch.testing.assert_close(
                loss, (each * weight_L).sum(1).mean() / 14, rtol=1e-5, atol=1e-6
            )
