"""What a run of ``dwswap bench layers`` comes to: a few figures per dtype and layout.

Speedups are averaged geometrically, since twice as fast and half as fast cancel out. Percentages of
the copy are medians per kernel size, and for sizes above and below 64 MB of input and output: small
tensors are bound by latency, in a copy as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from dwswap.bench.layer_results import LayerResult
from dwswap.bench.tables import Cells, markdown_table

__all__ = [
    "LARGE_BYTES",
    "SLOWER",
    "copy_rows",
    "copy_target",
    "geometric_mean",
    "markdown",
    "speedup_markdown",
    "speedup_rows",
    "speedup_target",
    "summarize",
]

LARGE_BYTES = 64_000_000
SLOWER = 0.97
"""Below this we count as slower than PyTorch."""

SIZES = {"large": "64 MB and more", "small": "below 64 MB", "all": "all sizes"}


def speedup_target(dtype: str, layout: str) -> float:
    """The geometric mean of speedup over PyTorch that we aim at, over all shapes at N = 64."""
    if layout == "channels_last":
        return 1.5
    return 2.5 if dtype == "float16" else 4.0


def copy_target(kernel: int, dtype: str, size: str) -> float | None:
    """The median percentage of the copy that we aim at; None where there is no aim.

    Args:
        kernel: the kernel size; 3, 5 and 7 have targets.
        size: ``"large"``, ``"small"`` or ``"all"``; the target of 3 depends on the size, and those
            of 5 and 7 are for all sizes together.
    """
    if kernel == 3:
        return {"large": 85.0, "small": 75.0}.get(size)
    if size != "all":
        return None
    return {5: 65.0, 7: 55.0 if dtype == "float32" else 45.0}.get(kernel)


def summarize(results: Sequence[LayerResult], *, targets: bool = True) -> dict[str, Any]:
    """The figures of ``results``, JSON-able.

    Args:
        results: of one device, batch size and activation.
        targets: the targets are meant for these results; else they are all None.

    Returns:
        ``groups``: per dtype and layout the number of shapes, of failed checks and of those below
        0.97 of PyTorch's speed, the geometric mean of the speedup and its target, the worst speedup
        and its shape, and the median cost of the activations in percent where they were measured.
        ``copy``: per kernel size and size class the median percentage of the copy in each group,
        with its target.
    """
    groups, copy = [], []
    names = list(dict.fromkeys((r.dtype, r.layout) for r in results))
    for dtype, layout in names:
        rows = [r for r in results if (r.dtype, r.layout) == (dtype, layout)]
        worst = min(rows, key=lambda r: r.speedup)
        costs = [100 * (r.ours_us / r.plain_us - 1) for r in rows if r.plain_us is not None]
        groups.append(
            {
                "dtype": dtype,
                "layout": layout,
                "shapes": len(rows),
                "failed": sum(not r.passed for r in rows),
                "slower": sum(r.speedup < SLOWER for r in rows),
                "geomean": geometric_mean(r.speedup for r in rows),
                "target": speedup_target(dtype, layout) if targets else None,
                "worst": worst.speedup,
                "worst_index": worst.index,
                "worst_shape": describe(worst),
                "activation_cost": statistics.median(costs) if costs else None,
            }
        )
    for kernel in sorted({max(r.kernel) for r in results}):
        for size in SIZES:
            for dtype, layout in names:
                percents = [
                    r.percent_of_copy
                    for r in results
                    if (r.dtype, r.layout, max(r.kernel)) == (dtype, layout, kernel)
                    and size in ("all", "large" if r.moved_bytes >= LARGE_BYTES else "small")
                ]
                if percents:
                    copy.append(
                        {
                            "kernel": kernel,
                            "size": size,
                            "dtype": dtype,
                            "layout": layout,
                            "shapes": len(percents),
                            "median": statistics.median(percents),
                            "target": copy_target(kernel, dtype, size) if targets else None,
                        }
                    )
    return {"groups": groups, "copy": copy}


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of positive numbers under multiplication."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def describe(row: LayerResult) -> str:
    """A shape in a few characters: input, kernel, stride, dilation where it is not 1."""
    text = f"{_by(row.shape)} k{_by(row.kernel)} s{_by(row.stride)}"
    return text if set(row.dilation) == {1} else f"{text} d{_by(row.dilation)}"


def speedup_rows(summary: dict[str, Any]) -> Cells:
    """Heads and cells of the table of speedups; each cell with whether it misses its target."""
    heads = ["dtype", "layout", "shapes", "geometric mean", "worst", "shape of the worst"]
    heads += [f"below {SLOWER}", "failed checks"]
    costs = any(group["activation_cost"] is not None for group in summary["groups"])
    rows = []
    for group in summary["groups"]:
        row = [
            (group["dtype"], False),
            (group["layout"], False),
            (str(group["shapes"]), False),
            _aimed(group["geomean"], group["target"], ".2f"),
            (f"{group['worst']:.2f}", group["worst"] < SLOWER),
            (group["worst_shape"], False),
            (str(group["slower"]), group["slower"] > 0),
            (str(group["failed"]), group["failed"] > 0),
        ]
        if costs:
            cost = group["activation_cost"]
            row.append(("" if cost is None else f"{cost:+.1f} %", False))
        rows.append(row)
    return heads + ["cost of the activations"] * costs, rows


def copy_rows(summary: dict[str, Any]) -> Cells:
    """Heads and cells of the table of percentages; each cell with whether it misses its target."""
    names = [(group["dtype"], group["layout"]) for group in summary["groups"]]
    cells = {
        (entry["kernel"], entry["size"], entry["dtype"], entry["layout"]): entry
        for entry in summary["copy"]
    }
    lines = list(dict.fromkeys((entry["kernel"], entry["size"]) for entry in summary["copy"]))
    rows = []
    for kernel, size in lines:
        row = [(f"{kernel}x{kernel}", False), (SIZES[size], False)]
        for dtype, layout in names:
            entry = cells.get((kernel, size, dtype, layout))
            row.append(
                ("", False) if entry is None else _aimed(entry["median"], entry["target"], ".1f")
            )
        rows.append(row)
    return ["kernel", "input + output", *(f"{dtype} {layout}" for dtype, layout in names)], rows


def markdown(summary: dict[str, Any]) -> list[str]:
    """The two tables as lines of Markdown; what misses its target is bold."""
    if not summary["groups"]:
        return ["Nothing was measured."]
    lines = ["Speedup over PyTorch's own convolution in the same layout:", ""]
    lines += speedup_markdown(summary)
    lines += ["", "Copy time / our time in percent, median:", ""]
    return lines + markdown_table(copy_rows(summary), left=("kernel", "input + output"))


def speedup_markdown(summary: dict[str, Any]) -> list[str]:
    """The table of speedups as lines of Markdown; what misses its target is bold."""
    return markdown_table(speedup_rows(summary), left=("dtype", "layout", "shape of the worst"))


def _aimed(value: float, target: float | None, form: str) -> tuple[str, bool]:
    """A cell with its target in parentheses, and whether it misses it."""
    if target is None:
        return f"{value:{form}}", False
    return f"{value:{form}} ({target:g})", value < target


def _by(sizes: Sequence[int]) -> str:
    same = len(sizes) == 2 and sizes[0] == sizes[1]
    return str(sizes[0]) if same else "x".join(map(str, sizes))
