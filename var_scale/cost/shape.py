"""The numbers that determine the cost of a VAR transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from var_scale.errors import UserError, require_grids
from var_scale.scales import PATCH_NUMS_256, PatchNum, cells, length, normal


@dataclass(frozen=True)
class ModelShape:
    """Shape of one VAR transformer: depth d, width C, heads H, vocab_size V, latent_channels Z.

    Raises:
        UserError: codes `cost.shape`, `argument.grid` and `argument.size`.
    """

    depth: int
    width: int
    heads: int
    mlp_hidden: int
    patch_nums: tuple[PatchNum, ...]
    vocab_size: int = 4096
    latent_channels: int = 32
    num_classes: int = 1000
    shared_aln: bool = False
    attn_l2_norm: bool = True

    def __post_init__(self) -> None:
        require_grids(patch_nums=self.patch_nums)
        object.__setattr__(self, "patch_nums", normal(self.patch_nums))
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
                raise UserError(
                    f"model shape: {name} is {value}; it must be positive", code="cost.shape"
                )
        if self.width % self.heads:
            raise UserError(
                f"model shape: width {self.width} does not divide into {self.heads} heads; change "
                "one of them",
                code="cost.shape",
            )

    @classmethod
    def official(
        cls, depth: int, patch_nums: tuple[PatchNum, ...] = PATCH_NUMS_256, **changes: Any
    ) -> ModelShape:
        """A size of the paper's ladder: C = 64 d, H = d, MLP 4 C; `changes` replaces fields."""
        values: dict[str, Any] = {
            "depth": depth,
            "width": 64 * depth,
            "heads": depth,
            "mlp_hidden": 256 * depth,
            "patch_nums": patch_nums,
        }
        return cls(**(values | changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model shape") -> ModelShape:
        """A shape from JSON; messages name `where` it is from.

        Raises:
            UserError: a field is missing or unknown (code `cost.shape`).
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"{where}: unknown shape field {unknown[0]}; known: {', '.join(sorted(known))}",
                code="cost.shape",
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(
                f"{where}: the shape is incomplete ({error})", code="cost.shape"
            ) from None

    def shown(self, stage: int) -> ModelShape:
        """The shape while progressive training has reached scale `stage`; -1: all scales."""
        return self if stage < 0 else replace(self, patch_nums=self.patch_nums[: stage + 1])

    @property
    def length(self) -> int:
        """Tokens per image, L, over all scales."""
        return length(self.patch_nums)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of block-causal attention: tokens see their own and earlier scales."""
        seen, pairs = 0, 0
        for count in cells(self.patch_nums):
            seen += count
            pairs += count * seen
        return pairs
