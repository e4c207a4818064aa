"""Every kernel with the settings that the official models launch it with, for `var_kernels.aot`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NO_SCALE = {"log_scale": None}
"""The argument of kernels that do not normalise."""


@dataclass(frozen=True)
class Case:
    """One kernel with the settings it is launched with.

    `types` maps the names of its arguments to their types; `16` after an integer type states that
    the value is a multiple of 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    matrix: bool = False
    """Whether the kernel uses tensor cores."""
    stack: int = 0
    """Bytes of spills that are known and small."""


def cases(architecture: str) -> Iterator[Case]:
    """Yield every kernel at the widths of d16, d24, d30 and d36.

    The data type is bfloat16 and heads have 64 channels, unless the name of the case states
    otherwise.
    """
    from var_kernels.adaln import config as adaln_config
    from var_kernels.adaln import triton as adaln
    from var_kernels.attention import config as attention_config
    from var_kernels.attention import triton_backward, triton_forward, triton_tiles
    from var_kernels.cross_entropy import config as ce_config
    from var_kernels.cross_entropy import triton as ce
    from var_kernels.group_norm import config as norm_config
    from var_kernels.group_norm import triton as norms
    from var_kernels.mlp import config as mlp_config
    from var_kernels.mlp import triton as mlp
    from var_kernels.vq import config as vq_config
    from var_kernels.vq import triton as vq

    names = (
        "x",
        "y",
        "gamma",
        "scale",
        "shift",
        "x_new",
        "h",
        "dh",
        "dx_new",
        "dx",
        "dy",
        "dscale",
        "dshift",
        "dgamma",
    )
    half = dict.fromkeys(names, "bf16")
    rows = (
        half
        | dict.fromkeys(("keep", "mean", "rstd", "partial", "eps"), "fp32")
        | {"eps": "f", "L": "i", "rows": "i", "splits": "i"}
    )
    rows |= dict.fromkeys(("C", "gamma_b", "scale_b", "shift_b"), "i16")
    for C in (1024, 1536, 1920, 2304):
        s = adaln_config.config_for(C)
        flags = {"GATED": True, "KEEP": True, "BLOCK_C": s.block_c}
        yield Case(
            f"adaln.forward C={C}",
            adaln.forward,
            rows,
            flags | {"A_ROW_EACH": True, "STAGES": s.gated.stages},
            s.gated.warps,
        )
        alone = flags | {"GATED": False, "A_ROW_EACH": False, "STAGES": s.forward.stages}
        yield Case(f"adaln.forward C={C} no gate", adaln.forward, rows, alone, s.forward.warps)
        more = flags | {"RESIDUAL": True, "STAGES": s.backward.stages}
        yield Case(f"adaln.backward C={C}", adaln.backward, rows, more, s.backward.warps)
    # A float32 residual stream, and the widest row.
    for C, kind, itemsize in (
        (2304, "fp32", 4),
        (4096, "bf16", 2),
    ):
        s, flags = (
            adaln_config.config_for(C, itemsize),
            {"GATED": True, "KEEP": True, "RESIDUAL": True},
        )
        typed = rows | {name: kind for name, given in rows.items() if given == "bf16"}
        constants = flags | {"BLOCK_C": s.block_c, "STAGES": s.backward.stages}
        yield Case(
            f"adaln.backward C={C} {kind}", adaln.backward, typed, constants, s.backward.warps
        )
    yield Case("adaln.finish", adaln.finish, rows, {"GATED": True, "BLOCK": 256}, 4)

    heads = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv", "x", "y"), "bf16")
    heads |= dict.fromkeys(("lse", "delta", "inv_q", "inv_k", "log_scale", "dscale", "out"), "fp32")
    heads |= dict.fromkeys(("tiles", "row_lo", "row_hi", "key_lo", "key_hi"), "i32") | {
        "sm_scale": "f"
    }
    heads |= dict.fromkeys(("count", "H", "L", "Lq", "Lk"), "i")
    kernels = {
        "forward": (triton_forward.forward, "BLOCK_M", "BLOCK_N"),
        "keys": (triton_backward.backward_keys, "BLOCK_N", "BLOCK_M"),
        "queries": (triton_backward.backward_queries, "BLOCK_M", "BLOCK_N"),
    }
    # Channels of a head, whether q and k are normalised, the number of keys, and known spills.
    # Sampling attends to keys that were normalised when they entered the cache.
    for kind, D, norm, keys, spilled in (
        ("bf16", 64, True, 680, 0),
        ("bf16", 64, True, attention_config.LONG, 0),
        ("bf16", 64, False, 680, 0),
        ("bf16", 64, False, attention_config.LONG, 0),
        ("fp16", 64, True, 680, 40),
        ("fp32", 64, True, 680, 32),
        ("bf16", 128, True, 680, 8),
    ):
        c = attention_config.config_for(
            D, int(architecture.removeprefix("sm_")) // 10, 4 if kind == "fp32" else 2, keys
        )
        typed = heads | {name: kind for name, given in heads.items() if given == "bf16"}
        for name, (kernel, rows_name, inner_name) in kernels.items():
            t: attention_config.Tile = getattr(c, name)
            # Only the forward pass has other tiles for many keys.
            if keys >= attention_config.LONG and name != "forward":
                continue
            settings: dict[str, Any] = {
                "NORM": norm,
                "D": D,
                "BLOCK_D": D,
                "UPCAST": False,
                "PRECISION": "ieee",
                rows_name: t.rows,
                inner_name: t.inner,
                "STAGES": t.stages,
            }
            settings |= {"BOUND": norm and kind == "bf16"} if name == "forward" else {}
            settings |= {} if norm else NO_SCALE
            # At 128 channels Triton uses mma, not wgmma, on Hopper.
            matrix = kind != "fp32" and D == 64
            yield Case(
                f"attention.{name} {kind} D={D} keys={keys}{'' if norm else ' no norm'}",
                kernel,
                typed,
                settings,
                t.warps,
                matrix=matrix,
                stack=spilled,
            )
    yield Case(
        "attention.inverse_norms",
        triton_tiles.inverse_norms,
        heads,
        {"D": 64, "BLOCK_D": 64, "BLOCK": 64},
        4,
    )
    for norm in (True, False):
        yield Case(
            f"attention.append{'' if norm else ' no norm'}",
            triton_tiles.append,
            heads | dict.fromkeys(("q_out", "k_out", "v_out"), "bf16"),
            {"NORM": norm, "D": 64, "BLOCK_D": 64, "BLOCK": 32} | ({} if norm else NO_SCALE),
            4,
        )
    yield Case(
        "attention.weighted_dots",
        triton_tiles.weighted_dots,
        heads,
        {"D": 64, "BLOCK_D": 64, "BLOCK": 64},
        4,
    )

    tokens = {
        "logits": "bf16",
        "target": "i64",
        "loss": "fp32",
        "ce": "fp32",
        "best": "i64",
        "V": "i16",
        "row_stride": "i16",
        "smoothing": "f",
        "z_loss": "f",
    }
    for V in (4096, 16384):
        flags = {"SMOOTH": True, "GRADIENT": True, "BLOCK_V": V}
        yield Case(f"cross_entropy V={V}", ce.cross_entropy, tokens, flags, ce_config.warps_for(V))

    yield Case(
        "cross_entropy.scale_rows",
        ce.scale_rows,
        {"x": "bf16", "factor": "fp32", "out": "bf16", "C": "i16", "x_stride": "i16"},
        {"BLOCK_C": ce_config.SCALE_BLOCK},
        4,
    )

    hidden = dict.fromkeys(("h", "a", "da", "dh"), "bf16") | {
        "partial": "fp32",
        "rows": "i",
        "group": "i",
        "hidden": "i16",
        "count": "i16",
    }
    yield Case(
        "mlp.gelu", mlp.gelu, hidden, {"BLOCK": mlp_config.FORWARD_BLOCK}, mlp_config.FORWARD_WARPS
    )
    flags = {"WRITE_A": True, "BLOCK": mlp_config.COLUMNS, "STAGES": mlp_config.BACKWARD_STAGES}
    yield Case("mlp.gelu_backward", mlp.gelu_backward, hidden, flags, mlp_config.BACKWARD_WARPS)

    for name, kernel, backward, flag in (
        ("linear_gelu", mlp.linear_gelu, False, "KEEP_H"),
        ("linear_gelu_backward", mlp.linear_gelu_backward, True, "WRITE_A"),
    ):
        g = mlp_config.product_config(int(architecture.removeprefix("sm_")) // 10, backward)
        sizes = {
            "BLOCK_M": g.block_m,
            "BLOCK_N": g.block_n,
            "BLOCK_K": g.block_k,
            "GROUP": g.group,
            "DESCRIPTOR": g.descriptor,
            "UPCAST": False,
            "PRECISION": "ieee",
            "STAGES": g.stages,
            flag: True,
        }
        w_tile = (g.block_k, g.block_n) if backward else (g.block_n, g.block_k)
        first, second = (
            f"tensordesc<bf16[{rows},{cols}]>" if g.descriptor else "bf16"
            for rows, cols in ((g.block_m, g.block_k), w_tile)
        )
        kinds = dict.fromkeys(("h", "a", "dh", "bias"), "bf16") | {
            "partial": "fp32",
            "M": "i",
            "x": first,
            "dy": first,
            "w": second,
        }
        yield Case(f"mlp.{name}", kernel, kinds, sizes, g.warps, g.stages, matrix=True)

    maps = {
        "x": "bf16",
        "y": "bf16",
        "weight": "bf16",
        "bias": "bf16",
        "partial": "fp32",
        "affine": "fp32",
        "rows": "i",
        "group": "i",
        "splits": "i",
        "width": "i",
        "eps": "f",
    }
    for name, constants in (
        ("sums", {"R": 8, "BLOCK_C": 512}),
        ("apply", {"R": 8, "BLOCK_C": 512, "SILU": True}),
        ("finish", {"BLOCK_S": 512, "BLOCK_W": 8}),
    ):
        yield Case(f"group_norm.{name}", getattr(norms, name), maps, constants, norm_config.WARPS)

    codes = {
        "z": "fp32",
        "codes": "fp32",
        "squares": "fp32",
        "index": "i64",
        "N": "i",
        "V": "i16",
        "Z": "i16",
        "z_stride": "i16",
        "code_stride": "i16",
    }
    for precision in vq_config.PRECISIONS.values():
        sizes = {
            "BLOCK_N": vq_config.BLOCK_N,
            "BLOCK_V": vq_config.BLOCK_V,
            "BLOCK_Z": 32,
            "PRECISION": precision,
        }
        yield Case(
            f"vq.nearest_code {precision}",
            vq.nearest_code,
            codes,
            sizes,
            vq_config.WARPS,
            matrix=True,
        )
