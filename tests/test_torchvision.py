"""Every model of torchvision: what is found, and that the outputs stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import dwswap
from dwswap import DepthwiseConv2d
from dwswap.passes.unswap_calls import swapped_calls
from dwswap.verify import compare

models = pytest.importorskip("torchvision").models

# Number of depthwise layers of every model that has any.
DEPTHWISE = {
    **{"mobilenet_v2": 17, "mobilenet_v3_large": 15, "mobilenet_v3_small": 11},
    **{"quantized_mobilenet_v2": 17, "quantized_mobilenet_v3_large": 15},
    **{"efficientnet_b0": 16, "efficientnet_b1": 23, "efficientnet_b2": 23, "efficientnet_b3": 26},
    **{"efficientnet_b4": 32, "efficientnet_b5": 39, "efficientnet_b6": 45, "efficientnet_b7": 55},
    **{"efficientnet_v2_s": 30, "efficientnet_v2_m": 44, "efficientnet_v2_l": 61},
    **dict.fromkeys(("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"), 17),
    **{
        f"{q}shufflenet_v2_x{n}": 19
        for q in ("", "quantized_")
        for n in ("0_5", "1_0", "1_5", "2_0")
    },
    **{"convnext_tiny": 18, "convnext_small": 36, "convnext_base": 36, "convnext_large": 36},
    **{"maxvit_t": 11, "lraspp_mobilenet_v3_large": 15, "deeplabv3_mobilenet_v3_large": 15},
    **{"fasterrcnn_mobilenet_v3_large_fpn": 15, "fasterrcnn_mobilenet_v3_large_320_fpn": 15},
    "ssdlite320_mobilenet_v3_large": 31,
}
DETECTION = {name for name in DEPTHWISE if name.startswith(("fasterrcnn", "ssdlite"))}
# The smallest model of every family, and its input size.
FAMILIES = {
    **dict.fromkeys(("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "mnasnet0_5"), 64),
    **dict.fromkeys(("efficientnet_v2_s", "shufflenet_v2_x0_5", "convnext_tiny"), 64),
    **dict.fromkeys(("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"), 64),
    **dict.fromkeys(("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"), 96),
    "maxvit_t": 224,
}


class WithoutData(TorchFunctionMode):
    """Parameters on the meta device, as ``torch.device("meta")``; other tensors with data.

    For constructors that compute with tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(name: str, **options: Any) -> nn.Module:
    """A torchvision model without pretrained weights."""
    try:
        return models.get_model(name, weights=None, weights_backbone=None, **options)
    except (TypeError, ValueError):  # it has no backbone
        return models.get_model(name, weights=None, **options)


def build_without_data(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(name)
    except NotImplementedError:
        with WithoutData(), torch.no_grad():
            return build(name)


def build_with_data(name: str, size: int = 64) -> nn.Module:
    """A model in eval mode with BatchNorm statistics that fit its activations.

    With the statistics of a fresh model the activations fade away from layer to layer.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if name.startswith("fasterrcnn"):
        options = {"rpn_score_thresh": 0.0, "box_score_thresh": 0.0}
    model = build(name, **options).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(*inputs(name, size))
    return model.eval()


def inputs(name: str, size: int) -> tuple[Any, ...]:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return (list(images),) if name in DETECTION else (images,)


def leaves(outputs: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_all_depthwise_layers_of_all_models_are_swapped() -> None:
    names = models.list_models()
    assert len(names) >= 121  # what was surveyed; later releases may add models
    found: dict[bool, dict[str, int]] = {False: {}, True: {}}
    for name in names:
        model = build_without_data(name)
        for train in (False, True):
            report = dwswap.explain(model.train(train))
            convolutions = [
                path for path, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)
            ]
            assert [layer.path for layer in report.layers] == convolutions, name
            swapped = [layer for layer in report.layers if layer.decision == "swapped"]
            assert all(layer.reason == "depthwise" for layer in swapped)
            if swapped:
                found[train][name] = len(swapped)
                graph = not train and name not in DETECTION
                assert report.mode == ("graph" if graph else "substitution"), name
            else:
                assert report.mode == "unchanged", name
    for train in (False, True):
        assert found[train] == DEPTHWISE
        assert len(found[train]) == 38
        assert sum(found[train].values()) == 917


def check(name: str, size: int) -> None:
    model = build_with_data(name, size)
    arguments = inputs(name, size)
    fast = dwswap.optimize(model, arguments, verify=True)

    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed, str(report)
    assert len(report.swapped) == DEPTHWISE[name]
    assert all(layer.errors is not None and layer.input_shape for layer in report.swapped)
    graphs = [m for m in fast.modules() if isinstance(m, fx.GraphModule)]
    calls = [call for graph in graphs for call in swapped_calls(graph)]
    modules = [m for m in fast.modules() if isinstance(m, DepthwiseConv2d)]
    assert len(modules) + len(calls) == DEPTHWISE[name]
    if not graphs:
        assert list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        ours, theirs = fast(*arguments), model(*arguments)
    outputs = list(zip(leaves(ours), leaves(theirs), strict=True))
    assert outputs
    for own, expected in outputs:
        assert own.numel() > 0
        assert own.float().std() > 0
        errors = compare(own, expected, expected if name in DETECTION else expected.double())
        scale = expected.abs().max()
        assert errors.problem is None
        # Both differ from float64 by about as much, in other directions: what verify has judged.
        judged = report.verification.outputs.values()
        apart = max(errors.ours + errors.pytorch for errors in judged)
        assert errors.ours <= max(1e-4 * scale, apart)


# Of those that test_fused_models.py compares as well, two are enough.
SLOW = (
    "convnext_tiny",
    "deeplabv3_mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "lraspp_mobilenet_v3_large",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "ssdlite320_mobilenet_v3_large",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES]
)
def test_outputs(name: str) -> None:
    check(name, FAMILIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DEPTHWISE.keys() - FAMILIES.keys()))
def test_outputs_of_the_other_models(name: str) -> None:
    check(name, 96 if name in DETECTION else 64)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_swap_only_exchanges_checkpoints(name: str) -> None:
    for train in (False, True):
        model, other = build_with_data(name).train(train), build_with_data(name).train(train)
        fast = dwswap.optimize(other, fuse=False)
        assert type(fast) is type(model)
        for source, target in ((model, fast), (fast, model)):
            assert not any(target.load_state_dict(source.state_dict()))
        restored = dwswap.restore(fast)
        assert list(restored.state_dict()) == list(model.state_dict())
        assert not any(isinstance(m, DepthwiseConv2d) for m in restored.modules())


def test_mobilenet_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    fast = dwswap.optimize(build_with_data("mobilenet_v3_small"))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), fast(x))
