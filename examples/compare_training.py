"""Train with the swap and without, and compare: what ``train_digits.py --compare`` does.

Two trainings that round one sum differently drift apart, whatever their kernels: the difference of
their losses grows from 1e-7 in the first step to 1e-1 after 50. So the measure is how far PyTorch
drifts from itself. The model is trained ``RUNS`` times without the swap, and as often with it,
always from the same weights and on the same batches, in float32 without TF32. The runs differ in
what must not matter: every other one is in channels_last, where PyTorch has other kernels, and in
all but the first each pixel is one float32 ulp larger or smaller, at random from the number of the
run. What PyTorch's own kernels leave to chance on a GPU comes on top.

The drift of two curves at step t is the largest difference of their losses up to t.

- ``noise``: the largest drift between any two runs without the swap;
- ``swapped``: the drift between the runs with and without the swap of the same number, the median
  over the numbers;
- at each of the first ``STEPS`` steps, ``swapped`` must be at most ``FACTOR`` times ``noise`` plus
  ``ULPS`` float32 ulp at the scale of the loss.

The drift grows in jumps (a value crosses the kink of a ReLU6), and chance decides in which of the
first steps they come: two ways in which PyTorch itself computes on a CPU, with oneDNN and without,
were once 3 times as far apart as the noise is. Hence the median, and a factor that is a few steps'
growth. What makes the test sharp are the first steps, where the noise is 1e-6: layers that compute
in bfloat16 and gradients of mirrored weights fail there. Single layers are held to a narrower limit
by ``dwswap.optimize(..., verify=True)``; this is about what becomes of a whole training.

The accuracies at the end, means over the runs, must be within ``POINTS`` percentage points. A test
digit is 0.25 points, and chance alone moves single runs by half a point.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits import BATCH, Digits, accuracy, new_optimizer, predict, train_steps
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import dwswap
from dwswap.bench.records import record, write_json
from dwswap.cli.bench_common import save_picture
from dwswap.precision import float32_convolutions

RUNS = 5
STEPS = 50
FACTOR = 10
ULPS = 4
POINTS = 0.5
FORMATS = (torch.contiguous_format, torch.channels_last)


class Comparison(NamedTuple):
    """Per step, ``(STEPS,)`` in float64: the drift with the swap, that without, and the limit."""

    swapped: Tensor
    noise: Tensor
    limit: Tensor

    @property
    def passed(self) -> bool:
        # NaN is within no limit.
        return bool((self.swapped <= self.limit).all())


def nudged(digits: Digits, run: int) -> Digits:
    """The digits of one run: every pixel one ulp off, up or down; run 0 has them as they are."""
    if run == 0:
        return digits
    images = digits.images
    generator = torch.Generator().manual_seed(run)
    up = torch.randint(2, images.shape, generator=generator).to(images.device)
    return digits._replace(images=images.nextafter(torch.where(up == 1, torch.inf, -torch.inf)))


def all_batches(images: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(images, generator=generator).split(BATCH)


def compare_losses(plain: Tensor, swapped: Tensor) -> Comparison:
    """Judge losses, ``(RUNS, steps)`` in float64, by the rule of this file."""
    plain, swapped = plain[:, :STEPS], swapped[:, :STEPS]
    pairs = torch.combinations(torch.arange(len(plain)))
    noise = (plain[pairs[:, 0]] - plain[pairs[:, 1]]).abs().cummax(1).values.amax(0)
    drift = (swapped - plain).abs().cummax(1).values.median(0).values
    scale = plain.abs().amax().log2().floor().exp2()
    ulp = torch.finfo(torch.float32).eps * scale
    return Comparison(drift, noise, FACTOR * noise + ULPS * ulp)


def compare_training(
    model: nn.Module,
    training: Digits,
    test: Digits,
    *,
    epochs: int,
    seed: int,
    path: Path | None,
    out: Console,
) -> int:
    """Train copies of ``model``, print the comparison, save it at ``path``; the exit status."""
    out.print(dwswap.report(dwswap.optimize(model)).summary(), markup=False, soft_wrap=True)
    steps = epochs * -(-len(training.images) // BATCH)
    losses: dict[str, list[list[float]]] = {"plain": [], "swapped": []}
    reached: dict[str, list[float]] = {"plain": [], "swapped": []}
    work = list(itertools.product(range(RUNS), losses))
    with float32_convolutions():
        for run, kind in track(work, "training", console=out, transient=True):
            trained = copy.deepcopy(model).to(memory_format=FORMATS[run % len(FORMATS)])
            if kind == "swapped":
                trained = dwswap.optimize(trained)
            batches = all_batches(len(training.images), epochs, seed)
            optimizer, schedule = new_optimizer(trained, steps)
            digits = nudged(training, run)
            losses[kind].append(train_steps(trained, digits, batches, optimizer, schedule))
            predicted = predict(trained.eval(), test.images)
            reached[kind].append(accuracy(predicted, test.labels))

    plain, swapped = (torch.tensor(losses[kind], dtype=torch.float64) for kind in losses)
    result = compare_losses(plain, swapped)
    points = 100 * abs(statistics.mean(reached["swapped"]) - statistics.mean(reached["plain"]))
    relative = ((swapped[0] - plain[0]).abs() / plain[0])[:STEPS].amax().item()
    print_comparison(out, result, plain[0], training.images.device.type)
    out.print(
        f"largest relative difference of the losses of run 0, with the swap and without, in "
        f"{len(result.noise)} steps: {relative:.1e}",
        soft_wrap=True,
    )
    for kind, name in (("plain", "without the swap"), ("swapped", "with the swap")):
        each = ", ".join(f"{value:.2%}" for value in reached[kind])
        mean = statistics.mean(reached[kind])
        out.print(f"test accuracy {name}: {mean:.2%} (runs: {each})", soft_wrap=True)

    if path is not None:
        content = {
            "device": training.images.device.type,
            "epochs": epochs,
            "seed": seed,
            "losses": losses,
            "accuracy": reached,
            "drift": {name: values.tolist() for name, values in result._asdict().items()},
            "largest_relative_difference": relative,
            "accuracy_difference_points": points,
            "passed": result.passed and points <= POINTS,
        }
        saved = [write_json(path, record("train_digits_compare", **content))]
        saved += save_picture(out, lambda: plot(result, plain, swapped, path.with_suffix(".png")))
        out.print(f"saved: {', '.join(map(str, saved))}", markup=False, soft_wrap=True)
    return verdict(out, result, points)


def verdict(out: Console, result: Comparison, points: float) -> int:
    failures = []
    if not result.passed:
        step = int((result.swapped <= result.limit).int().argmin())
        failures.append(
            f"at step {step + 1} the losses with the swap differ by {result.swapped[step]:.1e} "
            f"from those without; float32 noise allows {result.limit[step]:.1e}"
        )
    if points > POINTS:
        failures.append(f"the accuracies are {points:.2f} points apart, at most {POINTS} may be")
    for failure in failures:
        out.print(f"FAILED: {failure}", style="red", soft_wrap=True)
    if not failures:
        out.print(
            f"the losses agree to float32 noise, the accuracies within {points:.2f} points",
            soft_wrap=True,
        )
    return 1 if failures else 0


def print_comparison(out: Console, result: Comparison, loss: Tensor, device: str) -> None:
    table = Table(title=f"drift of the loss, {RUNS} runs each, {device}")
    for head in ("step", "loss", "with the swap", "noise of PyTorch", "limit"):
        table.add_column(head, justify="right")
    count = len(result.noise)
    for step in sorted({s for s in (1, 2, 5, 10, 20, 30, 40) if s < count} | {count}):
        drifts = (f"{values[step - 1]:.1e}" for values in result)
        table.add_row(str(step), f"{loss[step - 1]:.4f}", *drifts)
    out.print(table)


def plot(result: Comparison, plain: Tensor, swapped: Tensor, path: Path) -> Path:
    """The curves of all runs, and below them the drifts; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    curves, drifts = figure.subplots(2, 1)
    # Thin and dashed over thick, so that two curves that are equal can both be seen.
    styles: tuple[tuple[str, Tensor, dict[str, Any]], ...] = (
        ("without the swap", plain, {"color": "#e69f00", "linewidth": 2.5, "alpha": 0.6}),
        ("with the swap", swapped, {"color": "#0072b2", "linewidth": 0.8, "linestyle": "--"}),
    )
    for name, losses, style in styles:
        steps = range(1, losses.shape[1] + 1)
        for run, values in enumerate(losses.tolist()):
            curves.plot(steps, values, label=name if run == 0 else None, **style)
    curves.set_ylabel("loss")
    names = ("with the swap", "noise of PyTorch", "limit")
    colours = ("#0072b2", "#e69f00", "#cc3311")
    for name, values, colour in zip(names, result, colours, strict=True):
        shown = values.clamp_min(torch.finfo(torch.float32).eps / 4)  # a logarithm needs no zero
        drifts.plot(range(1, len(values) + 1), shown.tolist(), label=name, color=colour)
    drifts.set_yscale("log")
    drifts.set_ylabel("drift of the loss")
    drifts.set_xlabel("step")
    for axes in (curves, drifts):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png")
    return path
