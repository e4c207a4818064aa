"""The attention product behind one name, and the block-causal mask.

One path serves training and sampling. On one CPU core with L = 30, head dims 8 and 64, forward and backward, SDPA takes 1.05-1.15 times
an explicit softmax, and at L = 130 and 680 0.65-0.8 times; so there is no second CPU path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from var_scale.errors import UserError

# (q, k, v: (B, H, L, D); bias: (1, 1, Lq, Lk), 0 or -inf, or None; scale) -> (B, H, L, D)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def sdpa(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bias_11LL: Tensor | None, scale: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention, the definition of every other back-end.

    On the CPU it runs in float32: its bfloat16 backward takes about four times as long there (L = 30, head dim 8, one core).
    """
    if q_BHLD.device.type == "cpu" and q_BHLD.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            bias_11LL = None if bias_11LL is None else bias_11LL.float()
            return sdpa(q_BHLD.float(), k_BHLD.float(), v_BHLD.float(), bias_11LL, scale).to(q_BHLD.dtype)
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=bias_11LL, scale=scale)


BACKENDS: dict[str, Attention] = {"sdpa": sdpa}
INSTALL: dict[str, str] = {
    "flash_attn": "pip install 'var-scale[gpu]' on a Linux machine with an NVIDIA GPU, then register_backend it",
    "xformers": "pip install 'var-scale[gpu]' on a Linux machine with an NVIDIA GPU, then register_backend it",
}


def register_backend(name: str, attention: Attention) -> None:
    """Make `attention` available by `name` to `build_var(attention=name)`."""
    BACKENDS[name] = attention


def backend_name(name: str) -> str:
    """The back-end that `name` stands for; `auto` is sdpa. UserError for one that is unknown or not installed."""
    name = "sdpa" if name == "auto" else name
    if name not in BACKENDS:
        known = ", ".join(["auto", *sorted(BACKENDS)])
        if name in INSTALL:
            raise UserError(f"attention back-end {name!r} is not installed here: {INSTALL[name]}; or take one of {known}")
        raise UserError(f"attention back-end {name!r} is not known; take one of {known}, or add it with register_backend")
    return name


def level_index(patch_nums: Sequence[int]) -> Tensor:
    """Scale number of every token, (L,) int64."""
    return torch.cat([torch.full((pn * pn,), si, dtype=torch.int64) for si, pn in enumerate(patch_nums)])


def block_causal_bias(patch_nums: Sequence[int]) -> Tensor:
    """(1, 1, L, L) float32: 0 where the query's scale >= the key's scale, else -inf."""
    lvl_L = level_index(patch_nums)
    L = lvl_L.shape[0]
    return torch.zeros(L, L).masked_fill_(lvl_L[:, None] < lvl_L[None, :], -torch.inf).view(1, 1, L, L)
