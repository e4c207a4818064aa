"""The command `var-scale bench kernels`.

It times the forward pass, the backward pass and both for every operator in every form, and writes
the results. It first compares each form with the eager form in float32. A form that is wrong is
reported as wrong and is not timed.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from var_kernels.bench.measure import copy_rate, measure, product_rate
from var_kernels.bench.operators import OPERATORS, SHAPES, TRY, Problem, problems

TOLERANCE = 0.02


def outputs(form: Callable[..., Any], problem: Problem) -> list[torch.Tensor]:
    """Return the outputs that the problem has gradients for, or all outputs if it has none."""
    out = form(*problem.inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    return outs[: len(problem.gradients) or None]


def wrong(form: Callable[..., Any], problem: Problem) -> str:
    """Compare a form with the eager form in float32.

    Returns a description of the difference, or "" if the form is right.
    """
    exact = replace(
        problem,
        inputs=[t.detach().float().requires_grad_(t.requires_grad) for t in problem.inputs],
        gradients=[g.float() for g in problem.gradients],
    )
    results, truths = everything(form, problem), everything(problem.forms["eager"], exact)
    for number, (value, truth) in enumerate(zip(results, truths, strict=True)):
        if not value.is_floating_point():
            if (differ := float((value != truth).float().mean())) > 1e-3:
                return f"{100 * differ:.2f} % of the indices differ"
        elif (error := float((value.float() - truth).norm() / truth.norm())) > TOLERANCE:
            return f"relative error {error:.2g} in result {number} (outputs, then gradients)"
    return ""


def everything(form: Callable[..., Any], problem: Problem) -> list[torch.Tensor]:
    """Return the outputs and the gradients, detached."""
    outs = outputs(form, problem)
    wanted = [t for t in problem.inputs if t.requires_grad]
    grads = (
        torch.autograd.grad(outs, wanted, problem.gradients, allow_unused=True)
        if problem.gradients
        else ()
    )
    return [t.detach() for t in (*outs, *grads) if t is not None]


def time_form(form: Callable[..., Any], problem: Problem, device: torch.device) -> dict[str, Any]:
    """Time one form and measure its memory.

    The times are those of the forward pass (which includes what it keeps for the backward pass),
    the backward pass, both, and a whole call with its launches. The peak of the memory excludes the
    inputs.
    """
    result: dict[str, Any] = {"forward": asdict(measure(lambda: form(*problem.inputs), device))}
    if problem.gradients:
        wanted = [t for t in problem.inputs if t.requires_grad]
        outs = outputs(form, problem)

        def backward() -> None:
            torch.autograd.grad(
                outs, wanted, problem.gradients, retain_graph=True, allow_unused=True
            )

        def both() -> None:
            torch.autograd.grad(
                outputs(form, problem), wanted, problem.gradients, allow_unused=True
            )

        result["backward"] = asdict(measure(backward, device))
        del outs
        result["both"] = asdict(measure(both, device))
        if device.type == "cuda":
            result["called"] = asdict(measure(both, device, graph=False))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = form(*problem.inputs)
        result["kept_bytes"] = torch.cuda.memory_allocated() - before
        del kept
        everything(form, problem)
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def run_problem(
    problem: Problem, device: torch.device, ceilings: dict[str, float], forms: Sequence[str] = ()
) -> dict[str, Any]:
    """Time the given forms of one operator at one shape, or all forms if none is given."""
    row: dict[str, Any] = {
        "operator": problem.name,
        "shape": problem.shape.name,
        "bytes": problem.bytes,
        "flops": problem.flops,
        "serial": problem.serial,
    }
    row["forms"] = {}
    for name, form in problem.forms.items():
        if forms and not any(name.startswith(text) for text in forms):
            continue
        try:
            reason = "" if name in problem.parts else wrong(form, problem)
            row["forms"][name] = {"wrong": reason} if reason else time_form(form, problem, device)
        # A competitor that does not run on this machine must not end the benchmark.
        except Exception as error:
            row["forms"][name] = {
                "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            }
        print(line(row, name, ceilings), flush=True)
    return row


def line(row: dict[str, Any], name: str, ceilings: dict[str, float]) -> str:
    """Return the result of one form as text."""
    form = row["forms"][name]
    head = f"{row['shape']:16} {row['operator']:26} {name:10}"
    if "failed" in form or "wrong" in form:
        return f"{head} {form.get('failed') or 'WRONG: ' + form['wrong']}"
    parts = [
        f"{what} {form[what]['p50']:9.4f} ms"
        for what in ("forward", "backward", "both", "called")
        if what in form
    ]
    return f"{head} {'  '.join(parts)}  {share(row, form, ceilings)}"


def floor_seconds(row: dict[str, Any], place: int, ceilings: dict[str, float]) -> float:
    """Return the least time of the forward (0) or backward (1) pass on this device.

    It follows from the measured copy and product rates.
    """
    moving, counting = (
        row["bytes"][place] / ceilings["copy_bytes_per_s"],
        row["flops"][place] / ceilings["product_flop_per_s"],
    )
    return moving + counting if row["serial"] else max(moving, counting)


def share(row: dict[str, Any], form: dict[str, Any], ceilings: dict[str, float]) -> str:
    """Return the share of the floor that the forward and backward passes reach, as text."""
    parts = []
    for place, what in enumerate(("forward", "backward")):
        if what not in form:
            continue
        if floor := floor_seconds(row, place, ceilings):
            parts.append(f"{100 * floor / (1e-3 * form[what]['p50']):.0f} %")
    return " / ".join(parts) + " of the floor" if parts else ""


def describe(device: torch.device) -> dict[str, Any]:
    """Return the versions, the device, the command and the date."""
    from importlib import metadata

    versions = {}
    for package in ("torch", "triton", "flash-attn", "xformers", "liger-kernel", "quack-kernels"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU ({platform.processor() or platform.machine()})"
    )
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=here
    ).stdout.strip()
    return {
        "device": name,
        "versions": versions,
        "commit": commit or None,
        "command": " ".join(["var-scale", *sys.argv[1:]]),
        "timing": "the GPU alone" if device.type == "cuda" else "whole calls",
        "date": time.strftime("%Y-%m-%d"),
    }


def ceilings_of(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the rates of copies and of matrix products, which bound every kernel."""
    return {
        "copy_bytes_per_s": copy_rate(device),
        "product_flop_per_s": product_rate(device, dtype),
    }


def require_writable(out: Path | None) -> None:
    """Raise ValueError if the results cannot be written to `out`.

    The check runs before an hour is spent on the results.
    """
    if out is None:
        return
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: the results are JSON; use a name that ends in .json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a"):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot write this file ({error.strerror}); use another file"
        ) from None


def write(out: Path | None, result: dict[str, Any]) -> None:
    """Write the results to `out`, which is complete at any time; nothing if `out` is None."""
    if out:
        part = out.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(out)


def require_known(what: str, given: list[str], known: list[str]) -> None:
    """Raise ValueError for a given name that is not the beginning of a known name."""
    for name in given:
        if not any(other.startswith(name) for other in known):
            raise ValueError(f"--{what} {name}: not known; use one of {', '.join(known)}")


def run_sweep(names: list[str], out: Path | None) -> None:
    """Time the launch settings of the kernels one by one; see sweep.py.

    Raises ValueError if there is no GPU.
    """
    from var_kernels.bench.sweep import KERNELS, sweep

    require_known("operators", names, list(KERNELS))
    require_writable(out)
    if not torch.cuda.is_available():
        raise ValueError("--sweep: the settings are timed on a GPU, but this machine has none")
    device = torch.device("cuda")
    ceilings = ceilings_of(device, torch.bfloat16)
    about = {**describe(device), "ceilings": ceilings}
    chosen = [known for known in KERNELS if any(known.startswith(n) for n in names or KERNELS)]
    with torch.cuda.stream(torch.cuda.Stream()):
        sweep(chosen, each=lambda rows: write(out, {**about, "sweep": rows}))
    if out:
        print(f"wrote {out}")


def run(
    operators: list[str],
    shapes: list[str],
    out: Path | None,
    forms: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Time the given operators at the given shapes in the given forms, or all where none is given.

    On a CPU only a small shape is timed, and its times do not apply to a GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_known("operators", operators, OPERATORS)
    require_known("shapes", shapes, [shape.name for shape in SHAPES])
    require_writable(out)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = (
        [s for s in SHAPES if not shapes or any(s.name.startswith(text) for text in shapes)]
        if device.type == "cuda"
        else TRY
    )
    ceilings = ceilings_of(device, dtype)
    about = describe(device)
    print(
        f"{about['device']}: copy {ceilings['copy_bytes_per_s'] / 1e12:.3g} TB/s, {dtype} product "
        f"{ceilings['product_flop_per_s'] / 1e12:.4g} TFLOP/s",
        flush=True,
    )
    if device.type != "cuda":
        print(
            "this machine has no GPU: the benchmark runs a small shape on the CPU as a trial; "
            "its times do not apply to the kernels",
            flush=True,
        )
    torch.manual_seed(0)
    # With donated buffers, compiled forms refuse a second backward pass over one graph.
    if device.type == "cuda":
        from torch._functorch import config as functorch

        functorch.donated_buffer = False
    rows: list[dict[str, Any]] = []
    result = {**about, "ceilings": ceilings, "rows": rows}
    # CUDA graphs can be recorded on a separate stream.
    with (
        torch.cuda.stream(torch.cuda.Stream())
        if device.type == "cuda"
        else contextlib.nullcontext()
    ):
        for shape in chosen:
            for problem in problems(shape, device, dtype):
                if not operators or any(problem.name.startswith(name) for name in operators):
                    # Each shape is compiled separately.
                    torch._dynamo.reset()
                    rows.append(run_problem(problem, device, ceilings, forms or []))
                    write(out, result)  # what is measured stays if the benchmark is stopped
    if out:
        from var_kernels.bench.roofline import draw

        write(out, result)
        draw(result, out.with_suffix(".png"))
        print(f"wrote {out} and {out.with_suffix('.png')}")
    return rows
