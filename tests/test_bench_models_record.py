"""What ``dwswap bench models`` saves and shows: record, tables, picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_model_cases import CASE, result, run

from dwswap.bench.model_cases import Case
from dwswap.bench.model_peers import OURS, RUNNERS
from dwswap.bench.model_record import ModelRecord
from dwswap.bench.model_results import Measured
from dwswap.bench.model_summary import case_rows, markdown, profile_rows
from dwswap.bench.model_targets import target
from dwswap.bench.training_results import TRAINING_PEERS


def record(path: Path, **settings) -> ModelRecord:
    return ModelRecord(path, device="Some GPU", settings={"peers": ["auto"]} | settings)


def test_record_survives_a_round_trip(tmp_path):
    made = record(tmp_path / "a.json")
    rows = [result(run("compile")), result(Measured("compile", reason="no compiler"), batch=1)]
    for row in rows:
        made.add(row)
    made.save()
    again = record(tmp_path / "a.json")
    again.resume()
    assert again.results == rows
    assert again.left([row.case for row in rows] + [CASE]) == [CASE]
    again.finish()
    saved = json.loads((tmp_path / "a.json").read_text())
    assert (saved["kind"], saved["complete"]) == ("models", True)
    assert saved["markdown"] == markdown(rows)
    made.save()
    with pytest.raises(ValueError, match="settings peers"):
        record(tmp_path / "a.json", peers=["all"]).resume()


def test_speedups_of_a_result():
    eager = [run("eager_nchw", plain=3.0, graph=5.0), run("eager_channels_last", plain=2.0)]
    subject = result(*eager, Measured("compile", reason="failed"))
    assert subject.speedups("eager_nchw") == {"dwswap": 3.0, "dwswap_graph": 5.0}
    assert subject.speedups("eager") == {"dwswap": 2.0, "dwswap_graph": 2.5}
    assert subject.best_speedup("eager") == 2.5
    assert subject.speedups("compile") == {}
    assert subject.best_speedup("fx_fuse") is None


@pytest.mark.parametrize(
    ("case", "peer", "expected"),
    [
        (Case("mobilenet_v2", 256, "float16", "channels_last"), "compile", 1.9),
        (Case("mobilenet_v2", 256, "float16", "channels_last"), "max_autotune", 1.75),
        (Case("mobilenet_v2", 32, "float16", "channels_last"), "reduce_overhead", 1.8),
        (Case("shufflenet_v2_x1_0", 1, "float16", "channels_last"), "reduce_overhead", 1.3),
        (Case("mnasnet1_0", 256, "float16", "channels_last"), "compile", 1.25),
        (Case("convnext_tiny", 256, "float16", "channels_last"), "compile", 1.1),
        (Case("convnext_tiny", 1, "float16", "channels_last"), "reduce_overhead", None),
        (Case("mobilenet_v2", 256, "float32", "contiguous"), "eager_nchw", 3.0),
        (Case("mobilenet_v2", 256, "float32", "contiguous"), "compile", 1.4),
        (Case("mobilenet_v2", 256, "float16", "channels_last", 128), "compile", None),
        (Case("maxvit_t", 1, "bfloat16", "contiguous"), "eager", 1.0),
        (Case("maxvit_t", 1, "bfloat16", "contiguous"), "compile", None),
    ],
)
def test_targets(case, peer, expected):
    assert target(case, peer) == expected


def cells(table, row) -> dict[str, tuple[str, bool]]:
    heads, rows = table
    return dict(zip(heads, rows[row], strict=True))


def test_table_of_a_case():
    subject = result(
        run("eager_channels_last", peak_bytes=40_000_000),
        run("compile", 1500.0, 1.5, 1.875),
        Measured("max_autotune", reason="OutOfMemoryError: [GPU 0]"),
    )
    ours = cells(case_rows(subject), 0)
    assert ours["ms"] == ("1.000", False)
    assert ours["images/s"] == ("256,000", False)
    assert ours["peak MB"] == ("50", True)  # more than eager's
    assert ours["build s"] == ("0.5", False)
    compiled = cells(case_rows(subject), 3)
    assert compiled["dwswap faster"] == ("1.50", True)  # below 1.9
    assert compiled["cuda_graph faster"] == ("1.88", True)
    failed = cells(case_rows(subject), 4)
    assert failed["note"] == ("OutOfMemoryError: [GPU 0]", True)
    assert failed["ms"] == ("", False)
    slow = replace(subject, runs=[run("dwswap", build_s=5.5, error_ratio=1.3)])
    assert cells(case_rows(slow), 0)["build s"] == ("5.5", True)
    assert cells(case_rows(slow), 0)["RMS of eager's"] == ("1.30", True)
    assert cells(profile_rows(subject), 0)["percent"] == ("60.0", False)


def test_markdown():
    rows = [
        result(
            run("eager_nchw", plain=3.0, graph=4.0),
            run("eager_channels_last"),
            run("compile", plain=1.8, graph=1.85),
        ),
        result(run("eager_nchw", plain=0.9, graph=0.95), model="maxvit_t", batch=1),
        result(Measured("eager_nchw", reason="OOM"), model="maxvit_t", batch=32),
    ]
    assert markdown(rows) == [
        "Milliseconds per call, and how many times faster dwswap is than each, without / with "
        "`cuda_graph=True` (the better one's target in parentheses):",
        "",
        "| model | batch | dtype | layout | dwswap ms | cuda_graph ms | images/s "
        "| over eager NCHW | over eager channels_last | over compile |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| mobilenet_v2 | 256 | float16 | channels_last | 1.000 | 0.800 | 320,000 "
        "| 3.00 / 4.00 | 2.00 / 2.50 | **1.80 / 1.85 (1.9)** |",
        "",
        "How many times faster than eager in the better of NCHW and channels_last, without / with "
        "`cuda_graph=True`:",
        "",
        "| model | dtype | layout | batch 1 | batch 32 | batch 256 |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| mobilenet_v2 | float16 | channels_last |  |  | 2.00 / 2.50 |",
        "| maxvit_t | float16 | channels_last | **0.90 / 0.95** |  |  |",
    ]
    assert markdown([]) == ["Nothing was measured."]


def test_readme_merges_records(tmp_path, readme_table):
    one, two = record(tmp_path / "one.json"), record(tmp_path / "two.json")
    one.add(result(run("eager_nchw"), run("compile", plain=1.95, graph=2.05)))
    one.save()
    assert readme_table.NOTHING in readme_table.page(readme_table.newest_records(tmp_path))
    one.finish()
    # The same case with fewer peers, and another case.
    two.add(result(run("eager_nchw", plain=7.0, graph=8.0)))
    two.add(result(run("eager_nchw"), run("reduce_overhead"), batch=1))
    two.finish()
    text = readme_table.page(readme_table.newest_records(tmp_path))
    assert text.count("`dwswap bench models`") == 1
    assert "1.95 / 2.05 (1.9) |" in text
    assert "2.00 / 2.50 (1.8) |" in text
    assert "7.00" not in text
    assert "(results/models-some-gpu.png)" in text
    assert "eager.png" not in text
    two.add(result(run("eager_nchw"), model="vgg"))
    two.finish()
    assert "(results/models-some-gpu-eager.png)" in readme_table.page(
        readme_table.newest_records(tmp_path)
    )
    two.add(result(batch=32, passed=False))
    two.finish()
    with pytest.raises(ValueError, match="failed its check"):
        readme_table.page(readme_table.newest_records(tmp_path))


def test_readme_shows_one_picture_of_models(tmp_path, readme_table):
    made = record(tmp_path / "one.json")
    made.add(result(run("eager_nchw"), run("compile")))
    made.add(result(run("eager_nchw"), model="vgg"))
    made.finish()
    caption, _, picture, _, recorded = readme_table.selection(
        readme_table.newest_records(tmp_path)
    ).splitlines()
    assert "on Some GPU (`dwswap bench models`)" in caption
    assert picture.endswith("(benchmarks/results/models-some-gpu.png)")
    assert recorded.startswith("Recorded ")


def test_the_headline_of_the_readme(tmp_path, readme_table):
    assert readme_table.headline(readme_table.newest_records(tmp_path)) == readme_table.NOTHING
    found = record(tmp_path / "one.json")
    found.add(result(run("eager_nchw"), run("compile", plain=1.95, graph=2.05)))
    found.add(result(run("eager_nchw"), batch=1))  # nothing compiled
    found.finish()
    *lines, _, recorded = readme_table.headline(readme_table.newest_records(tmp_path)).splitlines()
    (row,) = [line for line in lines if "| mobilenet_v2 |" in line]
    assert "| mobilenet_v2 | 256 | " in row
    assert row.endswith(" | 2.0 |")
    assert recorded.startswith("Recorded ")


# the picture


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    from PIL import Image

    from dwswap.bench import model_plot

    rows = [
        result(run("eager_nchw"), run("compile"), batch=batch, model=name)
        for batch in (1, 256)
        for name in ("mobilenet_v2", "convnext_tiny")
    ]
    path = model_plot.plot(rows, tmp_path / "new" / "a.png", "title")
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(image.width * image.height)
    drawn = {"#{:02x}{:02x}{:02x}".format(*pixel) for _, pixel in found}
    colours = model_plot.COLOURS
    assert {colours["eager_nchw"], colours["compile"], model_plot.TARGET} <= drawn
    assert colours["reduce_overhead"] not in drawn
    assert set(colours) == {*RUNNERS, *TRAINING_PEERS} - set(OURS)
