"""Self-attention: the block-causal mask, and one class for each back-end.

| name | trains | samples | what it is |
|---|---|---|---|
| triton | yes | yes | var_kernels: fused norms, no mask tensor; NVIDIA GPUs from Ampere on |
| flex | on GPUs | yes | torch's FlexAttention with its block mask |
| flash | no | yes | flash-attn: no block-causal mask, so only the attention of sampling |
| xformers | yes | yes | memory_efficient_attention with a mask tensor |
| blocks | yes | yes | one product per scale over the keys that it sees; CPUs only |
| dense | yes | yes | an explicit softmax, for short sequences; CPUs only |
| sdpa | yes | yes | torch's scaled_dot_product_attention; the definition of the others |
"""

from var_scale.model.attention.base import Backend, Call, KVCache
from var_scale.model.attention.choose import (
    attend,
    backend_name,
    choose_backend,
    register_backend,
    require_trainable,
)
from var_scale.model.attention.mask import ScaleMask, block_causal_bias, level_index

__all__ = [
    "Backend",
    "Call",
    "KVCache",
    "ScaleMask",
    "attend",
    "backend_name",
    "block_causal_bias",
    "choose_backend",
    "level_index",
    "register_backend",
    "require_trainable",
]
