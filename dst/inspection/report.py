"""What `python -m dst` tells about the masks of one checkpoint, and of two."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..counters import Counts, count
from ..metrics import churn, mask_overlap
from ..selection import plain_name
from .checkpoint_files import InspectionError
from .saved_masks import SavedMasks
from .tables import printable, table, times


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One masked tensor of a checkpoint.

    Attributes:
        name: Its name in the plain model.
        shape: Its shape.
        sparsity: Fraction of its entries that are inactive, in [0, 1].
        active: Active weights.
        size: All weights.
        share: Its active weights as a fraction of those of all tensors here.
        sparse_macs: Multiply-accumulates per sample of its layer's active weights, None without a model.
            Tensors of one layer, such as the projections of attention, show the same figure.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    active: int
    size: int
    share: float
    sparse_macs: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect_masks` returns; printed, it is a table.

    Attributes:
        file: The checkpoint.
        masks_from: "saved masks", or "zeros" of the weights.
        tensors: The masked tensors.
        active: Active weights of them.
        size: All weights of them.
        sparsity: Fraction of them that is inactive.
        step: Completed optimizer steps; None where it was not saved, as the next four.
        updates: Mask updates so far.
        algorithm: The algorithm, printed.
        seed: Seed of its random choices.
        exploration_rate: Fraction of the weights that were ever active.
        stray: Weights outside the masks that are not zero, None if the weights are not in the file.
        parameters: All parameters of the model; None without a model, as the next three.
        nonzero: The same without inactive weights.
        macs: Multiply-accumulates per sample with all weights.
        sparse_macs: Multiply-accumulates per sample of active weights.
    """

    file: str
    masks_from: str
    tensors: tuple[TensorRow, ...]
    active: int
    size: int
    sparsity: float
    step: int | None
    updates: int | None
    algorithm: str | None
    seed: int | None
    exploration_rate: float | None
    stray: int | None
    parameters: int | None
    nonzero: int | None
    macs: int | None
    sparse_macs: int | None

    def __str__(self) -> str:
        lines = [["tensor", "shape", "sparsity", "active", "weights", "of active"]]
        lines += [
            [printable(row.name), times(row.shape), *_numbers(row.sparsity, row.active, row.size, row.share)]
            for row in self.tensors
        ]
        lines.append(["total", "", *_numbers(self.sparsity, self.active, self.size, 1.0)])
        if self.sparse_macs is not None:
            by_layer = {row.name.rpartition(".")[0]: row.sparse_macs or 0 for row in self.tensors}
            cells = [f"{row.sparse_macs:,}" for row in self.tensors]
            for line, cell in zip(lines, ["sparse MACs", *cells, f"{sum(by_layer.values()):,}"], strict=True):
                line.append(cell)
        return "\n".join([table(lines), "", *self._sentences()])

    def _sentences(self) -> list[str]:
        facts = [("masks", "as saved by dst")]
        if self.masks_from == "zeros":
            facts = [("masks", "read off the zeros of the weights; tensors of two or more dimensions")]
        if self.step is not None:
            facts.append(("step", f"{self.step:,}, after {self.updates:,} mask updates, seed {self.seed}"))
        if self.exploration_rate is not None:
            facts.append(("exploration rate", f"{self.exploration_rate:.4f}"))
        if self.algorithm is not None:
            facts.append(("algorithm", printable(self.algorithm)))
        if self.stray is not None:
            facts.append(("outside the masks", f"{self.stray:,} weights are not zero"))
        if self.parameters is not None:
            facts.append(("parameters", f"{self.nonzero:,} of {self.parameters:,} non-zero"))
            facts.append(("MACs per sample", f"{self.sparse_macs:,} of {self.macs:,} with active weights"))
        return [line for label, fact in facts for line in _wrapped(f"{label:<17}  {fact}")]


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """How one mask, or all together, went from the first checkpoint to the second.

    Attributes:
        name: The tensor, or "total".
        shape: Its shape; empty for the total.
        before: Active weights in the first.
        after: Active weights in the second.
        kept: Active in both.
        grown: Active in the second only.
        dropped: Active in the first only.
        overlap: Jaccard index, |both| / |either|.
        churn: `grown` as a fraction of `after`.
    """

    name: str
    shape: tuple[int, ...]
    before: int
    after: int
    kept: int
    grown: int
    dropped: int
    overlap: float
    churn: float


@dataclass(frozen=True, slots=True)
class Difference:
    """What `compare_masks` returns; printed, it is a table.

    Attributes:
        files: The two checkpoints.
        steps: The steps they were saved at, None where not saved.
        tensors: By tensor.
        total: Over all tensors together.
    """

    files: tuple[str, str]
    steps: tuple[int | None, int | None]
    tensors: tuple[DifferenceRow, ...]
    total: DifferenceRow

    def __str__(self) -> str:
        head = ["tensor", "shape", "before", "after", "kept", "grown", "dropped", "overlap", "churn"]
        lines = [head]
        for row in (*self.tensors, self.total):
            counts = (row.before, row.after, row.kept, row.grown, row.dropped)
            numbers = [*(f"{number:,}" for number in counts), f"{row.overlap:.4f}", f"{row.churn:.4f}"]
            lines.append([printable(row.name), times(row.shape), *numbers])
        sides = [
            f"{label}  {printable(file)}" + ("" if step is None else f", step {step:,}")
            for label, file, step in zip(("before", "after "), self.files, self.steps, strict=True)
        ]
        return "\n".join([table(lines), "", *sides])


def inspect_masks(
    saved: SavedMasks, model: nn.Module | None = None, input_size: Sequence[int] = ()
) -> Inspection:
    """Count what is active in the masks of a checkpoint.

    Args:
        saved: From `read_masks`.
        model: The model, for parameters and multiply-accumulates (MACs); its weights are not read.
        input_size: Size of one sample without the batch, for the model.

    Returns:
        The inspection.

    Raises:
        InspectionError: If the masks are not of this model, or it does not take such a sample.

    Examples:
        >>> import torch
        >>> saved = SavedMasks("a.pt", {"weight": torch.tensor([[True, False]])}, from_zeros=True)
        >>> inspect_masks(saved, nn.Linear(2, 1), (2,)).sparse_macs
        1
    """
    masks, counts = saved.masks, None
    if model is not None:
        buffers = {plain_name(name) for name, _ in model.named_buffers()}
        masks = {name: mask for name, mask in masks.items() if name not in buffers}
        if not masks:
            raise InspectionError(
                f"{saved.file}: only buffers of the model hold zeros; its weights are dense"
            )
        counts = _counted(model, input_size, masks)
    layers = {} if counts is None else {row.name: row.sparse_macs for row in counts.rows}
    active = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    total, size = sum(active.values()), sum(mask.numel() for mask in masks.values())
    return Inspection(
        file=saved.file,
        masks_from="zeros" if saved.from_zeros else "saved masks",
        tensors=tuple(
            TensorRow(
                name=name,
                shape=tuple(mask.shape),
                sparsity=(mask.numel() - active[name]) / mask.numel(),
                active=active[name],
                size=mask.numel(),
                share=active[name] / total if total else 0.0,
                sparse_macs=None if counts is None else layers.get(name.rpartition(".")[0], 0),
            )
            for name, mask in masks.items()
        ),
        active=total,
        size=size,
        sparsity=(size - total) / size,
        step=saved.step,
        updates=saved.updates,
        algorithm=saved.algorithm,
        seed=saved.seed,
        exploration_rate=None if saved.explored is None else saved.explored / size,
        stray=saved.stray,
        parameters=None if counts is None else counts.params,
        nonzero=None if counts is None else counts.nonzero,
        macs=None if counts is None else counts.macs,
        sparse_macs=None if counts is None else counts.sparse_macs,
    )


def compare_masks(a: SavedMasks, b: SavedMasks) -> Difference:
    """Compare the masks of two checkpoints, tensor by tensor.

    Args:
        a: The first, before.
        b: The second, after.

    Returns:
        The difference.

    Raises:
        InspectionError: If the two do not hold the same tensors.

    Examples:
        >>> import torch
        >>> a = SavedMasks("a.pt", {"w": torch.tensor([True, True, False])}, from_zeros=True)
        >>> b = SavedMasks("b.pt", {"w": torch.tensor([True, False, True])}, from_zeros=True)
        >>> compare_masks(a, b).total.grown, compare_masks(a, b).total.churn
        (1, 0.5)
    """
    _check_same_tensors(a, b)
    return Difference(
        files=(a.file, b.file),
        steps=(a.step, b.step),
        tensors=tuple(_difference(name, {name: a.masks[name]}, {name: b.masks[name]}) for name in a.masks),
        total=_difference(None, a.masks, b.masks),
    )


def _counted(model: nn.Module, input_size: Sequence[int], masks: Mapping[str, Tensor]) -> Counts:
    try:
        return count(model, input_size, masks)
    except Exception as error:  # the model's own forward can raise anything
        message = " ".join(str(error).split())
        raise InspectionError(
            f"the model of --model cannot be counted on an input of {times(input_size)}: {message}"
        ) from error


def _check_same_tensors(a: SavedMasks, b: SavedMasks) -> None:
    shapes = [{name: tuple(mask.shape) for name, mask in saved.masks.items()} for saved in (a, b)]
    names = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if names:
        first, second = (times(found[names[0]]) if names[0] in found else "absent" for found in shapes)
        raise InspectionError(
            f"{a.file} and {b.file} hold masks of different tensors: {names[0]!r} is {first} in the first "
            f"and {second} in the second ({len(names)} of {len({**shapes[0], **shapes[1]})} differ)"
        )


def _difference(name: str | None, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> DifferenceRow:
    before, after = (sum(int(mask.count_nonzero()) for mask in masks.values()) for masks in (a, b))
    kept = sum(int((a[key] & b[key]).count_nonzero()) for key in a)
    return DifferenceRow(
        name="total" if name is None else name,
        shape=() if name is None else tuple(a[name].shape),
        before=before,
        after=after,
        kept=kept,
        grown=after - kept,
        dropped=before - kept,
        overlap=mask_overlap(a, b).total,
        churn=churn(a, b),
    )


def _numbers(sparsity: float, active: int, size: int, share: float) -> list[str]:
    return [f"{sparsity:.4f}", f"{active:,}", f"{size:,}", f"{100 * share:.2f} %"]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 110, subsequent_indent=" " * 19, break_long_words=False, break_on_hyphens=False
    )
