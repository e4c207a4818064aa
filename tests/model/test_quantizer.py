"""The quantiser: which phi it uses, the chain of scales, and the training paths."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.raises import raises
from var_scale.model import MultiScaleQuantizer, build_vae
from var_scale.model.quantizer import _bicubic_matrix, phi_index, scale_position

PATCH_NUMS = (1, 2, 3, 4)


def quantizer(
    share: int = 4, patch_nums: tuple[int, ...] = PATCH_NUMS, **kwargs: object
) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return MultiScaleQuantizer(16, 6, v_patch_nums=patch_nums, share_quant_resi=share, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (4, [0, 1, 2, 3]),
        (1, [0]),
    ],
)
def test_four_shared_phis(scales: int, expected: list[int]) -> None:
    assert [phi_index(scale_position(i, scales), 4) for i in range(scales)] == expected


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 7, 10, 14])
def test_one_phi_a_scale(scales: int) -> None:
    assert [phi_index(scale_position(i, scales), scales) for i in range(scales)] == list(
        range(scales)
    )


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (0, {f"quant_resi.{k}.{w}" for k in range(4) for w in ("weight", "bias")}),
        (1, {"quant_resi.qresi.weight", "quant_resi.qresi.bias"}),
        (2, {f"quant_resi.qresi_ls.{k}.{w}" for k in range(2) for w in ("weight", "bias")}),
    ],
)
def test_names(share: int, names: set[str]) -> None:
    assert quantizer(share).state_dict().keys() == names | {"ema_vocab_hit_SV", "embedding.weight"}


def test_no_phi_when_its_weight_is_zero() -> None:
    q = quantizer(quant_resi=0.0)
    assert q.state_dict().keys() == {"ema_vocab_hit_SV", "embedding.weight"}
    h = torch.randn(1, 6, 4, 4)
    assert torch.equal(q.quant_resi[0.5](h), h)


def test_phi_formula() -> None:
    phi = quantizer(1, quant_resi=-0.3).quant_resi[0.0]
    h = torch.randn(2, 6, 4, 4)
    expected = 0.7 * h + 0.3 * F.conv2d(h, phi.weight, phi.bias, padding=1)  # type: ignore[arg-type]
    torch.testing.assert_close(phi(h), expected)


@pytest.mark.parametrize("share", [0, 1, 2, 4])
@pytest.mark.parametrize("znorm", [False, True])
def test_input_chain_is_the_sampling_chain(share: int, znorm: bool) -> None:
    """idxBl_to_var_input, get_next_autoregressive_input, f_to_idxBl_or_fhat and embed_to_fhat are
    four views of one pyramid."""
    q = quantizer(share, using_znorm=znorm)
    f = torch.randn(2, 6, 4, 4)
    idx = q.f_to_idxBl_or_fhat(f, to_fhat=False)
    fhats = q.f_to_idxBl_or_fhat(f, to_fhat=True)
    embeds = [
        q.embedding(i).transpose(1, 2).reshape(2, 6, pn, pn).detach()
        for i, pn in zip(idx, PATCH_NUMS, strict=True)
    ]
    f_hat, rows = torch.zeros(2, 6, 4, 4), []
    with torch.no_grad():
        for si, h in enumerate(embeds):
            f_hat, nxt = q.get_next_autoregressive_input(si, 4, f_hat, h)
            torch.testing.assert_close(f_hat, fhats[si])
            rows.append(nxt.flatten(2).transpose(1, 2))
    torch.testing.assert_close(q.idxBl_to_var_input(idx), torch.cat(rows[:-1], dim=1))
    decoded = q.embed_to_fhat(embeds)
    for a, b in zip(decoded, fhats, strict=True):
        torch.testing.assert_close(a.detach(), b)
    torch.testing.assert_close(q.embed_to_fhat(embeds, last_one=True), decoded[-1])  # type: ignore[arg-type]
    small = q.embed_to_fhat(embeds, all_to_max_scale=False)
    assert [tuple(s.shape[2:]) for s in small] == [(pn, pn) for pn in PATCH_NUMS]


@pytest.mark.parametrize(
    ("size", "target"),
    [((1, 1), (16, 16)), ((5, 13), (16, 24)), ((16, 16), (16, 16)), ((8, 8), (3, 5))],
)
def test_bicubic_interpolation_is_two_products(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    """The two products are computed as on GPUs."""
    h = torch.randn(2, 3, *size, dtype=torch.float64)
    down, across = (
        _bicubic_matrix(n, m, torch.device("cpu")).double()
        for n, m in zip(size, target, strict=True)
    )
    torch.testing.assert_close(
        down @ h @ across.t(), F.interpolate(h, size=target, mode="bicubic"), atol=1e-6, rtol=0
    )


def test_nearest_code() -> None:
    q, z = quantizer(), torch.randn(50, 6)
    assert torch.equal(q.nearest(z), torch.cdist(z, q.embedding.weight).argmin(1))
    q.using_znorm = True
    assert torch.equal(
        q.nearest(z), F.cosine_similarity(z[:, None], q.embedding.weight[None], dim=-1).argmax(1)
    )


def test_progressive_stages() -> None:
    q, f = quantizer(), torch.randn(2, 6, 4, 4)
    full = q.f_to_idxBl_or_fhat(f, to_fhat=False)
    x = q.idxBl_to_var_input(full)
    assert x is not None
    for stage in range(4):
        q.prog_si = stage
        short, part = q.f_to_idxBl_or_fhat(f, to_fhat=False), q.idxBl_to_var_input(full)
        assert [torch.equal(a, b) for a, b in zip(short, full, strict=False)] == [True] * (
            stage + 1
        )
        assert len(short) == stage + 1
        if part is None:
            assert stage == 0
        else:
            end = sum(pn * pn for pn in PATCH_NUMS[1 : stage + 1])
            assert torch.equal(part, x[:, :end])


def test_custom_schedule_and_wrong_size() -> None:
    q = quantizer()
    idx = q.f_to_idxBl_or_fhat(
        torch.randn(1, 6, 4, 6), to_fhat=False, v_patch_nums=[1, (2, 3), (4, 6)]
    )
    assert [i.shape[1] for i in idx] == [1, 6, 24]
    with raises("model.input", "5x5"):
        q.f_to_idxBl_or_fhat(torch.randn(1, 6, 5, 5), to_fhat=False)


def test_single_scale() -> None:
    q = quantizer(patch_nums=(4,)).train()
    f = torch.randn(1, 6, 4, 4, requires_grad=True)
    out, usages, loss = q(f, ret_usages=True)
    loss.backward()
    assert out.shape == f.shape
    assert usages is not None
    assert len(usages) == 1
    assert q.idxBl_to_var_input([torch.zeros(1, 16, dtype=torch.long)]) is None


def test_training_forward() -> None:
    """Loss by its definition, straight-through gradient, usage buffer without a process group."""
    q = quantizer().train()
    f = torch.randn(2, 6, 4, 4, requires_grad=True)
    out, usages, loss = q(f, ret_usages=True)
    fhats = q.f_to_idxBl_or_fhat(f.detach(), to_fhat=True)
    torch.testing.assert_close(out.detach(), fhats[-1])
    torch.testing.assert_close(
        loss.detach(), 1.25 * torch.stack([F.mse_loss(x, f.detach()) for x in fhats]).mean()
    )
    (grad,) = torch.autograd.grad(out.sum(), f, retain_graph=True)
    torch.testing.assert_close(grad, torch.ones_like(f))
    loss.backward()
    assert q.embedding.weight.grad is not None
    idx = q.f_to_idxBl_or_fhat(f.detach(), to_fhat=False)
    hits = [i.flatten().bincount(minlength=16).float() for i in idx]
    torch.testing.assert_close(
        q.ema_vocab_hit_SV, torch.stack([hits[0], *(0.1 * h for h in hits[1:])])
    )
    assert q.record_hit == 4
    margin = 2 * 16 / 16 * 0.08
    assert usages == pytest.approx(
        [100 * float((row >= margin).float().mean()) for row in q.ema_vocab_hit_SV]
    )


def test_encode_for_training() -> None:
    q, f = quantizer(), torch.randn(2, 6, 4, 4, requires_grad=True)
    out, loss, idx_list, residual_list = q.encode_for_training(f)
    (out.square().sum() + loss).backward()
    assert f.grad is not None
    assert q.embedding.weight.grad is None
    assert q.quant_resi.qresi_ls[0].weight.grad is not None
    reference = q.f_to_idxBl_or_fhat(f.detach(), to_fhat=False)
    for pn, idx, z, expected in zip(PATCH_NUMS, idx_list, residual_list, reference, strict=True):
        assert z.shape == (2 * pn * pn, 6)
        assert not z.requires_grad
        assert torch.equal(idx, expected.flatten())
        assert torch.equal(idx, q.nearest(z))
    torch.testing.assert_close(residual_list[0], f.detach().mean((2, 3)))


def test_patch_tokenizer() -> None:
    vae = build_vae(arch="patch", V=64, Cvae=16, patch_nums=PATCH_NUMS, test_mode=False)
    assert 0.5e6 < sum(p.numel() for p in vae.parameters()) < 0.95e6
    assert vae.image_size == (32, 32)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    out, _, loss = vae(image)
    (out.square().mean() + loss).backward()
    assert out.shape == image.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_fresh_weights_are_finite_and_frozen_in_test_mode() -> None:
    vae = build_vae(ch=32, V=16, Cvae=8, patch_nums=PATCH_NUMS)
    assert all(
        bool(t.isfinite().all()) and float(t.abs().max()) < 10 for t in vae.state_dict().values()
    )
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())


def test_usage_of_other_scales_is_left_aside() -> None:
    vae = build_vae(arch="patch", hidden=8, V=16, Cvae=8, patch_nums=PATCH_NUMS)
    state = build_vae(arch="patch", hidden=8, V=16, Cvae=8, patch_nums=(1, 2, 4)).state_dict()
    vae.load_state_dict(state)
    assert vae.quantize.ema_vocab_hit_SV.shape == (4, 16)
    assert state["quantize.ema_vocab_hit_SV"].shape == (3, 16)


def test_decoder_in_half_precision() -> None:
    """In half precision the decoder's output is near that of float32, and in float32 it is
    unchanged; the encoder and the quantiser keep their numbers."""
    torch.manual_seed(0)
    vae = build_vae(ch=32)
    f_hat, image = torch.randn(1, 32, 4, 4), torch.rand(1, 3, 32, 32)
    plain, tokens = vae.fhat_to_img(f_hat), vae.encode(image)
    vae.prepare_decoder(torch.float32)
    torch.testing.assert_close(vae.fhat_to_img(f_hat), plain, atol=1e-4, rtol=0)
    vae.prepare_decoder(torch.bfloat16)
    half = vae.fhat_to_img(f_hat)
    assert half.dtype == torch.bfloat16 and float((half.float() - plain).abs().mean()) < 0.02
    assert (
        torch.equal(vae.encode(image), tokens)
        and vae.quantize.embedding.weight.dtype == torch.float32
    )
