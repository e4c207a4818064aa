"""A report on the machine code of the kernels.

Run it as `python -m var_kernels.aot [sm_80 sm_90 sm_100] [--json]`, without TRITON_INTERPRET.

It compiles every kernel ahead of time, without a GPU, exactly as the official models launch it
(aot_cases.py records their launches). It reads the registers, the stack (spills), the shared memory
and the kinds of instructions from the machine code with Triton's cuobjdump.
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
    loop: dict[str, int]
    """Of the loop that takes most instructions on tensor cores: all instructions, wide loads,
    narrow loads (of 32 bits or less), and accesses to spilled registers. Zeros without such a
    loop."""


WIDE = r"\b(LDG|LDGSTS)\S*\.128\b|\bUTMALDG\b"
NARROW = r"\bLDG(STS)?\.(?!\S*\.(64|128))\S*"
SPILLS = r"\b(LDL|STL)\b"


def build(case: Case, architecture: str) -> Build:
    """Compile one kernel for one architecture and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = case.specialisation()
    source = ASTSource(
        case.kernel, signature=given.signature, constexprs=given.constants, attrs=given.attributes
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=case.options)
    usage, code = _inspect(compiled.asm["cubin"])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Build(
        case.name,
        architecture,
        numbers["REG"],
        numbers["STACK"],
        int(compiled.metadata.shared),
        count(WIDE),
        count(r"\bLDG\S*\.[US]16\b"),
        count(TENSOR_CORE[architecture]),
        main_loop(code, TENSOR_CORE[architecture]),
    )


def main_loop(code: str, tensor_core: str) -> dict[str, int]:
    """Count the instructions of the first loop with most instructions on tensor cores: the one
    without masks, which does most of the work."""
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    ]
    best = {"instructions": 0, "wide": 0, "narrow": 0, "spills": 0}
    most = 0
    for address, text in lines:
        jump = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if not jump or int(jump[1], 16) > address:
            continue
        body = [t for a, t in lines if int(jump[1], 16) <= a <= address]
        products = sum(bool(re.search(tensor_core, t)) for t in body)
        if products > most:
            most = products
            best = {
                "instructions": len(body),
                "wide": sum(bool(re.search(WIDE, t)) for t in body),
                "narrow": sum(bool(re.search(NARROW, t)) for t in body),
                "spills": sum(bool(re.search(SPILLS, t)) for t in body),
            }
    return best


def loop_text(loop: dict[str, int]) -> str:
    """Return the counts of the main loop as text."""
    return "main loop: " + ", ".join(f"{n} {what}" for what, n in loop.items())


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
    if "--json" not in arguments:
        print(
            "registers per thread, stack and shared memory in bytes, loads of 128 bits (wide) and "
            "of 16 bits (narrow), instructions on tensor cores (matrix); in the main loop loads of "
            "up to 32 bits are narrow"
        )
    for architecture in chosen:
        for case in cases(architecture):
            result = build(case, architecture)
            if "--json" in arguments:
                print(
                    json.dumps(
                        asdict(result)
                        | {
                            "matrix": case.matrix,
                            "warps": case.options.get("num_warps", 4),
                            "known_stack": case.stack,
                        }
                    ),
                    flush=True,
                )
            else:
                print(
                    f"{architecture:7} {result.name:48} {result.registers:4} registers "
                    f"{result.stack:4} stack {result.shared:7} shared {result.wide_loads:3} wide "
                    f"{result.narrow_loads:3} narrow {result.tensor_core:4} matrix"
                    + (f"; {loop_text(result.loop)}" if result.loop["instructions"] else ""),
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
