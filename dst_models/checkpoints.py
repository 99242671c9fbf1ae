"""Read published checkpoints of SLaK, ConvNeXt and RepLKNet into our models.

Every family has a table of rules: a pattern that a whole published key must match, and our name for it.
Whichever table places the most keys names the family; a key it leaves over is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_official"]

Rules = tuple[tuple[str, str], ...]

_WRAPPERS = ("model", "state_dict", "model_ema")
_AFFINE = r"(?:weight|bias)"
_BN = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_CONV_BN = rf"(?:conv\.weight|bn\.{_BN})"

_SLAK: Rules = (
    (rf"((?:downsample_layers\.\d\.[01]|norm|head)\.{_AFFINE})", r"\1"),
    (rf"(stages\.\d\.\d+\.(?:gamma|(?:norm|pwconv[12])\.{_AFFINE}))", r"\1"),
    (rf"(stages\.\d\.\d+\.large_kernel)\.(?:LoRA|Decom)1\.({_CONV_BN})", r"\1.tall.\2"),
    (rf"(stages\.\d\.\d+\.large_kernel)\.(?:LoRA|Decom)2\.({_CONV_BN})", r"\1.wide.\2"),
    (rf"(stages\.\d\.\d+\.large_kernel)\.lkb_origin\.({_CONV_BN})", r"\1.large.\2"),
    (rf"(stages\.\d\.\d+\.large_kernel)\.small_conv\.({_CONV_BN})", r"\1.small.\2"),
    (r"(stages\.\d\.\d+\.large_kernel)\.lkb_reparam\.weight", r"\1.large.conv.weight"),
    (r"(stages\.\d\.\d+\.large_kernel)\.lkb_reparam\.bias", r"\1.large.bn.bias"),
)
_CONVNEXT: Rules = (
    (rf"((?:downsample_layers\.\d\.[01]|norm|head)\.{_AFFINE})", r"\1"),
    (rf"(stages\.\d\.\d+\.(?:gamma|(?:dwconv|norm|pwconv[12])\.{_AFFINE}))", r"\1"),
)
_CONVNEXT_TIMM: Rules = (
    (rf"stem\.([01]\.{_AFFINE})", r"downsample_layers.0.\1"),
    (rf"stages\.(\d)\.downsample\.([01]\.{_AFFINE})", r"downsample_layers.\1.\2"),
    (rf"(stages\.\d)\.blocks(\.\d+\.(?:gamma|norm\.{_AFFINE}))", r"\1\2"),
    (rf"(stages\.\d)\.blocks(\.\d+)\.conv_dw\.({_AFFINE})", r"\1\2.dwconv.\3"),
    (rf"(stages\.\d)\.blocks(\.\d+)\.mlp\.fc([12]\.{_AFFINE})", r"\1\2.pwconv\3"),
    (rf"head\.(norm\.{_AFFINE})", r"\1"),
    (rf"head\.fc\.({_AFFINE})", r"head.\1"),
)
_REPLKNET: Rules = (
    (rf"(stem\.\d\.{_CONV_BN})", r"\1"),
    (rf"(transitions\.\d\.[01]\.{_CONV_BN})", r"\1"),
    (rf"(stages\.\d)\.blocks(\.\d+\.pw[12]\.{_CONV_BN})", r"\1\2"),
    (rf"(stages\.\d)\.blocks(\.\d+)\.(?:prelkb|preffn)_bn\.({_BN})", r"\1\2.norm.\3"),
    (rf"(stages\.\d)\.blocks(\.\d+\.large_kernel)\.lkb_origin\.({_CONV_BN})", r"\1\2.large.\3"),
    (rf"(stages\.\d)\.blocks(\.\d+\.large_kernel)\.small_conv\.({_CONV_BN})", r"\1\2.small.\3"),
    (r"(stages\.\d)\.blocks(\.\d+\.large_kernel)\.lkb_reparam\.weight", r"\1\2.large.conv.weight"),
    (r"(stages\.\d)\.blocks(\.\d+\.large_kernel)\.lkb_reparam\.bias", r"\1\2.large.bn.bias"),
    (rf"(norm\.{_BN}|head\.{_AFFINE})", r"\1"),
)


def _torchvision_rules() -> Rules:
    """Unroll torchvision's one sequence of eight: downsampling at even places, stages at odd ones."""
    rules = [(rf"classifier\.0\.({_AFFINE})", r"norm.\1"), (rf"classifier\.2\.({_AFFINE})", r"head.\1")]
    for stage in range(4):
        block = rf"features\.{2 * stage + 1}\.(\d+)"
        rules.append((rf"features\.{2 * stage}\.([01]\.{_AFFINE})", rf"downsample_layers.{stage}.\1"))
        rules.append((rf"{block}\.layer_scale", rf"stages.{stage}.\1.gamma"))
        for place, name in {0: "dwconv", 2: "norm", 3: "pwconv1", 5: "pwconv2"}.items():
            rules.append((rf"{block}\.block\.{place}\.({_AFFINE})", rf"stages.{stage}.\1.{name}.\2"))
    return tuple(rules)


_FAMILIES: dict[str, Rules] = {
    "SLaK": _SLAK,
    "RepLKNet": _REPLKNET,
    "ConvNeXt": _CONVNEXT,
    "timm's ConvNeXt": _CONVNEXT_TIMM,
    "torchvision's ConvNeXt": _torchvision_rules(),
}


def from_official(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Translate a published checkpoint to the names of our models.

    Reads SLaK (decomposed, plain, or with merged kernels), RepLKNet (the same), and ConvNeXt under its
    published names, torchvision's or timm's. Wrappers ``model``, ``state_dict``, ``model_ema`` are opened,
    the first that is there; pass ``checkpoint["model_ema"]`` for the averaged weights of a file that holds
    both. Prefixes ``module.`` and ``_orig_mod.`` are stripped. A merged kernel (``lkb_reparam``) becomes one
    branch whose BatchNorm is the identity: load it into a model with ``small_kernel=None`` (and
    ``decomposed=False`` for SLaK).

    Args:
        state_dict: What ``torch.load`` returned; not changed.

    Returns:
        A new dict of the same tensors that the model's ``load_state_dict(strict=True)`` takes.

    Raises:
        ValueError: A key has no place, two keys want the same place, or there is no tensor at all.

    Examples:
        >>> from dst_models import create_model, from_official
        >>> model = create_model("convnext_tiny", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
        >>> saved = {"model": {f"module.{key}": value for key, value in model.state_dict().items()}}
        >>> model.load_state_dict(from_official(saved), strict=True)
        <All keys matched successfully>
    """
    tensors = _unwrap(state_dict)
    placed, unplaced, family = min(
        ((*_place(tensors, rules), family) for family, rules in _FAMILIES.items()),
        key=lambda attempt: len(attempt[1]),
    )
    if unplaced:
        raise ValueError(
            f"{len(unplaced)} of {len(tensors)} keys have no place in {family}, the family nearest to them: "
            f"{', '.join(unplaced[:20])}{' ...' if len(unplaced) > 20 else ''}"
        )
    return _complete_identity_norms({key: _shaped(key, value) for key, value in placed.items()})


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Open the wrappers and strip the prefixes."""
    while wrapper := next((key for key in _WRAPPERS if isinstance(state_dict.get(key), Mapping)), None):
        state_dict = state_dict[wrapper]
    others = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if others or not state_dict:
        raise ValueError(
            f"no state dict: {', '.join(map(str, others)) or 'it is empty'}; expected names of tensors, "
            f"bare or under {', '.join(_WRAPPERS)}"
        )
    stripped = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in state_dict.items()}
    if len(stripped) < len(state_dict):
        raise ValueError("some keys stand both with and without a prefix module. or _orig_mod.; keep one")
    return stripped


def _place(tensors: Mapping[str, Tensor], rules: Rules) -> tuple[dict[str, Tensor], list[str]]:
    """Rename what the rules place; return it and the keys they do not place or place twice."""
    placed: dict[str, Tensor] = {}
    unplaced: list[str] = []
    for key, value in tensors.items():
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in rules)
        ours = next((match.expand(name) for match, name in matches if match), None)
        if ours is None or ours in placed:
            unplaced.append(key)
        else:
            placed[ours] = value
    return placed, unplaced


def _shaped(key: str, value: Tensor) -> Tensor:
    """Flatten torchvision's (C, 1, 1) layer scales and timm's 1x1 convolutions that are our linear layers."""
    if key.endswith(".gamma"):
        return value.flatten()
    if re.search(r"\.pwconv[12]\.weight$", key):
        return value.flatten(1)
    return value


def _complete_identity_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each merged kernel (weight and bias are all there is) a BatchNorm that only adds the bias."""
    eps = torch.nn.BatchNorm2d(1).eps
    for key, bias in list(state.items()):
        norm = key.removesuffix(".bias")
        if norm.endswith(".large.bn") and key != norm and f"{norm}.weight" not in state:
            state[f"{norm}.weight"] = torch.ones_like(bias)
            state[f"{norm}.running_mean"] = torch.zeros_like(bias)
            state[f"{norm}.running_var"] = torch.full_like(bias, 1.0 - eps)
            state[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    return state
