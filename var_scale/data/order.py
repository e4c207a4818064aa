"""The order of the samples: pure functions of a few integers, so that resuming needs one number and
the world size changes nothing.

Epoch e is the permutation Philox(key=[seed, e]) of all samples. The epochs form one endless stream,
of which step t takes positions [t·G, (t+1)·G); G is the global batch.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from var_scale.errors import UserError

MASK = 2**64 - 1


def philox(
    key: tuple[int, int], counter: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> np.random.Generator:
    """The stream of random numbers of a key, from a place `counter` on. Words are taken modulo
    2^64."""
    words = np.array([word & MASK for word in key], dtype=np.uint64)
    return np.random.Generator(
        np.random.Philox(
            key=words, counter=np.array([word & MASK for word in counter], dtype=np.uint64)
        )
    )


@lru_cache(maxsize=4)
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch`: a read-only int64 permutation (num_samples,)."""
    order = philox((seed, epoch)).permutation(num_samples)
    order.setflags(write=False)
    return order


def global_batch_indices(
    num_samples: int, seed: int, step: int, global_batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample indices and epochs, both int64 (G,), of stream positions [step·G, (step+1)·G)."""
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epochs, within = np.divmod(positions, num_samples)
    indices = np.empty_like(positions)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        mask = epochs == epoch
        indices[mask] = epoch_permutation(num_samples, seed, epoch)[within[mask]]
    return indices, epochs


def rank_slice(global_batch: int, world: int, rank: int, accumulate: int, micro: int) -> slice:
    """The part of a global batch that rank `rank` of `world` takes in micro-step `micro` of
    `accumulate`: b = G/(world·accumulate) samples from (micro·world + rank)·b, relative to t·G.

    Raises:
        UserError: G does not divide.
    """
    if world < 1 or accumulate < 1 or global_batch < 1 or global_batch % (world * accumulate):
        raise UserError(
            f"train.batch_size: {global_batch} does not divide into {world} processes x "
            f"{accumulate} micro-batches; change batch_size, accumulate or engine.processes",
            code="data.batch-divide",
        )
    assert 0 <= rank < world and 0 <= micro < accumulate, (
        f"rank {rank} of {world}, micro-step {micro} of {accumulate}"
    )
    size = global_batch // (world * accumulate)
    start = (micro * world + rank) * size
    return slice(start, start + size)


def uniform(seed: int, stream: str, step: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1), a pure function of (seed, stream, step).

    `stream` names the purpose ("label_drop", "drop_path/3", ...). For one number per sample, take
    count = G and index with the position in the global batch (or count = num_samples, step = epoch,
    and the index of the sample): every rank computes the same numbers.
    """
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    # The counter separates these streams from the permutations.
    return philox((seed, name), (0, 0, step, 1)).random(count)


@lru_cache(maxsize=4)
def epoch_views(num_samples: int, seed: int, epoch: int, views: int) -> np.ndarray:
    """The view that each sample shows in epoch `epoch`: read-only int64 (num_samples,), from 0 to
    views - 1."""
    chosen = (uniform(seed, "view", epoch, num_samples) * views).astype(np.int64)
    chosen.setflags(write=False)
    return chosen


def eval_slices(num_samples: int, batch: int, world: int = 1, rank: int = 0) -> list[np.ndarray]:
    """Batches of sample indices of one rank: over all ranks every sample exactly once.

    The counts of ranks may differ by one: sum losses and counts, and reduce them once at the end.
    """
    mine = np.arange(rank, num_samples, world, dtype=np.int64)
    return [mine[start : start + batch] for start in range(0, len(mine), batch)]
