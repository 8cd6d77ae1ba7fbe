"""What the demo computes: its photograph, its untrained model, its comparisons."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import dwswap
from dwswap import demo
from dwswap.cli import demo as command

pytest.importorskip("PIL")
pytest.importorskip("torchvision")


def test_photograph_is_real():
    pytest.importorskip("sklearn")
    image, origin = demo.photograph()
    assert origin == "china.jpg of scikit-learn"
    assert image.mode == "RGB"
    assert len(image.resize((64, 64)).getcolors(64 * 64)) > 1000


def test_photograph_without_scikit_learn(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert demo.photograph()[1] == "grace_hopper.jpg of matplotlib"


def test_photograph_without_any_package(monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FileNotFoundError, match=r"dwswap\[bench\]"):
        demo.photograph()


def test_preprocessing_is_that_of_torchvision():
    transform, classes = demo.preprocessing("mobilenet_v2")
    assert transform.resize_size == [256]
    assert transform.crop_size == [224]
    assert len(classes) == 1000
    with pytest.raises(ValueError, match="got 'mobilenet'"):
        demo.preprocessing("mobilenet")


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def test_randomize_takes_the_statistics_of_the_images():
    model, images = small_model(), 5 + torch.rand(4, 3, 32, 32)
    before = torch.get_rng_state()
    demo.randomize(model, images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    assert [model[1].momentum, model[4].momentum] == [0.3, 0.1]
    assert model[1].weight.unique().numel() == 8
    with torch.no_grad():
        mean = model[0](images).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, mean)


def test_randomize_is_reproducible():
    torch.manual_seed(0)
    one = small_model()
    two = small_model()
    two.load_state_dict(one.state_dict())
    images = torch.rand(2, 3, 32, 32)
    demo.randomize(one, images)
    demo.randomize(two, images)
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def test_views_differ():
    views = demo.views(torch.rand(3, 64, 64), 4)
    assert views.shape == (4, 3, 64, 64)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 4


def test_compare_yields_every_variant_in_order():
    torch.manual_seed(0)
    model = small_model().eval()
    wanted = demo.variants(torch.device("cpu"), [1, 2])
    found = list(demo.compare(model, torch.rand(3, 32, 32), wanted, torch.device("cpu"), 0.01))
    assert [c.variant for c in found] == wanted
    assert [(v.layout, v.batch) for v in wanted] == [
        ("NCHW", 1),
        ("NCHW", 2),
        ("channels_last", 1),
        ("channels_last", 2),
    ]
    for comparison in found:
        assert comparison.errors.passed
        assert len(comparison.report.swapped) == 1
        assert comparison.to_dict()["dtype"] == "float32"
    assert type(model[3]) is nn.Conv2d


def test_compare_notices_wrong_outputs(monkeypatch):
    """An optimize that breaks the model must show."""

    def broken(model):
        return nn.Sequential(demo_optimize(model), nn.Threshold(0.5, 0.0))

    demo_optimize = demo.optimize
    monkeypatch.setattr(demo, "optimize", broken)
    monkeypatch.setattr(demo, "report", lambda model: None)
    model = small_model().eval()
    wanted = demo.variants(torch.device("cpu"), [1])
    found = list(demo.compare(model, torch.rand(3, 32, 32), wanted, torch.device("cpu"), 0.01))
    assert not any(comparison.errors.passed for comparison in found)


def test_tables_of_a_narrow_terminal_keep_every_digit():
    model, image = small_model().eval(), torch.randn(3, 16, 16)
    wanted = demo.variants(torch.device("cpu"), [1])
    comparisons = list(demo.compare(model, image, wanted, torch.device("cpu"), budget=0.0))
    fast = dwswap.optimize(model, image[None], verify=True)
    console = Console(file=io.StringIO(), width=60)
    console.print(command._layers(dwswap.report(fast)))
    console.print(command._table(comparisons, "small"))
    assert "\N{HORIZONTAL ELLIPSIS}" not in console.file.getvalue()
