from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from dst.algorithms import Update, rigl, set_, slak, static
from dst.logs import log_masks, mask_image
from dst.optimizer import SparseOptimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.Conv2d(6, 6, (7, 3), groups=6, padding="same"),
        nn.Flatten(),
        nn.Linear(6 * 36, 10).bfloat16(),
    )


def trained(steps: int = 5, algorithm: object = None) -> SparseOptimizer:
    model = network().float()
    optimizer = SparseOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        model,
        sparsity=0.8,
        algorithm=algorithm or set_(total_steps=100, interval=2),
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 8, 8)).square().mean().backward()
        optimizer.step()
    return optimizer


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    return events.Reload()


def pixels(events: EventAccumulator, tag: str) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)).convert("RGB"))
    assert (image == image[..., :1]).all()
    return image[..., 0]


# --- What TensorBoard reads back -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", [None, rigl(total_steps=100, interval=4), slak(total_steps=9, interval=1)]
)
def test_scalars_read_back_are_the_counts(tmp_path: Path, algorithm: object) -> None:
    optimizer = trained(5, algorithm)
    engine = optimizer.sparsifier
    with SummaryWriter(str(tmp_path)) as writer:
        log_masks(writer, optimizer, histograms=False)
        log_masks(writer, optimizer, 77, histograms=False)
    events = read(tmp_path)
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert all([event.step for event in found] == [5, 77] for found in scalars.values())
    active = sum(int(mask.sum()) for mask in engine.masks.values())
    size = sum(mask.numel() for mask in engine.masks.values())
    grown = sum(engine.last_grown.values())
    expected = {
        "masks/sparsity": 1 - active / size,
        "masks/exploration_rate": sum(engine.explored.values()) / size,
        "masks/updates": engine.updates,
        "masks/drop_fraction": engine.algorithm.drop_fraction(5),
        "masks/grown": grown,
        "masks/churn": grown / active,
        **{f"sparsity/{name}": 1 - float(m.float().mean()) for name, m in engine.masks.items()},
    }
    assert grown > 0
    assert scalars.keys() == expected.keys()
    for tag, value in expected.items():
        assert scalars[tag][0].value == pytest.approx(value, rel=1e-6, abs=1e-6), tag
    assert not events.Tags()["images"]
    assert not events.Tags()["histograms"]


def test_histograms_hold_the_active_weights_alone(tmp_path: Path) -> None:
    optimizer = trained()
    with SummaryWriter(str(tmp_path)) as writer:
        log_masks(writer, optimizer)
    events = read(tmp_path)
    assert set(events.Tags()["histograms"]) == {f"weights/{name}" for name in optimizer.masks}
    for name, mask in optimizer.masks.items():
        weights = optimizer.sparsifier.params[name].detach()[mask]
        histogram = events.Histograms(f"weights/{name}")[0].histogram_value
        assert histogram.num == int(mask.sum())
        assert histogram.min == pytest.approx(float(weights.min()))
        assert histogram.max == pytest.approx(float(weights.max()))


def test_broken_and_empty_tensors_do_not_stop_the_log(tmp_path: Path) -> None:
    model = network()  # the last layer is bfloat16
    masks = {
        "0.weight": torch.zeros(6, 2, 3, 3, dtype=torch.bool),
        "1.weight": torch.ones(6, 1, 7, 3, dtype=torch.bool),
        "3.weight": torch.ones(10, 216, dtype=torch.bool),
    }
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters()), model, masks=masks, algorithm=static())
    with torch.no_grad():
        model[1].weight[0] = float("nan")
        model[1].weight[1] = float("inf")
    with SummaryWriter(str(tmp_path)) as writer:
        log_masks(writer, optimizer)
    events = read(tmp_path)
    assert set(events.Tags()["histograms"]) == {"weights/1.weight", "weights/3.weight"}
    assert events.Histograms("weights/1.weight")[0].histogram_value.num == 4 * 21


def test_images_read_back_are_the_masks(tmp_path: Path) -> None:
    optimizer = trained()
    with SummaryWriter(str(tmp_path)) as writer:
        log_masks(writer, optimizer, images=["0.*", "[13].weight"])
    events = read(tmp_path)
    assert set(events.Tags()["images"]) == {f"mask/{i}.weight" for i in (0, 1, 3)}
    matrix = pixels(events, "mask/3.weight")
    assert np.array_equal(matrix == 255, optimizer.masks["3.weight"].numpy())
    convolution = pixels(events, "mask/0.weight")
    assert np.array_equal(convolution == 255, optimizer.masks["0.weight"].reshape(6, -1).numpy())
    grid = pixels(events, "mask/1.weight")
    assert grid.shape == (15, 11)  # 2 rows of 3 kernels of 7x3, one grey line between
    for i, kernel in enumerate(optimizer.masks["1.weight"].squeeze(1)):
        top, left = i // 3 * 8, i % 3 * 4
        assert np.array_equal(grid[top : top + 7, left : left + 3] == 255, kernel.numpy())
    assert set(np.unique(grid[7])) == set(np.unique(grid[:, 3])) == {127}


def test_a_pattern_that_matches_nothing_raises_and_writes_nothing(tmp_path: Path) -> None:
    optimizer = trained(0)
    sentence = r"'5\.\*' matches no masked tensor; near names: '.\.weight'"
    with SummaryWriter(str(tmp_path)) as writer, pytest.raises(ValueError, match=sentence):
        log_masks(writer, optimizer, images=["0.*", "5.*"])
    assert not any(read(tmp_path).Tags()[kind] for kind in ("scalars", "images", "histograms"))


class Frozen:
    """An algorithm without a drop fraction."""

    def due(self, step: int) -> bool:
        return False

    def update(self, step: object, counts: object, evidence: object, memory: dict[str, object]) -> Update:
        return Update({}, memory)


class Recorder:
    """The smallest writer."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag] = scalar_value

    def add_histogram(self, tag: str, values: Tensor, global_step: int) -> None:
        assert values.dim() == 1
        assert values.dtype == torch.float32

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int) -> None:
        assert img_tensor.dim() == 3


def test_any_writer_and_any_algorithm_will_do() -> None:
    recorder = Recorder()
    log_masks(recorder, trained(1, Frozen()), images="*")
    assert "masks/drop_fraction" not in recorder.scalars
    assert recorder.scalars["masks/grown"] == recorder.scalars["masks/churn"] == 0
    half = nn.Linear(4, 4).bfloat16()
    log_masks(
        recorder,
        SparseOptimizer(torch.optim.SGD(half.parameters()), half, sparsity=0.5, algorithm=static()),
    )


# --- Pictures ------------------------------------------------------------------------------------------


@given(
    channels=st.integers(1, 40), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_every_kernel_of_a_depthwise_mask_is_in_the_grid(
    channels: int, height: int, width: int, seed: int
) -> None:
    mask = torch.rand(channels, 1, height, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    image = mask_image(mask)[0]
    columns = (image.shape[1] + 1) // (width + 1)
    found = [
        image[row : row + height, column : column + width]
        for row in range(0, image.shape[0], height + 1)
        for column in range(0, columns * (width + 1), width + 1)
    ]
    assert len(found) - channels < columns  # no row is empty
    for kernel, cell in zip(mask.squeeze(1), found, strict=False):
        assert torch.equal(cell, kernel.float())
    for cell in found[channels:]:
        assert (cell == 0.5).all()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 3, 3), (4, 2, 3, 3), (4, 1, 3), (4, 1, 3, 3, 3)])
def test_other_masks_are_drawn_as_matrices(shape: tuple[int, ...]) -> None:
    mask = torch.arange(math.prod(shape)).reshape(shape) % 3 == 0
    rows = shape[0] if len(shape) > 1 else 1
    assert torch.equal(mask_image(mask)[0], mask.reshape(rows, -1).float())


@pytest.mark.parametrize("shape", [(1024, 1024), (1025, 7), (3, 5000), (2049, 2047)])
def test_big_masks_are_shrunk_by_the_mean_of_blocks(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    image = mask_image(mask)[0]
    down, across = (math.ceil(side / 1024) for side in shape)
    assert image.shape == (math.ceil(shape[0] / down), math.ceil(shape[1] / across))
    assert max(image.shape) <= 1024
    for row in (0, image.shape[0] // 2, image.shape[0] - 1):
        for column in (0, image.shape[1] // 2, image.shape[1] - 1):
            block = mask[row * down : (row + 1) * down, column * across : (column + 1) * across]
            assert float(image[row, column]) == pytest.approx(float(block.float().mean()))
