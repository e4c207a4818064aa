"""DeepSpeed's configuration of a run."""

from __future__ import annotations

from typing import Any

from var_scale.errors import UserError

STAGES = (0, 1, 2, 3)


def engine_config(
    given: dict[str, Any], world: int, batch_size: int, accumulate: int, clip: float
) -> dict[str, Any]:
    """DeepSpeed's configuration: the keys that the user gave, and those that the recipe determines.

    Raises:
        UserError: a key contradicts the recipe or is not supported.
    """
    ours = {
        "train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "train_micro_batch_size_per_gpu": batch_size // accumulate // world,
        "gradient_clipping": clip,
    }
    for key, value in ours.items():
        if given.get(key, value) != value:
            raise UserError(
                f"engine.deepspeed.{key}: {given[key]} differs from {value} of the recipe; remove "
                "the key and set train.*",
                code="train.deepspeed-key",
            )
    # With DeepSpeed's own bf16, ZeRO 0 also takes wrong first steps.
    for key in ("fp16", "bf16", "torch_autocast"):
        if given.get(key, {}).get("enabled"):
            raise UserError(
                f"engine.deepspeed.{key}: train.precision sets the precision on every engine; "
                "remove the key",
                code="train.deepspeed-key",
            )
    for key, needed in (("managed_gradient_accumulation", True), ("compute_grad_norm", True)):
        if (
            given.get(key, needed) != needed
            or given.get("zero_optimization", {}).get(key, needed) != needed
        ):
            raise UserError(
                f"engine.deepspeed.{key}: must be {needed}; remove the key",
                code="train.deepspeed-key",
            )
    if "optimizer" in given or "scheduler" in given:
        raise UserError(
            "engine.deepspeed.optimizer: train.* sets optimiser and schedule on every engine; "
            "remove the key",
            code="train.deepspeed-key",
        )
    zero = given.get("zero_optimization", {})
    if zero.get("offload_optimizer", {}).get("device") == "nvme" or zero.get(
        "offload_param", {}
    ).get("device") not in (None, "none"):
        raise UserError(
            "engine.deepspeed.zero_optimization: only offload_optimizer to the cpu can be saved "
            "and resumed; remove the key",
            code="train.deepspeed-key",
        )
    if zero.keys() - {"stage"} or zero.get("stage", 0) not in STAGES:
        _validate(zero)
    if not zero.get("stage", 0):
        # `guard` clips before DeepSpeed's step, together with the check for finite gradients.
        ours["gradient_clipping"] = 0.0
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31 - 1,
        **given,
        **ours,
    }


def _validate(zero: dict[str, Any]) -> None:
    """Check `zero_optimization` by DeepSpeed's own schema, whose import takes seconds."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(
            f"engine.deepspeed.{where}: {first['msg']} (given: {first['input']!r})",
            code="train.deepspeed-value",
        ) from None
