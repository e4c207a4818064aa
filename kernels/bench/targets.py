"""What the operators should reach on an H200."""

from __future__ import annotations

FLOOR = {
    ("adaptive_layer_norm", 680): (0.90, 0.85),
    ("gate_adaptive_layer_norm", 680): (0.88, 0.84),
    ("block_attention", 680): (0.30, 0.25),
    ("block_attention", 2240): (0.44, 0.33),
    ("linear_cross_entropy", 680): (0.85, 0.85),
}
"""Share of the floor that an operator should reach at a sequence length, in the forward and the
backward pass."""
MLP = 0.92
"""Share of the MLP's time that its matrix products alone should take."""
