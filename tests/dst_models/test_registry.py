from __future__ import annotations

import inspect

import pytest
from torch import nn

from dst_models import create_model, list_models, register_model, registry
from dst_models.convnext import VARIANTS as CONVNEXT
from dst_models.replknet import VARIANTS as REPLKNET
from dst_models.slak import VARIANTS as SLAK

NAMES = sorted([*SLAK, *CONVNEXT, *REPLKNET])


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", {})


def test_every_variant_is_registered_once() -> None:
    assert list_models() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_point_builds_its_own_variant(name: str) -> None:
    entry = registry._ENTRIES[name]
    assert f'VARIANTS["{name}"]' in inspect.getsource(entry)
    assert entry.__doc__


def test_list_models_filters_by_glob() -> None:
    assert list_models("slak_*_k61") == ["slak_base_k61", "slak_small_k61", "slak_tiny_k61"]
    assert list_models("resnet*") == []


def test_unknown_name_shows_the_nearest() -> None:
    with pytest.raises(ValueError, match="no model is named 'slak_tny'; did you mean slak_tiny"):
        create_model("slak_tny")


def test_unknown_name_unlike_any_other_shows_all() -> None:
    with pytest.raises(
        ValueError, match=r"no model is named 'xyzzy'; the models are convnext_base, .*slak_tiny"
    ):
        create_model("xyzzy")


def test_unknown_override_shows_what_is_taken() -> None:
    with pytest.raises(
        ValueError, match=r"slak_tiny does not take kernel_size, width; .*kernel_sizes.*decomposed"
    ):
        create_model("slak_tiny", width=2, kernel_size=51)


@pytest.mark.parametrize("name", ["slak_tiny", "convnext_tiny", "replknet31_base"])
def test_every_family_takes_the_common_overrides(name: str) -> None:
    common = {
        "depths": (1, 1, 1, 1),
        "dims": (4, 4, 4, 4),
        "num_classes": 3,
        "in_chans": 1,
        "drop_path_rate": 0.1,
        "layer_scale_init": 1e-3,
    }
    model = create_model(name, **common)
    assert isinstance(model.head, nn.Linear)
    assert model.head.out_features == 3


@pytest.mark.usefixtures("empty_registry")
def test_register_model_returns_the_function_and_refuses_a_second_of_its_name() -> None:
    def probe(width: int = 2) -> nn.Module:
        return nn.Linear(width, 1)

    assert register_model(probe) is probe
    with pytest.raises(ValueError, match="'probe' is registered already"):
        register_model(probe)
    with pytest.raises(ValueError, match="probe does not take depth; the overrides it takes are width"):
        create_model("probe", depth=2)


@pytest.mark.usefixtures("empty_registry")
def test_an_open_ended_entry_point_takes_anything() -> None:
    @register_model
    def anything(**settings: int) -> nn.Module:
        return nn.Linear(settings["a"], settings["b"])

    assert create_model("anything", a=2, b=3).weight.shape == (3, 2)
