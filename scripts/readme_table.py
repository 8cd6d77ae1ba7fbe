"""Fill the performance figures of README.md from the recorded results, or check that they are.

    python scripts/readme_table.py            # rewrite both sections, draw the pictures of models
    python scripts/readme_table.py --check    # exit code 1 where they are not what the files say

Every figure between the markers comes from a file in benchmarks/results, written by `--json` of
examples/kernelbench.py, by `dwswap bench` or by `dwswap demo`. Of several files of one kind and
device the newest counts; those of `dwswap bench models` are merged case by case, with `--train` and
without, those of `dwswap bench layers --backward` by dtype and layout, and both are drawn anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwswap.bench.gradient_results import GradientResult
    from dwswap.bench.model_results import ModelResult

ROOT = Path(__file__).resolve().parents[1]
START = "<!-- results: start (scripts/readme_table.py) -->"
END = "<!-- results: end -->"
HEADLINE_START = "<!-- headline: start (scripts/readme_table.py) -->"
HEADLINE_END = "<!-- headline: end -->"
NOTHING = "No results are recorded yet."


def kernelbench_table(result: dict[str, Any]) -> list[str]:
    """The lines of one KernelBench record."""
    lines = [
        f"KernelBench level 1, float32, NCHW, on {result['device']}; times in microseconds:",
        "",
        "| problem | input | kernel | eager | channels_last | dwswap | copy | times eager |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["results"]:
        lines.append(
            f"| {row['problem']} | {'x'.join(map(str, row['shape']))} "
            f"| {'x'.join(map(str, row['kernel']))} | {row['eager_us']:,.0f} "
            f"| {row['eager_channels_last_us']:,.0f} | {row['ours_us']:,.0f} "
            f"| {row['copy_us']:,.0f} | {row['speedup']:.1f} |"
        )
    return lines


def demo_table(result: dict[str, Any]) -> list[str]:
    """The lines of one demo record."""
    lines = [
        f"{result['model']} on {result['device']} (`dwswap demo`); milliseconds per call:",
        "",
        "| dtype | layout | batch | eager | dwswap | times eager |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["timings"]:
        eager = row["eager"]["microseconds"] / 1e3
        optimized = row["optimized"]["microseconds"] / 1e3
        lines.append(
            f"| {row['dtype']} | {row['layout']} | {row['batch']} | {eager:.2f} "
            f"| {optimized:.2f} | {row['speedup']:.2f} |"
        )
    return lines


def layers_table(result: dict[str, Any]) -> list[str]:
    """The lines of one record of `dwswap bench layers`, and the picture next to it."""
    lines = [
        f"The depthwise convolutions of torchvision's models, N = {result['batch']}, on "
        f"{result['device']} (`dwswap bench layers`); targets in parentheses, what misses its "
        "target is bold.",
        "",
        *result["markdown"],
    ]
    picture = result["path"].with_suffix(".png")
    if picture.exists():
        lines += ["", f"![Speedup and percent of copy](benchmarks/results/{picture.name})"]
    return lines


def gradients_table(result: dict[str, Any]) -> list[str]:
    """The lines of the merged records of `dwswap bench layers --backward`, and their pictures."""
    from dwswap.bench.gradient_results import PARTS
    from dwswap.bench.layer_summary import speedup_markdown, summarize

    rows = gradients(result)
    lines = [
        f"Gradients of the depthwise convolutions of torchvision's models, N = {result['batch']}, "
        f"on {result['device']} (`dwswap bench layers --backward`).",
    ]
    for name, picture in gradient_pictures(result).items():
        summary = summarize([row.part(name) for row in rows], targets=False)
        lines += ["", f"{PARTS[name]}, speedup over PyTorch's:", "", *speedup_markdown(summary)]
        lines += ["", f"![Speedup and percent of copy](benchmarks/results/{picture.name})"]
    return lines


def gradients(result: dict[str, Any]) -> list[GradientResult]:
    """The rows of a merged record."""
    from dwswap.bench.gradient_results import GradientResult

    return [GradientResult(**row) for row in result["results"]]


def gradient_pictures(result: dict[str, Any]) -> dict[str, Path]:
    """The pictures of a merged record, by what they show."""
    from dwswap.bench.gradient_results import PARTS
    from dwswap.bench.records import slug

    stem = f"gradients-{slug(result['device'])}-n{result['batch']}"
    return {name: result["path"].with_name(f"{stem}-{name}.png") for name in PARTS}


def models_table(result: dict[str, Any]) -> list[str]:
    """The lines of the merged records of `dwswap bench models`, and their pictures."""
    from dwswap.bench.model_results import ModelResult
    from dwswap.bench.model_summary import markdown

    lines = [
        f"Whole models of torchvision with random weights, on {result['device']} "
        "(`dwswap bench models`); what misses its target is bold.",
        "",
        *markdown([ModelResult.from_dict(**row) for row in result["results"]]),
    ]
    return lines + shown(pictures(result))


def training_table(result: dict[str, Any]) -> list[str]:
    """The lines of the merged records of `dwswap bench models --train`, and their pictures."""
    from dwswap.bench.training_record import training_markdown
    from dwswap.bench.training_results import TrainingResult

    lines = [
        f"Training of models of torchvision (mixed precision, SGD), on {result['device']} "
        "(`dwswap bench models --train`); what misses its target is bold.",
        "",
        *training_markdown([TrainingResult.from_dict(**row) for row in result["results"]]),
    ]
    return lines + shown(pictures(result))


def pictures(result: dict[str, Any]) -> dict[Path, list[ModelResult]]:
    """What is drawn of a merged record: models next to many peers, and those next to eager only."""
    from dwswap.bench.model_peers import EAGER
    from dwswap.bench.model_results import ModelResult
    from dwswap.bench.records import slug
    from dwswap.bench.training_results import TrainingResult

    cls = TrainingResult if result["kind"] == "training" else ModelResult
    main = result["path"].with_name(f"{result['kind']}-{slug(result['device'])}.png")
    eager = main.with_stem(f"{main.stem}-eager")
    rows: dict[Path, list[ModelResult]] = {main: [], eager: []}
    for row in (cls.from_dict(**row) for row in result["results"]):
        others = {run.name for run in row.runs} - {*EAGER, *row.ours}
        rows[main if others else eager].append(row)
    return {path: found for path, found in rows.items() if found}


def shown(paths: Iterable[Path]) -> list[str]:
    """The lines that show pictures of whole models."""
    return [
        line
        for path in paths
        for line in ("", f"![Times faster than each peer](benchmarks/results/{path.name})")
    ]


def draw(folder: Path) -> None:
    """Draw what the lines for the merged records in ``folder`` show; needs matplotlib."""
    from dwswap.bench import layer_plot, model_plot
    from dwswap.bench.gradient_results import PARTS

    for (kind, device, batch), result in newest_records(folder).items():
        if kind in MERGED:
            for path, rows in pictures(result).items():
                model_plot.plot(rows, path, f"dwswap on {device}")
        if kind == "gradients":
            title = f"Depthwise convolutions of torchvision, N = {batch}, on {device}"
            rows_of_gradients = gradients(result)
            for name, path in gradient_pictures(result).items():
                parts = [row.part(name) for row in rows_of_gradients]
                layer_plot.plot(parts, path, f"{PARTS[name]}: {title}", targets=False)


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of all cases: of two rows of one case that with more peers, then the newer one."""
    best: dict[tuple[Any, ...], tuple[int, str, dict[str, Any]]] = {}
    for record in records:
        for row in record["results"]:
            case = tuple(row[name] for name in ("model", "batch", "dtype", "layout", "size"))
            ran = sum(run["us"] is not None for run in row["runs"])
            found = (ran, record["recorded"], row)
            if case not in best or best[case][:2] < found[:2]:
                best[case] = found
    newest = max(records, key=lambda record: record["recorded"])
    return {**newest, "results": [best[case][2] for case in sorted(best, key=_place)]}


def merged_gradients(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of all dtypes and layouts: for each the rows of the newest record that has it."""
    from dwswap.bench.layers import DTYPES, LAYOUTS

    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["recorded"]):
        settings = record["settings"]
        for key in itertools.product(settings["dtypes"], settings["layouts"]):
            rows[key] = [row for row in record["results"] if (row["dtype"], row["layout"]) == key]
    kinds = itertools.product(DTYPES, LAYOUTS)
    newest = max(records, key=lambda record: record["recorded"])
    return {**newest, "results": [row for kind in kinds for row in rows.get(kind, [])]}


def _place(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those that have targets first, then by name."""
    from dwswap.bench.model_cases import ACCEPTED

    model, *others = case
    known = model in ACCEPTED
    return (not known, ACCEPTED.index(model) if known else 0, model, *others)


TABLES = {
    "kernelbench": kernelbench_table,
    "models": models_table,
    "training": training_table,
    "layers": layers_table,
    "gradients": gradients_table,
    "demo": demo_table,
}

MERGED = ("models", "training")
"""The kinds of which all records count, case by case."""


def newest_records(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The records in ``folder`` that count, by kind, device and what else tells them apart.

    Records of a kind that has no table here are passed over, and so are those of a part of the
    layers.

    Raises:
        ValueError: a record holds a result that failed its own check.
    """
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    models: dict[tuple[str, str], list[dict[str, Any]]] = {}
    of_gradients: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kind = result.get("kind") if isinstance(result, dict) else None
        if kind not in TABLES:
            continue
        if kind == "layers" and not (result["complete"] and result["whole"]):
            continue
        if kind in MERGED and not result["complete"]:
            continue
        if kind == "gradients" and not has_every_shape(result):
            continue
        if not all(row["passed"] for row in result.get("results") or result["timings"]):
            raise ValueError(f"{path}: holds a result that failed its check")
        if kind in MERGED:
            models.setdefault((kind, result["device"]), []).append({**result, "path": path})
            continue
        key = (kind, result["device"], str(result.get("model") or result.get("batch", "")))
        if kind == "gradients":
            of_gradients.setdefault(key, []).append({**result, "path": path})
            continue
        if key not in newest or newest[key]["recorded"] < result["recorded"]:
            newest[key] = {**result, "path": path}
    for (kind, device), records in models.items():
        newest[kind, device, ""] = merged(records)
    for key, records in of_gradients.items():
        newest[key] = merged_gradients(records)
    return newest


def has_every_shape(record: dict[str, Any]) -> bool:
    """Whether a record of gradients has all shapes of its dtypes and layouts, from a GPU."""
    settings = record["settings"]
    chosen = settings["select"] is not None or settings["reduced"] or record["switches"]
    cold = settings.get("cold_code", False)  # older records have no such setting
    return record["complete"] and not (chosen or cold or record["skipped"])


def headline(folder: Path) -> str:
    """The few lines between the first pair of markers: whole models in half precision.

    Raises:
        ValueError: see ``newest_records``.
    """
    from dwswap.bench.model_results import ModelResult

    found = [result for key, result in newest_records(folder).items() if key[0] == "models"]
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


def section(folder: Path) -> str:
    """The text between the second pair of markers, for the records in ``folder``.

    Raises:
        ValueError: see ``newest_records``.
    """
    newest = newest_records(folder)
    if not newest:
        return NOTHING
    parts = []
    for kind in TABLES:
        for key in sorted(key for key in newest if key[0] == kind):
            result = newest[key]
            found = result["environment"]
            lines = TABLES[kind](result)
            lines += ["", f"Recorded {result['recorded'][:10]}, torch {found['torch']}."]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def filled(readme: str, text: str, start: str = START, end: str = END) -> str:
    """``readme`` with ``text`` between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    if start not in readme or end not in readme:
        raise ValueError(f"README.md must hold the markers {start!r} and {end!r}")
    head, _, rest = readme.partition(start)
    return f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill the results of README.md from the records.")
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    before = args.readme.read_text(encoding="utf-8")
    after = filled(before, headline(args.results), HEADLINE_START, HEADLINE_END)
    after = filled(after, section(args.results))
    if args.check:
        if after != before:
            print(f"{args.readme}: the results differ: run python scripts/readme_table.py")
            return 1
        return 0
    draw(args.results)
    args.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
