"""DeepSpeed ZeRO 0 to 3 with float32 master weights; bf16 comes from autocast inside TrainStep, as on every engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from var_scale.config.schema import TrainConfig
from var_scale.errors import UserError
from var_scale.model.block import FFN
from var_scale.train.engine.base import MOMENTS, WEIGHT, Engine, Piece, StepStats, guard
from var_scale.train.engine.single import whole_pieces, zero_state
from var_scale.train.optim import build_optimizer
from var_scale.train.step import TrainStep


def _without_cpu_compile() -> None:
    """Without this DeepSpeed compiles a shared-memory operator on CPUs: a minute each time, and an error without a compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_config(given: dict[str, Any], world: int, batch_size: int, accumulate: int, clip: float) -> dict[str, Any]:
    """DeepSpeed's configuration: the person's keys, and ours where the recipe decides."""
    ours = {
        "train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": batch_size // accumulate // world,
        "gradient_clipping": clip,
    }
    for key, value in ours.items():
        if given.get(key, value) != value:
            raise UserError(f"engine.deepspeed.{key}: {given[key]} differs from the recipe's {value}; leave the key out and set train.*")
    for key in ("fp16", "bf16", "torch_autocast"):  # also: ZeRO 0 with DeepSpeed's bf16 takes wrong first steps
        if given.get(key, {}).get("enabled"):
            raise UserError(f"engine.deepspeed.{key}: precision is set by train.precision on every engine; remove the key")
    for key, needed in (("managed_gradient_accumulation", True), ("compute_grad_norm", True)):
        if given.get(key, needed) != needed or given.get("zero_optimization", {}).get(key, needed) != needed:
            raise UserError(f"engine.deepspeed.{key}: must stay {needed} here; remove the key")
    if "optimizer" in given or "scheduler" in given:
        raise UserError("engine.deepspeed.optimizer: optimiser and schedule are set by train.* on every engine; remove the key")
    zero = given.get("zero_optimization", {})
    if zero.get("offload_optimizer", {}).get("device") == "nvme" or zero.get("offload_param", {}).get("device") not in (None, "none"):
        raise UserError("engine.deepspeed.zero_optimization: only offload_optimizer to the cpu can be saved and continued; remove the key")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"engine.deepspeed.{where}: {first['msg']} (given: {first['input']!r})") from None
    if not zero.get("stage", 0):
        ours["gradient_clipping"] = 0.0  # done before its step, with the check for gradients that are not finite
    return {
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "wall_clock_breakdown": False,
        "steps_per_print": 2**31 - 1, **given, **ours,
    }  # fmt: skip


class DeepSpeedEngine(Engine):
    """`deepspeed.initialize` around TrainStep with our AdamW."""

    def __init__(self, step_module: TrainStep, train: TrainConfig, given: dict[str, Any]):
        super().__init__(step_module, train)
        if self.device.type == "cpu":
            _without_cpu_compile()
        import deepspeed

        self.stage = int(given.get("zero_optimization", {}).get("stage", 0))
        named = [(name, p) for name, p in step_module.var.named_parameters()]
        if self.stage == 3:  # the fused MLP reads the weights of its layers itself: they are gathered as one
            deepspeed.utils.set_z3_leaf_modules(step_module, [FFN])
        config = engine_config(given, dist.get_world_size(), train.batch_size, self.accumulate, self.clip)
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=step_module, optimizer=build_optimizer(named, self.betas), config=config, dist_init_required=False
        )
        zero: Any = self.optimizer
        self.inner: torch.optim.Optimizer = zero if self.stage == 0 else zero.optimizer  # the torch optimiser under ZeRO's

    def backward(self, loss: torch.Tensor) -> None:
        if self.scaler and self.stage:  # ZeRO takes the scale out itself, and reads it: here the host waits once a step
            self.optimizer.loss_scaler.cur_scale = float(self.scaler.scale)  # type: ignore[attr-defined]
        elif self.scaler:
            loss = loss * self.scaler.scale
        self.module.backward(loss)  # type: ignore[operator]
        if not self.last:
            self.module.step()  # type: ignore[operator]  # counts the micro-batch; updates only at the border

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
        """ZeRO 1 and 2: this rank's part of each group of flattened parameters."""
        if len(kinds) > 1:
            self._link_moments()
        found = []
        for name, p in self.names():
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                for kind in kinds:
                    tensor = mapping.get_hp_fragment(None if kind == WEIGHT else kind)
                    found.append(Piece(kind, name, tuple(p.shape), mapping.lp_fragment_address.start, tensor))
        return found

    def _partitioned(self, kinds: tuple[str, ...]) -> list[Piece]:
        """ZeRO 3: every parameter flattened, padded and cut into equal parts."""
        found = []
        for name, p in self.names():
            total, shape = p.ds_numel, tuple(p.ds_shape)  # type: ignore[attr-defined]
            for kind in kinds:
                zero: Any = self.optimizer
                tensor, _ = zero._get_fp32_opt_state_partition(p, False, None if kind == WEIGHT else kind)
                start = min(dist.get_rank() * tensor.numel(), total)
                found.append(Piece(kind, name, shape, start, tensor[: min(tensor.numel(), total - start)]))
        return found

    def create_state(self, taken: int) -> None:
        zero: Any = self.optimizer
        if self.stage == 0:
            held = [p for _, p in self.names()]
        else:
            held = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        self.inner.state.clear()
        for tensor in held:
            self.inner.state[tensor] = zero_state(tensor.detach(), taken)

    def publish(self) -> None:
        zero: Any = self.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            zero._partition_all_parameters()  # small parameters stay gathered between steps: of the old weights
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def _link_moments(self) -> None:
        """Link every parameter to its part of the flat moments. DeepSpeed does so inside the first step, when only the first
        parameter group has moments, and never again: the second group's would not be found."""
        zero: Any = self.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
