from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dst.algorithms import PruneAndGrow, rigl, set_, slak, static
from dst.counters import Counts, count, training_macs
from dst.schedules import Cubic, Every
from dst.scores import Gradient
from dst.selection import select


def random_mask(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def flops(model: nn.Module, size: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *size))
    return counter.get_total_flops()


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution of any kind without padding or bias, and the size of its input."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    ins, outs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = draw(st.integers(1, 3))
    kind = {
        (1, False): nn.Conv1d,
        (2, False): nn.Conv2d,
        (3, False): nn.Conv3d,
        (1, True): nn.ConvTranspose1d,
        (2, True): nn.ConvTranspose2d,
        (3, True): nn.ConvTranspose3d,
    }[dims, transposed]
    size = tuple(draw(st.integers(3, 6)) for _ in range(dims))
    return kind(ins, outs, kernel, stride, groups=groups, bias=False), (ins, *size)


@given(convolutions(), st.integers(0, 99))
@settings(max_examples=60)
def test_convolutions_equal_the_multiplications_really_made(
    case: tuple[nn.Module, tuple[int, ...]], seed: int
) -> None:
    # With ones as input and a weight of zeros and ones, the sum of the outputs is the number of products.
    layer, size = case
    mask = random_mask(tuple(layer.weight.shape), seed)
    counts = count(layer, size, {"weight": mask})
    with torch.no_grad():
        layer.weight.fill_(1.0)
        assert counts.macs == layer(torch.ones(1, *size)).sum().item()
        layer.weight.copy_(mask)
        output = layer(torch.ones(1, *size))
    assert counts.sparse_macs == output.sum().item()
    assert counts.params == mask.numel()
    assert counts.nonzero == mask.count_nonzero()
    assert counts.rows[0].output == tuple(output.shape[1:])


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(0, 99))
def test_linear_layers_take_any_leading_dimensions(leading: list[int], seed: int) -> None:
    layer = nn.Linear(5, 7)
    mask = random_mask((7, 5), seed)
    counts = count(layer, (*leading, 5), {"weight": mask})
    assert counts.macs == math.prod(leading) * 35
    assert counts.sparse_macs == math.prod(leading) * int(mask.count_nonzero())
    assert (counts.params, counts.nonzero) == (42, 7 + int(mask.count_nonzero()))


def test_a_network_equals_torchs_own_counter() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, padding="same", groups=8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(36, 10),
    )
    counts = count(model, (3, 17, 13))
    assert 2 * counts.macs == flops(model, (3, 17, 13))
    assert counts.params == sum(p.numel() for p in model.parameters())
    assert counts.sparse_macs == counts.macs
    assert counts.nonzero == counts.params
    assert [row.type for row in counts.rows] == [
        "Conv2d",
        "BatchNorm2d",
        "Conv2d",
        "ConvTranspose2d",
        "Linear",
    ]
    assert counts.rows[1].macs == 0
    assert counts.rows[1].params == 16


def test_totals_are_sums_of_rows_and_a_uniform_mask_scales_them() -> None:
    model = nn.Sequential(nn.Conv2d(2, 10, 3), nn.Flatten(), nn.Linear(40, 10))
    masks = {}
    for name, parameter in select(model).items():
        masks[name] = (torch.arange(parameter.numel()) % 10 < 3).view(parameter.shape)
    counts = count(model, (2, 4, 4), masks)
    assert counts.sparse_macs * 10 == counts.macs * 3
    for field in ("params", "nonzero", "macs", "sparse_macs"):
        assert getattr(counts, field) == sum(getattr(row, field) for row in counts.rows)
        assert type(getattr(counts, field)) is int


class Attentive(nn.Module):
    def __init__(self, batch_first: bool = True, by_keyword: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=batch_first)
        self.batch_first, self.by_keyword = batch_first, by_keyword

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(1, 11, 10)
        if not self.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        x, _ = self.attention(x, x, x)
        if self.by_keyword:
            return self.cross(x, key=y[..., :6], value=y[..., 6:])[0]
        return self.cross(x, y[..., :6], y[..., 6:])[0]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_attention_counts_its_four_projections(batch_first: bool, by_keyword: bool) -> None:
    model = Attentive(batch_first, by_keyword)
    masks = {name: random_mask(tuple(p.shape), i) for i, (name, p) in enumerate(select(model).items())}
    counts = count(model, (5, 8), masks)
    rows = {row.name: row for row in counts.rows}
    active = {name: mask.count_nonzero().item() for name, mask in masks.items()}
    assert rows["attention"].macs == 3 * 5 * 64
    assert rows["attention"].sparse_macs == 5 * active["attention.in_proj_weight"]
    assert rows["attention.out_proj"].macs == 5 * 64
    assert rows["attention.out_proj"].sparse_macs == 5 * active["attention.out_proj.weight"]
    assert rows["cross"].macs == 5 * 64 + 11 * 6 * 8 + 11 * 4 * 8
    assert rows["cross"].sparse_macs == (
        5 * active["cross.q_proj_weight"]
        + 11 * active["cross.k_proj_weight"]
        + 11 * active["cross.v_proj_weight"]
    )
    assert rows["cross.out_proj"].output == (5, 8)
    assert counts.params == sum(p.numel() for p in model.parameters())


def test_a_packed_attention_uses_its_thirds_by_their_own_lengths() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x[:, :1], x, x)[0]

    mask = torch.zeros(12, 4, dtype=torch.bool)
    mask[:4] = True  # the query projection alone
    counts = count(Reader(), (9, 4), {"attention.in_proj_weight": mask})
    assert counts.rows[0].macs == (1 + 9 + 9) * 16
    assert counts.rows[0].sparse_macs == 16


@pytest.mark.parametrize("on_meta", [True, False])
def test_a_transformer_layer_is_counted_on_either_path(on_meta: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    if not on_meta:
        model = nn.Sequential(Choosy(), model)
    assert count(model, (5, 8)).macs == 5 * (4 * 64 + 2 * 8 * 16)


def test_shared_weights_count_once_as_parameters_and_per_call_as_macs() -> None:
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    two.weight = one.weight
    model = nn.Sequential(one, two, one)
    mask = random_mask((4, 4))
    counts = count(model, (4,), {"0.weight": mask})
    assert counts.params == 16 + 4
    assert counts.nonzero == int(mask.count_nonzero()) + 4
    assert counts.macs == 3 * 16
    assert counts.sparse_macs == 3 * int(mask.count_nonzero())
    assert [row.params for row in counts.rows] == [16, 4]
    assert count(model, (4,), {"1.weight": mask}) == counts  # any of its names


def test_names_are_the_plain_models() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = {"0.weight": random_mask((4, 4))}
    expected = count(model, (4,), masks)
    assert [row.name for row in expected.rows] == ["0", "1"]
    assert count(nn.DataParallel(model), (4,), masks) == expected
    compiled = torch.compile(model, backend="eager")
    assert count(compiled, (4,), masks) == expected
    model[1] = torch.compile(model[1], backend="eager")
    assert count(model, (4,), masks) == expected


class Choosy(nn.Module):
    """Reads a value, which the meta device does not have, and is not the same in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() < 0:
            return -x
        self.calls += 1
        return x + torch.rand(())


def test_a_model_that_cannot_run_on_meta_runs_on_its_own_device(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), Choosy(), nn.Linear(3, 2))
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="dst"):
        assert count(model, (3,)).macs == 9 + 6
    assert len(caplog.records) == 1
    assert "counting on cpu, as the meta device failed (" in caplog.text
    assert model[1].calls == 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)


class Caching(nn.Module):
    """Keeps what it made on the first call, and refuses to run in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("train mode")
        if self.table is None:
            self.table = torch.arange(4.0)
        return self.linear(x) + self.table


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_as_it_was_and_nothing_is_copied() -> None:
    model = nn.Sequential(Caching(), nn.BatchNorm1d(4), nn.Dropout())
    model[2].eval()
    model.append(model[0]).append(nn.Linear(4, 4))
    model[4].weight = model[0].linear.weight
    tensors = [*model.parameters(), *model.buffers()]
    before = [(id(t), t.data_ptr(), t.clone()) for t in tensors]
    modes = [module.training for module in model.modules()]
    count(model, (4,))
    assert [module.training for module in model.modules()] == modes
    assert model[0].table is None
    assert model[4].weight is model[0].linear.weight
    assert hooks_of(model) == 0
    for tensor, (identity, pointer, value) in zip(
        [*model.parameters(), *model.buffers()], before, strict=True
    ):
        assert (id(tensor), tensor.data_ptr()) == (identity, pointer)
        assert torch.equal(tensor, value)


def test_an_error_of_the_model_is_raised_and_leaves_it_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count(model, (5,))
    assert model.training
    assert hooks_of(model) == 0
    with torch.device("meta"):
        on_meta = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        count(on_meta, (5,))


def test_a_model_on_meta_and_other_types() -> None:
    with torch.device("meta"):
        assert count(nn.Linear(2**20, 2**20, bias=False), (2**20,)).macs == 2**40
    assert count(nn.Linear(4, 4, dtype=torch.bfloat16), 4).macs == 16
    assert count(nn.Linear(4, 4).double(), (4,)).macs == 16
    tokens = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    counts = count(tokens, (7,), dtype=torch.long)
    assert (counts.macs, counts.params) == (7 * 12, 40 + 15)


def test_a_masked_embedding_counts_as_parameters() -> None:
    tokens = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    counts = count(tokens, (7,), {"0.weight": torch.zeros(10, 4, dtype=torch.bool)}, dtype=torch.long)
    assert counts.params - counts.nonzero == 40
    assert counts.sparse_macs == counts.macs


def test_what_is_not_counted_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    assert count(Recurrent(), (3, 4)).macs == 0
    assert "the MACs of LSTM modules are not counted" in caplog.text


def test_a_layer_that_is_not_called_has_no_output() -> None:
    model = nn.Linear(4, 4)
    model.spare = nn.Linear(4, 4)
    counts = count(model, (4,))
    assert (counts.rows[1].name, counts.rows[1].output, counts.rows[1].macs) == ("spare", None, 0)
    assert counts.params == 40


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"0.wieght": torch.ones(4, 4, dtype=torch.bool)},
            "'0.wieght' names no parameter; near names: '0.weight'",
        ),
        (
            {"0.weight": torch.ones(4, dtype=torch.bool)},
            r"bool of shape \(4, 4\), got torch.bool of shape \(4,\)",
        ),
        ({"0.weight": torch.ones(4, 4)}, "got torch.float32"),
    ],
)
def test_a_mask_that_does_not_fit_raises(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(nn.Sequential(nn.Linear(4, 4)), (4,), masks)


def test_bad_arguments_raise() -> None:
    with pytest.raises(TypeError, match="size without the batch"):
        count(nn.Linear(4, 4), (4.0,))
    with pytest.raises(ValueError, match="'weight' is not initialised yet"):
        count(nn.LazyLinear(4), (4,))


def test_the_table_names_macs_and_aligns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    text = str(count(model, (3, 9, 9)))
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer",
        "type",
        "weight",
        "output",
        "parameters",
        "non-zero",
        "MACs",
        "sparse",
        "MACs",
    ]
    assert lines[1].split() == ["0", "Conv2d", "8x3x3x3", "8x7x7", "224", "224", "10,584", "10,584"]
    assert lines[2].split() == ["1", "BatchNorm2d", "8", "-", "16", "16", "0", "0"]
    assert lines[3].split() == ["total", "240", "240", "10,584", "10,584"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "multiply-accumulates" in lines[4]


# ---- training cost ----

COUNTS = Counts(params=1, nonzero=1, macs=1000, sparse_macs=100, rows=())


def test_training_costs_follow_the_published_formulas() -> None:
    assert training_macs(COUNTS, static()) == 300
    assert training_macs(COUNTS, set_(total_steps=1000)) == 300
    assert training_macs(COUNTS, rigl(total_steps=1000, interval=100)) == (300 * 100 + 200 + 1000) / 101
    assert training_macs(COUNTS, slak(total_steps=1000)) == 1200
    dense = Counts(params=1, nonzero=1, macs=1000, sparse_macs=1000, rows=())
    for algorithm in (static(), set_(total_steps=9), rigl(total_steps=9, interval=2), slak(total_steps=9)):
        assert training_macs(dense, algorithm) == 3000


def test_training_costs_are_read_from_the_fields_not_the_name() -> None:
    grown = PruneAndGrow(due=Every(10), grow=Gradient())
    assert training_macs(COUNTS, grown) == (300 * 10 + 200 + 1000) / 11
    assert training_macs(COUNTS, PruneAndGrow(due=Every(10), grow=Gradient(), masks_gradients=False)) == 1200

    class Behind:
        """Keeps dense weights behind the mask; what it does not say has the protocol's defaults."""

        dense_weights = True

    class Plain:
        pass

    assert training_macs(COUNTS, Behind()) == 1200
    assert training_macs(COUNTS, Plain()) == 300


def test_training_costs_without_a_fixed_sparsity_or_interval_raise() -> None:
    with pytest.raises(ValueError, match="changes the sparsity during training"):
        training_macs(COUNTS, PruneAndGrow(due=Every(10), sparsity=Cubic(0.0, 100, 1.0)))
    with pytest.raises(ValueError, match="regular interval"):
        training_macs(COUNTS, PruneAndGrow(due=lambda step: step in (3, 7), grow=Gradient()))
