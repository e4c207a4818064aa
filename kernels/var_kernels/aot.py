"""What the kernels compile to, without a GPU: `python -m var_kernels.aot [sm_80 sm_90 sm_100] [--json]`.

Compiles every kernel ahead of time as it is launched for the official models, and reads registers, stack (spills), shared memory and the
kinds of instruction from the machine code with the cuobjdump that comes with Triton. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TENSOR_CORE = {"sm_80": r"\bHMMA\.", "sm_90": r"\bHGMMA\.", "sm_100": r"\b(UTC[HQ]MMA|HMMA\.)"}
POINTERS = {"fp16": "*fp16", "fp32": "*fp32", "bf16": "*bf16", "i64": "*i64", "i32": "*i32"}


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: types of its arguments by name (`16` after an integer: a multiple of 16), constants, warps, stages."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    matrix: bool = False
    """uses tensor cores"""
    stack: int = 0
    """bytes of spills that are known and small"""


@dataclass(frozen=True)
class Build:
    """What came out."""

    name: str
    architecture: str
    registers: int
    stack: int
    """bytes of spilled registers a thread"""
    shared: int
    """bytes of shared memory a program"""
    wide_loads: int
    """loads of 128 bits from global memory, direct or into shared memory, or of whole tiles (TMA)"""
    narrow_loads: int
    """16-bit loads"""
    tensor_core: int
    """instructions on tensor cores"""


def cases(architecture: str) -> Iterator[Case]:
    """Every kernel at the widths of d16 (1024), d24 (1536), d30 (1920) and d36 (2304), bfloat16, heads of 64."""
    from var_kernels.adaln import config as adaln_config
    from var_kernels.adaln import triton as adaln
    from var_kernels.attention import config as attention_config
    from var_kernels.attention import triton as attention
    from var_kernels.cross_entropy import config as ce_config
    from var_kernels.cross_entropy import triton as ce
    from var_kernels.group_norm import config as norm_config
    from var_kernels.group_norm import triton as norms
    from var_kernels.mlp import config as mlp_config
    from var_kernels.mlp import triton as mlp
    from var_kernels.vq import config as vq_config
    from var_kernels.vq import triton as vq

    names = ("x", "y", "gamma", "scale", "shift", "x_new", "h", "dh", "dx_new", "dx", "dy", "dscale", "dshift", "dgamma")
    half = dict.fromkeys(names, "bf16")
    rows = half | dict.fromkeys(("keep", "mean", "rstd", "partial", "eps"), "fp32") | {"eps": "f", "L": "i", "rows": "i", "splits": "i"}
    rows |= dict.fromkeys(("C", "gamma_b", "scale_b", "shift_b"), "i16")
    for C in (1024, 1536, 1920, 2304):
        s = adaln_config.config_for(C)
        flags = {"GATED": True, "KEEP": True, "BLOCK_C": s.block_c}
        yield Case(f"adaln.forward C={C}", adaln.forward, rows, flags | {"A_ROW_EACH": True, "STAGES": s.gated.stages}, s.gated.warps)
        alone = flags | {"GATED": False, "A_ROW_EACH": False, "STAGES": s.forward.stages}
        yield Case(f"adaln.forward C={C} no gate", adaln.forward, rows, alone, s.forward.warps)
        more = flags | {"RESIDUAL": True, "STAGES": s.backward.stages}
        yield Case(f"adaln.backward C={C}", adaln.backward, rows, more, s.backward.warps)
    for C, kind, itemsize in ((2304, "fp32", 4), (4096, "bf16", 2)):  # a float32 residual stream, and the widest row
        s, flags = adaln_config.config_for(C, itemsize), {"GATED": True, "KEEP": True, "RESIDUAL": True}
        typed = rows | {name: kind for name, given in rows.items() if given == "bf16"}
        constants = flags | {"BLOCK_C": s.block_c, "STAGES": s.backward.stages}
        yield Case(f"adaln.backward C={C} {kind}", adaln.backward, typed, constants, s.backward.warps)
    yield Case("adaln.finish", adaln.finish, rows, {"GATED": True, "BLOCK": 256}, 4)

    heads = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv", "x", "y"), "bf16")
    heads |= dict.fromkeys(("lse", "delta", "inv_q", "inv_k", "log_scale", "dscale", "out"), "fp32")
    heads |= dict.fromkeys(("tiles", "row_lo", "row_hi", "key_lo", "key_hi"), "i32") | {"sm_scale": "f"}
    heads |= dict.fromkeys(("count", "H", "L", "Lq", "Lk"), "i")
    kernels = {"forward": (attention.forward, "BLOCK_M", "BLOCK_N"), "keys": (attention.backward_keys, "BLOCK_N", "BLOCK_M"),
               "queries": (attention.backward_queries, "BLOCK_M", "BLOCK_N")}  # fmt: skip
    for kind, D, spilled in (("bf16", 64, 0), ("fp16", 64, 40), ("fp32", 64, 32), ("bf16", 128, 8)):
        c = attention_config.config_for(D, int(architecture.removeprefix("sm_")) // 10, 4 if kind == "fp32" else 2)
        typed = heads | {name: kind for name, given in heads.items() if given == "bf16"}
        for name, (kernel, rows_name, inner_name) in kernels.items():
            t: attention_config.Tile = getattr(c, name)
            settings: dict[str, Any] = {"NORM": True, "D": D, "BLOCK_D": D, "UPCAST": False, "PRECISION": "ieee", rows_name: t.rows,
                                        inner_name: t.inner, "STAGES": t.stages}  # fmt: skip
            settings |= {"BOUND": kind == "bf16"} if name == "forward" else {}
            matrix = kind != "fp32" and D == 64  # at 128 channels Triton takes mma, not wgmma, on Hopper
            yield Case(f"attention.{name} {kind} D={D}", kernel, typed, settings, t.warps, matrix=matrix, stack=spilled)
    yield Case("attention.inverse_norms", attention.inverse_norms, heads, {"D": 64, "BLOCK_D": 64, "BLOCK": 64}, 4)
    yield Case("attention.append", attention.append, heads | dict.fromkeys(("q_out", "k_out", "v_out"), "bf16"),
               {"NORM": True, "D": 64, "BLOCK_D": 64, "BLOCK": 32}, 4)  # fmt: skip
    yield Case("attention.weighted_dots", attention.weighted_dots, heads, {"D": 64, "BLOCK_D": 64, "BLOCK": 64}, 4)

    tokens = {"logits": "bf16", "target": "i64", "loss": "fp32", "ce": "fp32", "best": "i64", "V": "i16", "row_stride": "i16",
              "smoothing": "f", "z_loss": "f"}  # fmt: skip
    for V in (4096, 16384):
        flags = {"SMOOTH": True, "GRADIENT": True, "BLOCK_V": V}
        yield Case(f"cross_entropy V={V}", ce.cross_entropy, tokens, flags, ce_config.warps_for(V))

    yield Case("cross_entropy.scale_rows", ce.scale_rows, {"x": "bf16", "factor": "fp32", "out": "bf16", "C": "i16", "x_stride": "i16"},
               {"BLOCK_C": ce_config.SCALE_BLOCK}, 4)  # fmt: skip

    hidden = dict.fromkeys(("h", "a", "da", "dh"), "bf16") | {"partial": "fp32", "rows": "i", "group": "i", "hidden": "i16", "count": "i16"}
    yield Case("mlp.gelu", mlp.gelu, hidden, {"BLOCK": mlp_config.FORWARD_BLOCK}, mlp_config.FORWARD_WARPS)
    flags = {"WRITE_A": True, "BLOCK": mlp_config.COLUMNS, "STAGES": mlp_config.BACKWARD_STAGES}
    yield Case("mlp.gelu_backward", mlp.gelu_backward, hidden, flags, mlp_config.BACKWARD_WARPS)

    for name, kernel, backward, flag in (("linear_gelu", mlp.linear_gelu, False, "KEEP_H"),
                                         ("linear_gelu_backward", mlp.linear_gelu_backward, True, "WRITE_A")):  # fmt: skip
        g = mlp_config.product_config(int(architecture.removeprefix("sm_")) // 10, backward)
        sizes = {"BLOCK_M": g.block_m, "BLOCK_N": g.block_n, "BLOCK_K": g.block_k, "GROUP": g.group, "DESCRIPTOR": g.descriptor,
                 "UPCAST": False, "PRECISION": "ieee", "STAGES": g.stages, flag: True}  # fmt: skip
        w_tile = (g.block_k, g.block_n) if backward else (g.block_n, g.block_k)
        first, second = (f"tensordesc<bf16[{rows},{cols}]>" if g.descriptor else "bf16" for rows, cols in ((g.block_m, g.block_k), w_tile))
        kinds = dict.fromkeys(("h", "a", "dh", "bias"), "bf16") | {"partial": "fp32", "M": "i", "x": first, "dy": first, "w": second}
        yield Case(f"mlp.{name}", kernel, kinds, sizes, g.warps, g.stages, matrix=True)

    maps = {"x": "bf16", "y": "bf16", "weight": "bf16", "bias": "bf16", "partial": "fp32", "affine": "fp32", "rows": "i", "group": "i",
            "splits": "i", "width": "i", "eps": "f"}  # fmt: skip
    for name, constants in (("sums", {"R": 8, "BLOCK_C": 512}), ("apply", {"R": 8, "BLOCK_C": 512, "SILU": True}),
                            ("finish", {"BLOCK_S": 512, "BLOCK_W": 8})):  # fmt: skip
        yield Case(f"group_norm.{name}", getattr(norms, name), maps, constants, norm_config.WARPS)

    codes = {"z": "fp32", "codes": "fp32", "squares": "fp32", "index": "i64", "N": "i", "V": "i16", "Z": "i16", "z_stride": "i16",
             "code_stride": "i16"}  # fmt: skip
    for precision in vq_config.PRECISIONS.values():
        sizes = {"BLOCK_N": vq_config.BLOCK_N, "BLOCK_V": vq_config.BLOCK_V, "BLOCK_Z": 32, "PRECISION": precision}
        yield Case(f"vq.nearest_code {precision}", vq.nearest_code, codes, sizes, vq_config.WARPS, matrix=True)


def build(case: Case, architecture: str) -> Build:
    """Compile one kernel for one architecture and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for number, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        kind = case.types.get(name, "i16")  # strides
        signature[name] = kind if kind.startswith("tensordesc") else POINTERS.get(kind) or {"i": "i32", "i16": "i32", "f": "fp32"}[kind]
        if kind in POINTERS or kind == "i16":
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})
    usage, code = _inspect(compiled.asm["cubin"])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    wide, narrow = count(r"\b(LDG|LDGSTS)\S*\.128\b|\bUTMALDG\b"), count(r"\bLDG\S*\.[US]16\b")
    return Build(case.name, architecture, numbers["REG"], numbers["STACK"], int(compiled.metadata.shared), wide, narrow,
                 count(TENSOR_CORE[architecture]))  # fmt: skip


def _inspect(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )


def main(arguments: list[str]) -> None:
    """Print a table, or JSON lines."""
    chosen = [a for a in arguments if a != "--json"] or list(ARCHITECTURES)
    if unknown := [a for a in chosen if a not in ARCHITECTURES]:
        sys.exit(f"error: {unknown[0]} is not known; take one or more of {', '.join(ARCHITECTURES)}, and --json for JSON lines")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: with TRITON_INTERPRET=1 Triton does not compile; unset it")
    for architecture in chosen:
        for case in cases(architecture):
            result = build(case, architecture)
            if "--json" in arguments:
                print(json.dumps(asdict(result) | {"matrix": case.matrix, "warps": case.warps, "known_stack": case.stack}), flush=True)
            else:
                print(f"{architecture:7} {result.name:30} {result.registers:4} registers {result.stack:4} stack {result.shared:7} shared "
                      f"{result.wide_loads:3} wide {result.narrow_loads:3} narrow {result.tensor_core:4} matrix", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
