"""The feature extractors of torchvision: a GraphModule with a graph for each mode."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ControlFlow, image
from torch import Tensor, nn

import dwswap
from dwswap import DepthwiseConv2d
from dwswap.bench.random_weights import randomize

extraction = pytest.importorskip("torchvision.models.feature_extraction")


class Dropping(nn.Module):
    """Its graphs differ, as those of timm's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.depthwise(self.conv(x))))
        return F.dropout(x, 0.5, self.training) + 1


def extractor(training: bool) -> Any:
    model = Dropping()
    randomize(model, image())
    return extraction.create_feature_extractor(model.train(), {"add": "y"}).train(training)


def computed(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model(image())["y"]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"fuse": False}, {"example_inputs": image(), "verify": True}]
)
def test_in_eval_mode(options: dict[str, Any], inplace: bool) -> None:
    model = extractor(training=False)
    expected = computed(model)
    fast = dwswap.optimize(model, inplace=inplace, **options)
    assert dwswap.report(fast).swapped
    torch.testing.assert_close(computed(fast), expected)
    if options.get("fuse", True):
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(computed(copied), expected)
        with pytest.raises(RuntimeError, match="optimized for inference"):
            fast.train()


def test_inside_a_model() -> None:
    model = nn.Sequential(extractor(training=False)).eval()
    for options in ({}, {"fuse": False}):
        torch.testing.assert_close(computed(dwswap.optimize(model, **options)), computed(model))


@pytest.mark.parametrize("training", [False, True])
def test_beside_a_graph_that_refuses_to_train(training: bool) -> None:
    model = nn.Sequential(extractor(training=False), ControlFlow()).eval()
    fast: Any = dwswap.optimize(model, skip=lambda module, path: path.startswith("0"))
    assert dwswap.report(fast).traced == ("1.block",)
    fast[0].train(training)
    expected = computed(fast[0])
    with pytest.raises(RuntimeError, match="optimized for inference"):
        fast.train()
    assert (fast.training, fast[0].training, fast[1].training) == (False, training, False)
    # A feature extractor swaps its graph where its mode changes.
    torch.testing.assert_close(computed(fast[0]), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_training(inplace: bool) -> None:
    model = extractor(training=True)
    plain = copy.deepcopy(model)
    fast = dwswap.optimize(model, inplace=inplace)
    for _ in range(2):
        for mode in (True, False):
            assert torch.equal(computed(fast.train(mode)), computed(plain.train(mode)))
            assert type(fast.depthwise) is DepthwiseConv2d
    for again in (dwswap.optimize(fast), dwswap.restore(fast, inplace=inplace)):
        torch.testing.assert_close(computed(again), computed(plain))


def test_without_a_report() -> None:
    model = extractor(training=False)
    assert dwswap.restore(model) is model
    with pytest.raises(ValueError, match="without a report"):
        dwswap.report(model)
