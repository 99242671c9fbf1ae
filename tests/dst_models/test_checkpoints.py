from __future__ import annotations

import re

import pytest
import torch
from helpers.official import load_official, our_model
from helpers.small_models import SMALL, relative_error, small_model
from torch import Tensor, nn

from dst_models import create_model, from_official
from dst_models.large_kernel import LargeKernelConv

FAMILIES = ("slak", "convnext", "replknet")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_come_off(wrapper: str, prefix: str) -> None:
    state = load_official("slak").state
    wrapped = {wrapper: {prefix + key: value for key, value in state.items()}, "epoch": 299, "args": None}
    bare = from_official(state)
    opened = from_official(wrapped)
    assert opened.keys() == bare.keys()
    assert all(opened[key] is bare[key] for key in bare)


def test_the_model_is_taken_before_its_average() -> None:
    state = load_official("convnext").state
    average = {key: value + 1 for key, value in state.items()}
    assert from_official({"model_ema": average, "model": state})["norm.bias"] is state["norm.bias"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_is_left_as_it_was(family: str) -> None:
    state = load_official(family).state
    checkpoint = {"model": {f"module.{key}": value for key, value in state.items()}}
    keys, copies = list(checkpoint["model"]), {key: value.clone() for key, value in state.items()}
    from_official(checkpoint)
    assert list(checkpoint["model"]) == keys
    assert all(torch.equal(state[key], copies[key]) for key in copies)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "stranger",
    ["stages.0.0.attention.weight", "norm0.weight", "head.weight.weight", "mask", "stages.0.norm.bias"],
)
def test_a_key_without_a_place_is_named(family: str, stranger: str) -> None:
    state = load_official(family).state | {stranger: torch.zeros(1)}
    with pytest.raises(
        ValueError, match=rf"^1 of {len(state)} keys have no place .*: {re.escape(stranger)}$"
    ):
        from_official(state)


def test_two_keys_for_one_place_are_refused() -> None:
    state = load_official("slak").state
    twice = state | {key.replace("LoRA1", "Decom1"): value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"have no place .*Decom1"):
        from_official(twice)
    with pytest.raises(ValueError, match="with and without a prefix"):
        from_official(state | {"module.norm.bias": state["norm.bias"]})


@pytest.mark.parametrize("checkpoint", [{}, {"epoch": 3}, {"model": {}}, {"norm.bias": [1.0]}], ids=str)
def test_what_is_no_state_dict_is_refused(checkpoint: dict) -> None:
    with pytest.raises(ValueError, match="no state dict"):
        from_official(checkpoint)


def test_a_missing_tensor_fails_the_strict_load() -> None:
    official = load_official("slak")
    state = {key: value for key, value in official.state.items() if key != "stages.2.1.gamma"}
    with pytest.raises(RuntimeError, match=r"stages\.2\.1\.gamma"):
        our_model("slak", official.config).load_state_dict(from_official(state), strict=True)


def published_names(case: str, model: nn.Module) -> dict[str, Tensor]:
    """Rename our state dict to what the published SLaK or RepLKNet calls it."""
    renamed = {}
    for key, value in model.state_dict().items():
        for ours, published in {
            "tall": "Decom1",
            "wide": "Decom2",
            "large": "lkb_origin",
            "small": "small_conv",
        }.items():
            key = key.replace(f"large_kernel.{ours}.", f"large_kernel.{published}.")
        if case.startswith("replknet"):
            key = re.sub(r"^(stages\.\d)\.", r"\1.blocks.", key)
            norm = "prelkb_bn" if re.search(r"blocks\.\d*[02468]\.", key) else "preffn_bn"
            key = re.sub(r"^(stages.*)\.norm\.", rf"\1.{norm}.", key)
        renamed[key] = value
    return renamed


UNPUBLISHED = ("convnext", "slak without norms", "replknet, layer scale")


@pytest.mark.parametrize("case", [case for case in SMALL if case not in UNPUBLISHED])
@torch.no_grad()
def test_every_published_form_is_read(case: str) -> None:
    model = small_model(case)
    name, settings = SMALL[case]
    fresh = create_model(name, **settings).eval()
    fresh.load_state_dict(from_official(published_names(case, model)), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh(x), model(x))


def merge_as_published(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each pair lkb_origin and small_conv by the one kernel lkb_reparam."""
    merged = {key: value for key, value in state.items() if not re.search("lkb_origin|small_conv", key)}
    for name, module in model.named_modules():
        if isinstance(module, LargeKernelConv):
            key = (
                re.sub(r"^(stages\.\d)\.", r"\1.blocks.", name)
                if "stages.0.blocks.0.pw1.conv.weight" in state
                else name
            )
            conv = next(module.merge().children())
            merged[f"{key}.lkb_reparam.weight"], merged[f"{key}.lkb_reparam.bias"] = conv.weight, conv.bias
    return merged


@pytest.mark.parametrize("case", ["slak plain", "replknet"])
@torch.no_grad()
def test_published_merged_kernels_are_read(case: str) -> None:
    model = small_model(case)
    name, settings = SMALL[case]
    fresh = create_model(name, **settings | {"small_kernel": None}).eval()
    published = merge_as_published(model, published_names(case, model))
    fresh.load_state_dict(from_official(published), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(fresh(x), model(x)) < 1e-5
    assert relative_error(fresh.merge()(x), model(x)) < 1e-5


def test_a_mixture_of_branch_names_does_not_hide_a_missing_norm() -> None:
    state = load_official("slak").state
    lost = "stages.0.0.large_kernel.small_conv.bn.weight"
    converted = from_official({key: value for key, value in state.items() if key != lost})
    assert "stages.0.0.large_kernel.small.bn.weight" not in converted


def as_torchvision(key: str, value: Tensor) -> tuple[str, Tensor]:
    if match := re.fullmatch(r"downsample_layers\.(\d)\.(.*)", key):
        return f"features.{2 * int(match[1])}.{match[2]}", value
    if match := re.fullmatch(r"stages\.(\d)\.(\d+)\.gamma", key):
        return f"features.{2 * int(match[1]) + 1}.{match[2]}.layer_scale", value.view(-1, 1, 1)
    if match := re.fullmatch(r"stages\.(\d)\.(\d+)\.(\w+)\.(\w+)", key):
        place = {"dwconv": 0, "norm": 2, "pwconv1": 3, "pwconv2": 5}[match[3]]
        return f"features.{2 * int(match[1]) + 1}.{match[2]}.block.{place}.{match[4]}", value
    return key.replace("norm.", "classifier.0.").replace("head.", "classifier.2."), value


def as_timm(key: str, value: Tensor) -> tuple[str, Tensor]:
    key = key.replace("downsample_layers.0.", "stem.")
    key = re.sub(r"^downsample_layers\.(\d)", r"stages.\1.downsample", key)
    key = re.sub(r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    key = key.replace("dwconv", "conv_dw").replace("pwconv", "mlp.fc")
    return re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", key)), value


def as_timm_with_convolutions(key: str, value: Tensor) -> tuple[str, Tensor]:
    key, value = as_timm(key, value)
    return key, value[..., None, None] if re.search(r"mlp\.fc.\.weight", key) else value


@pytest.mark.parametrize("rename", [as_torchvision, as_timm, as_timm_with_convolutions])
@torch.no_grad()
def test_convnext_weights_of_torchvision_and_timm_are_read(rename) -> None:
    official = load_official("convnext")
    renamed = dict(rename(key, value) for key, value in official.state.items())
    assert not renamed.keys() & official.state.keys()
    model = our_model("convnext", official.config).eval()
    model.load_state_dict(from_official(renamed), strict=True)
    assert relative_error(model(official.input), official.logits) < 1e-5
