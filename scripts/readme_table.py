"""Write the performance figures of README.md and benchmarks/RESULTS.md, or check them.

    python scripts/readme_table.py            # rewrite both, draw the pictures
    python scripts/readme_table.py --check    # exit code 1 where they are not what the files say

Every figure between the markers of README.md and in benchmarks/RESULTS.md comes from a file in
benchmarks/results, written by `--json` of examples/kernelbench.py, by `dwswap bench` or by `dwswap
demo`. Which of them count is in recorded_results.py, the tables are in result_tables.py. The README
has a selection, benchmarks/RESULTS.md everything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorded_results import KINDS, Records, newest_records
from result_tables import SELECTION, TABLES, draw

if TYPE_CHECKING:
    from dwswap.bench.model_results import ModelResult

ROOT = Path(__file__).resolve().parents[1]
START = "<!-- results: start (scripts/readme_table.py) -->"
END = "<!-- results: end -->"
HEADLINE_START = "<!-- headline: start (scripts/readme_table.py) -->"
HEADLINE_END = "<!-- headline: end -->"
NOTHING = "No results are recorded yet."

BATCH = 64
"""The images of the layers that the README shows: those for which there are targets."""

INTRODUCTION = """\
# Results

Written by `python scripts/readme_table.py` from the records in [results](results), never by
hand; the [README](../README.md#results) shows a selection.

Kernels are measured with a rotating set of buffers larger than the L2 cache, in one CUDA graph,
next to a copy of the same bytes, which is as fast as a kernel that is bound by memory can be;
models by the wall clock over calls back to back, in turns with each peer; training by the wall
clock over whole steps, with the gradients of the first one compared with float64. While models
and training were measured, tests ran on other cores and GPUs of the machine: what the host
bounds (eager PyTorch at 1 and 32 images, training) takes longer than on an idle one.

A target stands in parentheses behind its figure, and a figure that misses its target is bold. Of
whole models and training a target is how many times faster than that peer dwswap is to be; of
layers with 64 images it is the geometric mean of the speedups, or the median percentage of the
speed of a copy. Without parentheses: no model and no step of training is to be slower than eager
PyTorch or a step to take more memory, and no layer is to be below 0.97 of the speed of
PyTorch's. Targets are those that we set for an H200: it has 1.4 times the bandwidth of an H100,
and a kernel at the speed of memory gains all of that, where PyTorch's are often bound otherwise."""


def headline(records: Records) -> str:
    """The few lines between the first pair of markers: whole models in half precision."""
    from dwswap.bench.model_results import ModelResult

    found = [result for key, result in records.items() if key[0] == "models"]
    if not found:
        return NOTHING
    lines = [
        "Milliseconds per call in float16, channels_last, 224 x 224 pixels; eager PyTorch in its "
        "faster layout, `torch.compile` in the fastest measured mode:",
        "",
        "| GPU | model | batch | eager | torch.compile | dwswap | times eager "
        "| times torch.compile |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    recorded = []
    for record in sorted(found, key=lambda result: result["recorded"], reverse=True):
        device = record["device"]
        recorded.append(f"{record['recorded'][:10]} on {device}")
        for row in record["results"]:
            result = ModelResult.from_dict(**row)
            cells = _headline_cells(result)
            if cells is not None:
                lines.append(f"| {device} | {result.model} | {result.batch} | {cells} |")
    return "\n".join([*lines, "", f"Recorded {', '.join(recorded)}."])


def _headline_cells(result: ModelResult) -> str | None:
    """Times and ratios of one row; None where it is of another kind, or a time is missing."""
    if (result.dtype, result.layout, result.size) != ("float16", "channels_last", 224):
        return None
    ours = fastest(result, result.ours)
    eager = fastest(result, ("eager_nchw", "eager_channels_last"))
    compiled = fastest(result, ("compile", "reduce_overhead", "max_autotune"))
    if ours is None or eager is None or compiled is None:
        return None
    cells = [f"{us / 1e3:#.3g}" for _, us in (eager, compiled, ours)]
    # Times of ours and of a peer are compared as they were measured, in turns.
    return " | ".join(cells + [f"{result.best_speedup(n):.1f}" for n in ("eager", compiled[0])])


def fastest(result: ModelResult, names: Sequence[str]) -> tuple[str, float] | None:
    """Name and microseconds of the fastest of some ways to run a model; None where none ran."""
    runs = [result.run(name) for name in names]
    times = [(run.us, run.name) for run in runs if run is not None and run.us is not None]
    return min(times)[::-1] if times else None


def selection(records: Records) -> str:
    """The text between the second pair of markers."""
    chosen = {key: record for key, record in records.items() if record.get("batch", BATCH) == BATCH}
    parts = [text for kind in SELECTION for text in tables(chosen, kind, SELECTION[kind])]
    return "\n\n".join(parts) or NOTHING


def page(records: Records) -> str:
    """The text of benchmarks/RESULTS.md."""
    parts = [INTRODUCTION]
    for kind, heading in KINDS.items():
        found = tables(records, kind, TABLES[kind])
        parts += [f"## {heading}", *found] if found else []
    return "\n\n".join(parts if records else [*parts, NOTHING]) + "\n"


def tables(
    records: Records,
    kind: str,
    table: Callable[[dict[str, Any]], list[str]],
) -> list[str]:
    """The text of each record of a kind, with the day and the version of torch."""
    texts = []
    for key in sorted(key for key in records if key[0] == kind):
        record = records[key]
        recorded = f"Recorded {record['recorded'][:10]}, torch {record['environment']['torch']}."
        texts.append("\n".join([*table(record), "", recorded]))
    return texts


def filled(readme: str, text: str, start: str = START, end: str = END) -> str:
    """``readme`` with ``text`` between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    if start not in readme or end not in readme:
        raise ValueError(f"README.md must hold the markers {start!r} and {end!r}")
    head, _, rest = readme.partition(start)
    return f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}"


def documents(readme: Path, results_page: Path, records: Records) -> dict[Path, str]:
    """What both documents are to be.

    Raises:
        ValueError: see ``filled``.
    """
    text = readme.read_text(encoding="utf-8")
    text = filled(text, headline(records), HEADLINE_START, HEADLINE_END)
    return {readme: filled(text, selection(records)), results_page: page(records)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write the results of README.md and benchmarks/RESULTS.md from the records."
    )
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "RESULTS.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    records = newest_records(args.results)
    texts = documents(args.readme, args.page, records)
    if args.check:
        differing = [path for path, text in texts.items() if not holds(path, text)]
        for path in differing:
            print(f"{path}: the results differ: run python scripts/readme_table.py")
        return 1 if differing else 0
    draw(records)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


def holds(path: Path, text: str) -> bool:
    """Whether a file is there and holds ``text``."""
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
