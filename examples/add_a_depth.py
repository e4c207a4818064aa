"""The embedded study with one size more: what it would cost, before anything is spent. `study run` with the same overrides trains it."""

from pathlib import Path

from var_scale.cluster.pipeline import Study
from var_scale.config.load import load
from var_scale.cost.from_config import shape_of
from var_scale.study.plan import plan_rows, print_plan
from var_scale.train.schedule import Schedule

study = Study(load("study/tiny", ["name=deeper", "study.depths=[1,2,3,4,5,6]"]), Path("runs"))
configs = [config for config, _ in study.runs()]
images = [Schedule.of(c.train, c.train_samples).total_steps * c.train.batch_size for c in configs]
rows = plan_rows([shape_of(c) for c in configs], images, names=[c.name for c in configs], device="cpu")
print_plan(rows, "the data sheet of a CPU; `var-scale study plan` times a step of each size instead")
