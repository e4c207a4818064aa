"""The embedded study with one more size: its cost before anything is spent.

`study run` with the same overrides trains it.
"""

from pathlib import Path

from var_scale.config.load import load
from var_scale.study.plan import plan_rows, print_plan
from var_scale.study.study import Study

study = Study(load("study/tiny", ["name=deeper", "study.depths=[1,2,3,4,5,6,7]"]), Path("runs"))
configs = [config for config, _ in study.runs()]
print_plan(
    plan_rows(configs, [1] * len(configs), device="cpu"),
    "the data sheet of a CPU; `var-scale study plan` times a step of each size instead",
)
