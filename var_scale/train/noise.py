"""The randomness of a training step, drawn per sample of the global batch: the same for any world
size."""

from __future__ import annotations

import torch

from var_scale.config.schema import Config
from var_scale.data.image_loader import ImageBatch
from var_scale.data.loader import Batch
from var_scale.data.order import uniform
from var_scale.model.build import default_drop_path
from var_scale.train.world import World


class StepNoise:
    """Label dropout and drop-path of the step that uses stream position `step` of the samples."""

    def __init__(self, config: Config, step: int):
        model, self.batch_size = config.model, config.train.batch_size
        self.first = step * self.batch_size
        rate = (
            default_drop_path(model.depth) if model.drop_path_rate is None else model.drop_path_rate
        )
        seed = config.train.seed
        self.drop_B = torch.from_numpy(
            uniform(seed, "label", step, self.batch_size) < model.cond_drop_rate
        )
        self.keep_D2B = None
        if rate > 0:
            # As in the official model, the rate grows linearly from 0 in the first block.
            rate_D11 = torch.linspace(0, rate, model.depth, dtype=torch.float64)[:, None, None]
            u = torch.from_numpy(uniform(seed, "path", step, model.depth * 2 * self.batch_size))
            self.keep_D2B = u.view(model.depth, 2, self.batch_size) >= rate_D11

    def of(
        self, batch: Batch | ImageBatch, world: World
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The noise of the samples of this batch: (B,) true where the label is dropped, and
        (depth, 2, B) true where the path of attention or MLP is kept."""
        place = torch.as_tensor(batch.sample_positions_B) - self.first
        drop_B = world.put(self.drop_B[place])
        return drop_B, None if self.keep_D2B is None else world.put(self.keep_D2B[:, :, place])
