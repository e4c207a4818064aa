"""Launch parameters of the nearest-code search. Nothing here was measured on a GPU yet; see kernels/README.md."""

BLOCK_N = 64
BLOCK_V = 64
"""64 x 64 distances in float32 are 16 registers a thread with 8 warps; with 4 the exact (not TF32) product spills on Blackwell"""
WARPS = 8
MAX_Z = 128
"""channels of a code that one tile holds whole"""
