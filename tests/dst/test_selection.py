from __future__ import annotations

import logging
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dst.selection import near_names, plain_name, select


class Wrapper(nn.Module):
    """What DistributedDataParallel and AveragedModel do to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Compiled(nn.Module):
    """What torch.compile does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class Transformer(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.gamma = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 20)
        if tie:
            self.head.weight = self.embed.weight


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 4, 3, groups=4)
        self.two = nn.Conv2d(4, 4, 3, bias=False)
        self.three = nn.Conv3d(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.batch_norm = nn.BatchNorm2d(2)
        self.group_norm = nn.GroupNorm(1, 2)
        self.act = nn.PReLU()
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.fc = nn.Linear(4, 4)


CONVNET = ["one.weight", "two.weight", "three.weight", "up.weight", "fc.weight"]
TRANSFORMER = [
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "head.weight",
]


def test_defaults_are_the_weights_of_linear_and_convolution_layers() -> None:
    model = ConvNet()
    selected = select(model)
    assert list(selected) == CONVNET
    assert all(parameter is model.get_parameter(name) for name, parameter in selected.items())


def test_defaults_leave_out_embeddings_tables_tokens_and_scales() -> None:
    assert list(select(Transformer())) == TRANSFORMER


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, Compiled, lambda model: Compiled(Wrapper(model)), lambda model: Wrapper(Compiled(model))],
)
def test_names_are_the_plain_models(wrap) -> None:
    model = Transformer()
    wrapped = wrap(model)
    assert {n: id(p) for n, p in select(wrapped).items()} == {n: id(p) for n, p in select(model).items()}
    assert list(select(wrapped, "head.*")) == ["head.weight"]


def test_real_wrappers_give_the_plain_names() -> None:
    model = ConvNet()
    assert list(select(nn.DataParallel(model))) == CONVNET
    assert list(select(torch.optim.swa_utils.AveragedModel(model))) == CONVNET
    assert list(select(torch.compile(model, backend="eager"))) == CONVNET


def test_a_wrapper_inside_the_model_is_stripped_too() -> None:
    model = nn.Sequential()
    model.add_module("trunk", Wrapper(nn.Linear(2, 2)))
    assert list(select(model)) == ["trunk.weight"]
    assert plain_name("trunk.module.weight") == "trunk.weight"
    assert plain_name("modules.module_list.weight") == "modules.module_list.weight"


def test_names_that_collide_once_stripped_raise() -> None:
    model = Wrapper(nn.Linear(2, 2))
    model.weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="two parameters of Wrapper are called 'weight'"):
        select(model)


def test_a_pattern_that_meets_candidates_takes_only_these() -> None:
    model = Transformer()
    assert list(select(model, "*")) == TRANSFORMER
    assert list(select(model, "head*")) == ["head.weight"]
    assert list(select(model, ("cross.*", "attention.in*"))) == [
        "attention.in_proj_weight",
        *TRANSFORMER[2:6],
    ]


def test_a_pattern_that_meets_no_candidate_takes_what_it_names() -> None:
    model = Transformer()
    assert list(select(model, ["embed.*", "head.*"])) == ["embed.weight", "head.weight"]
    assert list(select(model, "position")) == ["position"]
    assert list(select(model, "head.bias")) == ["head.bias"]
    assert list(select(model, "norm.*")) == ["norm.weight", "norm.bias"]


def test_exclude_takes_away() -> None:
    model = Transformer()
    assert list(select(model, exclude="cross.*")) == [*TRANSFORMER[:2], "head.weight"]
    assert list(select(model, exclude=["attention.*", "cross.*", "*.bias"])) == ["head.weight"]
    assert list(select(model, ["embed.weight", "head.weight"], exclude="head.*")) == ["embed.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["heads.weight", "HEAD.*", "head", ""])
def test_a_pattern_that_matches_nothing_raises_and_names_the_near(argument: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument} pattern '.*' matches no parameter; near names: '"):
        select(Transformer(), **{argument: ["norm.*", pattern]})
    assert near_names("heads.weight", ["embed.weight", "head.weight"]).startswith("'head.weight'")


def test_nothing_selected_raises() -> None:
    with pytest.raises(ValueError, match="nothing is selected from LayerNorm"):
        select(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="nothing is selected from Linear"):
        select(nn.Linear(2, 2), exclude="weight")
    with pytest.raises(ValueError, match="nothing is selected"):
        select(nn.Linear(2, 2), include=[])


def test_a_tensor_tied_to_an_embedding_is_left_out_unless_asked_for_by_any_name() -> None:
    model = Transformer(tie=True)
    assert list(select(model)) == TRANSFORMER[:-1]
    for asked in ("head.weight", "embed.weight", "head.*ght", ["embed.*", "head.weight"]):
        selected = select(model, asked)
        assert list(selected) == ["embed.weight"]
        assert selected["embed.weight"] is model.head.weight
    assert list(select(model, ["head.weight", "cross.q*"], exclude="embed.*")) == ["cross.q_proj_weight"]


def test_tied_candidates_have_one_entry_under_the_first_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert list(select(model)) == ["0.weight", "1.weight"]
    assert list(select(model, "2.weight")) == ["0.weight"]
    assert list(select(model, exclude="2.weight")) == ["1.weight"]


def test_a_module_held_twice_has_one_entry() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(3, 3)})
    assert list(select(model)) == ["a.weight", "c.weight"]
    assert list(select(model, "b.*")) == ["a.weight"]


def test_frozen_parameters_are_left_out() -> None:
    model = Transformer()
    model.attention.requires_grad_(False)
    assert list(select(model)) == TRANSFORMER[2:]
    assert list(select(model, ["attention.*", "head.*"][1:])) == ["head.weight"]
    with pytest.raises(ValueError, match=r"'attention\.\*' matches only frozen parameters"):
        select(model, ["attention.*", "head.*"])
    model.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"only frozen parameters .* 'head.weight'"):
        select(model, "head.*")  # the bias trains, but a pattern with candidates means the candidates
    assert "head.weight" not in select(model, exclude="head.*")


def test_what_cannot_be_masked_raises() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' is not initialised yet"):
        select(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"'weight' has dtype torch.complex64"):
        select(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 2)
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 0\) has no elements"):
        select(empty)
    with pytest.raises(TypeError, match=r"needs an nn.Module, got list"):
        select([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="include must be a glob string"):
        select(nn.Linear(2, 2), include=[3])


def test_integer_weights_are_frozen_and_so_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert list(select(model)) == ["1.weight"]


def test_a_parametrized_weight_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    with caplog.at_level(logging.WARNING, logger="dst.selection"):
        assert list(select(model)) == ["1.weight"]
    assert "0 (ParametrizedLinear) has no plain `weight` parameter" in caplog.text
    assert list(select(model, "0.parametrizations.weight.original1")) == [
        "0.parametrizations.weight.original1"
    ]


def test_an_in_proj_weight_of_ones_own_attention_is_a_candidate() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.zeros(6, 2))
            self.q_proj_weight = nn.Parameter(torch.zeros(6, 2))

    assert list(select(Attention())) == ["in_proj_weight"]


@given(st.randoms(use_true_random=False))
def test_the_order_is_the_models_whatever_the_patterns_order(rng: random.Random) -> None:
    patterns = [*TRANSFORMER, "embed.weight", "position", "gamma"]
    rng.shuffle(patterns)
    model = Transformer()
    expected = [name for name, _ in model.named_parameters() if name in patterns]
    assert list(select(model, patterns)) == expected


def test_the_model_is_not_touched() -> None:
    model = Transformer()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    select(model, exclude="head.*")
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
