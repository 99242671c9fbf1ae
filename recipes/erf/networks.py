"""The networks whose receptive fields are measured: by name or by import, with random or given weights."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import dst_models
from recipes.engine import checkpoint
from recipes.engine.build import build_model
from recipes.engine.classification import stored_config
from recipes.engine.errors import UserError, as_user_error, one_line

Features = Callable[[Tensor], Tensor]
RANDOM = "random"
SETTLE = 256
"""Side of the middle part of an image that BatchNorms are set on."""


@dataclasses.dataclass(frozen=True)
class Network:
    """Hold a network to measure.

    Attributes:
        name: as the user gave it.
        weights: `random`, or the file that they are from.
        model: with those weights.
        channels: of its images.
        features: from a batch (1, channels, H, W) to the last feature map; None takes `forward_features`.
    """

    name: str
    weights: str
    model: nn.Module
    channels: int = 3
    features: Features | None = None


def random_network(name: str, seed: int) -> Network:
    """Build a network with random weights, its layer scales at 1.

    At their usual 1e-6 every block is all but the identity, and the field is the stem's and the
    downsampling layers', whatever the kernels.

    Raises:
        UserError: if there is no such network.
    """
    torch.manual_seed(seed)
    if ":" in name:
        model = _imported(name)
        return Network(name, RANDOM, model, features=_features_of(model))
    overrides = {} if name.startswith("replknet") else {"layer_scale_init": 1.0}
    with as_user_error("--models"):
        return Network(name, RANDOM, dst_models.create_model(name, **overrides))


def trained_network(name: str, file: Path) -> Network:
    """Build a network and give it the weights of a file: a recipe's checkpoint or a published one.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    content = _read(file)
    if content.get("format") == checkpoint.FORMAT and "config" in content:
        config = stored_config(file)
        if config.model.name != name:
            raise UserError(f"--checkpoint {name}: {file} is a checkpoint of {config.model.name}")
        state = content["model"]
        channels = config.data.channels
        model = build_model(config.model, classes=len(state["head.weight"]), channels=channels)
        _load(model, state, name, file)
        return Network(name, str(file), model, channels)
    if ":" in name:
        model = _imported(name)
        _load(model, content.get("state_dict", content.get("model", content)), name, file)
        return Network(name, str(file), model, features=_features_of(model))
    with as_user_error(f"--checkpoint {name}: {file}"):
        state = dst_models.from_official(content)
        classes = {"num_classes": len(state["head.weight"])} if "head.weight" in state else {}
        model = dst_models.create_model(name, **classes)
    _load(model, state, name, file)
    return Network(name, str(file), model)


def settle_norms(network: Network, image: Tensor) -> None:
    """Set the statistics of every BatchNorm to those of the middle of one image (channels, H, W).

    A BatchNorm that has seen no image scales by 1, and in a deep network with random weights the signal
    would fade or grow from block to block.
    """
    norms = [module for module in network.model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    network.model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over what it sees
        norm.train()
    run = network.features or network.model.forward_features
    top, left = (max(0, size - SETTLE) // 2 for size in image.shape[1:])
    with torch.no_grad():
        run(image[None, :, top : top + SETTLE, left : left + SETTLE])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.model.eval()


def _imported(name: str) -> nn.Module:
    """Call what `module:callable` names."""
    module, _, attribute = name.partition(":")
    try:
        model = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # another's module can raise anything
        raise UserError(f"{name} gives no model ({type(error).__name__}: {one_line(str(error))})") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returns {type(model).__name__}; a torch.nn.Module is expected")
    return model


def _features_of(model: nn.Module) -> Features | None:
    """Return how to get the last feature map of a model that is not ours.

    Where it has no `forward_features`, that is the last output of a direct child that has height and width;
    for torchvision's ResNets, `layer4`.
    """
    if hasattr(model, "forward_features"):
        return None

    def features(x: Tensor) -> Tensor:
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                found.append(output)

        hooks = [child.register_forward_hook(keep) for child in model.children()]
        try:
            model(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            raise ValueError("no direct child of the model puts out a map (1, channels, height, width)")
        return found[-1]

    return features


def _read(file: Path) -> Mapping[str, Any]:
    """Read a file of tensors and primitives, or of the argument lists that published files carry."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a foreign file can raise anything
        first = one_line(str(error)).split(". ")[0]
        raise UserError(f"{file}: the file cannot be read as tensors and primitives ({first})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: it holds {type(content).__name__}; a state dict is expected")
    return content


def _load(model: nn.Module, state: Mapping[str, Any], name: str, file: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = inspect.cleandoc(str(error)).splitlines()[:2]
        raise UserError(f"--checkpoint {name}: {file} does not fit ({one_line(' '.join(reason))})") from error
