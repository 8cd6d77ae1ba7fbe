"""What the training examples share: the digits, the model, steps of training, inference."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torchvision.models import MobileNetV2

import dwswap

TRAINING_IMAGES = 1400
BATCH = 64
BAR = 0.9
# Rows of: expansion, channels, blocks, stride of the first block.
BLOCKS = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 40, 2, 2], [4, 64, 1, 1]]


class Digits(NamedTuple):
    """Images (N, 3, 32, 32), float32 in [0, 1], and labels (N), int64."""

    images: Tensor
    labels: Tensor


def load_digits(path: Path | None) -> Digits:
    """The 1,797 digits of scikit-learn, or those of an .npz file."""
    if path is not None:
        with np.load(path) as data:
            images, labels = data["images"], data["target"]
    else:
        try:
            from sklearn import datasets
        except ModuleNotFoundError:
            raise SystemExit(
                "the digits ship with scikit-learn, which is not installed: "
                "pip install 'dwswap[bench]', or --data FILE.npz with `images` and `target`"
            ) from None
        images, labels = datasets.load_digits(return_X_y=True)
    small = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    large = large.expand(-1, 3, -1, -1).contiguous()
    return Digits(large, torch.as_tensor(labels, dtype=torch.int64))


def split_digits(path: Path | None, device: str | torch.device) -> tuple[Digits, Digits]:
    """Digits to train on and digits to test on, in an order from PyTorch's global seed."""
    images, labels = load_digits(path)
    order = torch.randperm(len(images))
    images, labels = images[order].to(device), labels[order].to(device)
    return (
        Digits(images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]),
        Digits(images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]),
    )


def new_model(device: str | torch.device) -> nn.Module:
    """The small MobileNetV2 in train mode, with weights from PyTorch's global seed."""
    model = MobileNetV2(num_classes=10, inverted_residual_setting=BLOCKS, dropout=0.0)
    return model.to(device).train()


def new_optimizer(model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler]:
    optimizer = AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    return optimizer, OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)


def train_steps(
    model: nn.Module,
    digits: Digits,
    batches: Iterable[Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
) -> list[float]:
    """A step per batch, which is a tensor of indices into the digits; the loss of every step."""
    losses = []
    for index in batches:
        index = index.to(digits.images.device)
        loss = F.cross_entropy(model(digits.images[index]), digits.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).float().mean().item()


def check_inference(model: nn.Module, test: Digits, console: Console) -> tuple[float, float, bool]:
    """Optimize a trained model in eval mode: accuracy before and after, and whether both will do.

    They must agree, and be at least ``BAR``.
    """
    model.eval()
    fast = dwswap.optimize(model)
    console.print(dwswap.report(fast).summary(), markup=False, soft_wrap=True)
    predicted = predict(model, test.images), predict(fast, test.images)
    before, after = (accuracy(p, test.labels) for p in predicted)
    table = Table(title=f"{len(test.images)} test digits, {test.images.device.type}")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_row("trained", f"{before:.2%}")
    table.add_row("optimized for inference", f"{after:.2%}")
    console.print(table)
    console.print(f"predictions that differ: {(predicted[0] != predicted[1]).sum()}")
    passed = after == before and after >= BAR
    if not passed:
        console.print(
            f"FAILED: accuracy {before:.2%} before optimize, {after:.2%} after; "
            f"they must agree, and be at least {BAR:.0%}",
            style="red",
        )
    return before, after, passed
