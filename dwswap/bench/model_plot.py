"""The picture of a run of ``dwswap bench models``; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwswap.bench.model_results import ModelResult
from dwswap.bench.model_summary import LAYOUT_NAMES

__all__ = ["plot"]

# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = {
    "eager": "#999999",
    "eager_nchw": "#999999",
    "eager_channels_last": "#000000",
    "eager_graph": "#56b4e9",
    "fx_fuse": "#f0e442",
    "compile": "#0072b2",
    "reduce_overhead": "#e69f00",
    "max_autotune": "#009e73",
    "dwswap_compile": "#cc79a7",
    "dwswap_backend": "#d55e00",
}
TARGET = "#cc3311"

LEGEND_INCHES = 2.4
"""Of the longest label."""

PANEL_INCHES = 3.4
CROWDED = 10
"""The most models whose names fit side by side; of more they are slanted."""
SLANTED_INCHES = 2.2
"""That these names take below the panel."""


def plot(results: Sequence[ModelResult], path: Path, title: str) -> Path:
    """Draw ``best_speedup`` over each peer, and save it as PNG.

    A panel per dtype, layout and batch size; a group of bars per model; a red mark where a target
    is. Without ``by_batch`` the batch size stands with the
    model instead.

    Args:
        results: at least one with a peer that ran, all of one class.
        path: the file, replaced where it exists.
        title: a line on top.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the place cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = type(results[0])
    panels: dict[str, list[ModelResult]] = {}
    for result in sorted(results, key=lambda r: (r.dtype, r.layout, r.batch)):
        name = f"{result.dtype} {LAYOUT_NAMES[result.layout]}"
        name += f", batch {result.batch}" if kind.by_batch else ""
        panels.setdefault(name, []).append(result)
    peers = [
        name
        for name in COLOURS
        if name in kind.runners and any(r.best_speedup(name) is not None for r in results)
    ]
    bars = max(len(rows) for rows in panels.values()) * (len(peers) + 1)
    slanted = sum(len(rows) > CROWDED for rows in panels.values())
    height = 1 + PANEL_INCHES * len(panels) + SLANTED_INCHES * slanted
    figure = Figure(figsize=(max(8.0, 3 + 0.17 * bars), height))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for (name, rows), (panel,) in zip(panels.items(), axes, strict=True):
        _bars(panel, rows, peers)
        panel.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=13)
    aims = any(result.goal(peer) is not None for result in results for peer in peers)
    _legend(figure, kind, peers, aims=aims)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png")
    return path


def _bars(panel: Any, rows: list[ModelResult], peers: list[str]) -> None:
    width = 0.85 / max(1, len(peers))
    for index, peer in enumerate(peers):
        shift = (index - (len(peers) - 1) / 2) * width
        for place, result in enumerate(rows):
            height, goal = result.best_speedup(peer), result.goal(peer)
            x = place + shift
            if height is not None:
                panel.bar(x, height, width, color=COLOURS[peer], edgecolor="white", linewidth=0.4)
                text = f"{height:.{1 if result.by_batch else 2}f}"
                panel.text(x, height, text, ha="center", va="bottom", fontsize=6)
            if goal is not None:
                panel.plot([x - width / 2, x + width / 2], [goal, goal], color=TARGET)
    panel.axhline(1.0, color="black", linewidth=1.0)
    panel.set_ylabel("times faster")
    panel.margins(y=0.12)
    crowded = len(rows) > CROWDED
    panel.set_xticks(
        range(len(rows)),
        [r.model if r.by_batch else f"{r.model}, batch {r.batch}" for r in rows],
        rotation=60 if crowded else 0,
        ha="right" if crowded else "center",
        fontsize=8,
    )
    panel.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _legend(figure: Any, kind: type[ModelResult], peers: list[str], *, aims: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=COLOURS[peer], label=f"over {kind.runners[peer].title}") for peer in peers
    ]
    if aims:
        handles.append(Line2D([], [], color=TARGET, label="target"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / LEGEND_INCHES)),
        fontsize=8,
        title=kind.basis,
    )
