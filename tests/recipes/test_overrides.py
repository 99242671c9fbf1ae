"""Dotted keys: what is read is what was written, and what is wrong is told in one line."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.engine import overrides
from recipes.engine.config import OptimConfig, SparseConfig
from recipes.engine.errors import UserError
from recipes.slak_imagenet import VARIANTS, digits

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text("abcdefghijklmnopqrstuvwxyz-_./0123456789", min_size=1).filter(lambda text: text != "none")
VALUES = {
    int: st.integers(),
    float: FLOATS,
    bool: st.booleans(),
    str: WORDS,
    tuple[int, ...]: st.lists(st.integers()).map(tuple),
    tuple[float, ...]: st.lists(FLOATS).map(tuple),
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_parse_reads_what_show_writes(kind):
    @given(VALUES[kind])
    def check(value):
        for wanted in (kind, kind | None):
            read = overrides.parse(overrides.show(value), wanted)
            assert read == value
            assert type(read) is type(value)

    check()


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_every_field_of_every_variant_survives_text_and_json(make):
    config = make()
    texts = [f"{key}={overrides.show(value)}" for key, value in overrides.flatten(config).items()]
    assert overrides.apply(config, texts) == config
    stored = json.loads(json.dumps(overrides.to_primitives(config)))
    assert overrides.from_primitives(type(config), stored) == config


def test_apply_changes_only_what_was_named_and_not_the_argument():
    before = digits()
    after = overrides.apply(before, ["optim.lr=1e-3", "model.depths=(1, 2, 3, 4)", "optim.ema_decay=none"])
    assert overrides.differences(before, after) == [
        "model.depths: none -> 1,2,3,4",
        "optim.lr: 0.004 -> 0.001",
        "optim.ema_decay: 0.99 -> none",
    ]
    assert before == digits()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim.lr", "expected key=value"),
        ("optim.learning=1", "did you mean"),
        ("data.splitt=x", "data.split"),
        ("lr=1", "optim.lr"),
        ("optim=1", "no field is called 'optim'"),
        ("zzz.qqq=1", "--dry-run lists every field"),
        ("optim.epochs=1.5", "expected a whole number, got '1.5'"),
        ("optim.lr=fast", "expected a number, got 'fast'"),
        ("optim.lr=nan", "finite"),
        ("optim.lr=inf", "finite"),
        ("model.decomposed=maybe", "expected true or false"),
        ("sparse.algorithm=adam", "expected one of slak, set, rigl, static"),
        ("model.depths=1,x", "whole number"),
    ],
)
def test_a_wrong_assignment_is_told_in_one_line(text, told):
    with pytest.raises(UserError, match=r"^--set .*") as caught:
        overrides.apply(digits(), [text])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_depend_on_each_other_change_together():
    config = overrides.apply(digits(), ["optim.warmup_epochs=50", "optim.epochs=60"])
    assert (config.optim.epochs, config.optim.warmup_epochs) == (60, 50)
    with pytest.raises(ValueError, match=r"optim\.warmup_epochs is 50"):
        overrides.apply(digits(), ["optim.warmup_epochs=50"])


@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(SparseConfig)] + ["x"]), st.none())
)
def test_stored_fields_must_be_exactly_those_of_the_class(values):
    if values.keys() != {field.name for field in dataclasses.fields(SparseConfig)}:
        with pytest.raises(ValueError, match="differs in its fields"):
            overrides.from_primitives(SparseConfig, values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulation": 0},
        {"lr": 0.0},
        {"min_lr": 1.0},
        {"weight_decay": -1.0},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"label_smoothing": 1.0},
        {"ema_decay": 1.0},
        {"max_grad_norm": 0.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_value_out_of_range_names_its_key(wrong):
    values = {"epochs": 2, "warmup_epochs": 1, "batch_size": 4} | wrong
    with pytest.raises(ValueError, match=rf"^optim\.{next(iter(wrong))} is .*: it must be "):
        OptimConfig(**values)
