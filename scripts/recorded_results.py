"""The records in benchmarks/results that count.

Of several files of one kind and device the newest counts; those of `dwswap bench models` are merged
case by case, with `--train` and without, those of `dwswap bench layers --backward` by dtype and
layout.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

KINDS = {
    "kernelbench": "KernelBench",
    "models": "Whole models",
    "training": "Training",
    "layers": "Layers",
    "gradients": "Gradients",
    "demo": "Demo",
}
"""The kinds of records that have tables, in the order of these, and their headings."""

MERGED = ("models", "training")
"""The kinds of which all records count, case by case."""


Records = dict[tuple[str, str, str], dict[str, Any]]
"""By kind, device and what else tells records apart."""


def newest_records(folder: Path) -> Records:
    """The records in ``folder`` that count.

    Records of a kind that has no table are passed over, and so are those of a part of the layers.

    Raises:
        ValueError: a record holds a result that failed its own check.
    """
    newest: Records = {}
    models: dict[tuple[str, str], list[dict[str, Any]]] = {}
    of_gradients: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kind = result.get("kind") if isinstance(result, dict) else None
        if kind not in KINDS:
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


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of all cases.

    Of two rows of one case that with more peers, then the newer one. A peer that did not run there
    is that of the other: each is compared with what ran in turns with it.
    """
    found: dict[tuple[Any, ...], list[tuple[int, str, dict[str, Any]]]] = {}
    for record in records:
        for row in record["results"]:
            case = tuple(row[name] for name in ("model", "batch", "dtype", "layout", "size"))
            ran = sum(run["us"] is not None for run in row["runs"])
            found.setdefault(case, []).append((ran, record["recorded"], row))
    newest = max(records, key=lambda record: record["recorded"])
    return {**newest, "results": [_united(found[case]) for case in sorted(found, key=_place)]}


def _united(rows: list[tuple[int, str, dict[str, Any]]]) -> dict[str, Any]:
    """The row of most peers, of the newest if several have as many, and what others add to it."""
    ordered = [row for _, _, row in sorted(rows, key=lambda row: row[:2], reverse=True)]
    runs: dict[str, dict[str, Any]] = {}
    for run in (run for row in ordered for run in row["runs"]):
        known = runs.setdefault(run["name"], run)
        if known["us"] is None and run["us"] is not None:
            runs[run["name"]] = run
    return {**ordered[0], "runs": list(runs.values())}


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
