"""Parameters, FLOPs, memory and time of a VAR model, as pure functions of its shape."""

from var_scale.cost.flops import FlopCount, count_flops
from var_scale.cost.memory import MemoryCount, count_memory
from var_scale.cost.params import ParamCount, count_params
from var_scale.cost.shape import ModelShape
from var_scale.cost.time import DEVICES, Device, seconds

__all__ = [
    "DEVICES",
    "Device",
    "FlopCount",
    "MemoryCount",
    "ModelShape",
    "ParamCount",
    "count_flops",
    "count_memory",
    "count_params",
    "seconds",
]
