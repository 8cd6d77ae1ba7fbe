"""The picture of a run of ``dwswap bench layers``; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwswap.bench.layer_results import LayerResult
from dwswap.bench.layer_summary import (
    LARGE_BYTES,
    copy_target,
    geometric_mean,
    speedup_target,
)

__all__ = ["plot"]

# Three of Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = {3: "#0072b2", 5: "#e69f00", 7: "#009e73"}
OTHER = "#555555"
TARGET = "#cc3311"
MARKERS = {1: "o", 2: "^"}


def plot(results: Sequence[LayerResult], path: Path, title: str, *, targets: bool = True) -> Path:
    """Draw speedup and percentage of the copy against size, a row per dtype, and save it as PNG.

    Args:
        results: at least one.
        path: the file, replaced where it exists.
        title: a line on top, such as the device and the batch size.
        targets: draw the targets of ``dwswap.bench.layer_summary``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the place cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    dtypes = list(dict.fromkeys(r.dtype for r in results))
    layouts = list(dict.fromkeys(r.layout for r in results))
    columns = 2 * len(layouts)
    figure = Figure(figsize=(5.2 * columns, 3.9 * len(dtypes) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(dtypes), columns, squeeze=False, sharex=True)
    for row, dtype in enumerate(dtypes):
        for column, layout in enumerate(layouts):
            rows = [r for r in results if (r.dtype, r.layout) == (dtype, layout)]
            speed, copy = axes[row][2 * column], axes[row][2 * column + 1]
            _speedups(speed, rows, dtype, layout)
            _percents(copy, rows, dtype, layout)
            if targets:
                line = speedup_target(dtype, layout)
                speed.axhline(line, color=TARGET, linewidth=1.0, linestyle="--")
                _copy_targets(copy, rows, dtype)
    fastest, slowest = max(r.speedup for r in results), min(r.speedup for r in results)
    highest = max(100.0, *(r.percent_of_copy for r in results))
    for line in axes:
        for index, panel in enumerate(line):
            panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            # The same scales everywhere: panels are there to be compared.
            if index % 2:
                panel.set_ylim(0, 1.08 * highest)
            else:
                panel.set_yscale("log")
                panel.set_ylim(min(0.8, 0.85 * slowest), max(2.0, 1.2 * fastest))
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_formatter(NullFormatter())
    for panel in axes[-1]:
        panel.set_xlabel("input + output, MB")
    figure.suptitle(title, fontsize=13)
    _legend(figure, results, targets)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png")
    return path


def _speedups(panel: Any, rows: list[LayerResult], dtype: str, layout: str) -> None:
    panel.set_ylabel("times PyTorch")
    if not rows:
        panel.set_title(f"{dtype} {layout}: nothing measured", fontsize=10)
        return
    mean = geometric_mean(r.speedup for r in rows)
    panel.set_title(f"{dtype} {layout}: speedup, geometric mean {mean:.2f}", fontsize=10)
    panel.axhline(1.0, color="black", linewidth=1.0)
    panel.axhline(mean, color="#555555", linewidth=1.0, linestyle=":")
    _points(panel, rows, [r.speedup for r in rows])


def _percents(panel: Any, rows: list[LayerResult], dtype: str, layout: str) -> None:
    panel.set_ylabel("percent of copy")
    panel.set_title(f"{dtype} {layout}: copy time / our time", fontsize=10)
    panel.axhline(100.0, color="black", linewidth=1.0)
    _points(panel, rows, [r.percent_of_copy for r in rows])


def _copy_targets(panel: Any, rows: list[LayerResult], dtype: str) -> None:
    if not rows:
        return
    megabytes = [r.moved_bytes / 1e6 for r in rows]
    edge = LARGE_BYTES / 1e6
    spans = {
        "small": (min(megabytes), edge),
        "large": (edge, max(megabytes)),
        "all": (min(megabytes), max(megabytes)),
    }
    for kernel in sorted({max(r.kernel) for r in rows}):
        for size, (start, stop) in spans.items():
            target = copy_target(kernel, dtype, size)
            if target is not None and start < stop:
                colour = COLOURS.get(kernel, OTHER)
                panel.plot([start, stop], [target, target], "--", color=colour, linewidth=1.3)


def _points(panel: Any, rows: list[LayerResult], heights: list[float]) -> None:
    for kernel, stride in _kinds(rows):
        chosen = [
            (r.moved_bytes / 1e6, height)
            for r, height in zip(rows, heights, strict=True)
            if (max(r.kernel), max(r.stride)) == (kernel, stride)
        ]
        panel.scatter(*zip(*chosen, strict=True), **_style(kernel, stride))
    failed = [
        (r.moved_bytes / 1e6, height)
        for r, height in zip(rows, heights, strict=True)
        if not r.passed
    ]
    if failed:
        panel.scatter(*zip(*failed, strict=True), s=90, marker="x", color=TARGET, linewidths=2)


def _style(kernel: int, stride: int) -> dict[str, Any]:
    return {
        "s": 26 if kernel > 5 else 17,  # there are few of them
        "marker": MARKERS.get(stride, "s"),
        "color": COLOURS.get(kernel, OTHER),
        "alpha": 0.65,
        "linewidths": 0,
    }


def _kinds(rows: Sequence[LayerResult]) -> list[tuple[int, int]]:
    return sorted({(max(r.kernel), max(r.stride)) for r in rows})


def _legend(figure: Any, results: Sequence[LayerResult], targets: bool) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for kernel, stride in _kinds(results):
        style = _style(kernel, stride)
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker=style["marker"],
                color=style["color"],
                label=f"{kernel}x{kernel}, stride {stride}",
            )
        )
    handles += [
        Line2D([], [], color="black", label="as fast as PyTorch, as the copy"),
        Line2D([], [], color="#555555", linestyle=":", label="geometric mean"),
    ]
    if targets:
        label = "target of the geometric mean, of the kernel's median"
        handles.append(Line2D([], [], color=TARGET, linestyle="--", label=label))
    if any(not r.passed for r in results):
        handles.append(
            Line2D([], [], color=TARGET, linestyle="none", marker="x", label="failed check")
        )
    # Two panels hold four of the longest labels side by side.
    widest = 4 if figure.get_figwidth() < 12 else 6
    figure.legend(handles=handles, loc="outside lower center", ncols=min(widest, len(handles)))
