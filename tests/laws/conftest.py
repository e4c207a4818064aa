"""Data and fits that the tests of laws share."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "laws"
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="session")
def chinchilla() -> Columns:
    """N, D and loss of Epoch's table of the Chinchilla runs, without its five worst."""
    with open(GOLDEN / "chinchilla_epoch.csv") as file:
        names = ("Model Size", "Training FLOP", "loss")
        table = np.array([[float(row[key]) for key in names] for row in csv.DictReader(file)])
    table = table[table[:, 2] < np.sort(table[:, 2])[-5]]
    return table[:, 0], table[:, 1] / (6 * table[:, 0]), table[:, 2]


@pytest.fixture(scope="session")
def routing() -> tuple[np.ndarray, np.ndarray]:
    """N and loss of DeepMind's dense models."""
    with open(GOLDEN / "deepmind_routing_dense.csv") as file:
        names = ("parameters", "loss_validation")
        table = np.array([[float(row[key]) for key in names] for row in csv.DictReader(file)])
    return table[:, 0], table[:, 1]
