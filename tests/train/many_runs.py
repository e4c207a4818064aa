"""Many short runs in one set of processes: `torchrun tests/train/many_runs.py JOBS.json`, a list of {folder, engine, train, model, from}.

Each is a real run (var_scale.train.loop.Run) that goes on from a copy of the checkpoints of the run `from` where that is given.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.runs import small_config
from var_scale.config.schema import Config
from var_scale.run_folder import RunFolder
from var_scale.train.loop import Run, create_run
from var_scale.train.world import leave, start_world


def config_of(root: Path, job: dict) -> Config:
    """The run's config over the tokens in `root`."""
    return small_config(root, engine=job["engine"], train=job["train"], model=job["model"])


def main(path: Path) -> None:
    """Run all jobs; every rank takes part in each."""
    world = start_world(group=True, threads=1)
    for job in json.loads(path.read_text()):
        folder = Path(job["folder"])
        if world.main:
            create_run(config_of(path.parent, job), folder)
            if job.get("from"):
                earlier = RunFolder(Path(job["from"]))
                for step in job["steps"]:
                    name = f"step-{step:08d}"
                    shutil.copytree(earlier.checkpoints / name, folder / "checkpoints" / name)
        world.barrier()
        run = Run(folder, world)
        assert run.train() == 0, folder
        run.close()
    leave(world, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
