"""Tables of a run of ``dwswap bench models``; a cell goes with whether it misses its target."""

from __future__ import annotations

from collections.abc import Sequence

from dwswap.bench.model_peers import EAGER, OURS
from dwswap.bench.model_results import Measured, ModelResult
from dwswap.bench.model_targets import ERROR_RATIO, OPTIMIZE_SECONDS
from dwswap.bench.tables import Cells, markdown_table

__all__ = ["case_rows", "markdown", "profile_rows", "speedup_rows"]

LAYOUT_NAMES = {"contiguous": "NCHW", "channels_last": "channels_last"}


def case_rows(result: ModelResult) -> Cells:
    """Every figure of one case, a row per way to run it."""
    heads = ["run by", "ms", "images/s", *(f"{head} faster" for head in result.ours_heads)]
    heads += ["build s", "first call s", "peak MB", "largest error", "RMS of eager's", "note"]
    eager = [run.peak_bytes for run in result.runs if run.name in result.eager and run.peak_bytes]
    rows = []
    for run in result.runs:
        goal = result.goal(run.name)
        best = result.best_speedup(run.name)
        ours = run.name in result.ours
        rows.append(
            [
                (result.runners[run.name].title, False),
                (_ms(run.us), False),
                (_number(run.images_per_second, ",.0f"), False),
                *(
                    (_number(run.speedups.get(name), ".2f"), _below(best, goal) and not ours)
                    for name in result.ours
                ),
                (_number(run.build_s, ".1f"), ours and _above(run.build_s, OPTIMIZE_SECONDS)),
                (_number(run.first_call_s, ".1f"), False),
                (
                    "" if run.peak_bytes is None else f"{run.peak_bytes / 1e6:,.0f}",
                    run.name == result.ours[0] and _above(run.peak_bytes, min(eager, default=None)),
                ),
                (_number(run.error, ".1e"), False),
                (_number(run.error_ratio, ".2f"), ours and _above(run.error_ratio, ERROR_RATIO)),
                (run.reason or run.note or "", run.reason is not None),
            ]
        )
    return heads, rows


def profile_rows(result: ModelResult) -> Cells:
    """The time per kernel family of one case."""
    heads = ["kernels", "us", "percent", "launches", "largest"]
    rows = [
        [
            (row.family, False),
            (f"{row.us:,.1f}", False),
            (f"{row.percent:.1f}", False),
            (f"{row.kernels:g}", False),
            (row.largest[:70], False),
        ]
        for row in result.profile
    ]
    return heads, rows


def speedup_rows(results: Sequence[ModelResult], kind: type[ModelResult] = ModelResult) -> Cells:
    """A row per case: the times of ours, and the speed-up of each of ours over each peer.

    Args:
        kind: of the results.
    """
    peers = [
        name
        for name in kind.runners
        if name not in kind.ours and any(result.run(name) for result in results)
    ]
    measured = {
        name: head
        for name, head in zip(kind.ours, kind.ours_heads, strict=True)
        if any(result.run(name) for result in results)
    }
    heads = ["model", "batch", "dtype", "layout", *(f"{head} ms" for head in measured.values())]
    heads += ["images/s", *(f"over {kind.runners[name].title}" for name in peers)]
    rows = []
    for result in results:
        runs = [result.run(name) for name in measured]
        rates = [run.images_per_second for run in runs if run and run.images_per_second]
        rows.append(
            [
                *((text, False) for text in (result.model, str(result.batch), result.dtype)),
                (LAYOUT_NAMES[result.layout], False),
                *((_ms(run.us) if run else "", False) for run in runs),
                (_number(max(rates, default=None), ",.0f"), False),
                *(_speedup(result, name) for name in peers),
            ]
        )
    return heads, rows


def eager_rows(results: Sequence[ModelResult]) -> Cells:
    """A row per model, dtype and layout: the speed-up over the better eager layout by batch."""
    batches = sorted({result.batch for result in results})
    groups: dict[tuple[str, str, str], dict[int, ModelResult]] = {}
    for result in results:
        key = (result.model, result.dtype, LAYOUT_NAMES[result.layout])
        groups.setdefault(key, {})[result.batch] = result
    rows = [
        [
            *((text, False) for text in key),
            *(_speedup(found[n], "eager") if n in found else ("", False) for n in batches),
        ]
        for key, found in groups.items()
    ]
    return ["model", "dtype", "layout", *(f"batch {n}" for n in batches)], rows


def markdown(results: Sequence[ModelResult]) -> list[str]:
    """The tables for benchmarks/RESULTS.md; what misses its target is bold."""
    texts = ("model", "dtype", "layout")
    compared = [r for r in results if any(run.name not in (*OURS, *EAGER) for run in r.runs)]
    measured = [r for r in results if any(r.run(name) for name in EAGER)]
    lines = []
    if compared:
        lines += ["Milliseconds per call, and how many times faster dwswap is than each, "]
        lines[-1] += "without / with `cuda_graph=True` (the better one's target in parentheses):"
        lines += ["", *markdown_table(speedup_rows(compared), left=texts)]
    if len(measured) > len(compared):
        lines += [""] * bool(lines)
        lines += ["How many times faster than eager in the better of NCHW and channels_last, "]
        lines[-1] += "without / with `cuda_graph=True`:"
        lines += ["", *markdown_table(eager_rows(measured), left=texts)]
    return lines or ["Nothing was measured."]


def _speedup(result: ModelResult, peer: str) -> tuple[str, bool]:
    """The speed-ups of ours over a peer, and the target where it has one of its own."""
    speedups = result.speedups(peer)
    if not speedups:
        runs: list[Measured | None] = [result.run(name) for name in (peer, *result.ours)]
        return ("failed" if any(run is not None and run.reason for run in runs) else "", False)
    goal = result.goal(peer)
    measured = result.run(peer)
    within = {} if measured is None else measured.within
    text = " / ".join(
        f"{value:.2f} ± {within[name]:.2f}" if name in within else f"{value:.2f}"
        for name, value in speedups.items()
    )
    if goal not in (None, 1.0):
        text += f" ({goal:g})"
    return text, _below(result.best_speedup(peer), goal)


def _ms(us: float | None) -> str:
    return "" if us is None else f"{us / 1e3:.3f}" if us < 1e4 else f"{us / 1e3:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _below(value: float | None, goal: float | None) -> bool:
    return value is not None and goal is not None and value < goal


def _above(value: float | None, most: float | None) -> bool:
    return value is not None and most is not None and value > most
