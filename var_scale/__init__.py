"""var-scale: how does a VAR image model get better as it gets bigger, and what should we train next?"""

__version__ = "0.1.0"
