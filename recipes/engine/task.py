"""What makes one training different from another: its loss, and how a model is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn


class Task(Protocol):
    """Define a loss and an evaluation; the training loop knows nothing else about the work.

    Attributes:
        headline: the key of `evaluate` that picks the best checkpoint, larger is better.
    """

    headline: str

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a model in train mode on a batch, averaged over its samples."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Return the scores of a model on held-out batches; the model's mode is as before afterwards."""
        ...


@dataclasses.dataclass(frozen=True)
class Classification:
    """Tell images apart: cross entropy against class indices, or against the class shares that mixing makes.

    Attributes:
        classes: how many classes there are.
    """

    classes: int
    headline: str = "accuracy"

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross entropy of a batch.

        Args:
            model: returns logits of shape (B, classes).
            batch: images and targets; targets are int64 of shape (B,), or class shares of shape (B, classes).
        """
        images, targets = batch
        return F.cross_entropy(model(images).float(), targets)

    @torch.no_grad()
    def probabilities(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the class probabilities of a model in eval mode, (B, classes) on the CPU."""
        was_training = model.training
        model.eval()
        shares = model(images).float().softmax(1).cpu()
        model.train(was_training)
        return shares

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return top-1 accuracy in [0, 1] (for many classes top-5 as well) and the mean cross entropy.

        Every image counts once: the accuracy is over images, not averaged over classes.
        """
        device = next(model.parameters()).device
        metrics = {"accuracy": 1} | ({"accuracy_top5": 5} if self.classes > 20 else {})
        accuracies = {
            name: torchmetrics.classification.MulticlassAccuracy(self.classes, top_k=k, average="micro").to(
                device
            )
            for name, k in metrics.items()
        }
        loss = torchmetrics.MeanMetric().to(device)
        was_training = model.training
        model.eval()
        for images, targets in batches:
            logits = model(images).float()
            for metric in accuracies.values():
                metric.update(logits, targets)
            loss.update(F.cross_entropy(logits, targets), weight=len(targets))
        model.train(was_training)
        return {name: float(metric.compute()) for name, metric in accuracies.items()} | {
            "loss": float(loss.compute())
        }
