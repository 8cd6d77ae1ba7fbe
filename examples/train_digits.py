"""Train a small MobileNetV2 on handwritten digits with dwswap, then optimize it for inference.

    python examples/train_digits.py

The 1,797 digits of 8 x 8 pixels ship with scikit-learn. ``dwswap.optimize`` is called twice: on the
model in train mode, where it swaps the depthwise layers and keeps everything trainable, and on the
trained model in eval mode, where it makes an inference model. The accuracy must not move.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import MobileNetV2

import dwswap
from dwswap.bench.records import record, write_json

TRAINING_IMAGES = 1400
BATCH = 64
BAR = 0.9
# Rows of: expansion, channels, blocks, stride of the first block.
BLOCKS = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 40, 2, 2], [4, 64, 1, 1]]


def load_digits(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images (1797, 3, 32, 32) in [0, 1] and labels, from scikit-learn or from an .npz file."""
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
    return large.expand(-1, 3, -1, -1).contiguous(), torch.as_tensor(labels, dtype=torch.int64)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


def train_epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One pass over the images in random order; the mean loss."""
    total = 0.0
    for index in torch.randperm(len(images)).split(BATCH):
        index = index.to(images.device)
        loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item() * len(index)
    return total / len(images)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on digits, with dwswap in both modes.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="arrays images and target")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[-1])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    console = Console(highlight=False)

    torch.manual_seed(args.seed)
    images, labels = load_digits(args.data)
    order = torch.randperm(len(images))
    images, labels = images[order].to(args.device), labels[order].to(args.device)
    train_images, test_images = images[:TRAINING_IMAGES], images[TRAINING_IMAGES:]
    train_labels, test_labels = labels[:TRAINING_IMAGES], labels[TRAINING_IMAGES:]

    model = MobileNetV2(num_classes=10, inverted_residual_setting=BLOCKS, dropout=0.0)
    model.to(args.device).train()
    # Train mode: the depthwise layers are swapped, their Parameters stay the same objects.
    model = dwswap.optimize(model)
    console.print(dwswap.report(model).summary(), markup=False, soft_wrap=True)

    steps = args.epochs * -(-TRAINING_IMAGES // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    history = []
    start = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=args.epochs)
        for epoch in range(1, args.epochs + 1):
            model.train()
            loss = train_epoch(model, train_images, train_labels, optimizer, schedule)
            accuracy = (predict(model.eval(), test_images) == test_labels).float().mean().item()
            history.append({"epoch": epoch, "loss": loss, "test_accuracy": accuracy})
            progress.console.print(f"epoch {epoch}: loss {loss:.4f}, test accuracy {accuracy:.2%}")
            progress.advance(task)
    seconds = time.perf_counter() - start

    model.eval()
    fast = dwswap.optimize(model)
    console.print(dwswap.report(fast).summary(), markup=False, soft_wrap=True)
    before, after = predict(model, test_images), predict(fast, test_images)
    accuracy_before = (before == test_labels).float().mean().item()
    accuracy_after = (after == test_labels).float().mean().item()
    table = Table(title=f"{len(test_images)} test digits, {args.device}")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_row("trained", f"{accuracy_before:.2%}")
    table.add_row("optimized for inference", f"{accuracy_after:.2%}")
    console.print(table)
    console.print(f"trained in {seconds:.1f} s; predictions that differ: {(before != after).sum()}")

    if args.json:
        result = record(
            "train_digits",
            device=args.device,
            seconds=seconds,
            epochs=history,
            accuracy_before=accuracy_before,
            accuracy_after=accuracy_after,
        )
        console.print(f"saved: {write_json(args.json, result)}", markup=False)
    if accuracy_after != accuracy_before or accuracy_after < BAR:
        console.print(
            f"FAILED: accuracy {accuracy_before:.2%} before optimize, {accuracy_after:.2%} after; "
            f"they must agree, and be at least {BAR:.0%}",
            style="red",
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
