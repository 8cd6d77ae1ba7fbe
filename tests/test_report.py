"""The report: content, rendering, JSON, where it lives."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from tiny_models import Block, ControlFlow, depthwise, image
from torch import nn

import dwswap
from dwswap.changes import CHANGE_REASONS, Change
from dwswap.report import REASONS, Layer, LayerErrors, Report, Verification


def test_layer_lines() -> None:
    model = Block(kernel_size=(3, 5), stride=2, padding=(1, 2), dilation=1, multiplier=2).eval()
    expand, layer = dwswap.report(dwswap.optimize(model, image())).layers
    assert layer == Layer(
        path="depthwise",
        kind="module",
        decision="swapped",
        reason="depthwise",
        detail=REASONS["depthwise"],
        weight_shape=(16, 1, 3, 5),
        kernel_size=(3, 5),
        stride=(2, 2),
        padding=(1, 2),
        dilation=(1, 1),
        groups=8,
        dtype="float32",
        input_shape=(2, 8, 9, 9),
        changes=(
            Change("batchnorm", "norm", True, "folded", CHANGE_REASONS["folded"]),
            Change("activation", "relu6", True, "absorbed", CHANGE_REASONS["absorbed"], "relu6"),
            Change("input_bias", "expand", True, "absorbed", CHANGE_REASONS["absorbed"]),
        ),
    )
    assert (expand.decision, expand.reason) == ("kept", "not_depthwise")
    assert expand.detail == "groups 1 of 3 channels"


def test_text() -> None:
    report = dwswap.report(dwswap.optimize(Block().eval(), image(), verify=True))
    lines = report.render(width=200).splitlines()
    assert len(lines) == 6
    for word in ("layer", "input", "weight", "stride", "pad", "decision", "reason", "error"):
        assert word in lines[0]
    assert "2x3x9x9" in lines[1]
    assert "not_depthwise: groups 1 of 3 channels" in lines[1]
    assert "8x1x3x3" in lines[2]
    assert "swapped" in lines[2]
    assert lines[3] == report.summary()
    assert lines[3].startswith(
        "Block: 1 of 2 convolutions swapped (graph; composite (CPU)); kept: 1 not_depthwise; "
        "verify passed"
    )
    assert "gave its bias to depthwise" in lines[1]
    changes = "folded norm, absorbed relu6 after it, absorbed the bias of expand"
    assert changes in lines[2]
    assert lines[4] == (
        "4 calls of operations per forward before, 2 now; folded 1 BatchNorm, absorbed 1 "
        "activations and 1 biases"
    )
    assert lines[5].startswith("verify output: error / PyTorch's ")
    summary = str(report).splitlines().index(report.summary())
    assert max(map(len, str(report).splitlines()[:summary])) <= 120
    assert all(len(line) <= 80 for line in report.render(width=80).splitlines()[:-3])


def test_text_in_a_narrow_terminal_has_layers_and_reasons() -> None:
    lines = dwswap.report(dwswap.optimize(Block().eval(), image())).render(40).splitlines()
    assert lines[0].split() == ["layer", "decision", "reason", "changes"]
    assert any(line.startswith("depthwise ") and "swapped" in line for line in lines)


def test_text_takes_paths_literally() -> None:
    layer = Layer("[bold]x[/bold]", "module", "kept", "skipped", REASONS["skipped"])
    text = str(Report("M", layers=[layer]))
    assert "[bold]x[/bold]" in text


def test_text_of_an_untraced_model() -> None:
    report = dwswap.explain(ControlFlow().eval())
    assert str(report).splitlines()[-1].startswith("not traced as a whole: control flow ")
    assert str(Report("M")) == "M: 0 of 0 convolutions swapped (unchanged; )"


def test_text_shows_failures_and_changes() -> None:
    errors = LayerErrors(1.0, 0.1, 0.3)
    layer = Layer("a", "module", "kept", "verify_failed", "put back", errors=errors)
    changes = (
        Change("batchnorm", "norm", True, "folded", ""),
        Change("activation", "act", False, "other_users", "it is used elsewhere", "relu"),
    )
    other = dataclasses.replace(layer, path="b", errors=None, changes=changes)
    verification = Verification(False, {"output": errors}, ("a note",))
    text = str(Report("M", layers=[layer, other], verification=verification))
    assert "1 / 0.1 FAILED" in text
    assert "folded norm" in text
    assert "act stays" in text
    assert "verify: a note" in text
    assert "verify FAILED" in text


def test_json() -> None:
    report = dwswap.report(dwswap.optimize(Block().eval(), image(), verify=True))
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["mode"] == "graph"
    assert loaded["summary"] == report.summary()
    assert loaded["layers"][1]["path"] == "depthwise"
    assert loaded["layers"][1]["weight_shape"] == [8, 1, 3, 3]
    assert loaded["layers"][1]["errors"].keys() == {"ours", "pytorch", "limit", "problem"}
    assert loaded["verification"]["passed"] is True


@pytest.mark.parametrize("fuse", [True, False])
def test_lives_with_the_model(fuse: bool) -> None:
    fast = dwswap.optimize(Block().eval(), fuse=fuse)
    report = dwswap.report(fast)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert dwswap.report(again) == report
    fast = dwswap.optimize(Block().eval(), fuse=False)
    for restored in (dwswap.restore(fast), dwswap.restore(fast, inplace=True)):
        with pytest.raises(ValueError, match=r"dwswap\.explain"):
            dwswap.report(restored)


def test_report_of_a_compiled_model() -> None:
    fast = dwswap.optimize(Block().train())
    assert dwswap.report(torch.compile(fast, backend="eager")) is dwswap.report(fast)
    with pytest.raises(ValueError, match=r"must come from dwswap\.optimize"):
        dwswap.report(torch.compile(Block(), backend="eager"))


def test_report_of_any_other_model() -> None:
    with pytest.raises(ValueError, match=r"must come from dwswap\.optimize, got a Sequential"):
        dwswap.report(nn.Sequential(depthwise()))


def test_errors_that_are_worse() -> None:
    good, better = LayerErrors(1.0, 1.0, 2.0), LayerErrors(0.5, 1.0, 2.0)
    bad = LayerErrors(3.0, 1.0, 2.0)
    broken = LayerErrors(0.0, 1.0, 2.0, problem="shape")
    assert good.passed
    assert not bad.passed
    assert not broken.passed
    assert good.worse(better) == better.worse(good) == good
    assert good.worse(None) == good
    for failed in (bad, broken):
        assert good.worse(failed) == failed.worse(good) == failed


def test_report_of_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        dwswap.report(3)  # type: ignore[arg-type]
