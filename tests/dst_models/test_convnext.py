from __future__ import annotations

import torch

from dst_models import create_model


@torch.no_grad()
def test_merge_is_a_plain_copy() -> None:
    model = create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=3)
    merged = model.merge()
    assert merged is not model
    assert not merged.training
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), model.parameters(), strict=True))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(merged(x), model.eval()(x))


def test_parameter_names_are_the_published_ones() -> None:
    model = create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=3)
    block = {
        name.removeprefix("stages.0.0.") for name, _ in model.named_parameters() if "stages.0.0." in name
    }
    layers = ("dwconv", "norm", "pwconv1", "pwconv2")
    assert block == {"gamma", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}


def test_zero_layer_scale_and_zero_classes_leave_their_parts_out() -> None:
    model = create_model("convnext_tiny", dims=(4, 6, 8, 10), layer_scale_init=0, num_classes=0)
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.endswith("gamma") or name.startswith("head") for name in names)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
