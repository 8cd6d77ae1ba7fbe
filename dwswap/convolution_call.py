"""Convolutions that a graph calls as functions: recognize them and judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dwswap import registration
from dwswap.eligibility import DTYPES
from dwswap.ops import depthwise_conv2d
from dwswap.report import REASONS, Layer, dtype_name
from dwswap.separable import separable_conv2d

__all__ = [
    "OPERATOR",
    "SWAPPED",
    "ConvolutionCall",
    "Shapes",
    "bind",
    "example_of",
    "find_calls",
    "has_depthwise_call",
    "owner_of",
]

Shapes = Mapping[fx.Node, tuple[int, ...]]
aten = torch.ops.aten

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION = (*_CONV[:6], "transposed", "output_padding", "groups")
_DEPTHWISE = ("input", "weight", "kernel_size", "bias", "stride", "padding", "dilation")
# The first argument is called `self` here, and `input` in the other overloads.
_NAMES = {"self": "input"}

# The operator of dwswap, as its Python function and as torch.export shows it.
OPERATOR: tuple[Any, ...] = (
    depthwise_conv2d,
    registration.depthwise_conv2d,
    registration.depthwise_conv2d.overloadpacket,
)
# What has a swapped layer as a part as well.
SWAPPED: tuple[Any, ...] = (*OPERATOR, separable_conv2d)
_CONV2D: tuple[Any, ...] = (torch.conv2d, aten.conv2d, aten.conv2d.default, aten.conv2d.padding)
_GENERAL: tuple[Any, ...] = (
    *(torch.convolution, aten.convolution, aten.convolution.default),
    *(torch._convolution, aten._convolution, aten._convolution.default),
)
_DEPTHWISE2D: tuple[Any, ...] = (aten._conv_depthwise2d, aten._conv_depthwise2d.default)
_OTHER: tuple[Any, ...] = (
    *(torch.conv1d, aten.conv1d, aten.conv1d.default, aten.conv1d.padding),
    *(torch.conv3d, aten.conv3d, aten.conv3d.default, aten.conv3d.padding),
)
_TRANSPOSED: tuple[Any, ...] = (
    *(torch.conv_transpose1d, aten.conv_transpose1d, aten.conv_transpose1d.default),
    *(torch.conv_transpose2d, aten.conv_transpose2d, aten.conv_transpose2d.input),
    *(torch.conv_transpose3d, aten.conv_transpose3d, aten.conv_transpose3d.input),
)

_SIGNATURES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((*_CONV2D, *_OTHER), _CONV),
    **dict.fromkeys(OPERATOR, (*_CONV[:6], "input_bias", "input_activation", "activation")),
    separable_conv2d: (*_CONV[:3], "point_weight", "point_bias", "residual"),
    **dict.fromkeys(_GENERAL, _CONVOLUTION),
    **dict.fromkeys(_DEPTHWISE2D, _DEPTHWISE),
    **dict.fromkeys(_TRANSPOSED, (*_CONV[:5], "output_padding", "groups", "dilation")),
}
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1}


@dataclass(frozen=True)
class ConvolutionCall:
    """A ``call_function`` node that computes a convolution.

    Attributes:
        arguments: by name, those of ``torch.conv2d`` at least; defaults filled in.
        owner: path of the module whose forward makes the call.
        layer: the description and the decision; ``swapped`` where the node may be replaced.
    """

    node: fx.Node
    arguments: dict[str, Any]
    owner: str
    layer: Layer


def find_calls(
    graph_module: fx.GraphModule,
    *,
    prefix: str = "",
    shapes: Shapes | None = None,
    skip: Callable[[str], str | None] | None = None,
) -> Iterator[ConvolutionCall]:
    """The convolution calls of ``graph_module``, in graph order.

    Args:
        prefix: path of ``graph_module`` inside the model.
        shapes: what is known about the shapes of values that the graph computes.
        skip: called with the owner's path for calls that would be swapped; the reason code for
            those that stay.
    """
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not _is_convolution(node.target):
            continue
        arguments = bind(node)
        owner = _join(prefix, owner_of(node))
        layer = _describe(graph_module, node, arguments, owner, shapes or {})
        code, facts = _judge(node, arguments, layer)
        if code == "depthwise" and skip is not None:
            code = skip(owner) or code
        decision = "swapped" if code in ("depthwise", "already_swapped") else "kept"
        yield ConvolutionCall(node, arguments, owner, layer.decided(decision, code, **facts))


def has_depthwise_call(graph_module: fx.GraphModule) -> bool:
    """Whether some call in the graph may be swapped."""
    return any(call.layer.reason == "depthwise" for call in find_calls(graph_module))


def _is_convolution(target: Any) -> bool:
    try:
        return target in _SIGNATURES
    except TypeError:  # an unhashable callable
        return False


def bind(node: fx.Node) -> dict[str, Any]:
    """Arguments of a convolution node by name; ``groups`` is None where it is inferred."""
    names = _SIGNATURES[node.target]
    given = dict(zip(names, node.args, strict=False))
    given |= {_NAMES.get(name, name): value for name, value in node.kwargs.items()}
    inferred = node.target in (*SWAPPED, *_DEPTHWISE2D)
    return {**_DEFAULTS, "groups": None if inferred else 1, **given}


def example_of(node: fx.Node) -> Any:
    """The fake value of ``node`` that an export or Dynamo left; None where there is none."""
    return node.meta.get("val", node.meta.get("example_value"))


def owner_of(node: fx.Node) -> str:
    """Path of the module whose forward makes the call ``node``, inside its graph module."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries and isinstance(entries[-1], tuple) else ""


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _describe(
    graph_module: fx.GraphModule,
    node: fx.Node,
    arguments: dict[str, Any],
    owner: str,
    shapes: Shapes,
) -> Layer:
    weight = arguments.get("weight")
    shape, dtype = _known_tensor(graph_module, weight, shapes)
    input_shape = _known_tensor(graph_module, arguments.get("input"), shapes)[0]
    if arguments["groups"] is None and input_shape is not None and len(input_shape) >= 3:
        arguments["groups"] = input_shape[-3]
    groups = arguments.get("groups")
    return Layer(
        path=_join(owner, node.name),
        kind="functional",
        decision="kept",
        reason="not_conv2d",
        detail=REASONS["not_conv2d"],
        weight_shape=shape,
        kernel_size=None if shape is None else shape[2:],
        stride=_sizes(arguments["stride"]),
        padding=_sizes(arguments["padding"]),
        dilation=_sizes(arguments["dilation"]),
        groups=groups if isinstance(groups, int) else None,
        dtype=None if dtype is None else dtype_name(dtype),
        input_shape=input_shape,
    )


def _judge(node: fx.Node, arguments: dict[str, Any], layer: Layer) -> tuple[str, dict[str, Any]]:
    if node.target in SWAPPED:
        return "already_swapped", {}
    if node.target in _TRANSPOSED or arguments.get("transposed", False) is not False:
        return "transposed", {}
    if node.target in _OTHER:
        return "not_conv2d", {}
    if any(not isinstance(arguments.get(name), fx.Node) for name in ("input", "weight")):
        return "arguments_unknown", {}
    shape, groups = layer.weight_shape, layer.groups
    if groups is None:
        return "groups_unknown", {}
    if shape is None:
        return (
            ("not_depthwise", {"groups": 1, "channels": "all"})
            if groups == 1
            else (
                "weight_unknown",
                {},
            )
        )
    if len(shape) != 4:
        return "not_conv2d", {}
    if groups == 1 and shape[1] == 1:
        return "single_channel", {}
    if shape[1] != 1:
        return "not_depthwise", {"groups": groups, "channels": groups * shape[1]}
    if shape[0] % groups or any(size == 0 for size in shape):
        return "inconsistent_shape", {"shape": shape}
    if layer.dtype is not None and layer.dtype not in map(dtype_name, DTYPES):
        return "dtype", {"dtype": layer.dtype}
    return "depthwise", {}


def _known_tensor(
    graph_module: fx.GraphModule, value: Any, shapes: Shapes
) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    """Shape and dtype of what ``value`` stands for, as far as they are known without running."""
    if not isinstance(value, fx.Node):
        return None, None
    if value.op == "get_attr":
        tensor = _attribute(graph_module, str(value.target))
        if isinstance(tensor, Tensor) and not torch.nn.parameter.is_lazy(tensor):
            return tuple(tensor.shape), tensor.dtype
        return None, None
    if value in shapes:
        return shapes[value], None
    example = example_of(value)
    if isinstance(example, Tensor) and all(isinstance(size, int) for size in example.shape):
        return tuple(example.shape), example.dtype
    return None, None


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _sizes(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(value) if all(isinstance(item, int) for item in value) else None
    if isinstance(value, str):
        return value
    return (value, value) if isinstance(value, int) else None
