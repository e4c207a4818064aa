"""DeepSpeed ZeRO 0 to 3 with float32 master weights.

As on every engine, bf16 comes from autocast inside TrainStep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from var_scale.config.schema import EngineConfig, TrainConfig
from var_scale.model.block import FFN
from var_scale.train.engine.base import MOMENTS, WEIGHT, Engine, Piece, StepStats, guard
from var_scale.train.engine.deepspeed_config import engine_config
from var_scale.train.engine.single import whole_pieces, zero_state
from var_scale.train.optim import build_optimizer
from var_scale.train.step import TrainStep


def _without_cpu_compile() -> None:
    """Keep DeepSpeed from compiling a shared-memory operator on CPUs, which takes a minute each
    time and fails without a compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedEngine(Engine):
    """`deepspeed.initialize` around TrainStep with our AdamW."""

    def __init__(self, step_module: TrainStep, train: TrainConfig, engine: EngineConfig):
        super().__init__(step_module, train)
        if self.device.type == "cpu":
            _without_cpu_compile()
        import deepspeed

        self.stage = engine.zero_stage
        named = list(step_module.var.named_parameters())
        if self.stage == 3:
            # The fused MLP reads the weights of its layers itself, so they are gathered as one.
            deepspeed.utils.set_z3_leaf_modules(step_module, [FFN])
        config = engine_config(
            engine.deepspeed, dist.get_world_size(), train.batch_size, self.accumulate, self.clip
        )
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=step_module,
            optimizer=build_optimizer(named, self.betas),
            config=config,
            dist_init_required=False,
        )
        zero: Any = self.optimizer
        # The torch optimiser inside ZeRO's.
        self.inner: torch.optim.Optimizer = zero if self.stage == 0 else zero.optimizer

    def backward(self, loss: torch.Tensor) -> None:
        if self.scaler and self.stage:
            # ZeRO removes the scale itself, and reads it: here the host waits once per step.
            self.optimizer.loss_scaler.cur_scale = float(self.scaler.scale)  # type: ignore[attr-defined]
        elif self.scaler:
            loss = loss * self.scaler.scale
        # DeepSpeed divides the loss by the number of micro-batches.
        self.module.backward(loss)  # type: ignore[operator]
        if not self.last:
            # Counts the micro-batch; it updates the weights only after the last one.
            self.module.step()  # type: ignore[operator]

    def step(self) -> StepStats:
        if self.stage == 0:
            stats = guard([p for _, p in self.names()], self.inner, self.clip, self.scaler)
            self.module.step()  # type: ignore[operator]
            return stats
        self.module.step()  # type: ignore[operator]
        zero: Any = self.optimizer
        skipped = torch.tensor(float(zero.overflow), device=self.device)
        norm = float("inf") if zero.overflow else self.module.get_global_grad_norm()  # type: ignore[operator]
        if self.scaler:
            self.scaler.update(skipped)
        return StepStats(torch.as_tensor(norm, dtype=torch.float32, device=self.device), skipped)

    def held(self) -> list[Piece]:
        if self.stage == 0:
            return whole_pieces(self.names(), self.inner)
        kinds = (WEIGHT, *MOMENTS) if self.inner.state else (WEIGHT,)
        return self._partitioned(kinds) if self.stage == 3 else self._fragments(kinds)

    def _fragments(self, kinds: tuple[str, ...]) -> list[Piece]:
        """ZeRO 1 and 2: the part of each group of flattened parameters that this rank stores."""
        if len(kinds) > 1:
            self._link_moments()
        found = []
        for name, p in self.names():
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                for kind in kinds:
                    tensor = mapping.get_hp_fragment(None if kind == WEIGHT else kind)
                    found.append(
                        Piece(kind, name, tuple(p.shape), mapping.lp_fragment_address.start, tensor)
                    )
        return found

    def _partitioned(self, kinds: tuple[str, ...]) -> list[Piece]:
        """ZeRO 3: every parameter is flattened, padded and cut into equal parts."""
        found = []
        for name, p in self.names():
            total, shape = p.ds_numel, tuple(p.ds_shape)  # type: ignore[attr-defined]
            for kind in kinds:
                zero: Any = self.optimizer
                tensor, _ = zero._get_fp32_opt_state_partition(
                    p, False, None if kind == WEIGHT else kind
                )
                start = min(dist.get_rank() * tensor.numel(), total)
                found.append(
                    Piece(kind, name, shape, start, tensor[: min(tensor.numel(), total - start)])
                )
        return found

    def create_state(self, taken: int) -> None:
        zero: Any = self.optimizer
        if self.stage == 0:
            held = [p for _, p in self.names()]
        else:
            held = (
                zero.fp32_partitioned_groups_flat
                if self.stage == 3
                else zero.single_partition_of_fp32_groups
            )
        self.inner.state.clear()
        for tensor in held:
            self.inner.state[tensor] = zero_state(tensor.detach(), taken)

    def publish(self) -> None:
        zero: Any = self.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            # Small parameters stay gathered between steps, with the old weights.
            zero._partition_all_parameters()
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def _link_moments(self) -> None:
        """Link every parameter to its part of the flat moments.

        DeepSpeed does this once, inside the first step, when only the first parameter group has
        moments: those of the second group would not be found.
        """
        zero: Any = self.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
