"""Scaling studies of VAR image models: what does a larger model gain, and what to train next?"""

__version__ = "0.1.0"
