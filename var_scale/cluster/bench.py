"""`var-scale bench train` from the outside: start the ranks, wait, show what they measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from var_kernels.bench.run import require_writable

from var_scale.cluster.local import launch_command, launch_environment, process_count
from var_scale.config.load import write_config
from var_scale.config.schema import Config
from var_scale.cost.time import DEVICES
from var_scale.data.order import rank_slice
from var_scale.errors import UserError
from var_scale.files import read_json, replace_between, write_json
from var_scale.progress import say
from var_scale.study.plan import short

START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
"""`python -m var_scale.cluster.bench` puts the table of bench/results/ between them in docs/training.md"""


def bench_train(config: Config, steps: int, warmup: int, out: Path | None, trace: Path | None) -> dict[str, Any]:
    """Run the bench on this machine's processes; prints the result, writes it to `out`, and a profiler trace to `trace`."""
    rank_slice(config.train.batch_size, process_count(config.engine), 0, config.train.accumulate, 0)
    try:
        require_writable(out)
        require_writable(trace)
    except ValueError as error:
        raise UserError(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="var-scale-bench-") as name:
        folder = Path(name)
        write_config(config, folder / "config.yaml")
        write_json(folder / "bench.json", {"steps": steps, "warmup": warmup, "trace": trace is not None})
        command = launch_command(config, folder, "var_scale.train.bench_train")
        done = subprocess.run(command, env=launch_environment(config), capture_output=True, text=True, check=False)
        if not (folder / "result.json").exists():
            raise UserError(f"the bench ended without a result (exit code {done.returncode}): {_last_line(done.stdout + done.stderr)}")
        result = read_json(folder / "result.json") | {"command": " ".join(["var-scale", *sys.argv[1:]])}
        if trace:
            shutil.copyfile(folder / "trace.json", trace)
    show(result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        say(f"written: {out}")
    return dict(result)


def bench_official(config: Config, checkout: Path, steps: int, warmup: int, compiled: bool, out: Path | None) -> dict[str, Any]:
    """Our step from tokens and the official trainer's from images, each in a process of its own, one after the other on this device."""
    if not (checkout / "trainer.py").is_file():
        raise UserError(f"{checkout}: is not a checkout of the official code (no trainer.py); clone FoundationVision/VAR and give its path")
    if config.tokenizer.arch != "cnn" or config.engine.name != "single":
        raise UserError("bench official: needs the official tokenizer (tokenizer.arch=cnn) and engine=single")
    ours = bench_train(config, steps, warmup, None, None)
    with tempfile.TemporaryDirectory(prefix="var-scale-bench-") as name:
        folder = Path(name)
        write_config(config, folder / "config.yaml")
        job = {"steps": steps, "warmup": warmup, "official": str(checkout.resolve()), "compile": compiled}
        write_json(folder / "bench.json", job)
        command = [sys.executable, "-m", "var_scale.train.bench_official", str(folder)]
        done = subprocess.run(command, env=launch_environment(config), capture_output=True, text=True, check=False)
        if not (folder / "official.json").exists():
            reason = _last_line(done.stdout + done.stderr)
            raise UserError(f"the official step ended without a result (exit code {done.returncode}): {reason}")
        official = read_json(folder / "official.json")
    ratio = official["step_ms"] / ours["step_ms"]
    say(f"official trainer, tokenising in the step: {official['step_ms']:.2f} ms, peak {official['memory_bytes'] / 2**30:.2f} GiB; "
        f"ours, from tokens: {ratio:.2f} times its images a second")  # fmt: skip
    result = ours | {"official": official, "official_compiled": compiled, "ratio": ratio}
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
        say(f"written: {out}")
    return result


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "Error" in line or line.startswith("error:")]
    return lines[-1].strip() if lines else "no message"


def show(result: dict[str, Any]) -> None:
    """As text."""
    low, high = result["step_ms_range"]
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    say(f"{result['device']}: {result['world']} processes, {result['engine']['name']}, {result['precision']}, batch {result['batch']}, "
        f"{result['data']}")  # fmt: skip
    say(f"step {result['step_ms']:.2f} ms ({low:.2f} to {high:.2f})  {result['images_per_second']:,.1f} images/s  "
        f"{result['tokens_per_second']:,.0f} tokens/s  {result['flops_per_second'] / 1e12:.3g} TFLOP/s{mfu}  "
        f"peak {result['memory_bytes'] / 2**30:.2f} GiB")  # fmt: skip
    total = sum(result["phases_ms"].values())
    parts = "  ".join(f"{name} {ms:.2f} ms ({ms / total:.1%})" for name, ms in result["phases_ms"].items())
    say(f"cut into phases (the device is waited for after each): {parts}")
    if result["world"] > 1:
        say(f"exchanges between ranks: {result['exchange_ms']:.2f} ms a step, inside backward and optimiser, in part behind other work")


def show_dry_run(config: Config, world: int) -> None:
    """What each rank of a world would hold, and on which devices it fits."""
    from var_scale.train.dry_run import dry_run

    found = dry_run(config, world)
    memory = found.memory
    say(f"{config.engine.name}, {world} ranks, {found.micro_batch} samples a rank and micro-batch: {short(found.parameters)} parameters, "
        f"of which a rank holds {short(found.held)}")  # fmt: skip
    for name in ("parameters", "gradients", "optimizer", "activations"):
        estimate = " (an estimate)" if name == "activations" else ""
        say(f"  {name:12} {getattr(memory, name) / 2**30:8.2f} GiB{estimate}")
    fits = [device.name for key, device in DEVICES.items() if key != "cpu" and memory.total < 0.92 * device.memory]
    say(f"  {'total':12} {memory.total / 2**30:8.2f} GiB: fits {', '.join(fits) if fits else 'none of the known devices'}")


def results_table(folder: Path) -> str:
    """The results that `--out` wrote into a folder, as Markdown."""
    lines = ["| file | device | processes, engine, precision | batch | attention | step, ms | images/s | TFLOP/s | MFU |",
             "|---|---|---|---:|---|---:|---:|---:|---:|"]  # fmt: skip
    for path in sorted(folder.glob("*.json")):
        r = read_json(path, "bench result")
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else ""
        lines.append(f"| {path.stem} | {r['device']} | {r['world']}, {r['engine']['name']}, {r['precision']} | {r['batch']} | "
                     f"{r['choices']['attention'].split(' (')[0]} | {r['step_ms']:.0f} | {r['images_per_second']:.2f} | "
                     f"{r['flops_per_second'] / 1e12:.3f} | {mfu} |")  # fmt: skip
    return "\n".join(lines) if len(lines) > 2 else "Nothing measured yet."


def fill(text: str, folder: Path) -> str:
    """docs/training.md with its measured part made anew."""
    return replace_between(text, START, END, results_table(folder))


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    page = root / "docs" / "training.md"
    page.write_text(fill(page.read_text(), root / "bench" / "results"))
