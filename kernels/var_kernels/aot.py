"""A report on the machine code of the kernels.

Run it as `python -m var_kernels.aot [sm_80 sm_90 sm_100] [--json]`, without TRITON_INTERPRET.

It compiles every kernel ahead of time, without a GPU, with the settings that the official models
launch it with. It reads the registers, the stack (spills), the shared memory and the kinds of
instructions from the machine code with Triton's cuobjdump.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from var_kernels.aot_cases import Case, cases

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
POINTERS = {"fp16": "*fp16", "fp32": "*fp32", "bf16": "*bf16", "i64": "*i64", "i32": "*i32"}
TENSOR_CORE = {"sm_80": r"\bHMMA\.", "sm_90": r"\bHGMMA\.", "sm_100": r"\b(UTC[HQ]MMA|HMMA\.)"}


@dataclass(frozen=True)
class Build:
    """The result of compiling one kernel for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    """Bytes of spilled registers per thread."""
    shared: int
    """Bytes of shared memory per program."""
    wide_loads: int
    """Loads of 128 bits from global memory to registers or shared memory, and loads of whole tiles
    (TMA)."""
    narrow_loads: int
    """Loads of 16 bits."""
    tensor_core: int
    """Instructions on tensor cores."""


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
        # The arguments without a declared type are strides.
        kind = case.types.get(name, "i16")
        signature[name] = (
            kind
            if kind.startswith("tensordesc")
            else POINTERS.get(kind) or {"i": "i32", "i16": "i32", "f": "fp32"}[kind]
        )
        if kind in POINTERS or kind == "i16":
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        case.kernel, signature=signature, constexprs=case.constants, attrs=attributes
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": case.warps, "num_stages": case.stages}
    )
    usage, code = _inspect(compiled.asm["cubin"])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    wide, narrow = count(r"\b(LDG|LDGSTS)\S*\.128\b|\bUTMALDG\b"), count(r"\bLDG\S*\.[US]16\b")
    return Build(
        case.name,
        architecture,
        numbers["REG"],
        numbers["STACK"],
        int(compiled.metadata.shared),
        wide,
        narrow,
        count(TENSOR_CORE[architecture]),
    )


def _inspect(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the machine code of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )


def main(arguments: list[str]) -> None:
    """Print a table, or JSON lines with --json."""
    chosen = [a for a in arguments if a != "--json"] or list(ARCHITECTURES)
    if unknown := [a for a in chosen if a not in ARCHITECTURES]:
        sys.exit(
            f"error: {unknown[0]} is not known; use one or more of {', '.join(ARCHITECTURES)}, "
            "and --json for JSON lines"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: Triton does not compile with TRITON_INTERPRET=1; unset it")
    for architecture in chosen:
        for case in cases(architecture):
            result = build(case, architecture)
            if "--json" in arguments:
                print(
                    json.dumps(
                        asdict(result)
                        | {"matrix": case.matrix, "warps": case.warps, "known_stack": case.stack}
                    ),
                    flush=True,
                )
            else:
                print(
                    f"{architecture:7} {result.name:30} {result.registers:4} registers "
                    f"{result.stack:4} stack {result.shared:7} shared {result.wide_loads:3} wide "
                    f"{result.narrow_loads:3} narrow {result.tensor_core:4} matrix",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
