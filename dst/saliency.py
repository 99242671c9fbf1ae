"""SNIP: how much each weight matters to the loss before training, as layer sparsities or as masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .distribution import check_sparsity
from .masks import draw, grow
from .sync import average_over_ranks
from .undisturbed import undisturbed

Loss = Callable[[], Tensor]
"""A loss of one batch: takes nothing, returns a scalar tensor that depends on the parameters."""


def snip(params: Mapping[str, Tensor], sparsity: float, *, loss: Loss | Sequence[Loss]) -> dict[str, float]:
    """Give each tensor the sparsity that the SNIP mask has there, as SLaK does; the mask itself is left open.

    s_l = 1 - k_l / N_l, where k_l of the round((1 - S) N) weights with the largest |g w| lie in tensor l.
    With `functools.partial(snip, loss=...)` it is a distribution like `erk`.

    Args:
        params: Name to trainable parameter, in the model's order.
        sparsity: Global fraction of zeros S, in [0, 1].
        loss: A function of no arguments that returns the scalar loss of a batch, or one such function for
            each of several batches.

    Returns:
        Name to layer sparsity; `active_counts` turns them back into exactly k_l.

    Raises:
        TypeError: If `sparsity` is not a number or the loss is not a tensor.
        ValueError: As `snip_masks` does.

    Examples:
        >>> one = torch.nn.Parameter(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> two = torch.nn.Parameter(torch.tensor([5.0, 6.0]))
        >>> snip({"one": one, "two": two}, 0.5, loss=lambda: one.sum() + two.sum())
        {'one': 0.75, 'two': 0.0}

    Source:
        Lee et al., SNIP, ICLR 2019, section 4 and algorithm 1; its layer ratios alone: Liu et al., More
        ConvNets in the 2020s (SLaK), ICLR 2023, section 4, and the released code.
    """
    masks = snip_masks(params, sparsity, loss=loss)
    return {name: int((~mask).count_nonzero()) / mask.numel() for name, mask in masks.items()}


def snip_masks(
    params: Mapping[str, Tensor], sparsity: float, *, loss: Loss | Sequence[Loss]
) -> dict[str, Tensor]:
    """Draw the SNIP mask: the round((1 - S) N) weights of the whole network with the largest |g w|.

    g is the gradient of the loss, averaged over the batches and over all ranks before the absolute value is
    taken. Equal saliencies go by lowest index, earlier tensors first. Each tensor keeps at least its best
    weight. A parameter that the loss does not use has saliency zero. Gradients, module buffers (BatchNorm
    statistics), train mode and the random generators of torch, numpy and Python are afterwards as they were,
    also when the loss raises. The parameters must be whole: choose masks before sharding a model.

    Args:
        params: Name to trainable parameter, in the model's order.
        sparsity: Global fraction of zeros S, in [0, 1].
        loss: A function of no arguments that returns the scalar loss of a batch, or one such function for
            each of several batches.

    Returns:
        Name to bool mask of the parameter's shape, True where active, for `SparseOptimizer(masks=...)`.

    Raises:
        TypeError: If `sparsity` is not a number or the loss is not a tensor.
        ValueError: If `sparsity` is outside [0, 1], a parameter is frozen, the loss is not a scalar with a
            gradient, a saliency is not finite, all are zero, or fewer weights stay than there are tensors.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -3.0, 2.0]))
        >>> snip_masks({"weight": weight}, 1 / 3, loss=lambda: (weight * torch.tensor([1.0, 1.0, 5.0])).sum())
        {'weight': tensor([False,  True,  True])}

    Source:
        Lee et al., SNIP, ICLR 2019, section 4 and algorithm 1. The absolute value of the product, and not of
        the gradient alone: Evci et al., Rigging the Lottery, ICML 2020, appendix M.
    """
    asked = check_sparsity(sparsity)
    losses = [loss] if callable(loss) else list(loss)
    if not params or not losses:
        raise ValueError(f"snip needs a parameter and a loss, got {len(params)} and {len(losses)}")
    for name, parameter in params.items():
        if not parameter.requires_grad:
            raise ValueError(f"parameter {name!r} is frozen (requires_grad=False); leave it out of params")
    active = round((1 - asked) * sum(parameter.numel() for parameter in params.values()))
    if active < len(params) and asked != 1.0:
        raise ValueError(
            f"at sparsity {asked} only {active} weights stay, fewer than the {len(params)} tensors that "
            "each keep their best; ask for a lower sparsity"
        )
    scores = _saliencies(params, losses)
    if asked == 1.0:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    return _global_top(scores, active)


def _saliencies(params: Mapping[str, Tensor], losses: Sequence[Loss]) -> dict[str, Tensor]:
    """Return |mean of gradient * weight| by name, in float32 at least."""
    parameters = list(params.values())
    gradients = [
        torch.zeros(
            parameter.shape,
            dtype=torch.promote_types(parameter.dtype, torch.float32),
            device=parameter.device,
        )
        for parameter in parameters
    ]
    with undisturbed(parameters):
        for loss in losses:
            for total, gradient in zip(gradients, _gradients(loss, parameters), strict=True):
                if gradient is not None:
                    total += gradient / len(losses)
    scores = {
        # The product is averaged, not the gradient: ranks whose weights are not yet alike agree all the same.
        name: average_over_ranks(gradient * parameter.detach()).abs_()
        for (name, parameter), gradient in zip(params.items(), gradients, strict=True)
    }
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(
                f"the saliency of {name!r} is not finite (NaN or infinity in its gradient or weights); check "
                "the loss, the inputs and the initial weights"
            )
    if not any(score.any() for score in scores.values()):
        raise ValueError(
            "every saliency |gradient * weight| is zero: the loss does not depend on the selected parameters "
            "or their weights or gradients are all zero"
        )
    return scores


def _gradients(loss: Loss, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    # torch.autograd.grad, unlike backward, leaves every .grad alone.
    with torch.enable_grad():
        value = loss()
        if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"loss() must return a scalar tensor, got {type(value).__name__}")
        if value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"loss() must return a scalar that depends on the parameters, got shape "
                f"{tuple(value.shape)} with requires_grad={value.requires_grad}"
            )
        return torch.autograd.grad(value, parameters, allow_unused=True)


def _global_top(scores: Mapping[str, Tensor], active: int) -> dict[str, Tensor]:
    """Keep the best weight of each tensor and then the best of the whole, `active` in all.

    Where each tensor has a weight among the best `active` of the whole, this is exactly the top `active`.
    """
    device = next(iter(scores.values())).device
    flat = torch.cat([score.reshape(-1).to(device) for score in scores.values()])
    best = torch.cat([draw(score.reshape(-1), 1).to(device) for score in scores.values()])
    chosen = grow(flat, best, active - len(scores)).split([score.numel() for score in scores.values()])
    return {
        name: mask.view(score.shape).to(score.device)
        for (name, score), mask in zip(scores.items(), chosen, strict=True)
    }
