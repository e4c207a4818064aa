"""DeepSpeed ZeRO 0 to 3 with float32 master weights; bf16 comes from autocast inside TrainStep, as on every engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from var_scale.errors import UserError
from var_scale.model.block import FFN
from var_scale.train.engine.base import MOMENT_KEYS, Engine, Moments, StepStats
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
    for key in ("fp16", "bf16"):
        if given.get(key, {}).get("enabled"):
            raise UserError(f"engine.deepspeed.{key}: precision is set by train.precision on every engine; remove the key")
    if "optimizer" in given or "scheduler" in given:
        raise UserError("engine.deepspeed.optimizer: optimiser and schedule are set by train.* on every engine; remove the key")
    return {"zero_allow_untested_optimizer": True, "wall_clock_breakdown": False, "steps_per_print": 2**31 - 1, **given, **ours}


class DeepSpeedEngine(Engine):
    """`deepspeed.initialize` around TrainStep with our AdamW."""

    def __init__(
        self, step_module: TrainStep, accumulate: int, clip: float, betas: tuple[float, float], given: dict[str, Any], batch_size: int
    ):
        super().__init__(accumulate, clip)
        device = next(step_module.parameters()).device
        if device.type == "cpu":
            _without_cpu_compile()
        import deepspeed

        self.stage = int(given.get("zero_optimization", {}).get("stage", 0))
        named = [(name, p) for name, p in step_module.var.named_parameters()]
        if self.stage == 3:  # the fused MLP reads the weights of its layers itself: they are gathered as one
            deepspeed.utils.set_z3_leaf_modules(step_module, [FFN])
        config = engine_config(given, dist.get_world_size(), batch_size, accumulate, clip)
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=step_module, optimizer=build_optimizer(named, betas), config=config, dist_init_required=False
        )

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss)  # type: ignore[operator]
        if not self.last:
            self.module.step()  # type: ignore[operator]  # counts the micro-batch; updates only at the border

    def step(self) -> StepStats:
        self.module.step()  # type: ignore[operator]
        norm = self.module.get_global_grad_norm()  # type: ignore[operator]
        return StepStats(float("nan") if norm is None else norm)

    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimiser under ZeRO's."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer  # type: ignore[attr-defined]

    def gather(self) -> tuple[dict[str, torch.Tensor], Moments]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, torch.Tensor] = {}
        moments: Moments = {key: {} for key in MOMENT_KEYS}
        state_exists = bool(self._inner().state)
        if state_exists and self.stage in (1, 2):
            self._link_moments()
        for name, p in self.names():
            whole = p.detach().float() if self.stage == 0 else safe_get_full_fp32_param(p)
            weights[name] = whole.cpu().clone()
            for key in MOMENT_KEYS:
                if not state_exists:
                    state = torch.zeros_like(weights[name])
                else:
                    state = self._inner().state[p][key] if self.stage == 0 else safe_get_full_optimizer_state(p, key)
                moments[key][name] = state.detach().cpu().clone().view_as(weights[name])
        return weights, moments

    def load_moments(self, moments: Moments, step: int) -> None:
        inner = self._inner()
        if self.stage == 0:
            for name, p in self.names():
                state = {key: moments[key][name].to(p.device) for key in MOMENT_KEYS}
                inner.state[p] = {"step": torch.tensor(float(step), device=p.device), **state}
            return
        zero: Any = self.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            empty = {key: torch.zeros_like(flat) for key in MOMENT_KEYS}
            inner.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **empty}
        if self.stage < 3:
            self._link_moments()
        for name, p in self.names():
            for key in MOMENT_KEYS:
                self._set_moment(p, moments[key][name].to(flats[0].device), key)

    def _link_moments(self) -> None:
        """Link every parameter to its part of the flat moments. DeepSpeed does so inside the first step, when only the first
        parameter group has moments, and never again: the second group's would not be found."""
        zero: Any = self.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, p: torch.nn.Parameter, value: torch.Tensor, key: str) -> None:
        """Write one whole moment tensor into this rank's part of it."""
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(p, value, key)
            return
        part = safe_get_local_optimizer_state(p, key)  # padded to equal parts
        flat = torch.zeros(part.numel() * dist.get_world_size(), dtype=part.dtype, device=part.device)
        flat[: value.numel()] = value.flatten()
        rank = dist.get_rank()
        part.copy_(flat[rank * part.numel() : (rank + 1) * part.numel()])
