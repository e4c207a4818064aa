"""The command `var-scale bench kernels --sweep`.

It times the launch settings of each kernel one by one. The file config.py of each operator contains
the settings chosen from the results. A setting that does not compile or does not fit is reported
and left out. A time is the time of the GPU alone for the whole pass, in which the other kernels
keep their settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from var_kernels.bench.measure import measure
from var_kernels.bench.operators import PATCHES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Try(NamedTuple):
    """One setting of one kernel at one shape.

    It has the setting as text, the module attributes to set for it, the call to time, and the least
    bytes that the call moves.
    """

    kernel: str
    shape: str
    setting: str
    changes: dict[tuple[Any, str], Any]
    call: Callable[[], object]
    bytes: float = 0.0


@contextmanager
def changed(changes: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Set module attributes temporarily."""
    before = {place: getattr(*place) for place in changes}
    for (module, name), value in changes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return normally distributed random numbers on the device."""
    return torch.randn(*size, device=DEVICE).to(dtype)


def attention(small: bool) -> Iterator[Try]:
    """Yield the settings of the forward kernel and of the two backward kernels of attention.

    They are the rows of a tile, the rows of the tiles in its loop, the warps, the stages, and for
    some the most registers per thread.
    """
    from var_kernels.attention import config, launch, scales
    from var_kernels.dispatch import generation

    tries: dict[str, list[tuple[int, ...]]] = {
        "forward": [
            (64, 32, 4, 3),
            (64, 32, 4, 3, 96),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 64, 4, 3, 128),
            (64, 64, 4, 4),
            (64, 128, 4, 2),
            (64, 128, 4, 3),
            (128, 64, 8, 3),
            (128, 128, 8, 3),
            (128, 32, 8, 3),
        ],
        "keys": [
            (64, 64, 4, 1),
            (64, 64, 4, 1, 168),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 32, 4, 2),
            (64, 32, 4, 3),
            (128, 64, 8, 1),
            (128, 64, 8, 2),
        ],
        "queries": [
            (64, 32, 4, 2),
            (64, 32, 4, 3),
            (64, 32, 4, 3, 128),
            (64, 64, 4, 1),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (128, 32, 8, 3),
        ],
    }
    for B, L, H in ((1, 30, 1),) if small else ((32, 680, 30), (8, 2240, 30)):
        qkv, log_scale = random(B, L, 3, H, 64), torch.full((H,), 1.386, device=DEVICE)
        q, k, v = qkv.unbind(2)
        visible = scales(PATCHES[L])
        o, lse, inv_q, inv_k = launch.launch_forward(q, k, v, log_scale, visible, 1.0)
        do, gradient = torch.randn_like(o), torch.empty_like(qkv)
        forward = (q, k, v, log_scale, visible, 1.0)
        calls: dict[str, Callable[[], object]] = {
            "forward": lambda given=forward: launch.launch_forward(*given)
        }  # type: ignore[misc]
        backward = (do, q, k, v, o, lse, inv_q, inv_k, log_scale, visible, 1.0, *gradient.unbind(2))
        calls["keys"] = calls["queries"] = lambda given=backward: launch.launch_backward(*given)  # type: ignore[misc]
        for name, settings in tries.items():
            for setting in settings:
                new = replace(
                    launch.config_for(64, generation(DEVICE), 2, L), **{name: config.Tile(*setting)}
                )
                names = ("rows", "inner", "warps", "stages", "registers")
                text = ", ".join(f"{n} {name}" for n, name in zip(setting, names, strict=False))
                yield Try(
                    f"attention.{name}",
                    f"B={B} L={L} H={H}",
                    text,
                    {(launch, "config_for"): lambda *_, new=new: new},
                    calls[name],
                )


def adaln(small: bool) -> Iterator[Try]:
    """Yield the warps, the stages and the programs per multiprocessor of each pass of AdaLN."""
    from var_kernels.adaln import config, launch

    for B, L, C in ((1, 4, 64),) if small else ((32, 680, 1024), (32, 680, 1920)):
        x, y, dh, dx = (random(B, L, C) for _ in range(4))
        gamma, scale, shift = (random(B, C) for _ in range(3))
        alone, n = (x, None, None, None, scale, shift, 1e-6, x.dtype), x.numel() * 2
        gated = (x, y, gamma, None, scale, shift, 1e-6, x.dtype)
        x_new, _, mean, rstd = launch.launch_forward(*gated)
        calls = {
            "forward": (2 * n, lambda a=alone: launch.launch_forward(*a)),
            "gated": (4 * n, lambda a=gated: launch.launch_forward(*a)),
            "backward": (
                6 * n,
                lambda a=(dh, dx, x_new, y, gamma, None, scale, x.dtype, mean, rstd): (
                    launch.launch_backward(*a)
                ),
            ),
        }
        base = launch.config_for(C)
        few = base.backward.warps
        for name, (moved, call) in calls.items():
            settings = [(w, 3, most // w) for w in (few, 2 * few) for most in (8, 16)]
            settings += [(few, 1, config.A_ROW_EACH)] if name != "backward" else []
            for warps, stages, programs in settings:
                new = replace(base, **{name: config.Rows(warps, stages, programs)})
                per = "a row a program" if programs == config.A_ROW_EACH else f"{programs} programs"
                text = f"{warps} warps, {stages} stages, {per}"
                yield Try(
                    f"adaln.{name}",
                    f"B={B} L={L} C={C}",
                    text,
                    {(launch, "config_for"): lambda *_, new=new: new},
                    call,
                    moved,
                )


def cross_entropy(small: bool) -> Iterator[Try]:
    """Yield the warps per row of the cross-entropy."""
    from var_kernels.cross_entropy import op

    N, V = (4, 64) if small else (21760, 4096)
    logits, target = random(N, V), torch.randint(V, (N,), device=DEVICE)
    for warps in (4, 8, 16):
        changes = {(op, "warps_for"): lambda _, warps=warps: warps}
        yield Try(
            "cross_entropy",
            f"N={N} V={V}",
            f"{warps} warps",
            changes,
            lambda: op.launch(logits, target, 0.0, 0.0, True),
            4 * N * V,
        )


def vq(small: bool) -> Iterator[Try]:
    """Yield the tile, the warps and the precision of the products of the nearest-code search."""
    from var_kernels.vq import config, op

    N, V = (8, 64) if small else (21760, 4096)
    z, codes = random(N, 32, dtype=torch.float32), random(V, 32, dtype=torch.float32)
    for precision in ("ieee", "tf32x3", "tf32"):
        for rows, cols, warps in ((64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 128, 8)):
            changes: dict[tuple[Any, str], Any] = {
                (config, "BLOCK_N"): rows,
                (config, "BLOCK_V"): cols,
                (config, "WARPS"): warps,
            }
            changes[config, "PRECISIONS"] = {"float32": precision}
            text = f"{precision}, {rows} x {cols}, {warps} warps"
            yield Try(
                "vq.nearest_code",
                f"N={N} V={V} Z=32",
                text,
                changes,
                lambda: op.launch(z, codes, "float32"),
            )


def group_norm(small: bool) -> Iterator[Try]:
    """Yield the numbers per tile, the warps and the programs per multiprocessor of the group norm.

    The three kernels are timed together.
    """
    from var_kernels.group_norm import config, op

    for B, C, side in ((1, 32, 4),) if small else ((64, 160, 256), (1, 160, 256), (64, 640, 16)):
        x, w = random(B, C, side, side).to(memory_format=torch.channels_last), random(C)
        for tile, warps, programs in (
            (4096, 4, 8),
            (8192, 4, 8),
            (4096, 8, 8),
            (8192, 8, 8),
            (4096, 4, 16),
        ):
            changes: dict[tuple[Any, str], Any] = {
                (config, "TILE"): tile,
                (config, "WARPS"): warps,
                (config, "PROGRAMS"): programs,
            }
            text = f"{tile} a tile, {warps} warps, {programs} programs"
            yield Try(
                "group_norm",
                f"B={B} C={C} {side}x{side}",
                text,
                changes,
                lambda x=x, w=w: op.launch(x, w, w, 32, 1e-6, True),
                3 * x.numel() * 2,
            )


KERNELS = {
    "attention": attention,
    "adaln": adaln,
    "cross_entropy": cross_entropy,
    "vq": vq,
    "group_norm": group_norm,
}


def sweep(
    names: list[str],
    small: bool = False,
    milliseconds: float = 50.0,
    each: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Time the settings of the given kernels, or of all kernels if none is given.

    Returns rows of the kernel, the shape, the setting and the milliseconds (median), or the error.
    On a GPU, the current stream must not be the default stream. `small` uses tiny shapes, which
    test the sweep itself in Triton's interpreter. `each` gets the rows so far after every setting.
    """
    rows: list[dict[str, Any]] = []
    for name, tries in KERNELS.items():
        if names and name not in names:
            continue
        for one in tries(small):
            row: dict[str, Any] = {
                "kernel": one.kernel,
                "shape": one.shape,
                "setting": one.setting,
                "bytes": one.bytes,
            }
            try:
                with changed(one.changes):
                    row["ms"] = measure(one.call, DEVICE, milliseconds).p50
            # Triton and the driver may raise any exception for a setting.
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            rows.append(row)
            print(
                f"{row['kernel']:20} {row['shape']:22} {row['setting']:40} "
                f"{row.get('ms', row.get('failed'))}",
                flush=True,
            )
            each(rows)
    return rows
