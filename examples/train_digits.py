"""Train a small MobileNetV2 on handwritten digits with dwswap, then optimize it for inference.

    python examples/train_digits.py

The 1,797 digits of 8 x 8 pixels ship with scikit-learn. ``dwswap.optimize`` is called twice: on the
model in train mode, where it swaps the depthwise layers and keeps everything trainable, and on the
trained model in eval mode, where it makes an inference model. The accuracy must not move.

With ``--compare`` the same model is trained with the swap and without, and the curves of the loss
are compared; ``compare_training.py`` says how.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from compare_training import compare_training
from digits import (
    BATCH,
    accuracy,
    check_inference,
    new_model,
    new_optimizer,
    predict,
    split_digits,
    train_steps,
)
from rich.console import Console
from rich.progress import Progress

import dwswap
from dwswap.bench.records import record, write_json


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on digits, with dwswap in both modes.")
    parser.add_argument(
        "--epochs", type=int, default=8, help="default: 8; fewer than 4 may not pass the check"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="arrays images and target")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[-1])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train with the swap and without, and compare; --json saves a picture, too",
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    return args


def main() -> int:
    args = arguments()
    console = Console(highlight=False)
    torch.manual_seed(args.seed)
    training, test = split_digits(args.data, args.device)
    model = new_model(args.device)
    if args.compare:
        return compare_training(
            model, training, test, epochs=args.epochs, seed=args.seed, path=args.json, out=console
        )

    # Train mode: the depthwise layers of a copy are swapped. The optimizer comes after it.
    model = dwswap.optimize(model)
    console.print(dwswap.report(model).summary(), markup=False, soft_wrap=True)

    images = len(training.images)
    optimizer, schedule = new_optimizer(model, args.epochs * -(-images // BATCH))
    history = []
    start = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=args.epochs)
        for epoch in range(1, args.epochs + 1):
            model.train()
            batches = torch.randperm(images).split(BATCH)
            losses = train_steps(model, training, batches, optimizer, schedule)
            loss = sum(x * len(b) for x, b in zip(losses, batches, strict=True)) / images
            reached = accuracy(predict(model.eval(), test.images), test.labels)
            history.append({"epoch": epoch, "loss": loss, "test_accuracy": reached})
            progress.console.print(f"epoch {epoch}: loss {loss:.4f}, test accuracy {reached:.2%}")
            progress.advance(task)
    seconds = time.perf_counter() - start
    console.print(f"trained in {seconds:.1f} s")

    before, after, passed = check_inference(model, test, console)
    if args.json:
        result = record(
            "train_digits",
            device=args.device,
            seconds=seconds,
            epochs=history,
            accuracy_before=before,
            accuracy_after=after,
        )
        console.print(f"saved: {write_json(args.json, result)}", markup=False)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
