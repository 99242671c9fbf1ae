"""Effective receptive field: which input pixels the middle of the last feature map depends on, and how far.

Paper: the measure is RepLKNet's (Ding, Zhang, Han, Ding, Scaling Up Your Kernels to 31x31, arXiv 2203.06717,
appendix on the effective receptive field), which SLaK takes over (arXiv 2207.03620). Published code: MIT.
What differs: an image whose score is not finite is an error and not left out; a square of one pixel and the
whole map are squares too (the published loop begins at three pixels and may end with none).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["area_ratio", "effective_receptive_field"]


def effective_receptive_field(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Score every input pixel by how much the middle of the last feature map depends on it.

    With F the feature map (1, D, h, w) of image x (1, C, H, W)::

        score[i, j] = mean over images of  sum_c relu(d/dx[c, i, j]  sum_d relu(F[d, h // 2, w // 2]))

    The model is in eval mode meanwhile; the modes of all its modules, ``requires_grad`` and ``grad`` of its
    parameters are afterwards as before. One image is in memory at a time.

    Args:
        model: Network, on the device of the images.
        images: Images (C, H, W) of one size, floating point, normalised as the model expects; a batch
            (N, C, H, W) or anything that yields images one by one.
        features: From a batch (1, C, H, W) to the feature map (1, D, h, w). If not given, what
            ``model.forward_features`` returns, the last one where that is a sequence.

    Returns:
        Scores (H, W), float64, on the CPU, not negative.

    Raises:
        TypeError: There is no ``features`` and the model has no ``forward_features``, or an image is not of
            floating point.
        ValueError: There is no image, sizes differ, the map is not (1, D, h, w) or does not depend on the
            image, or a score is not finite.

    Examples:
        A 3x3 convolution sees nine pixels, all alike if its weights are:

        >>> import torch
        >>> from dst_models import effective_receptive_field
        >>> conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> _ = torch.nn.init.ones_(conv.weight)
        >>> effective_receptive_field(conv, torch.ones(2, 1, 5, 5), features=conv)
        tensor([[0., 0., 0., 0., 0.],
                [0., 1., 1., 1., 0.],
                [0., 1., 1., 1., 0.],
                [0., 1., 1., 1., 0.],
                [0., 0., 0., 0., 0.]], dtype=torch.float64)

    Source: Ding et al., arXiv 2203.06717, appendix, and its published ``erf/visualize_erf.py`` (centre, both
    rectifications, mean over images).
    """
    if features is None:
        if not hasattr(model, "forward_features"):
            raise TypeError(f"{type(model).__name__} has no forward_features; give features=")
        features = _last_of(model.forward_features)
    total, count = None, 0
    with _frozen_in_eval(model), torch.enable_grad():
        for image in images:
            score = _score(features, image, count)
            if total is not None and score.shape != total.shape:
                raise ValueError(
                    f"image {count} has {_size(score)} pixels and those before it {_size(total)}; "
                    "all must have one size"
                )
            total = score if total is None else total + score
            count += 1
    if total is None:
        raise ValueError("there are no images; give at least one")
    return total / count


def area_ratio(score: Tensor, share: float, *, log: bool = True) -> tuple[int, float]:
    """Find the smallest centred square that holds a share of the score, and its share of the area.

    Squares have odd sides 1, 3, 5, ... around pixel (S // 2, S // 2); the last one is the whole map. The
    ratio is ``(side / S) ** 2``. The smaller the ratio, the more the score is gathered in the middle.

    Args:
        score: Scores (S, S), finite, not negative, not all zero, as `effective_receptive_field` returns.
        share: Share to hold, in (0, 1]; the paper's are 0.2, 0.3, 0.5 and 0.99.
        log: Measure ``log10(score + 1)``, as published, which depends on the scale of the score; False
            measures the score itself, which does not.

    Returns:
        Side in pixels and ``(side / S) ** 2``.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> import torch
        >>> from dst_models import area_ratio
        >>> area_ratio(torch.ones(5, 5), 0.36)
        (3, 0.36)
        >>> area_ratio(torch.ones(5, 5), 0.37)
        (5, 1.0)

    Source: Ding et al., arXiv 2203.06717, appendix, and its published ``erf/analyze_erf.py``. There a square
    must hold more than the share; here it must hold at least the share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be over 0 and at most 1")
    if score.ndim != 2 or score.shape[0] != score.shape[1]:
        raise ValueError(f"score has shape {tuple(score.shape)}; it must be a square map (S, S)")
    score = score.detach().to("cpu", torch.float64)
    if not bool(score.isfinite().all()) or bool((score < 0).any()) or not bool(score.any()):
        raise ValueError("score must be finite, not negative and not zero everywhere")
    held = _held_by_squares((score + 1).log10() if log else score)
    # A share of a thousand summands is rounded; a tie in real numbers must not be lost to that.
    radius = int((held >= share * held[-1] * (1 - 1e-12)).nonzero()[0])
    side = min(2 * radius + 1, score.shape[0])
    return side, side**2 / score.shape[0] ** 2


def _held_by_squares(score: Tensor) -> Tensor:
    """Sum a map (S, S) over the centred square of each radius 0 .. S // 2."""
    size = score.shape[0]
    distance = (torch.arange(size) - size // 2).abs()
    radius = torch.maximum(distance[:, None], distance[None, :]).flatten()
    rings = torch.zeros(size // 2 + 1, dtype=score.dtype)
    return rings.index_add_(0, radius, score.flatten()).cumsum(0)


def _score(features: Callable[[Tensor], Tensor], image: Tensor, index: int) -> Tensor:
    """Score the pixels of one image (C, H, W)."""
    if image.ndim != 3:
        raise ValueError(f"image {index} has shape {tuple(image.shape)}; it must be (C, H, W)")
    if not image.is_floating_point():
        raise TypeError(f"image {index} is of {image.dtype}; it must be of floating point")
    pixels = image.detach()[None].requires_grad_()
    found = features(pixels)
    if found.ndim != 4 or len(found) != 1:
        raise ValueError(f"the feature map has shape {tuple(found.shape)}; it must be (1, D, h, w)")
    middle = found[:, :, found.shape[2] // 2, found.shape[3] // 2]
    gradient = None
    if middle.requires_grad:
        (gradient,) = torch.autograd.grad(middle.relu().sum(), pixels, allow_unused=True)
    if gradient is None:
        raise ValueError("the feature map does not depend on the image, or not differentiably")
    score = gradient[0].relu().sum(0).to("cpu", torch.float64)
    if not bool(score.isfinite().all()):
        raise ValueError(f"the score of image {index} is not finite")
    return score


def _last_of(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def features(x: Tensor) -> Tensor:
        maps = forward(x)
        return maps[-1] if isinstance(maps, Sequence) else maps

    return features


@contextlib.contextmanager
def _frozen_in_eval(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and stop its parameters from asking for gradients; put all back after.

    Autograd need not keep what only gradients of parameters would want.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def _size(score: Tensor) -> str:
    return f"{score.shape[0]}x{score.shape[1]}"
