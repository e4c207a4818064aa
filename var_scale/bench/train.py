"""`var-scale bench train` and `bench official`: start the ranks, wait, show what they measured."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from var_kernels.bench.run import require_writable

from var_scale.config.load import write_config
from var_scale.config.schema import Config
from var_scale.cost.time import DEVICES
from var_scale.data.order import rank_slice
from var_scale.errors import UserError
from var_scale.files import atomic_file, read_json, require_exists, write_json
from var_scale.jobs.local import launch_command, launch_environment, process_count
from var_scale.progress import say, short


def bench_train(
    config: Config,
    steps: int,
    warmup: int,
    out: Path | None,
    trace: Path | None,
    save: bool = False,
) -> dict[str, Any]:
    """Time training steps on this machine's processes and print the result.

    Args:
        steps, warmup: how many steps to time, and how many to take before.
        out: JSON file for the result.
        trace: file for a profiler trace of one step.
        save: also time a checkpoint, in a temporary folder.

    Raises:
        UserError: the batch does not divide, a file cannot be written, or the ranks failed.
    """
    rank_slice(config.train.batch_size, process_count(config.engine), 0, config.train.accumulate, 0)
    for file in (out, trace):
        check_writable(file)
    # At the end of the run: progressive training then uses all scales.
    job = {"steps": steps, "warmup": warmup, "trace": trace is not None, "at": 1.0}
    job["save"] = save
    with tempfile.TemporaryDirectory(prefix="var-scale-bench-") as name:
        folder = Path(name)
        command = launch_command(config, folder, "var_scale.bench.train_worker")
        result = _measure(config, job, folder, command, "result.json")
        if trace:
            with atomic_file(trace) as copy, open(folder / "trace.json", "rb") as source:
                shutil.copyfileobj(source, copy)
    result["command"] = " ".join(["var-scale", *sys.argv[1:]])
    show(result)
    write_result(result, out)
    return result


def bench_official(
    config: Config, checkout: Path, steps: int, warmup: int, compiled: bool, out: Path | None
) -> dict[str, Any]:
    """Time the step of the official trainer from images, as it really trains, and from tokens; then
    ours from tokens, in another process on the same device.

    Raises:
        UserError: `checkout` is not the official code, the config does not fit it, or it failed.
    """
    require_checkout(checkout, "trainer.py")
    if config.tokenizer.arch != "cnn" or config.engine.name != "single":
        raise UserError(
            "bench official: set tokenizer.arch=cnn (the official tokenizer) and engine=single",
            code="bench.official-config",
        )
    job = {
        "steps": steps,
        "warmup": warmup,
        "official": str(checkout.resolve()),
        "compile": compiled,
    }
    with tempfile.TemporaryDirectory(prefix="var-scale-bench-") as name:
        command = [sys.executable, "-m", "var_scale.bench.official", name]
        official = _measure(config, job, Path(name), command, "official.json")
    ours = bench_train(config, steps, warmup, None, None)
    ratio = official["step_ms"] / ours["step_ms"]
    from_tokens = official["step_ms_from_tokens"] / ours["step_ms"]
    say(
        f"official trainer, which encodes images within the step: {official['step_ms']:.2f} ms, "
        f"peak {official['memory_bytes'] / 2**30:.2f} GiB; ours, from tokens: {ratio:.2f} times "
        f"its images per second. With tokens given, it would take "
        f"{official['step_ms_from_tokens']:.2f} ms: {from_tokens:.2f} times"
    )
    result = ours | {
        "official": official,
        "official_compiled": compiled,
        "ratio": ratio,
        "ratio_from_tokens": from_tokens,
    }
    write_result(result, out)
    return result


def require_checkout(folder: Path, file: str) -> None:
    """Refuse a folder that is not the official code, which holds `file`."""
    if not (folder / file).is_file():
        require_exists(folder)
        raise UserError(
            f"{folder}: is not a checkout of the official code (no {file}); clone "
            "FoundationVision/VAR and give its path",
            code="bench.not-official",
        )


def check_writable(file: Path | None) -> None:
    """Refuse a result file that cannot be written, before anything is measured."""
    try:
        require_writable(file)
    except ValueError as error:
        raise UserError(str(error), code="bench.not-writable") from None


def write_result(result: Any, out: Path | None, quiet: bool = False) -> None:
    """Write a result as JSON, if a file is given; `quiet` for one that is not complete."""
    if out:
        write_json(out, result)
        if not quiet:
            say(f"written: {out}")


def _measure(
    config: Config, job: dict[str, Any], folder: Path, command: list[str], result: str
) -> dict[str, Any]:
    """Run a benchmark process over a folder with config.yaml and bench.json; what it wrote."""
    write_config(config, folder / "config.yaml")
    write_json(folder / "bench.json", job)
    done = subprocess.run(
        command, env=launch_environment(config), capture_output=True, text=True, check=False
    )
    if not (folder / result).exists():
        lines = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if "Error" in line or line.startswith("error:")
        ]
        reason = lines[-1].strip() if lines else "it printed no error message"
        raise UserError(
            f"the benchmark exited without a result (exit code {done.returncode}): {reason}",
            code="bench.no-result",
        )
    return dict(read_json(folder / result))


def show(result: dict[str, Any]) -> None:
    """Print a result of `bench_train`."""
    low, high = result["step_ms_range"]
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    say(
        f"{result['device']}: {result['world']} processes, {result['engine']['name']}, "
        f"{result['precision']}, batch {result['batch']}, {result['data']}"
    )
    say(
        f"step {result['step_ms']:.2f} ms ({low:.2f} to {high:.2f})  "
        f"{result['images_per_second']:,.1f} images/s  {result['tokens_per_second']:,.0f} tokens/s"
        f"  {result['flops_per_second'] / 1e12:.3g} TFLOP/s{mfu}  "
        f"peak {result['memory_bytes'] / 2**30:.2f} GiB"
    )
    kernels = result["device_ms"]
    busy = f", {kernels:.2f} ms of it in kernels" if kernels else ""
    say(
        f"steps in a row, without waiting for the device between them: {result['in_a_row_ms']:.2f} "
        f"ms each{busy}"
    )
    if save := result["save"]:
        say(
            f"a checkpoint: training waits {save['stall_ms']:.0f} ms for it (the first one "
            f"{save['first_stall_ms']:.0f} ms), it is on disk after {save['seconds']:.1f} s, and "
            f"steps take {save['steps_ms']:.2f} ms meanwhile"
        )
    total = sum(result["phases_ms"].values())
    parts = "  ".join(
        f"{name} {ms:.2f} ms ({ms / total:.1%})" for name, ms in result["phases_ms"].items()
    )
    say(f"by phases (waiting for the device after each): {parts}")
    if result["world"] > 1:
        say(
            f"exchanges between ranks: {result['exchange_ms']:.2f} ms per step, within backward "
            "and optimiser, partly overlapped with other work"
        )


def show_dry_run(config: Config, world: int) -> None:
    """Print what each rank of a world of this size would hold, and on which devices it fits."""
    from var_scale.train.dry_run import dry_run

    found = dry_run(config, world)
    memory = found.memory
    say(
        f"{config.engine.name}, {world} ranks, {found.micro_batch} samples per rank and "
        f"micro-batch: {short(found.parameters)} parameters, of which each rank holds "
        f"{short(found.held)}"
    )
    for name in ("parameters", "gradients", "optimizer", "activations"):
        estimate = " (an estimate)" if name == "activations" else ""
        say(f"  {name:12} {getattr(memory, name) / 2**30:8.2f} GiB{estimate}")
    fits = [
        device.name
        for key, device in DEVICES.items()
        if key != "cpu" and memory.total < 0.92 * device.memory
    ]
    on = ", ".join(fits) if fits else "none of the known devices"
    say(f"  {'total':12} {memory.total / 2**30:8.2f} GiB: fits {on}")
