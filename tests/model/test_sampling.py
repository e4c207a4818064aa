"""Filters, guidance and the sampling loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from tests.raises import raises
from var_scale.model import VAR, build_vae, build_var
from var_scale.model import sampling as s
from var_scale.model import var as official


@pytest.fixture(scope="module")
def var() -> VAR:
    torch.manual_seed(0)
    vae = build_vae(arch="patch", hidden=8, V=32, Cvae=8, patch_nums=(1, 2, 3, 4))
    return build_var(
        vae,
        depth=2,
        width=32,
        heads=2,
        num_classes=10,
        init_adaln=1.0,
        init_adaln_gamma=1.0,
        init_head=1.0,
        init_std=0.2,
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
    # 1/8 and 2/8 <= 1/4 are dropped, 4/8 is not.
    assert kept(s.filter_top_p_(logits.clone(), 0.75)) == [
        0,
        1,
    ]
    assert kept(s.filter_top_p_(logits.clone(), 0.8)) == [0, 1, 3] or kept(
        s.filter_top_p_(logits.clone(), 0.8)
    ) == [0, 1, 2]
    assert kept(s.filter_top_p_(logits.clone(), 1e-6)) == [0]
    # All are equal: the last in the order stays.
    assert len(kept(s.filter_top_p_(torch.zeros(1, 1, 4), 1e-9))) == 1


def test_top_p_works_on_what_top_k_left() -> None:
    logits = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log()
    official.sample_with_top_k_top_p_(logits, top_k=2, top_p=0.5)
    assert kept(logits) == [0]  # of 4/7 and 3/7, 3/7 <= 1/2 is dropped; of all four, 0.3 would stay
    assert (
        official.sample_with_top_k_top_p_(torch.zeros(2, 3, 8), num_samples=-8).sort(-1)[0].tolist()
        == [[list(range(8))] * 3] * 2
    )


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
    # A seeded call does not change the global generator.
    assert torch.equal(before, torch.get_rng_state())


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
    handle = var.blocks[0].register_forward_pre_hook(
        lambda _module, args: sizes.append(len(args[0]))
    )
    sample(var, 3, 2, 7, 0.0)
    sample(var, 3, 2, 7, 1.0)
    handle.remove()
    assert sizes == [3] * 4 + [6] * 4


def test_labels(var: VAR) -> None:
    rng = torch.Generator().manual_seed(4)
    expected = torch.multinomial(
        torch.full((1, 10), 0.1), 5, replacement=True, generator=rng
    ).reshape(5)
    assert torch.equal(
        official.resolve_labels(var, 5, None, torch.Generator().manual_seed(4)), expected
    )
    assert official.resolve_labels(var, 2, -1, None).tolist() == [10, 10]
    assert official.resolve_labels(var, 2, 3, None).tolist() == [3, 3]
    for bad, value in ((11, "11"), (torch.tensor([0, -2]), "-2")):
        with raises("model.labels", f"label {value}", "0..10"):
            sample(var, 2, bad)
    with raises("model.labels", "(1,)", "3"):
        sample(var, 3, torch.tensor([1]))


def test_sampling_is_done_in_evaluation_mode_and_the_mode_is_kept(var: VAR) -> None:
    reference = sample(var, 2, 1, 5)[0]
    var.train()
    assert torch.equal(sample(var, 2, 1, 5)[0], reference)
    assert var.training
    var.eval()


def draw(
    var: VAR,
    labels: list[int],
    seeds: list[int],
    settings: s.Settings | None = None,
    hooks: s.Hooks | None = None,
) -> Tensor:
    out = s.sample(
        var, torch.tensor(labels), settings or s.Settings(), s.SeedPerImage(seeds), hooks
    )
    assert out.images.shape == (len(labels), 3, 32, 32)
    return torch.cat(out.tokens, 1)


def test_a_seed_an_image_gives_the_same_image_in_any_batch(var: VAR) -> None:
    """Images are sampled alone, in pairs and in another order, also with soft codes. Another seed
    gives another image."""
    labels, seeds = [1, 4, 2, 4], [5, 6, 7, 8]
    for settings in (s.Settings(2.0, 8, 0.9), s.Settings(more_smooth=True)):
        whole = draw(var, labels, seeds, settings)
        for part in ([0], [1, 2], [3, 0], [2, 3, 1]):
            assert torch.equal(
                draw(var, [labels[k] for k in part], [seeds[k] for k in part], settings),
                whole[part],
            )
        assert not torch.equal(draw(var, labels, [9, 6, 7, 8], settings)[0], whole[0])


def test_tokens_of_a_seed_follow_the_distribution() -> None:
    """The chi-square of 20,000 draws is small, and no token of probability 0 is drawn."""
    logits = torch.tensor([0.5, -math.inf, 1.5, 0.0, -1.0, -math.inf])
    drawn = s.SeedPerImage([3]).tokens(logits.expand(1, 20_000, 6))
    count = drawn.flatten().bincount(minlength=6).double()
    expected = 20_000 * logits.double().softmax(0)
    assert count[1] == count[5] == 0
    some = expected > 0
    # The limit is the 0.1 % quantile of chi-square with 3 degrees of freedom.
    assert float(((count - expected)[some] ** 2 / expected[some]).sum()) < 16.3


def test_settings_of_a_scale(var: VAR) -> None:
    """A number for all scales or one for each: guidance is used as it is, a low temperature is
    greedy, and a filter may act at one scale only."""
    ramp, tuple_ = s.Settings(3.0, top_k=1), s.Settings((0.0, 1.0, 2.0, 3.0), top_k=1)
    assert torch.equal(draw(var, [1, 2], [1, 2], ramp), draw(var, [1, 2], [1, 2], tuple_))
    assert not torch.equal(
        draw(var, [1, 2], [1, 2], s.Settings((3.0,) * 4, top_k=1)), draw(var, [1, 2], [1, 2], ramp)
    )
    assert torch.equal(
        draw(var, [1], [1], s.Settings(temperature=1e-4)), draw(var, [1], [7], s.Settings(top_k=1))
    )
    greedy_first = s.Settings(top_k=(1, 0, 0, 0))
    first = [int(draw(var, [1], [seed], greedy_first)[0, 0]) for seed in range(6)]
    last = {tuple(draw(var, [1], [seed], greedy_first)[0, 1:].tolist()) for seed in range(6)}
    assert len(set(first)) == 1 and len(last) == 6
    for bad, names in (
        (s.Settings((1.0, 2.0)), ("cfg", "2", "4")),
        (s.Settings(-1.0), ("cfg", "-1")),
        (s.Settings(top_p=1.5), ("top_p", "1.5")),
        (s.Settings(temperature=0.0), ("temperature", "0")),
        (s.Settings(temperature=[1.0]), ("temperature", "[1.0]")),
    ):
        with raises("model.settings", *names):
            draw(var, [1], [1], bad)


def test_hooks_see_and_change_every_scale(var: VAR) -> None:
    """Logits are forced to a token, codes are replaced, maps are seen; the last map is the decoded
    one."""
    seen: list[int] = []
    maps: list[Tensor] = []

    def force(si: int, logits_BlV: Tensor) -> Tensor:
        seen.append(si)
        return torch.full_like(logits_BlV, -math.inf).index_fill_(-1, torch.tensor([5]), 0.0)

    assert draw(
        var, [1, 2], [1, 2], hooks=s.Hooks(force, scale=lambda si, f: maps.append(f))
    ).unique().tolist() == [5]
    assert seen == [0, 1, 2, 3] and len(maps) == 4
    zero = s.sample(
        var,
        torch.tensor([1]),
        s.Settings(),
        s.SeedPerImage([1]),
        s.Hooks(codes=lambda si, idx, h: torch.zeros_like(h)),
    )
    free = s.sample(var, torch.tensor([1]), s.Settings(), s.SeedPerImage([1]))
    assert not torch.equal(zero.images, free.images)
    torch.testing.assert_close(var.vae_proxy[0].fhat_to_img(free.f_hat) / 2 + 0.5, free.images)


def test_another_model_for_the_last_scales(var: VAR) -> None:
    """The same model changes nothing. Another one draws, greedily, the argmax of its own
    teacher-forced logits, and the first scales stay those of the first model."""
    torch.manual_seed(5)
    other = build_var(
        var.vae_proxy[0],
        depth=3,
        width=24,
        heads=2,
        num_classes=10,
        init_adaln=1.0,
        init_adaln_gamma=1.0,
        init_head=1.0,
        init_std=0.3,
        shared_aln=True,
    ).eval()
    settings = s.Settings(2.0, top_k=1)
    alone = draw(var, [1, 4], [1, 2], settings)
    assert torch.equal(draw(var, [1, 4], [1, 2], settings, s.Hooks(models={1: var, 3: var})), alone)
    mixed = draw(var, [1, 4], [1, 2], settings, s.Hooks(models={2: other}))
    assert torch.equal(mixed[:, :5], alone[:, :5]) and not torch.equal(mixed, alone)
    tokens = list(mixed.split([1, 4, 9, 16], dim=1))
    x_BlZ = var.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    with torch.no_grad():
        conditional, free = other(torch.tensor([1, 4]), x_BlZ), other(torch.tensor([10, 10]), x_BlZ)
    t_L = 2.0 * var.lvl_1L[0][:, None] / 3
    assert torch.equal(((1 + t_L) * conditional - t_L * free).argmax(-1)[:, 5:], mixed[:, 5:])
    small = build_vae(arch="patch", hidden=8, V=16, Cvae=8, patch_nums=(1, 2, 3, 4))
    elsewhere = build_var(small, depth=1, width=16, heads=1, num_classes=10)
    with raises("model.hooks", "scale 1", "V=16", "32"):
        draw(var, [1], [1], hooks=s.Hooks(models={1: elsewhere}))


def test_likelihood_is_the_product_of_what_sampling_drew_from(var: VAR) -> None:
    """Teacher-forced ln p equals the sum over the steps with caches, and the class of the tokens is
    the likeliest on average."""
    steps: list[Tensor] = []

    def keep(si: int, logits_BlV: Tensor) -> Tensor:
        steps.append(logits_BlV.log_softmax(-1))
        return logits_BlV

    labels = torch.tensor([1, 4, 7])
    out = s.sample(var, labels, s.Settings(0.0), s.SeedPerImage([1, 2, 3]), s.Hooks(keep))
    stepped = torch.stack(
        [
            p.gather(-1, idx.unsqueeze(-1)).sum((1, 2))
            for p, idx in zip(steps, out.tokens, strict=True)
        ],
        1,
    )
    found = s.log_likelihood(var, out.tokens, labels)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found, stepped, rtol=1e-4, atol=1e-4)
    scores = s.class_log_likelihoods(var, out.tokens, range(10), batch=7)
    torch.testing.assert_close(scores[range(3), labels], found.sum(1), rtol=1e-4, atol=1e-4)
    many = torch.arange(10).repeat(6)
    drawn = s.sample(var, many, s.Settings(0.0), s.SeedPerImage(range(60)))
    assert (
        float(
            (s.class_log_likelihoods(var, drawn.tokens, range(10)).argmax(1) == many)
            .double()
            .mean()
        )
        > 0.5
    )


def test_half_precision_weights(var: VAR) -> None:
    """Weights in bfloat16 and residual stream in float32: the logits are near those of the float32
    model."""
    half = copy.deepcopy(var).to(torch.bfloat16)
    object.__setattr__(half, "vae_proxy", var.vae_proxy)
    object.__setattr__(half, "vae_quant_proxy", var.vae_quant_proxy)
    logits: dict[str, Tensor] = {}
    for name, model in (("full", var), ("half", half)):
        s.sample(
            model,
            torch.tensor([1]),
            s.Settings(0.0, top_k=1),
            s.SeedPerImage([1]),
            s.Hooks(lambda si, x, name=name: logits.setdefault(f"{name}{si}", x)),
        )
    assert logits["half0"].dtype == torch.float32
    assert float((logits["half0"] - logits["full0"]).abs().max()) < 0.05 * float(
        logits["full0"].abs().max()
    )
    image = s.sample(half, torch.tensor([1]), s.Settings(), s.SeedPerImage([1])).images
    assert image.dtype == torch.float32 and image.shape == (1, 3, 32, 32)


def test_a_cache_grows_where_nobody_says_how_long_it_gets() -> None:
    from var_scale.model.attention import KVCache

    parts = [torch.randn(2, l, 3, 3, 4) for l in (1, 4, 9, 16, 2)]
    for capacity in (0, 5, 32):
        cache = KVCache(capacity)
        for n, part in enumerate(parts, 1):
            begin, memory = cache.make_room(part)
            end = begin + part.shape[1]
            memory[:, :, :, begin:end] = part[:, :, 1:].permute(2, 0, 3, 1, 4)
            assert torch.equal(
                memory[:, :, :, :end], torch.cat(parts[:n], 1)[:, :, 1:].permute(2, 0, 3, 1, 4)
            )


def test_wrong_arguments(var: VAR) -> None:
    label_B, seeds, settings = torch.tensor([1, 2]), s.SeedPerImage([1, 2]), s.Settings()
    with raises("model.labels", "1 seeds", "2 labels"):
        s.sample(var, label_B, settings, s.SeedPerImage([1]))
    with raises("model.labels", "label -1"):
        s.sample(var, torch.tensor([-1]), settings, s.SeedPerImage([1]))
    with raises("model.hooks", "scale 99"):
        s.sample(var, label_B, settings, seeds, s.Hooks(models={99: var}))
    with raises("model.input", "1 scales", "[1, 4, 9, 16]"):
        s.log_likelihood(var, [label_B[:, None]], label_B)


def test_when_graphs_are_recorded(var: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are recorded at the second batch of a size in a row, again for other weights, and not
    again where memory ran out. tests/kernels/test_gpu.py tests on GPUs that a replay gives the same
    tokens."""
    from var_scale.model import graphs

    made: list[int] = []

    class Recording:
        def __init__(self, var: VAR, label_B: Tensor, key: object):
            self.key = key
            made.append(len(label_B))
            if len(label_B) > 3:
                raise torch.OutOfMemoryError("full")

        def restart(self, label_B: Tensor) -> None:
            """Do nothing."""

    monkeypatch.setattr(graphs, "_Recorded", Recording)
    model, kept = copy.deepcopy(var), graphs.Graphs()

    def kinds(*batches: int) -> str:
        labels = [torch.zeros(batch, dtype=torch.long) for batch in batches]
        return "".join(
            "s" if isinstance(kept.stepper(model, label), s.Stepper) else "r" for label in labels
        )

    assert kinds(2, 2, 2, 1, 2) == "srrsr" and made == [2]
    assert kinds(3, 3, 2) == "srs" and made == [2, 3]
    model.to(torch.float64)
    assert kinds(3, 3) == "sr" and made == [2, 3, 3]
    assert kinds(4, 4, 4) == "sss" and made == [2, 3, 3, 4]
