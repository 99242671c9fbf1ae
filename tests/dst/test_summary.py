from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dst.algorithms import rigl, set_, static
from dst.counters import count
from dst.optimizer import SparseOptimizer
from dst.summary import summary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 1000, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))


def wrapped(model: nn.Module, sparsity: float = 0.9) -> SparseOptimizer:
    base = torch.optim.AdamW(model.parameters())
    return SparseOptimizer(base, model, sparsity=sparsity, algorithm=set_(total_steps=100, interval=1))


def test_rows_and_totals_are_recounted_from_the_masks() -> None:
    model = Net()
    optimizer = wrapped(model)
    for step in range(3):
        model(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        found = summary(optimizer)
        assert found.step == step + 1
    sizes = {name: mask.numel() for name, mask in optimizer.masks.items()}
    active = {name: int(mask.sum()) for name, mask in optimizer.masks.items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert [row.name for row in found.rows] == list(optimizer.masks)
    for row in found.rows:
        size = sizes[row.name]
        assert (row.active, row.size) == (active[row.name], size)
        assert row.sparsity == (size - active[row.name]) / size
        assert row.shape == tuple(optimizer.masks[row.name].shape)
        assert row.parameter_share == size / total
        assert row.mac_share is None
    assert (found.active, found.size) == (sum(active.values()), sum(sizes.values()))
    assert found.sparsity == (found.size - found.active) / found.size
    assert found.parameters == total
    assert found.nonzero == total - found.size + found.active
    assert found.exploration_rate == sum(optimizer.sparsifier.explored.values()) / found.size > 0.1
    assert found.algorithm == repr(optimizer.sparsifier.algorithm)
    assert found.macs is found.sparse_macs is None


def test_with_counts_the_shares_of_macs_come_from_the_layers() -> None:
    model = Net()
    optimizer = wrapped(model)
    counts = count(model, (3, 4, 4), masks=optimizer.masks)
    found = summary(optimizer, counts)
    active = {row.name: row.active for row in found.rows}
    by_hand = {name: 16 * active[name] for name in active} | {"head.weight": active["head.weight"]}
    assert counts.sparse_macs == sum(by_hand.values())
    for row in found.rows:
        assert row.mac_share == by_hand[row.name] / counts.sparse_macs
    assert (found.macs, found.sparse_macs) == (counts.macs, counts.sparse_macs)
    assert (found.parameters, found.nonzero) == (counts.params, counts.nonzero)


def test_tensors_of_one_layer_are_added_up_once() -> None:
    attention = nn.MultiheadAttention(4, 1, kdim=6, vdim=8)  # three projection tensors in one module
    model = nn.Sequential()
    model.attention = attention
    model.forward = lambda x: attention(x[:, :, :4], x[:, :, :6], x)[0]
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters()), model, sparsity=0.5, algorithm=static())
    found = summary(optimizer, count(model, (2, 8), masks=optimizer.masks))
    shares = {row.name.rpartition(".")[2]: row.mac_share for row in found.rows[:3]}
    assert len(found.rows) == 4
    assert len(set(shares.values())) == 1
    assert "100.00 %" in next(line for line in str(found).splitlines() if line.startswith("total"))


@pytest.mark.parametrize("with_counts", [False, True])
def test_the_table_is_aligned(with_counts: bool) -> None:
    model = Net()
    optimizer = wrapped(model)
    found = summary(optimizer, count(model, (3, 4, 4), masks=optimizer.masks) if with_counts else None)
    head, rule, *lines = str(found).splitlines()
    rows = lines[: len(found.rows)]
    assert len({len(line) for line in (head, rule, *rows, lines[len(rows) + 1])}) == 1
    assert lines[len(rows)] == rule == "-" * len(head)
    for row, line in zip(found.rows, rows, strict=True):
        assert line.split()[:5] == [
            row.name,
            "x".join(map(str, row.shape)),
            f"{row.sparsity:.4f}",
            f"{row.active:,}",
            f"{row.size:,}",
        ]
    for column in ("sparsity", "active", "weights"):  # right-aligned: the last characters stand below another
        end = head.index(column) + len(column)
        assert all(line[end - 1] != " " and line[end] == " " for line in rows)
    text = str(found)
    assert "exploration rate  0.1000 after 0 steps" in text
    assert ("MACs per sample" in text) == ("of sparse MACs" in head) == with_counts
    assert max(map(len, text.splitlines())) <= 110
    assert all(line == line.rstrip() for line in text.splitlines())


def test_summaries_are_frozen_values() -> None:
    model = Net()
    optimizer = wrapped(model)
    assert summary(optimizer) == summary(optimizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary(optimizer).step = 3


def test_counts_that_do_not_fit_raise() -> None:
    model = Net()
    optimizer = wrapped(model)
    with pytest.raises(ValueError, match=r"count with the masks of now: dst\.count"):
        summary(optimizer, count(model, (3, 4, 4)))
    with pytest.raises(ValueError, match=r"no layer 'stem' for the tensor 'stem\.weight'"):
        summary(optimizer, count(nn.Sequential(nn.Linear(4, 4)), 4))


def test_a_model_that_is_one_layer_and_an_algorithm_of_another_kind() -> None:
    model = nn.Linear(4, 4)
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters()), model, sparsity=0.0, algorithm=rigl(total_steps=10)
    )
    found = summary(optimizer, count(model, 4, masks=optimizer.masks))
    assert found.rows[0].mac_share == 1
    assert found.sparsity == 0
