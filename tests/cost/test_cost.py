"""The counts are compared with those of the official code."""

from collections.abc import Callable
from typing import cast

import pytest

from tests.raises import raises
from var_scale.cost import ModelShape, count_flops, count_memory, count_params, seconds
from var_scale.cost.communication import Volume, efficiency, exchange
from var_scale.cost.memory import Precision

PN_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# depth: total, non-AdaLN blocks, AdaLN, head, embeddings, 73728 d^3, total with shared AdaLN
TABLE = {
    6: (18492580, 10635300, 5322240, 1872640, 662400, 15925248, 14071204),
    8: (41315904, 25198656, 12607488, 2626560, 883200, 37748736, 30308928),
    10: (78367716, 49203300, 24614400, 3446016, 1104000, 73728000, 56253156),
    12: (133186960, 85008528, 42522624, 4331008, 1324800, 127401984, 94263184),
    14: (209312580, 134973636, 67511808, 5281536, 1545600, 202309632, 146698308),
    16: (310283520, 201457920, 100761600, 6297600, 1766400, 301989888, 215917824),
    18: (439638724, 286820676, 143451648, 7379200, 1987200, 429981696, 304281028),
    20: (600917136, 393421200, 196761600, 8526336, 2208000, 589824000, 414147216),
    22: (797657700, 523618788, 261871104, 9739008, 2428800, 785055744, 547875684),
    24: (1033399360, 679772736, 339959808, 11017216, 2649600, 1019215872, 707825728),
    26: (1311681060, 864242340, 432207360, 12360960, 2870400, 1295843328, 896356644),
    28: (1636041744, 1079386896, 539793408, 13770240, 3091200, 1618477056, 1115827728),
    30: (2010020356, 1327565700, 663897600, 15245056, 3312000, 1990656000, 1368598276),
    32: (2437155840, 1611138048, 805699584, 16785408, 3532800, 2415919104, 1657027584),
    34: (2920987140, 1932463236, 966379008, 18391296, 3753600, 2897805312, 1983474948),
    36: (3465053200, 2293900560, 1147115520, 20062720, 3974400, 3439853568, 2350299664),
}
# depth: forward GMACs, block-causal
GMACS = {
    6: 9.6,
    8: 20.9,
    10: 38.9,
    12: 65.2,
    14: 101.5,
    16: 149.3,
    18: 210,
    20: 285.8,
    22: 378,
    24: 487.8,
    26: 617,
    28: 768,
    30: 941.5,
}


@pytest.mark.parametrize("depth", TABLE)
def test_parameters_equal_the_reference(depth: int) -> None:
    total, blocks, adaln, head, embeddings, paper, shared = TABLE[depth]
    count = count_params(ModelShape.official(depth))
    groups = (count.total, count.blocks, count.adaln, count.head, count.embeddings, count.paper)
    assert groups == (total, blocks, adaln, head, embeddings, paper)
    assert count.per_token == 49152 * depth**3
    saln = count_params(ModelShape.official(depth, shared_aln=True))
    assert (saln.total, saln.paper) == (shared, 49152 * depth**3)


def test_official_512_model() -> None:
    assert count_params(ModelShape.official(36, PN_512, shared_aln=True)).total == 2353893904


def test_l2_norm_adds_one_scale_a_head() -> None:
    with_norm, without = (
        count_params(ModelShape.official(8, attn_l2_norm=on)).total for on in (True, False)
    )
    assert with_norm - without == 8 * 8


def test_tokens_and_visible_pairs() -> None:
    small, large = ModelShape.official(16), ModelShape.official(36, PN_512)
    assert (small.length, small.visible_pairs, large.length) == (680, 286434, 2240)
    assert large.visible_pairs / 2240**2 == pytest.approx(0.652, abs=5e-4)


@pytest.mark.parametrize("depth", GMACS)
def test_forward_macs(depth: int) -> None:
    digits = 1 if isinstance(GMACS[depth], float) else 0
    assert round(
        count_flops(ModelShape.official(depth)).forward_macs / 1e9, digits
    ) == pytest.approx(GMACS[depth])


@pytest.mark.parametrize(("depth", "ratio"), [(6, 0.89), (16, 0.73), (30, 0.70)])
def test_exact_against_6nd(depth: int, ratio: float) -> None:
    flops = count_flops(ModelShape.official(depth))
    assert flops.training / flops.training_6nd == pytest.approx(ratio, abs=0.005)
    assert flops.training == 3 * flops.forward == 6 * flops.paper


def test_d16_of_the_paper_costs_161_h100_hours() -> None:
    work = count_flops(ModelShape.official(16)).training * 1281167 * 200
    assert work == pytest.approx(2.30e20, rel=0.005)
    assert seconds(work, "h100") / 3600 == pytest.approx(161, abs=1)
    assert seconds(work, "h100", 8) == pytest.approx(seconds(work, "h100") / 8)


def test_memory_shards_as_zero_does() -> None:
    shape = ModelShape.official(16)
    n = count_params(shape).total
    full = count_memory(shape, 1, "fp32")
    assert (full.parameters, full.gradients, full.optimizer) == (4 * n, 4 * n, 8 * n)
    one, two, three = (count_memory(shape, 1, "fp32", 8, stage) for stage in (1, 2, 3))
    assert (one.optimizer, one.gradients, one.parameters) == (n, 4 * n, 4 * n)
    assert two.gradients == n // 2
    assert three.parameters < n
    assert count_memory(shape, 4).activations == 4 * count_memory(shape, 1).activations


def test_wrong_arguments_are_named() -> None:
    shape, fp8 = ModelShape.official(8), cast(Precision, "fp8")
    faults: list[tuple[Callable[[], object], str, tuple[str, ...]]] = [
        (lambda: ModelShape.official(8, heads=7), "cost.shape", ("512", "7 heads")),
        (lambda: ModelShape.official(8, mlp_hidden=0), "cost.shape", ("mlp_hidden", "0")),
        (lambda: ModelShape.from_dict({"depht": 4}), "cost.shape", ("depht", "depth")),
        (lambda: ModelShape.from_dict({"depth": 4}, "law.json"), "cost.shape", ("law.json",)),
        (lambda: ModelShape.official(8, patch_nums=()), "argument.size", ("patch_nums",)),
        (lambda: ModelShape.official(8, patch_nums=((1, 2, 3),)), "argument.grid", ("patch_nums",)),
        (lambda: seconds(1.0, "abacus"), "cost.device", ("abacus", "h100")),
        (lambda: seconds(1.0, mfu=0.0), "cost.argument", ("MFU 0.0",)),
        (lambda: count_memory(shape, 1, fp8), "cost.argument", ("fp8",)),
        (lambda: count_memory(shape, 1, stage=4), "cost.argument", ("stage 4",)),
    ]
    for call, code, names in faults:
        with raises(code, *names):
            call()


def test_exchange_volumes() -> None:
    """A ring all-reduce sends twice the tensor, sharded weights three times, HSDP between nodes an
    eighth."""
    size = 4.0 * 1000
    assert exchange(1000, 8, "ddp") == Volume(2 * 7 / 8 * size, 0.0)
    assert exchange(1000, 64, "zero2") == Volume(2 * 63 / 64 * size, 2 * 63 / 64 * size / 8)
    assert exchange(1000, 64, "fsdp").between == 1.5 * exchange(1000, 64, "zero1").between
    hybrid = exchange(1000, 64, "hsdp", 8)
    assert hybrid == Volume(3 * 7 / 8 * size, 2 * 7 / 8 * size / 8)
    assert exchange(1000, 1, "ddp") == Volume(0.0, 0.0)
    with raises("cost.argument"):
        exchange(1000, 12, "hsdp", 8)
    shares = [efficiency(ModelShape.official(24), 768, world, "zero1") for world in (8, 64, 512)]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    assert efficiency(ModelShape.official(24), 768, 64, "zero1") > efficiency(
        ModelShape.official(24), 768, 64, "zero3"
    )
