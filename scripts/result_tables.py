"""Tables of the recorded results as lines of Markdown, and the pictures beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorded_results import MERGED, Records

if TYPE_CHECKING:
    from dwswap.bench.gradient_results import GradientResult
    from dwswap.bench.model_results import ModelResult

PICTURES = "results"
"""The folder of the pictures, as seen from the page of all results."""

FASTER = "Times faster than each peer"
LAYERS = "Speedup and percent of copy"
AIMED = "targets in parentheses, what misses its target is bold"


def kernelbench_table(result: dict[str, Any]) -> list[str]:
    """The lines of one KernelBench record."""
    lines = [
        f"KernelBench level 1, float32, NCHW, on {result['device']}; times in microseconds, "
        "`copy` that of a copy of the same bytes:",
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


def models_table(result: dict[str, Any]) -> list[str]:
    """The lines of the merged records of `dwswap bench models`, and their pictures."""
    from dwswap.bench.model_results import ModelResult
    from dwswap.bench.model_summary import markdown

    lines = [
        f"{models_caption(result)}; what misses its target is bold.",
        "",
        *markdown([ModelResult.from_dict(**row) for row in result["results"]]),
    ]
    return lines + shown(pictures(result), FASTER, PICTURES)


def models_picture(result: dict[str, Any]) -> list[str]:
    """What the README shows of ``models_table``: the first of its pictures."""
    first = list(pictures(result))[:1]
    return [f"{models_caption(result)}:", *shown(first, FASTER, f"benchmarks/{PICTURES}")]


def models_caption(result: dict[str, Any]) -> str:
    """What a merged record of whole models is of."""
    return (
        f"Whole models of torchvision with random weights, on {result['device']} "
        "(`dwswap bench models`)"
    )


def training_table(result: dict[str, Any]) -> list[str]:
    """The lines of the merged records of `dwswap bench models --train`, and their pictures."""
    return training_speedups(result) + shown(pictures(result), FASTER, PICTURES)


def training_speedups(result: dict[str, Any]) -> list[str]:
    """What the README shows of ``training_table``: all but the pictures."""
    from dwswap.bench.training_record import training_markdown
    from dwswap.bench.training_results import TrainingResult

    return [
        f"Training of models of torchvision (mixed precision, SGD), on {result['device']} "
        "(`dwswap bench models --train`); what misses its target is bold. A peer that a "
        "run of a case left out is that of another run.",
        "",
        *training_markdown([TrainingResult.from_dict(**row) for row in result["results"]]),
    ]


def layers_table(result: dict[str, Any]) -> list[str]:
    """The lines of one record of `dwswap bench layers`, and the picture next to it."""
    lines = [f"{layers_caption(result)}; {AIMED}.", "", *result["markdown"]]
    picture = result["path"].with_suffix(".png")
    return lines + shown([picture] if picture.exists() else [], LAYERS, PICTURES)


def layers_speedups(result: dict[str, Any]) -> list[str]:
    """What the README shows of ``layers_table``: the speed-ups."""
    from dwswap.bench.layer_summary import speedup_markdown

    return [
        f"{layers_caption(result)}: speedup over PyTorch's own convolution in the same layout; "
        f"{AIMED}.",
        "",
        *speedup_markdown(result["summary"]),
    ]


def layers_caption(result: dict[str, Any]) -> str:
    """What a record of layers is of."""
    return (
        f"The depthwise convolutions of torchvision's models, N = {result['batch']}, on "
        f"{result['device']} (`dwswap bench layers`)"
    )


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
        lines += shown([picture], LAYERS, PICTURES)
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


def gradients(result: dict[str, Any]) -> list[GradientResult]:
    """The rows of a merged record."""
    from dwswap.bench.gradient_results import GradientResult

    return [GradientResult(**row) for row in result["results"]]


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


def gradient_pictures(result: dict[str, Any]) -> dict[str, Path]:
    """The pictures of a merged record, by what they show."""
    from dwswap.bench.gradient_results import PARTS
    from dwswap.bench.records import slug

    stem = f"gradients-{slug(result['device'])}-n{result['batch']}"
    return {name: result["path"].with_name(f"{stem}-{name}.png") for name in PARTS}


def shown(paths: Iterable[Path], text: str, folder: str) -> list[str]:
    """The lines that show pictures.

    Args:
        paths: of the pictures.
        text: what stands for a picture that cannot be seen.
        folder: that of the pictures, as seen from the document.
    """
    return [line for path in paths for line in ("", f"![{text}]({folder}/{path.name})")]


def draw(records: Records) -> None:
    """Draw what the lines for the merged records show; needs matplotlib."""
    from dwswap.bench import layer_plot, model_plot
    from dwswap.bench.gradient_results import PARTS

    for (kind, device, batch), result in records.items():
        if kind in MERGED:
            for path, rows in pictures(result).items():
                model_plot.plot(rows, path, f"dwswap on {device}")
        if kind == "gradients":
            title = f"Depthwise convolutions of torchvision, N = {batch}, on {device}"
            rows_of_gradients = gradients(result)
            for name, path in gradient_pictures(result).items():
                parts = [row.part(name) for row in rows_of_gradients]
                layer_plot.plot(parts, path, f"{PARTS[name]}: {title}", targets=False)


TABLES = {
    "kernelbench": kernelbench_table,
    "models": models_table,
    "training": training_table,
    "layers": layers_table,
    "gradients": gradients_table,
    "demo": demo_table,
}
"""The lines of a record, by its kind."""

SELECTION = {
    "kernelbench": kernelbench_table,
    "models": models_picture,
    "training": training_speedups,
    "layers": layers_speedups,
}
"""Those that the README shows, by the kind of the record."""
