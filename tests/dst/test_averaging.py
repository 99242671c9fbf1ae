from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dst.algorithms import Algorithm, rigl, set_, slak, static
from dst.averaging import SparseEMA
from dst.optimizer import SparseOptimizer

ALGORITHMS = {
    "static": static(),
    "set": set_(total_steps=1000, interval=2, drop_fraction=0.5),
    "rigl": rigl(total_steps=1000, interval=3, drop_fraction=0.5),
    "slak": slak(total_steps=1000, interval=1, drop_fraction=0.5),
}


class Net(nn.Module):
    """Convolution, BatchNorm, a tied matrix, and buffers of every kind."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("cache", torch.randn(3), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.kept: Tensor
        self.cache: Tensor
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept = self.kept + 1  # a new tensor, as some modules do
        self.cache = self.cache * 2
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.second(self.first(x).relu())


def build(
    algorithm: Algorithm = ALGORITHMS["set"], *, sparsity: float = 0.7, decay: float = 0.9, seed: int = 0
) -> tuple[Net, SparseOptimizer, SparseEMA]:
    model = Net()
    base = torch.optim.AdamW(model.parameters(), lr=0.05)
    optimizer = SparseOptimizer(base, model, sparsity=sparsity, algorithm=algorithm, seed=seed)
    return model, optimizer, SparseEMA(model, optimizer, decay)


def train(model: nn.Module, optimizer: SparseOptimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer.zero_grad()
    model(torch.randn(4, 2, 5, 5, generator=generator)).square().mean().backward()
    optimizer.step()


def is_plus_zero(tensor: Tensor) -> bool:
    return not tensor.any() and not tensor.signbit().any()


def assert_sparse(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    params = dict(module.named_parameters())
    for name, mask in masks.items():
        assert is_plus_zero(params[name][~mask]), name


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)


class Oracle:
    """The rule, one scalar at a time, with the whole history of masks at hand."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.before = {name: mask.clone() for name, mask in masks.items()}

    def update(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        for name, live in model.state_dict().items():
            old = self.average[name]
            if not live.is_floating_point():
                self.average[name] = live.clone()
                continue
            moved = [
                torch.lerp(o, w, 1 - self.decay)
                for o, w in zip(old.reshape(-1), live.reshape(-1), strict=True)
            ]
            if name in masks:
                now, before = masks[name].reshape(-1).tolist(), self.before[name].reshape(-1).tolist()
                for i, w in enumerate(live.reshape(-1)):
                    if not now[i]:
                        moved[i] = torch.tensor(0.0)
                    elif not before[i]:
                        moved[i] = w
            self.average[name] = torch.stack(moved).view(live.shape)
        self.before = {name: mask.clone() for name, mask in masks.items()}


# --- The rule --------------------------------------------------------------------------------------


@given(
    algorithm=st.sampled_from(sorted(ALGORITHMS)),
    sparsity=st.sampled_from([0.0, 0.3, 0.9]),
    decay=st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.9999]),
    averaged=st.lists(st.booleans(), min_size=1, max_size=9),
)
def test_every_update_equals_the_oracle_and_is_zero_off_the_mask(
    algorithm: str, sparsity: float, decay: float, averaged: list[bool]
) -> None:
    model, optimizer, ema = build(ALGORITHMS[algorithm], sparsity=sparsity, decay=decay)
    oracle = Oracle(model, optimizer.masks, decay)
    oracle.average["second.weight"] = oracle.average["first.weight"]
    tied = dict(optimizer.masks)
    assert_sparse(ema.module, optimizer.masks)
    for step, now in enumerate(averaged):  # several mask updates may lie between two of the average's
        train(model, optimizer, step)
        if now:
            ema.update()
            tied = {**optimizer.masks, "second.weight": optimizer.masks["first.weight"]}
            oracle.before["second.weight"] = oracle.before["first.weight"]
            oracle.update(model, tied)
            assert_sparse(ema.module, optimizer.masks)
            assert_equal(ema.module.state_dict(), oracle.average)
    assert ema.updates == sum(averaged)
    assert torch.equal(ema.module.cache, model.cache) or not averaged[-1]


@given(flips=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=6))
def test_arbitrary_mask_changes(flips: list[list[bool]]) -> None:
    model = nn.Linear(6, 1, bias=False)
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, sparsity=0.5, algorithm=static()
    )
    ema = SparseEMA(model, optimizer, 0.7)
    oracle = Oracle(model, optimizer.masks, 0.7)
    for number, flip in enumerate(flips):
        state = optimizer.state_dict()
        state["sparse"]["masks"]["weight"] = torch.tensor([sum(b << i for i, b in enumerate(flip))]).byte()
        optimizer.load_state_dict(state)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([flip]) * torch.arange(1.0, 7.0) * (number + 1))
        ema.update()
        oracle.update(model, optimizer.masks)
        assert_sparse(ema.module, optimizer.masks)
        assert_equal(ema.module.state_dict(), oracle.average)


def test_an_entry_that_left_and_came_back_between_updates_keeps_its_history() -> None:
    model, optimizer, ema = build(ALGORITHMS["set"], decay=0.5)
    mask = optimizer.masks["first.weight"]
    before = {name: m.clone() for name, m in optimizer.masks.items()}
    history = ema.module.first.weight.clone()
    state = copy.deepcopy(optimizer.state_dict())
    for step in range(4):
        train(model, optimizer, step)
    assert not torch.equal(mask, before["first.weight"])
    optimizer.load_state_dict(state)  # the old masks are back, over the new weights
    ema.update()
    expected = torch.lerp(history, model.first.weight.detach(), 0.5)
    assert torch.equal(ema.module.first.weight, expected)


def test_nan_in_a_pruned_entry_leaves_the_average_clean() -> None:
    model, optimizer, ema = build(ALGORITHMS["slak"], decay=0.5)
    with torch.no_grad():
        ema.module.first.weight.fill_(float("nan"))
        ema.module.first.weight[optimizer.masks["first.weight"]] = -0.0
    train(model, optimizer, 0)
    ema.update()
    assert_sparse(ema.module, optimizer.masks)


def test_tensors_stay_in_place_and_the_module_is_for_evaluation() -> None:
    model, optimizer, ema = build()
    pointers = {name: tensor.data_ptr() for name, tensor in ema.module.state_dict().items()}
    for step in range(4):
        train(model, optimizer, step)
        ema.update()
    assert pointers == {name: tensor.data_ptr() for name, tensor in ema.module.state_dict().items()}
    assert ema.module.first.weight is ema.module.second.weight
    assert not ema.module.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_updating_changes_nothing_of_the_model() -> None:
    model, optimizer, ema = build()
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    ema.update()
    assert_equal(model.state_dict(), before)


def test_masks_are_compared_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, ema = build(set_(total_steps=1000, interval=5))
    compared: list[int] = []
    apply = SparseEMA._apply_changes
    monkeypatch.setattr(
        SparseEMA, "_apply_changes", lambda self: (compared.append(self.updates), apply(self))
    )
    for step in range(12):
        train(model, optimizer, step)
        ema.update()
    assert compared == [0, 4, 9]


def test_a_half_precision_model_can_have_a_float_average_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters()), model, sparsity=0.5, algorithm=static())
    ema = SparseEMA(model, optimizer)
    ema.update()  # mixed dtypes in one list
    ema.module.float()
    with torch.no_grad():
        model[1].weight[optimizer.masks["1.weight"]] = 8.0
    before = ema.module[1].weight.clone()
    ema.update()
    expected = torch.lerp(before, model[1].weight.detach().float(), 1 - 0.9999)
    assert ema.module[1].weight.dtype == torch.float32
    assert torch.equal(ema.module[1].weight, expected)


# --- Wrappers, several optimizers --------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # the wrapper is what matters, not the code it makes


@pytest.mark.parametrize("when", ["before", "after", "never"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled], ids=["DataParallel", "compile"])
def test_a_wrapped_model_averages_like_a_plain_one(when: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, plain_optimizer, plain_ema = build()
    model = Net()
    optimizer = SparseOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.05), model, sparsity=0.7, algorithm=ALGORITHMS["set"]
    )
    ema = SparseEMA(wrap(model) if when == "before" else model, optimizer, 0.9)
    if when == "after":
        wrap(model)
    for step in range(4):
        train(plain, plain_optimizer, step)
        plain_ema.update()
        train(model, optimizer, step)
        ema.update()
    assert type(ema.module) is Net
    assert_equal(ema.module.state_dict(), plain_ema.module.state_dict())


def test_a_compiled_part_keeps_plain_names_in_the_saved_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters()), model, sparsity=0.5, algorithm=static())
    plain = SparseEMA(model, optimizer)
    ema = SparseEMA(nn.Sequential(model[0], compiled(model[1])), optimizer)
    assert "1._orig_mod.weight" in ema.module.state_dict()
    assert ema.state_dict()["module"].keys() == plain.state_dict()["module"].keys()
    plain.load_state_dict(ema.state_dict())
    ema.load_state_dict(plain.state_dict())


def test_distributed_data_parallel(tmp_path: object) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer, _ = build()
        wrapped = nn.parallel.DistributedDataParallel(model)
        ema = SparseEMA(wrapped, optimizer, 0.9)
        train(wrapped, optimizer, 1)
        ema.update()
        assert type(ema.module) is Net
        assert_sparse(ema.module, optimizer.masks)
    finally:
        torch.distributed.destroy_process_group()


def two_optimizers() -> tuple[nn.ModuleDict, list[SparseOptimizer]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 6)), "head": nn.Sequential(nn.Linear(6, 4))})
    # Both parts call their tensor "0.weight".
    optimizers = [
        SparseOptimizer(
            torch.optim.SGD(part.parameters(), lr=0.1),
            part,
            sparsity=0.5,
            algorithm=slak(total_steps=100, interval=every),
            seed=every,
        )
        for every, part in enumerate(model.values(), 1)
    ]
    return model, optimizers


def test_several_optimizers_of_one_model() -> None:
    model, optimizers = two_optimizers()
    ema = SparseEMA(model, optimizers, 0.5)
    for _ in range(5):
        model["head"](model["body"](torch.randn(3, 6))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        ema.update()
        masks = [optimizer.masks["0.weight"] for optimizer in optimizers]
        assert_sparse(ema.module, {"body.0.weight": masks[0], "head.0.weight": masks[1]})
    assert ema.state_dict()["masks"].keys() == {"body.0.weight", "head.0.weight"}


# --- Copies and saved states -------------------------------------------------------------------------


def saved(state: object) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize("pending", [False, True], ids=["after the average", "before the average"])
@pytest.mark.parametrize("order", ["optimizer first", "average first"])
def test_resume_is_bit_exact(algorithm: str, pending: bool, order: str) -> None:
    model, optimizer, ema = build(ALGORITHMS[algorithm])
    for step in range(6):  # every algorithm here has a mask update at step 6
        train(model, optimizer, step)
        if step < 5 or not pending:
            ema.update()
    state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()})

    other, other_optimizer, other_ema = build(ALGORITHMS[algorithm], decay=0.1, seed=7)
    other.load_state_dict(state["model"])
    if order == "optimizer first":
        other_optimizer.load_state_dict(state["optimizer"])
    other_ema.load_state_dict(state["ema"])
    if order != "optimizer first":
        other_optimizer.load_state_dict(state["optimizer"])
    other.cache.copy_(model.cache)
    assert (other_ema.updates, other_ema.decay) == (ema.updates, ema.decay)
    if pending:
        ema.update()
        other_ema.update()
    for step in range(6, 10):
        train(model, optimizer, step)
        ema.update()
        train(other, other_optimizer, step)
        other_ema.update()
        assert_sparse(other_ema.module, other_optimizer.masks)
        assert_equal(other_ema.module.state_dict(), ema.module.state_dict())
    assert_equal(other_ema.state_dict()["masks"], ema.state_dict()["masks"])


def test_an_older_average_follows_the_masks_of_now() -> None:
    model, optimizer, ema = build()
    older = ema.state_dict()
    for step in range(4):
        train(model, optimizer, step)
        ema.update()
    ema.load_state_dict(older)
    ema.update()
    assert_sparse(ema.module, optimizer.masks)


def test_the_saved_state_is_a_copy_and_loading_leaves_it_alone() -> None:
    model, optimizer, ema = build()
    state = ema.state_dict()
    before = copy.deepcopy(state)
    ema.load_state_dict(state)
    for step in range(3):
        train(model, optimizer, step)
        ema.update()
    assert_equal(state["module"], before["module"])
    assert_equal(state["masks"], before["masks"])
    assert state["updates"] == 0


@pytest.mark.parametrize("together", [True, False])
def test_a_deepcopy_goes_on_like_the_original(together: bool) -> None:
    model, optimizer, ema = build()
    train(model, optimizer, 0)
    train(model, optimizer, 1)  # a mask update that the average has not seen
    if together:
        other, other_optimizer, other_ema = copy.deepcopy((model, optimizer, ema))
    else:
        other_ema = copy.deepcopy(ema)
        ema.update()
        other_ema.update()
        assert_equal(other_ema.module.state_dict(), ema.module.state_dict())
        return
    for step in range(2, 7):
        train(model, optimizer, step)
        ema.update()
    for step in range(2, 7):
        train(other, other_optimizer, step)
        other_ema.update()
    assert_equal(other_ema.module.state_dict(), ema.module.state_dict())
    assert_sparse(other_ema.module, other_optimizer.masks)


# --- Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_raises(decay: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        build(decay=decay)


@pytest.mark.parametrize("wrong", ["dense", "empty", "mixed"])
def test_something_that_is_no_sparse_optimizer_raises(wrong: str) -> None:
    model, optimizer, _ = build()
    given = {"dense": optimizer.base, "empty": [], "mixed": [optimizer, optimizer.base]}[wrong]
    with pytest.raises(TypeError, match="sequence of them"):
        SparseEMA(model, given)


def test_another_model_or_a_mask_twice_raises() -> None:
    model, optimizer, _ = build()
    with pytest.raises(ValueError, match="none of the 2 masked tensors"):
        SparseEMA(Net(), optimizer)
    with pytest.raises(ValueError, match="two of the optimizers"):
        SparseEMA(model, [optimizer, optimizer])
    with pytest.raises(ValueError, match="no floating-point tensor"):
        SparseEMA(nn.Identity(), optimizer)


def test_a_state_that_does_not_fit_raises_and_changes_nothing() -> None:
    _, _, ema = build()
    good = ema.state_dict()
    before = copy.deepcopy(good)
    for broken, sentence in [
        ({key: value for key, value in good.items() if key != "masks"}, "lacks"),
        ({**good, "masks": {}}, "masks of the saved average .* 2 differ"),
        ({**good, "module": {**good["module"], "extra": torch.ones(1)}}, "'extra' .saved only"),
        ({**good, "module": {**good["module"], "conv.weight": torch.ones(1)}}, "'conv.weight' has shape"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            ema.load_state_dict(broken)
    assert_equal(ema.state_dict()["module"], before["module"])


def test_names_that_collide_without_wrappers_raise() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.ModuleDict()})
    model.register_parameter("weight", nn.Parameter(torch.ones(2, 2)))
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters()), {"weight": model.weight}, sparsity=0.5, algorithm=static()
    )
    with pytest.raises(ValueError, match="one name once"):
        SparseEMA(model, optimizer).state_dict()
