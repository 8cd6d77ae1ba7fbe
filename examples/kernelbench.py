"""KernelBench level 1, problems 82 to 85 (depthwise 2-D convolutions), with dwswap.

    python examples/kernelbench.py

Each ``ModelNew`` is the problem's ``Model`` with one line changed: the layer. Each is checked
against a float64 reference, then timed: eager PyTorch, eager in channels_last, dwswap, and a
``copy_`` of the same bytes as the floor. On the CPU the sizes are reduced and times mean little.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dwswap
from dwswap.bench.records import record, write_json
from dwswap.bench.timing import buffers_needed, time_copy, time_launches
from dwswap.precision import float32_convolutions
from dwswap.report import LayerErrors
from dwswap.verify import compare

REFERENCE_BYTES = 256_000_000


class Model82(nn.Module):
    """Square input, square kernel."""

    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv2d = self.layer(
            in_channels,
            in_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=in_channels,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


class ModelNew82(Model82):
    layer = dwswap.DepthwiseConv2d


class Model83(nn.Module):
    """Square input, asymmetric kernel (k, 1)."""

    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv2d = self.layer(
            in_channels,
            in_channels,
            (kernel_size, 1),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


class ModelNew83(Model83):
    layer = dwswap.DepthwiseConv2d


class Model84(nn.Module):
    """Asymmetric input, square kernel."""

    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv2d = self.layer(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=in_channels,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


class ModelNew84(Model84):
    layer = dwswap.DepthwiseConv2d


class Model85(nn.Module):
    """Asymmetric input, asymmetric kernel."""

    layer: type[nn.Conv2d] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size_h: int,
        kernel_size_w: int,
        stride_h: int = 1,
        stride_w: int = 1,
        padding_h: int = 0,
        padding_w: int = 0,
        dilation_h: int = 1,
        dilation_w: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv2d = self.layer(
            in_channels,
            out_channels,
            (kernel_size_h, kernel_size_w),
            stride=(stride_h, stride_w),
            padding=(padding_h, padding_w),
            dilation=(dilation_h, dilation_w),
            groups=groups,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


class ModelNew85(Model85):
    layer = dwswap.DepthwiseConv2d


@dataclass(frozen=True)
class Problem:
    """One problem: its two models, their arguments, the input's shape here and on the CPU."""

    number: int
    model: type[nn.Module]
    model_new: type[nn.Module]
    arguments: dict[str, int]
    full: tuple[int, int, int, int]
    reduced: tuple[int, int, int, int]


PROBLEMS = [
    Problem(
        82,
        Model82,
        ModelNew82,
        {"in_channels": 64, "kernel_size": 3},
        (16, 64, 512, 512),
        (2, 64, 64, 64),
    ),
    Problem(
        83,
        Model83,
        ModelNew83,
        {"in_channels": 8, "kernel_size": 3},
        (64, 8, 512, 512),
        (4, 8, 128, 128),
    ),
    Problem(
        84,
        Model84,
        ModelNew84,
        {"in_channels": 128, "out_channels": 128, "kernel_size": 3},
        (64, 128, 256, 512),
        (2, 128, 32, 64),
    ),
    Problem(
        85,
        Model85,
        ModelNew85,
        {
            "in_channels": 128,
            "out_channels": 128,
            "kernel_size_h": 3,
            "kernel_size_w": 7,
            "groups": 128,
        },
        (32, 128, 128, 256),
        (2, 128, 32, 64),
    ),
]


@dataclass(frozen=True)
class Result:
    """What came out of one problem; times in microseconds."""

    problem: int
    shape: list[int]
    kernel: list[int]
    eager: float
    eager_channels_last: float
    ours: float
    copy: float
    check: LayerErrors

    def to_dict(self) -> dict[str, Any]:
        return {
            "problem": self.problem,
            "shape": self.shape,
            "kernel": self.kernel,
            "eager_us": self.eager,
            "eager_channels_last_us": self.eager_channels_last,
            "ours_us": self.ours,
            "copy_us": self.copy,
            "speedup": self.eager / self.ours,
            "percent_of_copy": 100 * self.copy / self.ours,
            "error": self.check.ours,
            "eager_error": self.check.pytorch,
            "error_limit": self.check.limit,
            "passed": self.check.passed,
        }


def convolution(model: nn.Module) -> nn.Conv2d:
    layer = model.conv2d
    assert isinstance(layer, nn.Conv2d)
    return layer


def check(model: nn.Module, model_new: nn.Module, x: Tensor) -> LayerErrors:
    """Compare both models with float64, a few samples at a time."""
    peer = model(x)
    # The allocator hands this block to the next output of the same size, so an element that the
    # kernel forgets to write shows up as NaN.
    poison = torch.full_like(peer, float("nan"))
    del poison
    ours = model_new(x)
    conv = convolution(model)
    step = max(1, REFERENCE_BYTES // (8 * x[0].numel()))
    worst = None
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        reference = F.conv2d(
            x[part].double(),
            conv.weight.double(),
            None if conv.bias is None else conv.bias.double(),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        worst = compare(ours[part], peer[part], reference).worse(worst)
    assert worst is not None
    return worst


@torch.no_grad()
def run(problem: Problem, device: torch.device, full: bool, budget: float) -> Result:
    """Check and time one problem on fresh random data."""
    shape = problem.full if full else problem.reduced
    model = problem.model(**problem.arguments).to(device)
    model_new = problem.model_new(**problem.arguments).to(device)
    model_new.load_state_dict(model.state_dict())

    x = torch.rand(shape, device=device)
    with float32_convolutions():
        checked = check(model, model_new, x)

    moved = 4 * (x.numel() + model(x).numel())
    inputs = [x] + [torch.rand(shape, device=device) for _ in range(buffers_needed(moved) - 1)]
    eager = time_launches([partial(model, i) for i in inputs], device, budget=budget)
    ours = time_launches([partial(model_new, i) for i in inputs], device, budget=budget)
    model.to(memory_format=torch.channels_last)
    inputs = [i.contiguous(memory_format=torch.channels_last) for i in inputs]
    channels_last = time_launches([partial(model, i) for i in inputs], device, budget=budget)
    del inputs
    copy = time_copy(moved, device, budget=budget)
    return Result(
        problem.number,
        list(shape),
        list(convolution(model).kernel_size),
        eager.microseconds,
        channels_last.microseconds,
        ours.microseconds,
        copy.microseconds,
        checked,
    )


def table(results: list[Result], title: str) -> Table:
    view = Table(title=title)
    for name in ("problem", "input", "kernel"):
        view.add_column(name, overflow="fold")
    for name in ("eager", "channels_last", "dwswap", "copy"):
        view.add_column(f"{name}\nus", justify="right", overflow="fold")
    for name in ("times\neager", "percent\nof copy", "error", "eager's\nerror", "check"):
        view.add_column(name, justify="right", overflow="fold")
    for r in results:
        view.add_row(
            str(r.problem),
            "x".join(map(str, r.shape)),
            "x".join(map(str, r.kernel)),
            f"{r.eager:,.0f}",
            f"{r.eager_channels_last:,.0f}",
            f"{r.ours:,.0f}",
            f"{r.copy:,.0f}",
            f"{r.eager / r.ours:.2f}",
            f"{100 * r.copy / r.ours:.0f}",
            f"{r.check.ours:.1e}",
            f"{r.check.pytorch:.1e}",
            "[green]ok" if r.check.passed else "[bold red]FAILED",
        )
    return view


def main() -> int:
    parser = argparse.ArgumentParser(description="KernelBench level 1, problems 82 to 85.")
    parser.add_argument(
        "--problems", nargs="+", type=int, metavar="N", default=[p.number for p in PROBLEMS]
    )
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[-1])
    parser.add_argument(
        "--size", choices=("full", "reduced"), help="default: full on CUDA, reduced elsewhere"
    )
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    args = parser.parse_args()
    unknown = set(args.problems) - {p.number for p in PROBLEMS}
    if unknown:
        parser.error(f"--problems must be among 82, 83, 84, 85, got {sorted(unknown)}")
    device = torch.device(args.device)
    full = args.size == "full" if args.size else device.type == "cuda"

    torch.manual_seed(0)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    results = []
    for problem in PROBLEMS:
        if problem.number in args.problems:
            with console.status(f"problem {problem.number}"):
                results.append(run(problem, device, full, args.budget))
    size = "full size" if full else "reduced size"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(table(results, f"KernelBench level 1, float32, {size}, {name}"))
    if device.type != "cuda":
        console.print("On the CPU dwswap is a composite of aten operators: expect no speed-up.")
    if args.json:
        value = record(
            "kernelbench",
            device=name,
            size="full" if full else "reduced",
            results=[r.to_dict() for r in results],
        )
        console.print(f"saved: {write_json(args.json, value)}", markup=False)
    failed = [r.problem for r in results if not r.check.passed]
    if failed:
        console.print(f"FAILED: outside the tolerance: {failed}", style="bold red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
