"""The transformer: names, counts, initialisation, dropout, stages, cached and teacher-forced."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.raises import raises
from var_scale.model import VAR, VQVAE, backend_name, build_vae, build_vae_var, build_var
from var_scale.model.attention import block_causal_bias
from var_scale.scales import PatchNum

PATCH_NUMS = (1, 2, 3, 4)


def tiny_vae(patch_nums: tuple[PatchNum, ...] = PATCH_NUMS) -> VQVAE:
    torch.manual_seed(0)
    return build_vae(arch="patch", hidden=8, V=32, Cvae=8, patch_nums=patch_nums)


def tiny(patch_nums: tuple[PatchNum, ...] = PATCH_NUMS, **kwargs: Any) -> VAR:
    """A small VAR whose every part matters (no damping at the start)."""
    plain = {"init_adaln": 1.0, "init_adaln_gamma": 1.0, "init_head": 1.0, "init_std": 0.1}
    return build_var(
        tiny_vae(patch_nums),
        **{"depth": 2, "width": 32, "heads": 2, "num_classes": 10, **plain, **kwargs},
    )


def batch(var: VAR, B: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.arange(B), torch.randn(B, var.L - var.first_l, var.Cvae, generator=generator)


@torch.no_grad()
def stepped(var: VAR, label_B: Tensor, x_BlZ: Tensor) -> Tensor:
    """Logits scale by scale with a key-value cache and no mask, from the blocks, as in the official
    notebooks."""
    cond = var.class_emb(label_B)
    position = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    tokens = torch.cat((cond[:, None] + var.pos_start, var.word_embed(x_BlZ)), dim=1) + position
    out = []
    for block in var.blocks:
        block.attn.kv_caching(True)
    for begin, end in var.begin_ends:
        h = tokens[:, begin:end]
        for block in var.blocks:
            h = block(x=h, cond_BD=var.shared_ada_lin(cond), attn_bias=None)
        out.append(var.get_logits(h, cond))
    for block in var.blocks:
        block.attn.kv_caching(False)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
@pytest.mark.parametrize(
    "patch_nums", [(1, 2, 3, 4), (2, 3), (3,), (1, (1, 2), (2, 3)), ((2, 1), (3, 2))]
)
def test_cached_equals_teacher_forced(
    shared_aln: bool, attn_l2_norm: bool, patch_nums: tuple[PatchNum, ...]
) -> None:
    var = tiny(patch_nums, shared_aln=shared_aln, attn_l2_norm=attn_l2_norm).eval()
    label_B, x_BlZ = batch(var)
    torch.testing.assert_close(
        stepped(var, label_B, x_BlZ), var(label_B, x_BlZ).detach(), atol=5e-6, rtol=1e-5
    )


def test_mask_is_block_causal() -> None:
    bias = block_causal_bias((1, 2))[0, 0]
    assert bias[0].tolist() == [0.0] + [-math.inf] * 4
    assert not bias[1:].any()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_progressive_stage_is_a_prefix(stage: int) -> None:
    var = tiny().eval()
    label_B, x_BlZ = batch(var)
    full = var(label_B, x_BlZ).detach()
    end = var.begin_ends[stage][1]
    var.prog_si = stage
    part = var(label_B, x_BlZ[:, : end - 1] if stage else None)
    torch.testing.assert_close(part.detach(), full[:, :end], atol=5e-6, rtol=1e-5)
    part.sum().backward()
    assert all(p.grad is not None for p in var.parameters())  # DDP waits for every one


# Of the official models: depth: (parameters, parameters with shared AdaLN).
COUNTS = {
    6: (18_492_580, 14_071_204),
    8: (41_315_904, 30_308_928),
    16: (310_283_520, 215_917_824),
    20: (600_917_136, 414_147_216),
    24: (1_033_399_360, 707_825_728),
    30: (2_010_020_356, 1_368_598_276),
    36: (3_465_053_200, 2_350_299_664),
}


@pytest.mark.parametrize("depth", COUNTS)
@pytest.mark.parametrize("shared_aln", [False, True])
def test_parameter_counts_and_names(depth: int, shared_aln: bool) -> None:
    var = build_vae_var(depth=depth, shared_aln=shared_aln, device="meta")[1]
    assert sum(p.numel() for p in var.parameters()) == COUNTS[depth][shared_aln]
    names = var.state_dict().keys()
    assert len(names) == (14 + 12 * depth if shared_aln else 12 + 13 * depth)
    assert ("blocks.0.ada_gss" in names) == ("shared_ada_lin.1.weight" in names) == shared_aln
    assert ("blocks.0.ada_lin.1.weight" in names) == (not shared_aln)


def test_official_512_model() -> None:
    var = build_vae_var(
        depth=36, shared_aln=True, patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), device="meta"
    )[1]
    assert (var.L, sum(p.numel() for p in var.parameters()), len(var.state_dict())) == (
        2240,
        2_353_893_904,
        446,
    )


@pytest.mark.parametrize("shared_aln", [False, True])
def test_initialisation(shared_aln: bool) -> None:
    torch.manual_seed(0)
    C, depth = 128, 4
    var = build_var(tiny_vae(), depth=depth, width=C, heads=2, shared_aln=shared_aln)
    auto = math.sqrt(1 / C / 3)

    def std(tensor: Tensor) -> float:
        return float(tensor.detach().std())

    for tensor in (
        var.class_emb.weight,
        var.pos_1LC,
        var.blocks[1].attn.mat_qkv.weight,
        var.blocks[1].ffn.fc1.weight,
    ):  # type: ignore[union-attr]
        assert std(tensor) == pytest.approx(auto, rel=0.05)  # type: ignore[arg-type]
    block: Any = var.blocks[2]
    assert std(var.head.weight) == pytest.approx(0.02 * auto, rel=0.05)
    assert std(block.attn.proj.weight) == pytest.approx(auto / math.sqrt(2 * depth), rel=0.05)
    assert std(block.ffn.fc2.weight) == pytest.approx(auto / math.sqrt(2 * depth), rel=0.05)
    head_nm: Any = var.head_nm
    assert std(head_nm.ada_lin[1].weight) == pytest.approx(0.5 * auto, rel=0.05)
    if shared_aln:
        shared: Any = var.shared_ada_lin
        assert std(shared[1].weight) == pytest.approx(auto, rel=0.05)
        assert std(block.ada_gss[:, :, :2]) == pytest.approx(1e-5 / math.sqrt(C), rel=0.2)
        assert std(block.ada_gss[:, :, 2:]) == pytest.approx(0.5 / math.sqrt(C), rel=0.2)
    else:
        assert std(block.ada_lin[1].weight[: 2 * C]) == pytest.approx(1e-5 * auto, rel=0.05)
        assert std(block.ada_lin[1].weight[2 * C :]) == pytest.approx(0.5 * auto, rel=0.05)
    assert torch.allclose(block.attn.scale_mul_1H11, torch.tensor(4.0).log())
    assert all(not p.any() for name, p in var.named_parameters() if name.endswith("bias"))
    logits = var.eval()(*batch(var))
    assert float(torch.log_softmax(logits.detach(), -1).mean()) == pytest.approx(
        -math.log(32), abs=0.01
    )


def test_initial_std_leaves_positions_alone() -> None:
    var = build_var(tiny_vae(), depth=2, width=128, heads=2, init_std=0.3)
    assert float(var.pos_1LC.detach().std()) == pytest.approx(math.sqrt(1 / 128 / 3), rel=0.05)
    assert float(var.class_emb.weight.detach().std()) == pytest.approx(0.3, rel=0.05)


def test_drop_path_rates_rise_from_zero() -> None:
    var: Any = build_var(tiny_vae(), depth=5, width=40, heads=5)
    assert [b.drop_path.rate for b in var.blocks] == pytest.approx(
        torch.linspace(0, 0.1 * 5 / 24, 5).tolist()
    )


def test_labels_in_evaluation() -> None:
    var = tiny(cond_drop_rate=1.0).eval()
    label_B, x_BlZ = batch(var)
    null_B = torch.full_like(label_B, 10)
    kept, dropped = var(label_B, x_BlZ), var(null_B, x_BlZ)
    assert not torch.allclose(kept, dropped, atol=1e-3)
    var.eval_label_drop = True
    assert torch.equal(var(label_B, x_BlZ), dropped)
    mask_B = torch.tensor([True, False, True])
    mixed = var(label_B, x_BlZ, label_drop_B=mask_B)
    torch.testing.assert_close(mixed, torch.where(mask_B[:, None, None], dropped, kept))


def test_label_drop_in_training_follows_the_global_generator() -> None:
    var = tiny(drop_path_rate=0.0, cond_drop_rate=0.5).train()
    label_B, x_BlZ = torch.arange(8), batch(var, 8)[1]
    torch.manual_seed(3)
    drawn = var(label_B, x_BlZ)
    torch.manual_seed(3)
    drop_B = torch.rand(8) < 0.5
    assert 0 < int(drop_B.sum()) < 8
    assert torch.equal(drawn, var(label_B, x_BlZ, label_drop_B=drop_B))


def test_path_keep() -> None:
    var = tiny(drop_path_rate=0.5).train()
    label_B, x_BlZ = batch(var)
    no_drop = torch.zeros(3, dtype=torch.bool)
    torch.manual_seed(5)
    drawn = var(label_B, x_BlZ, label_drop_B=no_drop)
    torch.manual_seed(5)  # block 0 has rate 0 and draws nothing
    keep_2B = torch.stack([torch.empty(3, 1, 1).bernoulli_(0.5).view(3) for _ in range(2)]).bool()
    keep_D2B = torch.stack([torch.ones(2, 3, dtype=torch.bool), keep_2B])
    assert torch.equal(drawn, var(label_B, x_BlZ, label_drop_B=no_drop, path_keep_DB=keep_D2B))
    one = torch.tensor([[True] * 3, [True, False, True]])
    both = var(label_B, x_BlZ, label_drop_B=no_drop, path_keep_DB=one)
    assert torch.equal(
        both, var(label_B, x_BlZ, label_drop_B=no_drop, path_keep_DB=one[:, None].expand(2, 2, 3))
    )
    assert not torch.allclose(both[0], drawn.new_zeros(()), atol=1e-3)


def test_autocast_keeps_embeddings_and_logits_in_float32() -> None:
    var = tiny().eval()
    label_B, x_BlZ = batch(var)
    exact, seen = var(label_B, x_BlZ).detach(), []
    handle = var.blocks[0].register_forward_pre_hook(
        lambda _module, args: seen.append([a.dtype for a in args if a is not None])
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = var(label_B, x_BlZ)
        assert var.autoregressive_infer_cfg(2, 1, g_seed=0).isfinite().all()  # type: ignore[union-attr]
    handle.remove()
    assert seen[0] == [torch.bfloat16] * 3  # residual stream, condition, mask
    assert seen[1][:2] == [torch.float32] * 2  # sampling does not cast the residual stream down
    assert logits.dtype == torch.float32
    assert float((logits.detach() - exact).abs().max()) < 0.1 * float(exact.abs().max())
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in var.parameters())


def test_model_in_bfloat16_altogether() -> None:
    var = tiny().eval().bfloat16()
    logits = var(*batch(var))
    assert logits.dtype == torch.float32
    logits.sum().backward()


@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_attention_formula(attn_l2_norm: bool) -> None:
    """Compared with the definition written out: temperature, cap, biases and mask."""
    attn: Any = tiny(attn_l2_norm=attn_l2_norm).blocks[0].attn
    with torch.no_grad():
        for p in attn.parameters():
            p.normal_(std=0.5)
        if attn_l2_norm:
            attn.scale_mul_1H11[0, 0] = 9.0  # above the cap of ln 100
    x, mask = torch.randn(2, 30, 32), block_causal_bias(PATCH_NUMS)
    w, zero = attn.mat_qkv.weight, torch.zeros(32)
    q, k, v = (
        (x @ w.T + torch.cat((attn.q_bias, zero, attn.v_bias)))
        .view(2, 30, 3, 2, 16)
        .permute(2, 0, 3, 1, 4)
    )
    if attn_l2_norm:
        q = q / q.norm(dim=-1, keepdim=True) * attn.scale_mul_1H11.exp().clamp(max=100)
        score = q @ (k / k.norm(dim=-1, keepdim=True)).transpose(-1, -2)
    else:
        score = q @ k.transpose(-1, -2) * 0.25 / math.sqrt(16)
    expected = attn.proj(((score + mask).softmax(-1) @ v).transpose(1, 2).reshape(2, 30, 32))
    torch.testing.assert_close(attn(x, mask), expected, atol=1e-5, rtol=1e-4)


def test_bad_input_is_one_clear_line() -> None:
    var = tiny()
    label_B, x_BlZ = batch(var)
    with raises("model.labels", "label 11", "0..10"):
        var(label_B + 9, x_BlZ)
    with raises("model.labels", "label -1"):
        var(label_B - 1, x_BlZ)
    with raises("model.input", "(3, 5, 8)", "(3, 29, 8)"):
        var(label_B, x_BlZ[:, :5])
    with raises("model.sizes", "64", "3 heads"):
        build_var(tiny_vae(), depth=3, width=64)
    with raises("model.attention-package", "flash_attn", "pip install flash-attn"):
        build_var(tiny_vae(), depth=2, attention="flash")
    with raises("model.attention", "'flsh'", "auto, triton"):
        backend_name("flsh")


def test_vae_is_no_part_of_the_weights() -> None:
    assert not any("vae" in name or "quantize" in name for name in tiny().state_dict())
