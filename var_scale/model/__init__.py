"""VQVAE, multi-scale quantiser and VAR transformer, with the official names and numbers."""

from var_scale.model.attention import backend_name, register_backend
from var_scale.model.build import build_vae, build_vae_var, build_var
from var_scale.model.official import load_vae, load_var, read_weights
from var_scale.model.quantizer import MultiScaleQuantizer
from var_scale.model.var import VAR
from var_scale.model.vqvae import VQVAE

__all__ = [
    "VAR",
    "VQVAE",
    "MultiScaleQuantizer",
    "backend_name",
    "build_vae",
    "build_vae_var",
    "build_var",
    "load_vae",
    "load_var",
    "read_weights",
    "register_backend",
]
