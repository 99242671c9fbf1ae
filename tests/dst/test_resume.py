from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import (
    ALGORITHMS,
    algorithm,
    assert_exact,
    bits,
    loss_at,
    mlp,
    same_bits,
    snapshot,
    sparse,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.amp import GradScaler

import dst

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
INTERVAL = 4
BASES: dict[str, Callable[..., optim.Optimizer]] = {
    "AdamW": partial(optim.AdamW, lr=0.01),
    "AdamW-fused": partial(optim.AdamW, lr=0.01, fused=True),
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": partial(optim.Adagrad, lr=0.05),
    "ASGD": partial(optim.ASGD, lr=0.05),
}
ORDERS = ("load-wrap-load", "wrap-model-optimizer", "wrap-optimizer-model")


def written_and_read(saved: Any) -> Any:
    """Send a checkpoint through a file, as tensors and primitives only."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*selected weights are exactly zero:UserWarning")
def resumed(
    order: str, saved: dict[str, Any], build: Callable[[nn.Module], dst.SparseOptimizer], seed: int = 77
) -> tuple[nn.Module, dst.SparseOptimizer]:
    """Restore a checkpoint into a new model and a new optimizer of another seed."""
    model = mlp(seed)
    if order == "load-wrap-load":
        model.load_state_dict(saved["model"])
    optimizer = build(model)
    if order == "wrap-model-optimizer":
        model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if order == "wrap-optimizer-model":
        model.load_state_dict(saved["model"])
    return model, optimizer


# --- Bit-equal continuation ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*selected weights are exactly zero:UserWarning")
@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(ALGORITHMS)),
    base=st.sampled_from(sorted(BASES)),
    order=st.sampled_from(ORDERS),
    stop=st.integers(0, 3 * INTERVAL + 1),
    early=st.booleans(),
)
def test_resume_at_any_step_is_the_uninterrupted_run(
    name: str, base: str, order: str, stop: int, early: bool
) -> None:
    """Weights, optimizer state, masks, counters and what was explored agree bit for bit."""
    model = mlp()
    optimizer = sparse(model, BASES[base], name, interval=INTERVAL, seed=5)

    def go(held: nn.Module, taken: dst.SparseOptimizer, steps: range) -> None:
        for step in steps:
            taken.zero_grad()
            loss_at(held, step).backward()
            if early:
                taken.mask_gradients()
                nn.utils.clip_grad_norm_(held.parameters(), 0.5)
            taken.step()

    go(model, optimizer, range(1, stop + 1))
    saved = written_and_read({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    before = snapshot(model, optimizer)
    again, restored = resumed(
        order, saved, lambda held: sparse(held, BASES[base], name, interval=INTERVAL, seed=6)
    )
    assert same_bits(before, snapshot(again, restored))
    assert_exact(restored, optimizer.sparsifier.counts)
    end = range(stop + 1, stop + 2 * INTERVAL + 2)
    go(model, optimizer, end)
    go(again, restored, end)
    assert same_bits(snapshot(model, optimizer), snapshot(again, restored))


@every_algorithm
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.filterwarnings("ignore:.*selected weights are exactly zero:UserWarning")
def test_wrapping_a_loaded_model_destroys_nothing(name: str, order: str) -> None:
    """Also where a trained active weight is exactly zero, which reads like an inactive one.

    Right after an update every newcomer is such a weight.
    """
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name, interval=INTERVAL)
    train(model, optimizer, range(1, INTERVAL + 1))
    with torch.no_grad():
        active = optimizer.masks["0.weight"].nonzero()
        model[0].weight[tuple(active[0])] = 0.0
        model[0].weight[tuple(active[1])] = -0.0
    saved = written_and_read({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for seed in range(8):  # whatever the constructor draws
        again, restored = resumed(
            order,
            saved,
            lambda held, seed=seed: sparse(held, optim.AdamW, name, interval=INTERVAL, seed=seed),
        )
        assert same_bits(snapshot(model, optimizer), snapshot(again, restored))


def rewritten(model: nn.Module, optimizer: dst.SparseOptimizer) -> tuple[nn.Module, dst.SparseOptimizer]:
    """DistributedDataParallel's constructor writes rank 0's weights over the same weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())
    return model, optimizer


def converted(model: nn.Module, optimizer: dst.SparseOptimizer) -> tuple[nn.Module, dst.SparseOptimizer]:
    return model.to(torch.float64).to(torch.float32), optimizer


def evaluated(model: nn.Module, optimizer: dst.SparseOptimizer) -> tuple[nn.Module, dst.SparseOptimizer]:
    """A sanity check, a backward pass and a step that a scaler skips, as frameworks do at the start."""
    loss_at(model, 1).backward()
    optimizer.mask_gradients()
    optimizer.zero_grad()
    optimizer.sparsifier.mask_weights()
    return model, optimizer


@every_algorithm
@pytest.mark.parametrize(
    "between",
    [
        rewritten,
        converted,
        lambda model, optimizer: (model.to(torch.float64), optimizer),
        evaluated,
        lambda *both: copy.deepcopy(both),
        lambda *both: pickle.loads(pickle.dumps(both)),
    ],
    ids=["ddp", "converted", "float64", "evaluated", "deepcopy", "pickle"],
)
@pytest.mark.filterwarnings("ignore:.*selected weights are exactly zero:UserWarning")
def test_what_happens_between_wrapping_and_loading_loses_no_weight(
    name: str, between: Callable[..., tuple[nn.Module, dst.SparseOptimizer]]
) -> None:
    """Load the model, wrap it, wrap it again (DDP, a copy for EMA), load the optimizer."""
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name, interval=INTERVAL)
    train(model, optimizer, range(1, INTERVAL + 3))
    saved = written_and_read({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = mlp(3)
    again.load_state_dict(saved["model"])
    again, restored = between(again, sparse(again, optim.AdamW, name, interval=INTERVAL, seed=4))
    restored.load_state_dict(saved["optimizer"])
    again.to(torch.float32)
    assert same_bits(model.state_dict(), again.state_dict())
    assert same_bits(optimizer.state_dict()["sparse"], restored.state_dict()["sparse"])


def test_the_values_before_the_first_mask_are_kept_until_the_first_step_only() -> None:
    """They cost the memory of the inactive weights, and after a step they are nobody's weights."""
    for finish in (
        lambda optimizer: optimizer.step(),
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    ):
        optimizer = sparse(mlp(), optim.AdamW, "static")
        assert optimizer.sparsifier._displaced
        finish(optimizer)
        assert optimizer.sparsifier._displaced is None


def written_to_data(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load as much code of the field does, by writes that torch does not count."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])


@pytest.mark.parametrize("load", [nn.Module.load_state_dict, written_to_data], ids=["load", "data"])
def test_a_model_loaded_after_wrapping_is_not_written_over(
    load: Callable[[nn.Module, dict[str, Tensor]], object],
) -> None:
    """Values put back must never replace loaded ones, not even those that are zero where both masks meet."""
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "set", interval=1, seed=1)
    train(model, optimizer, [1])
    saved = {"model": copy.deepcopy(model.state_dict()), "optimizer": optimizer.state_dict()}
    again = mlp()
    restored = sparse(again, optim.AdamW, "set", interval=1, seed=1)  # the mask of before the update
    grown = optimizer.masks["0.weight"] & ~restored.masks["0.weight"]
    assert grown.any()
    load(again, saved["model"])
    restored.load_state_dict(saved["optimizer"])
    assert not bits(again[0].weight)[grown].any()  # newcomers: active and zero
    assert same_bits(saved["model"], again.state_dict())


@pytest.mark.slow
@every_algorithm
def test_resume_in_a_new_process(name: str, tmp_path: Path) -> None:
    """60 steps are 30 steps, a new process with other hash and generator seeds, and 30 more."""
    script = (
        "import sys, torch\n"
        "from helpers.training import mlp, sparse, train\n"
        "torch.manual_seed(123)\n"
        "path, name, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])\n"
        "model = mlp(first); optimizer = sparse(model, torch.optim.AdamW, name, interval=5, seed=first)\n"
        "if first > 1:\n"
        "    saved = torch.load(path, weights_only=True)\n"
        "    model.load_state_dict(saved['model']); optimizer.load_state_dict(saved['optimizer'])\n"
        "train(model, optimizer, range(first, last + 1))\n"
        "torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, path)\n"
    )
    root = Path(__file__).parents[2]

    def run(path: Path, first: int, last: int, hash_seed: str) -> None:
        subprocess.run(
            [sys.executable, "-c", script, str(path), name, str(first), str(last)],
            check=True,
            timeout=120,
            env={
                "PYTHONPATH": f"{root}:{root / 'tests'}",
                "PYTHONHASHSEED": hash_seed,
                "OMP_NUM_THREADS": "1",
            },
        )

    run(tmp_path / "parts.pt", 1, 30, "1")  # step 30 is an update
    run(tmp_path / "parts.pt", 31, 60, "2")
    run(tmp_path / "whole.pt", 1, 60, "3")
    parts, whole = (torch.load(tmp_path / f"{kind}.pt", weights_only=True) for kind in ("parts", "whole"))
    assert same_bits(parts, whole)
    assert parts["optimizer"]["sparse"]["step"] == 60


@every_algorithm
def test_resume_around_skipped_steps(name: str) -> None:
    """Saved right after the scaler skipped the step of an update."""

    def go(model: nn.Module, optimizer: dst.SparseOptimizer, scaling: GradScaler, batches: range) -> None:
        for number in batches:
            optimizer.zero_grad()
            scaling.scale(loss_at(model, number)).backward()
            if number in (4, 5, 9):
                model[0].weight.grad[0] = float("inf")
            scaling.unscale_(optimizer)
            optimizer.mask_gradients()
            scaling.step(optimizer)
            scaling.update()

    model = mlp()
    optimizer, scaling = sparse(model, optim.AdamW, name), GradScaler("cpu", init_scale=1024.0)
    go(model, optimizer, scaling, range(1, 6))
    # An infinity is masked away where it is inactive and masking comes before the scaler's own look.
    saved = written_and_read([model.state_dict(), optimizer.state_dict(), scaling.state_dict()])
    again = mlp(9)
    restored, scaling_too = sparse(again, optim.AdamW, name, seed=9), GradScaler("cpu")
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    scaling_too.load_state_dict(saved[2])
    for held, taken, used in ((model, optimizer, scaling), (again, restored, scaling_too)):
        go(held, taken, used, range(6, 15))
    assert same_bits(snapshot(model, optimizer), snapshot(again, restored))
    assert optimizer.sparsifier.step == 14 - 3


# --- Copies --------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("stop", [0, INTERVAL - 1, INTERVAL, INTERVAL + 1])
@pytest.mark.parametrize("base", ["AdamW", "SGD", "AdamW-fused"])
def test_copies_and_pickles_go_on_alike(name: str, stop: int, base: str) -> None:
    model = mlp()
    optimizer = sparse(model, BASES[base], name, interval=INTERVAL)
    train(model, optimizer, range(1, stop + 1))
    twins = [
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
        pickle.loads(pickle.dumps(copy.deepcopy((model, optimizer)))),
    ]
    before = snapshot(model, optimizer)
    for held, taken in twins:
        assert same_bits(before, snapshot(held, taken))
        train(held, taken, range(stop + 1, stop + 2 * INTERVAL + 1))
        assert same_bits(before, snapshot(model, optimizer))  # a copy shares nothing
    train(model, optimizer, range(stop + 1, stop + 2 * INTERVAL + 1))
    for held, taken in twins:
        assert same_bits(snapshot(model, optimizer), snapshot(held, taken))


@every_algorithm
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(name: str) -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name, interval=2)
    train(model, optimizer, range(1, 4))
    before = snapshot(model, optimizer)
    alone = copy.deepcopy(optimizer)
    mine = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in alone.param_groups for parameter in group["params"]]
    assert not mine & {id(parameter) for parameter in held}
    assert {id(p) for p in alone.sparsifier.params.values()} <= {id(p) for p in held}
    for _ in range(6):
        for parameter in held:
            parameter.grad = torch.ones_like(parameter)
        alone.step()
        assert_exact(alone, optimizer.sparsifier.counts)
    assert same_bits(before, snapshot(model, optimizer))


def test_copying_reports_to_no_listener_and_takes_no_gradient_along() -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "rigl", interval=1)
    optimizer.sparsifier.on_change(lambda *_: None)
    loss_at(model, 1).backward()
    optimizer.mask_gradients()
    copied = copy.deepcopy(optimizer)
    assert copied.sparsifier._callbacks == []
    assert copied.sparsifier._dense_gradients == {}
    assert optimizer.sparsifier._callbacks
    assert optimizer.sparsifier._dense_gradients


# --- The saved state -----------------------------------------------------------------------------


@every_algorithm
def test_saving_changes_nothing_and_loading_leaves_the_callers_dict(name: str) -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name, interval=2)
    train(model, optimizer, range(1, 6))
    before = snapshot(model, optimizer)
    first = copy.deepcopy(optimizer.state_dict())
    assert same_bits(before, snapshot(model, optimizer))
    other_model = mlp()
    other = sparse(other_model, optim.AdamW, name, interval=2, seed=1)
    given = copy.deepcopy(first)
    other.load_state_dict(given)
    assert same_bits(given, first)
    assert same_bits(other.state_dict(), first)  # save, load, save
    other.load_state_dict(given)
    assert same_bits(other.state_dict(), first)
    train(other_model, other, range(6, 12))
    assert same_bits(given["sparse"], first["sparse"])  # masks and counters are copied


def test_the_saved_state_is_tensors_and_primitives_under_one_extra_key() -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "rigl", interval=2)
    train(model, optimizer, range(1, 4))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups", "sparse"}
    assert set(saved) - {"sparse"} == set(optimizer.base.state_dict())
    for entry in saved["state"].values():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}  # no mask, which would come back as float

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)
        else:
            assert isinstance(value, (Tensor, int, float, str)), type(value)

    check(saved["sparse"])
    masks = saved["sparse"]["masks"]
    assert {key: (value.dtype, value.numel()) for key, value in masks.items()} == {
        "0.weight": (torch.uint8, 20),
        "3.weight": (torch.uint8, 12),
    }


def test_the_saved_state_is_a_copy_of_the_masks() -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "set", interval=1)
    saved = optimizer.state_dict()["sparse"]
    first = copy.deepcopy(saved)
    train(model, optimizer, range(1, 4))
    assert same_bits(saved, first)


def test_load_state_dict_takes_its_argument_by_name() -> None:
    """torch.distributed.checkpoint calls it so."""
    optimizer = sparse(mlp())
    optimizer.load_state_dict(state_dict=optimizer.state_dict())


def test_saved_seed_and_counts_win() -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "set", interval=1, sparsity=0.6, seed=12)
    again = mlp(1)
    restored = sparse(again, optim.AdamW, "set", interval=1, sparsity=0.9, seed=13)
    saved = [model.state_dict(), optimizer.state_dict()]
    restored.load_state_dict(saved[1])
    again.load_state_dict(saved[0])
    assert restored.sparsifier.seed == 12
    assert restored.sparsifier.counts == optimizer.sparsifier.counts
    assert restored.sparsifier.targets == optimizer.sparsifier.targets
    for held, taken in ((model, optimizer), (again, restored)):
        train(held, taken, range(1, 4))
    assert same_bits(snapshot(model, optimizer), snapshot(again, restored))


def test_loading_into_a_run_that_has_stepped() -> None:
    """Going back to an earlier checkpoint within one process, with the model loaded too."""
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "rigl", interval=2)
    train(model, optimizer, range(1, 4))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(4, 12))
    end = snapshot(model, optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(4, 12))
    assert same_bits(end, snapshot(model, optimizer))


def damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(saved: dict[str, Any]) -> dict[str, Any]:
        saved = copy.deepcopy(saved)
        change(saved["sparse"])
        return saved

    return apply


def _other_shape() -> dict[str, Any]:
    return sparse(
        nn.Sequential(nn.Linear(10, 15), nn.LayerNorm(15), nn.ReLU(), nn.Linear(15, 6))
    ).state_dict()


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "dense": (lambda saved: {k: v for k, v in saved.items() if k != "sparse"}, "no entry 'sparse'"),
    "shapes": (
        lambda saved: _other_shape(),
        r"2 differ, the first is '0\.weight', saved as \[15, 10\], here",
    ),
    "names": (
        damaged(lambda s: s["shapes"].update(x=s["shapes"].pop("0.weight"))),
        "masks are of other tensors",
    ),
    "algorithm": (
        lambda saved: sparse(mlp(), optim.AdamW, "set").state_dict(),
        "saved under PruneAndGrow.*but this optimizer uses.*allow_other_algorithm=True",
    ),
    "missing step": (damaged(lambda s: s.pop("step")), r"lacks 'step'"),
    "missing mask": (damaged(lambda s: s["masks"].pop("3.weight")), "saved masks are of other tensors"),
    "missing explored": (damaged(lambda s: s["explored"].pop("3.weight")), "saved explored are of other"),
    "short mask": (
        damaged(lambda s: s["masks"].update({"3.weight": torch.zeros(3, dtype=torch.uint8)})),
        "packed",
    ),
    "float mask": (damaged(lambda s: s["masks"].update({"3.weight": torch.zeros(12)})), "packed mask"),
    "short explored": (
        damaged(lambda s: s["explored"].update({"3.weight": torch.zeros(3, dtype=torch.uint8)})),
        "explored|packed",
    ),
    "groups": (
        lambda saved: {**saved, "param_groups": saved["param_groups"] * 2},
        "different number of parameter groups",
    ),
    "step no number": (damaged(lambda s: s.update(step="x")), "step"),
    "dense weights": (damaged(lambda s: s.update(dense_weights={"x": torch.ones(2)})), "dense_weights"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "rigl", interval=2)
    source = mlp(5)
    other = sparse(source, optim.AdamW, "rigl", interval=2, seed=5)
    train(source, other, range(1, 6))
    saved = change(other.state_dict())
    train(model, optimizer, range(1, 2))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(model, optimizer))
    train(model, optimizer, range(2, 5))  # and it still trains
    assert_exact(optimizer, {"0.weight": 40, "3.weight": 24})


def test_another_algorithm_is_accepted_when_asked_for() -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "set", interval=2)
    train(model, optimizer, range(1, 6))
    longer = dst.SparseOptimizer(
        optim.AdamW((again := mlp()).parameters()),
        again,
        sparsity=0.75,
        distribution=dst.uniform,
        algorithm=algorithm("set", total_steps=1000, interval=3),
        seed=8,
    )
    with pytest.raises(ValueError, match="allow_other_algorithm=True"):
        longer.load_state_dict(optimizer.state_dict())
    longer.load_state_dict(optimizer.state_dict(), allow_other_algorithm=True)
    again.load_state_dict(model.state_dict())
    assert same_bits(longer.masks, optimizer.masks)
    train(again, longer, range(6, 10))
    assert longer.sparsifier.updates == 2 + 2
    assert "interval=3" in longer.state_dict()["sparse"]["algorithm"]


def test_an_algorithm_prints_alike_in_every_process() -> None:
    """The repr is compared on load, so no address may stand in it, of functions neither."""
    preset = dst.set_(total_steps=10)
    for value in (preset, dst.rigl(total_steps=10), dst.slak(total_steps=10), dst.static()):
        assert " at 0x" not in repr(value)
        assert pickle.loads(pickle.dumps(value)) == value
