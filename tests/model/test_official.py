"""Reading official weights files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.raises import raises
from var_scale.model import VAR, VQVAE, build_vae, build_var, load_vae, load_var
from var_scale.model.official import load_strict, var_sizes

PATCH_NUMS = (1, 2, 3, 4)


def make(arch: str = "cnn", **kwargs: Any) -> tuple[VQVAE, VAR]:
    torch.manual_seed(0)
    vae = build_vae(arch=arch, ch=32, hidden=16, V=32, Cvae=8, patch_nums=PATCH_NUMS)
    return vae, build_var(
        vae, **{"depth": 3, "width": 24, "heads": 3, "num_classes": 7, "mlp_ratio": 2.0, **kwargs}
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_bare_state_dicts(tmp_path: Path, shared_aln: bool) -> None:
    vae, var = make(shared_aln=shared_aln)
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    torch.save(var.state_dict(), tmp_path / "var.pth")
    vae2 = load_vae(tmp_path / "vae.pth", PATCH_NUMS)
    var2 = load_var(tmp_path / "var.pth", vae2)
    assert same(vae, vae2)
    assert same(var, var2)
    assert (var2.depth, var2.C, var2.num_heads, var2.num_classes, var2.patch_nums) == (
        3,
        24,
        3,
        7,
        PATCH_NUMS,
    )


def test_training_checkpoint_with_wrapper_prefixes(tmp_path: Path) -> None:
    vae, var = make()
    wrapped = {
        f"module._orig_mod.{k.replace('blocks.1.', 'blocks.1._fsdp_wrapped_module.')}": v
        for k, v in var.state_dict().items()
    }
    trainer = {"config": {}, "var_wo_ddp": wrapped, "vae_local": vae.state_dict(), "var_opt": {}}
    torch.save(
        {"epoch": 3, "iter": 0, "trainer": trainer, "args": {"depth": 3}},
        tmp_path / "ar-ckpt-last.pth",
    )
    vae2 = load_vae(tmp_path / "ar-ckpt-last.pth", PATCH_NUMS)
    assert same(vae, vae2)
    assert same(var, load_var(tmp_path / "ar-ckpt-last.pth", vae2))
    torch.save({"trainer": {"var_wo_ddp": wrapped}}, tmp_path / "half.pth")
    with raises("model.weights-kind", "half.pth", "trainer.vae_local"):
        load_vae(tmp_path / "half.pth", PATCH_NUMS)


WRAPPED: dict[str, Callable[[str], str]] = {
    "Fabric": lambda name: f"_forward_module.{name}",
    "DDP twice": lambda name: f"module.module.{name}",
    "all": lambda name: (
        "_forward_module._orig_mod.module._orig_mod."
        + name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module.")
    ),
    "inside": lambda name: name.replace("attn.", "attn.module._forward_module.module."),
    "last": lambda name: name.replace(".weight", "._checkpoint_wrapped_module.weight"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_names_of_wrappers_in_any_combination(wrapper: str, ending: str, tmp_path: Path) -> None:
    """At the start, inside and repeated; the tensors are those of the module that was wrapped."""
    vae, var = make()
    for name, module in (("vae", vae), ("var", var)):
        state = {WRAPPED[wrapper](k): v.contiguous() for k, v in module.state_dict().items()}
        assert state.keys() != module.state_dict().keys()
        path = tmp_path / f"{name}.{ending}"
        save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    vae2 = load_vae(tmp_path / f"vae.{ending}", PATCH_NUMS)
    assert same(vae, vae2) and same(var, load_var(tmp_path / f"var.{ending}", vae2))


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    """With and without a prefix: it is not known which of them is meant."""
    vae = make()[0]
    state = vae.state_dict()
    torch.save(
        {**state, "module.quantize.embedding.weight": torch.zeros(32, 8)}, tmp_path / "v.pth"
    )
    with raises("model.weights-mismatch", "v.pth", "quantize.embedding.weight"):
        load_vae(tmp_path / "v.pth", PATCH_NUMS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """The tensor is named; the mask of the official files holds infinity by design."""
    vae, var = make()
    state = {name: tensor.clone() for name, tensor in var.state_dict().items()}
    assert state["attn_bias_for_masking"].isinf().any()
    state["blocks.1.ffn.fc1.weight"] = state["blocks.1.ffn.fc1.weight"].to(dtype)
    state["blocks.1.ffn.fc1.weight"][2, 3] = value
    torch.save(state, tmp_path / "var.pth")
    with raises("model.weights-nonfinite", "var.pth", "blocks.1.ffn.fc1.weight", " 1 "):
        load_var(tmp_path / "var.pth", vae)


@pytest.mark.parametrize("share", [0, 1, 2, 4])
def test_patch_tokenizer_and_safetensors(tmp_path: Path, share: int) -> None:
    vae = build_vae(
        arch="patch",
        hidden=16,
        patch=4,
        V=32,
        Cvae=8,
        patch_nums=PATCH_NUMS,
        share_quant_resi=share,
    )
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    vae2 = load_vae(tmp_path / "vae.safetensors", PATCH_NUMS)
    assert same(vae, vae2)
    assert (vae2.arch, vae2.patch, vae2.hidden) == ("patch", 4, 16)


def test_weights_without_attention_norm(tmp_path: Path) -> None:
    vae, var = make(attn_l2_norm=False)
    sizes = var_sizes(var.state_dict())
    assert (sizes["attn_l2_norm"], sizes["heads"]) == (False, 1)
    torch.save(var.state_dict(), tmp_path / "var.pth")
    assert load_var(tmp_path / "var.pth", vae, heads=3).num_heads == 3


def test_tokenizer_at_other_patch_nums(tmp_path: Path) -> None:
    vae = make()[0]
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    assert load_vae(tmp_path / "vae.pth", (1, 2, 4)).quantize.ema_vocab_hit_SV.shape[0] == 3


def test_mismatch_is_one_line(tmp_path: Path) -> None:
    var = make()[1]
    code = "model.weights-mismatch"
    with raises(code, "here: ", "lacks 13 tensors of this VAR", "blocks.3"):
        load_strict(make(depth=4)[1], var.state_dict(), "here")
    with raises(code, "13 tensors that this VAR lacks", "blocks.2"):
        load_strict(make(depth=2)[1], var.state_dict(), "here")
    with raises(code, "class_emb.weight", "(8, 24)", "(10, 24)"):
        load_strict(make(num_classes=9)[1], var.state_dict(), "here")
    torch.save(var.state_dict(), tmp_path / "var.pth")
    with raises("model.tokenizer-differs", "var.pth", "V=32, Cvae=8", "V=16"):
        load_var(tmp_path / "var.pth", build_vae(arch="patch", V=16, Cvae=8, patch_nums=PATCH_NUMS))
    with raises("model.weights-kind", "var.pth", "quantize.embedding.weight"):
        load_vae(tmp_path / "var.pth", PATCH_NUMS)


class Trap:
    """Pickles to a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with raises("model.weights-missing", "none.pth"):
        load_vae(tmp_path / "none.pth", PATCH_NUMS)
    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    with raises("model.weights-unreadable", "trap.pth"):
        load_vae(tmp_path / "trap.pth", PATCH_NUMS)
    assert "executed" not in capsys.readouterr().out
    for name in ("junk.pth", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all, but long enough to be read")
        with raises("model.weights-unreadable", name):
            load_vae(tmp_path / name, PATCH_NUMS)
    (tmp_path / "empty.pth").write_bytes(b"")
    with raises("model.weights-unreadable", "empty.pth"):
        load_vae(tmp_path / "empty.pth", PATCH_NUMS)
    torch.save([1, 2], tmp_path / "list.pth")
    with raises("model.weights-kind", "list.pth"):
        load_vae(tmp_path / "list.pth", PATCH_NUMS)
