"""Filters, guidance and the sampling loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from var_scale.errors import UserError
from var_scale.model import VAR, build_vae, build_var
from var_scale.model import sampling as s

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def var() -> VAR:
    torch.manual_seed(0)
    vae = build_vae(arch="patch", hidden=8, V=32, Cvae=8, patch_nums=(1, 2, 3, 4))
    return build_var(
        vae, depth=2, width=32, heads=2, num_classes=10, init_adaln=1.0, init_adaln_gamma=1.0, init_head=1.0, init_std=0.2
    ).eval()


def sample(var: VAR, *args: object, **kwargs: object) -> tuple[Tensor, list[Tensor]]:
    out = var.autoregressive_infer_cfg(*args, **kwargs, return_idx=True)  # type: ignore[arg-type]
    assert isinstance(out, tuple)
    return out


def kept(logits: Tensor) -> list[int]:
    return (logits[0, 0] > -math.inf).nonzero().flatten().tolist()


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0, 2.0, 0.0]]])
    out = s.filter_top_k_(logits, 2)
    assert out is logits
    assert kept(logits) == [1, 2, 3]
    assert kept(s.filter_top_k_(torch.randn(1, 1, 5), 50)) == [0, 1, 2, 3, 4]


def test_top_p_drops_where_the_rising_sum_is_at_most_1_minus_p() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    assert kept(s.filter_top_p_(logits.clone(), 0.75)) == [0, 1]  # 1/8, 2/8 <= 1/4 are dropped, 4/8 is not
    assert kept(s.filter_top_p_(logits.clone(), 0.8)) == [0, 1, 3] or kept(s.filter_top_p_(logits.clone(), 0.8)) == [0, 1, 2]
    assert kept(s.filter_top_p_(logits.clone(), 1e-6)) == [0]
    assert len(kept(s.filter_top_p_(torch.zeros(1, 1, 4), 1e-9))) == 1  # all equal: the last of the order stays


def test_top_p_works_on_what_top_k_left() -> None:
    logits = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log()
    s.sample_with_top_k_top_p_(logits, top_k=2, top_p=0.5)
    assert kept(logits) == [0]  # of 4/7 and 3/7, 3/7 <= 1/2 is dropped; of all four, 0.3 would stay
    assert s.sample_with_top_k_top_p_(torch.zeros(2, 3, 8), num_samples=-8).sort(-1)[0].tolist() == [[list(range(8))] * 3] * 2


def test_guidance_formula() -> None:
    logits = torch.randn(4, 3, 5)
    torch.testing.assert_close(s.guide(logits, 2, 1.5), 2.5 * logits[:2] - 1.5 * logits[2:])


def test_guidance_rises_with_the_scale(var: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    guide = s.guide

    def spy(logits: Tensor, B: int, t: float) -> Tensor:
        seen.append(t)
        return guide(logits, B, t)

    monkeypatch.setattr(s, "guide", spy)
    var.autoregressive_infer_cfg(2, 1, cfg=3.0, top_k=1)
    assert seen == pytest.approx([0.0, 1.0, 2.0, 3.0])


def test_seed_decides_the_tokens(var: VAR) -> None:
    image, tokens = sample(var, 3, 2, 7)
    again, tokens_again = sample(var, 3, 2, 7)
    _, other = sample(var, 3, 2, 8)
    assert torch.equal(image, again)
    assert torch.equal(torch.cat(tokens, 1), torch.cat(tokens_again, 1))
    assert not torch.equal(torch.cat(tokens, 1), torch.cat(other, 1))
    assert image.shape == (3, 3, 32, 32)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    before = torch.get_rng_state()
    sample(var, 3, None, 7, more_smooth=True)
    assert torch.equal(before, torch.get_rng_state())  # a seeded call leaves the global generator alone


def test_tokens_decode_to_the_image(var: VAR) -> None:
    image, tokens = sample(var, 2, torch.tensor([1, 4]), 3, 2.0, 8)
    decoded = var.vae_proxy[0].idxBl_to_img(tokens, same_shape=True, last_one=True)
    torch.testing.assert_close((decoded + 1) / 2, image, atol=1e-5, rtol=0)  # type: ignore[operator]


def test_greedy_tokens_are_the_argmax_of_the_teacher_forced_logits(var: VAR) -> None:
    label_B, cfg = torch.tensor([1, 4]), 2.0
    _, tokens = sample(var, 2, label_B, None, cfg, 1)
    x_BlZ = var.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    with torch.no_grad():
        conditional, free = var(label_B, x_BlZ), var(torch.full_like(label_B, 10), x_BlZ)
    t_L = cfg * var.lvl_1L[0][:, None] / 3
    assert torch.equal(((1 + t_L) * conditional - t_L * free).argmax(-1), torch.cat(tokens, 1))


def test_no_guidance_skips_the_unconditional_half(var: VAR) -> None:
    sizes: list[int] = []
    handle = var.blocks[0].register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    sample(var, 3, 2, 7, 0.0)
    sample(var, 3, 2, 7, 1.0)
    handle.remove()
    assert sizes == [3] * 4 + [6] * 4


def test_labels(var: VAR) -> None:
    rng = torch.Generator().manual_seed(4)
    expected = torch.multinomial(torch.full((1, 10), 0.1), 5, replacement=True, generator=rng).reshape(5)
    assert torch.equal(s.resolve_labels(var, 5, None, torch.Generator().manual_seed(4)), expected)
    assert s.resolve_labels(var, 2, -1, None).tolist() == [10, 10]
    assert s.resolve_labels(var, 2, 3, None).tolist() == [3, 3]
    for bad in (11, torch.tensor([0, -2])):
        with pytest.raises(UserError, match="is outside 0"):
            sample(var, 2, bad)
    with pytest.raises(UserError, match="one label an image"):
        sample(var, 3, torch.tensor([1]))


def test_sampling_is_done_in_evaluation_mode_and_the_mode_is_kept(var: VAR) -> None:
    reference = sample(var, 2, 1, 5)[0]
    var.train()
    assert torch.equal(sample(var, 2, 1, 5)[0], reference)
    assert var.training
    var.eval()
