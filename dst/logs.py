"""Write masks to TensorBoard, or to anything that takes scalars, histograms and images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import exploration_rate
from .optimizer import SparseOptimizer
from .selection import near_names

_LIMIT = 1024  # pixels on a side of an image
_GAP = 0.5  # grey between kernels: neither active (1) nor inactive (0)


class Writer(Protocol):
    """What `log_masks` asks of a writer; `torch.utils.tensorboard.SummaryWriter` has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Write a number."""
        ...

    def add_histogram(self, tag: str, values: Tensor, global_step: int, /) -> object:
        """Write the distribution of a one-dimensional float tensor."""
        ...

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int, /) -> object:
        """Write an image of shape (1, height, width) with float values in [0, 1]."""
        ...


def log_masks(
    writer: Writer,
    optimizer: SparseOptimizer,
    step: int | None = None,
    *,
    histograms: bool = True,
    images: str | Sequence[str] = (),
) -> None:
    """Write how sparse the tensors are, how the masks move, and what they look like.

    - `masks/sparsity`: fraction of all masked weights that are inactive
    - `masks/exploration_rate`: fraction of them that were ever active, see `exploration_rate`
    - `masks/updates`: mask updates so far
    - `masks/drop_fraction`: the algorithm's drop fraction at its step, if it has one
    - `masks/grown`: weights that came active in the last mask update; 0 before the first
    - `masks/churn`: the same as a fraction of the active weights
    - `sparsity/<tensor>`: fraction of its entries that are inactive
    - `weights/<tensor>`: histogram of its active weights; infinities and NaN are left out, and a tensor with
      no finite active weight has none
    - `mask/<tensor>`: image of its mask, see `mask_image`

    Args:
        writer: Such as a `SummaryWriter`; it stays open.
        optimizer: The sparse optimizer.
        step: Where on the axis to write; None for the optimizer's completed steps.
        histograms: Whether to write the histograms, which cost more than the rest.
        images: Glob or globs on the names of the masked tensors whose masks are drawn.

    Raises:
        ValueError: If a pattern matches no masked tensor; nothing is written then.

    Examples:
        >>> from dst.algorithms import static
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        ...     def add_image(self, tag, image, step):
        ...         print(tag, tuple(image.shape), step)
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = SparseOptimizer(torch.optim.SGD(layer.parameters()), layer, sparsity=0.5,
        ...                             algorithm=static())
        >>> log_masks(Printer(), optimizer, histograms=False, images="weight")
        masks/sparsity 0.5 0
        masks/exploration_rate 0.5 0
        masks/updates 0 0
        masks/drop_fraction 0.0 0
        masks/grown 0 0
        masks/churn 0.0 0
        sparsity/weight 0.5 0
        mask/weight (1, 2, 4) 0
    """
    sparsifier = optimizer.sparsifier
    drawn = _matching(images, sparsifier.masks)
    at = sparsifier.step if step is None else step
    for tag, value in _scalars(optimizer).items():
        writer.add_scalar(tag, value, at)
    if histograms:
        for name, parameter in sparsifier.params.items():
            active = parameter.detach()[sparsifier.masks[name].to(parameter.device)].float()
            finite = active[active.isfinite()]
            if finite.numel():
                writer.add_histogram(f"weights/{name}", finite.cpu(), at)
    for name in drawn:
        writer.add_image(f"mask/{name}", mask_image(sparsifier.masks[name]), at)


def mask_image(mask: Tensor) -> Tensor:
    """Draw a mask: white is active, black inactive.

    The kernels (C, 1, kh, kw) of a depthwise convolution become a grid, row by row from the top left, about
    as wide as high, with grey lines between. Any other mask becomes a matrix whose rows are its first
    dimension. A side of more than 1024 pixels is shrunk by the smallest whole factor that suffices; a grey
    pixel is then the mean of its block.

    Args:
        mask: bool, any shape.

    Returns:
        float32, (1, height, width), in [0, 1], on the CPU.

    Examples:
        >>> mask_image(torch.ones(4, 1, 2, 2, dtype=torch.bool))
        tensor([[[1.0000, 1.0000, 0.5000, 1.0000, 1.0000],
                 [1.0000, 1.0000, 0.5000, 1.0000, 1.0000],
                 [0.5000, 0.5000, 0.5000, 0.5000, 0.5000],
                 [1.0000, 1.0000, 0.5000, 1.0000, 1.0000],
                 [1.0000, 1.0000, 0.5000, 1.0000, 1.0000]]])
    """
    values = mask.detach().float().cpu()
    if values.dim() == 4 and values.shape[1] == 1:
        picture = _grid(values.squeeze(1))
    else:
        picture = values.reshape(values.shape[0] if values.dim() > 1 else 1, -1)
    factors = [math.ceil(side / _LIMIT) for side in picture.shape]
    # With ceil_mode the last block of a side may be smaller, and is divided by its own size.
    return F.avg_pool2d(picture[None], factors, ceil_mode=True)


def _grid(kernels: Tensor) -> Tensor:
    """Lay (C, height, width) out on a nearly square grid; cells without a kernel are grey."""
    number, height, width = kernels.shape
    columns = min(number, max(1, round(math.sqrt(number * (height + 1) / (width + 1)))))
    rows = math.ceil(number / columns)
    cells = torch.full((rows * columns, height + 1, width + 1), _GAP)
    cells[:number, :height, :width] = kernels
    grid = cells.view(rows, columns, height + 1, width + 1).transpose(1, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]


def _scalars(optimizer: SparseOptimizer) -> dict[str, float]:
    sparsifier = optimizer.sparsifier
    sizes = {name: parameter.numel() for name, parameter in sparsifier.params.items()}
    active, size = sum(sparsifier.counts.values()), sum(sizes.values())
    grown = sum(sparsifier.last_grown.values())
    found: dict[str, float] = {
        "masks/sparsity": (size - active) / size,
        "masks/exploration_rate": exploration_rate(optimizer),
        "masks/updates": sparsifier.updates,
    }
    drop_fraction = getattr(sparsifier.algorithm, "drop_fraction", None)
    if callable(drop_fraction):
        found["masks/drop_fraction"] = float(drop_fraction(sparsifier.step))  # pyright: ignore[reportArgumentType]
    found["masks/grown"] = grown
    found["masks/churn"] = grown / active if active else 0.0
    for name, total in sizes.items():
        found[f"sparsity/{name}"] = (total - sparsifier.counts[name]) / total
    return found


def _matching(patterns: str | Sequence[str], masks: Mapping[str, Tensor]) -> list[str]:
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in masks):
            raise ValueError(
                f"images pattern {pattern!r} matches no masked tensor; "
                f"near names: {near_names(pattern, masks)}"
            )
    return [name for name in masks if any(fnmatchcase(name, pattern) for pattern in patterns)]
