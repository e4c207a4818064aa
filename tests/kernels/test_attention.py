"""Tests of the attention over a scale schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.compare import DEVICE, ROOM, check, eager_attention, relative
from var_kernels.attention import Visible, mask, op, reference, scales
from var_kernels.attention.schedule import counts, tile_rows

PATCHES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Triton kernels on every device."""
    monkeypatch.setattr(op, "use_triton", lambda _: True)


def brute_force_mask(patch_nums: tuple[int, ...], back: int) -> torch.Tensor:
    """Return the mask from its definition: scale i sees scale j when i - back < j <= i."""
    level = torch.cat(
        [torch.full((count,), number) for number, count in enumerate(counts(patch_nums))]
    )
    return (level[None, :] <= level[:, None]) & (level[None, :] > level[:, None] - back)


@pytest.mark.parametrize(
    "patch_nums", [(1,), (1, 2), (1, 2, 3, 4), (3, 4, 7), ((1, 2), (3, 5), (3, 7)), PATCHES_256]
)
@pytest.mark.parametrize(("pattern", "back"), [("full", 99), ("own", 1), (2, 2), (3, 3)])
def test_schedule_is_the_definition(
    patch_nums: tuple[int, ...], pattern: str | int, back: int
) -> None:
    """The mask and its transpose match the definition.

    The tiles cover every row once and never leave out a visible key.
    """
    visible = scales(patch_nums, pattern)
    expected = brute_force_mask(patch_nums, back)
    assert torch.equal(mask(visible), expected) and visible.pairs() == int(expected.sum())
    assert torch.equal(mask(visible.transposed), expected.t())
    for block in (16, 64):
        tiles = tile_rows(visible, block)
        assert sorted(row for start, stop, *_ in tiles for row in range(start, stop)) == list(
            range(len(visible.lo))
        )
        for start, stop, lo, hi, full_lo, full_hi in tiles:
            part = expected[start:stop]
            assert (
                stop - start <= block
                and not part[:, :lo].any()
                and not part[:, hi:].any()
                and part[:, full_lo:full_hi].all()
            )


def test_tiles_of_the_paper() -> None:
    """256 pixels take twelve tiles of 64 queries, of which one holds the first five scales.

    The kernels compute 1.13 pairs for each useful pair.
    """
    visible = scales(PATCHES_256)
    tiles = tile_rows(visible, 64)
    assert len(tiles) == 12 and (0, 55) in [tile[:2] for tile in tiles]
    assert visible.pairs() == 286_434
    computed = sum(64 * 64 * math.ceil((hi - lo) / 64) for _, _, lo, hi, _, _ in tiles)
    assert computed / visible.pairs() == pytest.approx(1.130, abs=2e-3)


UP_TO_6 = (1, 2, 3, 4, 5, 6)
ALL = (torch.float16, torch.float32, torch.bfloat16)
CASES: list[tuple[tuple, str | int, int, tuple[torch.dtype, ...]]] = [
    ((1, 2, 3), "full", 16, ALL),
    (UP_TO_6, "full", 64, ALL[1:]),
    (UP_TO_6, "own", 64, ALL[1:2]),
    ((1, 3, 9), 2, 12, ALL[1:]),
    ((1,), "full", 64, ALL[1:2]),
    (((1, 2), (3, 5), (3, 7)), "full", 16, ALL[1:2]),
]
"""Scales, pattern, channels per head, and the data types of the fast tests. The pattern and the
number of scales are only limits of loops, whatever the data type."""


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(
    ("patch_nums", "pattern", "D", "dtype"),
    [
        pytest.param(*case, dtype, marks=[] if dtype in fast else pytest.mark.slow)
        for *case, fast in CASES
        for dtype in ALL
    ],
)
def test_block_attention(
    patch_nums: tuple[int, ...], pattern: str | int, D: int, l2_norm: bool, dtype: torch.dtype
) -> None:
    """The output and all gradients match, reading packed qkv.

    The kernels pad heads of 12 channels to 16.
    """
    L = sum(counts(patch_nums))
    B, H = (2 if patch_nums == (1, 2, 3) else 1), 2
    qkv, g = (
        torch.randn(B, L, 3, H, D, device=DEVICE).to(dtype),
        torch.randn(B, L, H * D, device=DEVICE).to(dtype),
    )
    scale = 0.25 / math.sqrt(D)
    inputs = [qkv, torch.tensor([1.4, 0.3], device=DEVICE)] if l2_norm else [qkv]

    def reference_form(qkv: torch.Tensor, log_scale: torch.Tensor | None = None) -> torch.Tensor:
        return reference.attention(
            *qkv.unbind(2), scales(patch_nums, pattern), log_scale, scale
        ).reshape(B, L, H * D)

    def ours(qkv: torch.Tensor, log_scale: torch.Tensor | None = None) -> torch.Tensor:
        return op.block_attention(qkv, patch_nums, log_scale, scale, pattern)

    def eager(qkv: torch.Tensor, log_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Compose the attention like the model under autocast.

        Norms and softmax are in float32, and products are in the dtype of v.
        """
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        factor = scale
        if log_scale is not None:
            q = F.normalize(q.float(), dim=-1) * log_scale.clamp_max(math.log(100)).exp().view(
                1, -1, 1, 1
            )
            q, k, factor = q.to(v.dtype), F.normalize(k.float(), dim=-1).to(v.dtype), 1.0
        scores = (q @ k.transpose(2, 3)).float() * factor
        p = scores.masked_fill(~mask(scales(patch_nums, pattern), DEVICE), -math.inf).softmax(-1)
        return (p.to(v.dtype) @ v).transpose(1, 2).reshape(B, L, H * D)

    # With one key the gradient of the scale is zero, and a relative error has no meaning.
    if L == 1 and l2_norm:
        inputs = [qkv]
    check(ours, reference_form, inputs, [g], eager, sums=[2])


def test_expanded_gradients_and_strided_inputs() -> None:
    """The gradient may be one expanded number (strides 0), and qkv may be a part of a wider
    tensor."""
    wide = torch.randn(2, 14, 3, 3, 32, device=DEVICE)
    qkv = wide[:, :, :, :2, :16].detach().requires_grad_()
    log_scale = torch.zeros(2, device=DEVICE)
    op.block_attention(qkv, (1, 2, 3), log_scale).sum().backward()
    copy = qkv.detach().contiguous().double().requires_grad_()
    reference.attention(
        *copy.unbind(2), scales((1, 2, 3)), log_scale.double(), 1.0
    ).sum().backward()
    assert qkv.grad is not None and copy.grad is not None
    torch.testing.assert_close(qkv.grad, copy.grad.float(), rtol=1e-4, atol=1e-5)


def test_the_scale_is_held_at_100() -> None:
    """exp(s) is clamped at 100, and the gradient of a clamped scale is 0."""
    qkv = torch.randn(1, 14, 3, 2, 16, device=DEVICE)
    log_scale = torch.tensor([6.0, 1.0], device=DEVICE, requires_grad=True)
    out = op.block_attention(qkv, (1, 2, 3), log_scale)
    exact = reference.attention(*qkv.double().unbind(2), scales((1, 2, 3)), log_scale.double(), 1.0)
    torch.testing.assert_close(out, exact.reshape(1, 14, 32).float(), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert (
        log_scale.grad is not None
        and float(log_scale.grad[0]) == 0.0
        and float(log_scale.grad[1]) != 0.0
    )


@pytest.mark.parametrize(
    "patch_nums",
    [
        (1, 2, 3, 4, 5, 6, 8),
        pytest.param(PATCHES_256, marks=pytest.mark.slow),
        pytest.param((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), marks=pytest.mark.nightly),
    ],
)
def test_whole_schedules(patch_nums: tuple[int, ...]) -> None:
    """One head at L = 155, 680 and 2240 matches, with every tile of a real model."""
    L = sum(side * side for side in patch_nums)
    qkv, g, log_scale = (
        torch.randn(1, L, 3, 1, 16, device=DEVICE),
        torch.randn(1, L, 16, device=DEVICE),
        torch.ones(1, device=DEVICE),
    )

    def reference_form(qkv: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        return reference.attention(*qkv.unbind(2), scales(patch_nums), log_scale, 1.0).reshape(
            1, L, 16
        )

    check(
        lambda qkv, log_scale: op.block_attention(qkv, patch_nums, log_scale),
        reference_form,
        [qkv, log_scale],
        [g],
        sums=[2],
    )


def test_the_scale_in_the_shape_of_the_parameter() -> None:
    """A scale (1, H, 1, 1), as in the model, gives the same output and the gradient of each
    head."""
    qkv, log_scale = (
        torch.randn(1, 5, 3, 3, 16, device=DEVICE),
        torch.tensor([0.2, 1.0, -0.5], device=DEVICE),
    )
    grads = []
    for shape in ((3,), (1, 3, 1, 1)):
        leaf = log_scale.view(shape).clone().requires_grad_()
        op.block_attention(qkv, (1, 2), leaf).square().sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == shape
        grads.append(leaf.grad.flatten())
    assert torch.equal(*grads) and len(set(grads[0].tolist())) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zero_vector_has_finite_gradients(dtype: torch.dtype) -> None:
    """|q| = 0 or |k| = 0 is divided by 1e-12, as in F.normalize.

    This also holds in float16, which cannot represent 1e12.
    """
    qkv = torch.randn(1, 5, 3, 1, 16, device=DEVICE).to(dtype)
    qkv[0, 2, 0] = qkv[0, 3, 1] = 0.0
    qkv.requires_grad_()
    out = op.block_attention(qkv, (1, 2), torch.zeros(1, device=DEVICE))
    exact = reference.attention(
        *qkv.detach().unbind(2), scales((1, 2)), torch.zeros(1, device=DEVICE), 1.0
    )
    torch.testing.assert_close(
        out.detach(),
        exact.reshape(1, 5, 16),
        rtol=2e-3,
        atol=1e-5 if dtype == torch.float32 else 2e-3,
    )
    out.sum().backward()
    assert (
        qkv.grad is not None
        and torch.isfinite(qkv.grad[:, :, 2]).all()
        and torch.isfinite(qkv.grad[0, [0, 1, 4]]).all()
    )
    # The gradient of a zero vector has the magnitude 1e12.
    if dtype == torch.float32:
        assert torch.isfinite(qkv.grad).all()
    with pytest.raises(RuntimeError, match="has no gradient"):
        op.cached_attention(*qkv.unbind(2))


def test_cached_attention_is_the_last_scale_of_the_whole() -> None:
    """Keys and values may be views of a longer cache, with fewer or more queries than a tile."""
    for B, queries, keys in ((1, 1, 1), (2, 9, 14), (1, 64, 91), (1, 70, 161)):
        cache_k, cache_v = (torch.randn(B, 200, 2, 16, device=DEVICE) for _ in range(2))
        q = torch.randn(B, queries, 2, 16, device=DEVICE)
        out = op.cached_attention(q, cache_k[:, :keys], cache_v[:, :keys], 0.3)
        scores = torch.einsum("blhd,bmhd->bhlm", q, cache_k[:, :keys]) * 0.3
        torch.testing.assert_close(
            out,
            torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), cache_v[:, :keys]),
            rtol=1e-4,
            atol=1e-5,
        )


def test_wrong_calls() -> None:
    qkv = torch.randn(1, 14, 3, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="does not hold the tokens"):
        op.block_attention(qkv, (1, 2))
    with pytest.raises(ValueError, match="pattern 'half' is not known"):
        op.block_attention(qkv, (1, 2, 3), pattern="half")
    with pytest.raises(ValueError, match="qkv is"):
        op.block_attention(qkv.flatten(2), (1, 2, 3))
    with pytest.raises(ValueError, match="grid sides"):
        op.block_attention(qkv, (1, -2, 3))
    with pytest.raises(ValueError, match="1 scales for 2 heads"):
        op.block_attention(qkv, (1, 2, 3), torch.zeros(1, device=DEVICE))
    with pytest.raises(ValueError, match="wider than"):
        op.block_attention(torch.randn(1, 14, 3, 1, 96, device=DEVICE), (1, 2, 3))
    q, k, v = qkv.unbind(2)
    for wrong in (
        (q, k, v[:, :5]),
        (q, k[..., :8], v),
        (q, k[:, :, :1], v[:, :, :1]),
        (q[0], k[0], v[0]),
    ):
        with pytest.raises(ValueError, match="cached_attention"):
            op.cached_attention(*wrong)
    with pytest.raises(AssertionError, match="must not fall"):
        Visible((1, 0), (2, 2), 2).transposed  # noqa: B018


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_to_cache(dtype: torch.dtype, l2_norm: bool) -> None:
    """Each scale returns its queries and writes its keys and values to their places.

    Nothing else in the cache changes.
    """
    B, H, D, room = 2, 3, 16, 14
    cache, wanted = (
        torch.full((2, B, H, room + 2, D), 7.0, device=DEVICE).to(dtype) for _ in range(2)
    )
    log_scale, begin = (torch.tensor([0.3, 1.4, 6.0], device=DEVICE) if l2_norm else None), 0
    for l in (1, 4, 9):
        qkv = torch.randn(B, l, 3, H, D, device=DEVICE).to(dtype)
        q, k, v = reference.normalised(*qkv.unbind(2), log_scale)
        wanted[0, :, :, begin : begin + l], wanted[1, :, :, begin : begin + l] = (
            k.transpose(1, 2),
            v.transpose(1, 2),
        )
        made = op.append_to_cache(qkv, cache, begin, log_scale)
        assert relative(made, q) <= ROOM[dtype] and relative(cache, wanted) <= ROOM[dtype]
        begin += l
    assert torch.equal(cache[:, :, :, room:], wanted[:, :, :, room:])
    with pytest.raises(ValueError, match="does not fit"):
        op.append_to_cache(
            torch.zeros(B, 3, 3, H, D, device=DEVICE, dtype=dtype), cache, begin, log_scale
        )


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive"):
        op.block_attention(torch.randn(1, 5, 3, 1, 16, device=DEVICE), (1, 2), None, -1.0)


@pytest.mark.parametrize("D", [32, 96, 128])
@pytest.mark.parametrize("hottest", [4.0, 60.0])
def test_other_widths_and_hot_heads(D: int, hottest: float) -> None:
    """Heads of other widths match, and so do heads with a factor above 40 in bfloat16, which need
    the maximum of the logits."""
    patch_nums, H = (1, 2, 3), 2
    log_scale = torch.tensor([math.log(hottest), 0.3], device=DEVICE)
    check(
        lambda qkv, s: op.block_attention(qkv, patch_nums, s),
        lambda qkv, s: reference.attention(*qkv.unbind(2), scales(patch_nums), s, 1.0).flatten(2),
        [torch.randn(1, 14, 3, H, D, device=DEVICE).to(torch.bfloat16), log_scale],
        [torch.randn(1, 14, H * D, device=DEVICE)],
        lambda qkv, s: eager_attention(qkv, s, mask(scales(patch_nums), DEVICE)),
        sums=[2],
    )
