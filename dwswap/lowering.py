"""Operators in the place of Python functions, which the graph of an exported program may not call.

The passes write what every ``torch.fx`` graph may call: ``torch.conv2d``, ``F.linear``,
``dwswap.depthwise_conv2d``, functions of this package.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dwswap.checks import pair
from dwswap.convolution_call import bind, example_of
from dwswap.layouts import memory_format, restored, restored_layout, to_layout
from dwswap.ops import depthwise_conv2d, squeeze_excitation
from dwswap.pointwise import pointwise_product, pointwise_residual
from dwswap.schema import depthwise_conv2d as depthwise_operator
from dwswap.schema import squeeze_excitation as excitation_operator

__all__ = ["lower", "lower_depthwise"]

aten = torch.ops.aten

# Function -> the operator, and that for padding="same" or "valid".
_CONVOLUTIONS: dict[Any, tuple[Any, Any]] = {
    torch.conv1d: (aten.conv1d.default, aten.conv1d.padding),
    torch.conv2d: (aten.conv2d.default, aten.conv2d.padding),
    torch.conv3d: (aten.conv3d.default, aten.conv3d.padding),
    torch.conv_transpose1d: (aten.conv_transpose1d.default, None),
    torch.conv_transpose2d: (aten.conv_transpose2d.input, None),
    torch.conv_transpose3d: (aten.conv_transpose3d.input, None),
}
# Those that take the same arguments.
_SIMPLE: dict[Any, Any] = {
    F.relu: aten.relu.default,
    F.relu6: aten.relu6.default,
    F.hardswish: aten.hardswish.default,
    F.silu: aten.silu.default,
    F.gelu: aten.gelu.default,
    F.hardsigmoid: aten.hardsigmoid.default,
    torch.sigmoid: aten.sigmoid.default,
    operator.add: aten.add.Tensor,
}
_METHODS: dict[str, Any] = {"size": aten.sym_size.int}


def lower(graph: fx.Graph, *, decomposed: bool = False) -> set[fx.Node]:
    """Replace in place every call that a pass may have made of no operator; the new nodes.

    Inputs of the graph have their fake values in ``meta["val"]``. Conversions of layouts are made
    for inputs in the layout of these.

    Args:
        decomposed: ``aten.convolution`` for all convolutions, ``aten.addmm`` for linear layers.
    """
    lowering = _Lowering(graph, decomposed)
    return _replace(graph, lowering.replacement)


def lower_depthwise(graph: fx.Graph) -> None:
    """Replace in place calls of ``dwswap.depthwise_conv2d`` by those of the operator.

    Where ``padding="same"``, the weight has a fake value in ``meta``.
    """
    lowering = _Lowering(graph, False)
    _replace(graph, lambda node: lowering.depthwise if node.target is depthwise_conv2d else None)


Replace: TypeAlias = Callable[[fx.Node], fx.Node]


def _replace(graph: fx.Graph, choose: Callable[[fx.Node], Replace | None]) -> set[fx.Node]:
    made: set[fx.Node] = set()
    for node in list(graph.nodes):
        replace = choose(node)
        if replace is None:
            continue
        with graph.inserting_before(node):
            new = replace(node)
        if new.op != "placeholder":
            new.meta = {k: v for k, v in node.meta.items() if k != "is_wrapped"}
            made.add(new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return made


class _Lowering:
    def __init__(self, graph: fx.Graph, decomposed: bool) -> None:
        self.graph, self.decomposed = graph, decomposed

    def replacement(self, node: fx.Node) -> Replace | None:
        """What makes the node that computes what ``node`` does; None where that may stay."""
        if node.op == "call_method":
            return self._view if node.target == "view" else self._simple
        if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
            return None
        if node.target is depthwise_conv2d:
            return self.depthwise
        if node.target in _CONVOLUTIONS:
            return self._convolution
        if node.target is F.linear:
            return self._linear
        if node.target is squeeze_excitation:
            return self._excitation
        if node.target is pointwise_product:
            return self._product
        if node.target is pointwise_residual:
            return self._residual
        if node.target is to_layout:
            return self._converted
        if node.target is restored:
            return self._restored
        is_sum = node.target is operator.add and not isinstance(_example(node.args[0]), Tensor)
        return self._simple if node.target in _SIMPLE and not is_sum else None

    def _simple(self, node: fx.Node) -> fx.Node:
        table: dict[Any, Any] = _METHODS if node.op == "call_method" else _SIMPLE
        return self.graph.call_function(table[node.target], node.args, node.kwargs)

    def _view(self, node: fx.Node) -> fx.Node:
        return self.graph.call_function(aten.view.default, (node.args[0], list(node.args[1:])))

    def depthwise(self, node: fx.Node) -> fx.Node:
        given = bind(node)
        input, padding = given["input"], given["padding"]
        stride, dilation = (list(pair(n, given[n], 1)) for n in ("stride", "dilation"))
        if padding == "same":
            weight = _example(given["weight"])
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):  # aten pads the odd element at the end as well
                border = [0, total[1] % 2, 0, total[0] % 2]
                input = self.graph.call_function(aten.constant_pad_nd.default, (input, border))
            padding = [t // 2 for t in total]
        padding = [0, 0] if padding == "valid" else list(pair("padding", padding, 0))
        args = (input, given["weight"], given["bias"], stride, padding, dilation)
        names = ("input_bias", "input_activation", "activation")
        absorbed = {name: given[name] for name in names if name in given}
        return self.graph.call_function(depthwise_operator, args, absorbed)

    def _convolution(self, node: fx.Node) -> fx.Node:
        given = bind(node)
        plain, named = _CONVOLUTIONS[node.target]
        transposed = named is None
        is_named = isinstance(given["padding"], str)
        spatial = _example(given["weight"]).dim() - 2
        names = ("stride", "padding", "dilation", "output_padding")
        sizes = {name: _sizes(given.get(name, 0), spatial) for name in names}
        args = tuple(given[name] for name in ("input", "weight", "bias"))
        groups = given["groups"]
        if self.decomposed and not is_named:
            args += (sizes["stride"], sizes["padding"], sizes["dilation"], transposed)
            args += (sizes["output_padding"], groups)
            return self.graph.call_function(aten.convolution.default, args)
        args += (sizes["stride"], sizes["padding"])
        if transposed:
            args += (sizes["output_padding"], groups, sizes["dilation"])
        else:
            args += (sizes["dilation"], groups)
        return self.graph.call_function(named if is_named else plain, args)

    def _linear(self, node: fx.Node) -> fx.Node:
        input, weight, bias = node.args
        if not self.decomposed or _example(input).dim() != 2:
            return self.graph.call_function(aten.linear.default, node.args)
        weight = self.graph.call_function(aten.permute.default, (weight, [1, 0]))
        if bias is None:
            return self.graph.call_function(aten.mm.default, (input, weight))
        return self.graph.call_function(aten.addmm.default, (bias, input, weight))

    def _excitation(self, node: fx.Node) -> fx.Node:
        given = {"activation": "relu", "gate": "sigmoid", **node.kwargs}
        args = (*node.args, given["activation"], given["gate"])
        return self.graph.call_function(excitation_operator, args)

    def _residual(self, node: fx.Node) -> fx.Node:
        """A product that changes its residual in place is none for a functional graph."""
        input, weight, residual = node.args
        product = self._pointwise(input, weight, None)
        return self.graph.call_function(aten.add.Tensor, (residual, product))

    def _product(self, node: fx.Node) -> fx.Node:
        """Where the weight is channels_last, so is the result of the convolution, whatever its
        input is; and it would lay out the input as the product does."""
        call = self.graph.call_function
        input, weight, bias = node.args
        if memory_format(_example(weight)) is not torch.channels_last:
            return self._pointwise(input, weight, bias)
        outputs, inputs = _example(weight).shape[:2]
        sizes = [
            size if isinstance(size, int) else call(aten.sym_size.int, (input, dim))
            for dim, size in enumerate(_example(node).shape[2:], 2)
        ]
        pixels = call(aten.permute.default, (input, [0, 2, 3, 1]))
        rows = call(aten.reshape.default, (pixels, [-1, inputs]))
        matrix = call(aten.view.default, (weight, [outputs, inputs]))
        matrix = call(aten.permute.default, (matrix, [1, 0]))
        if bias is None:
            product = call(aten.mm.default, (rows, matrix))
        else:
            product = call(aten.addmm.default, (bias, rows, matrix))
        pixels = call(aten.view.default, (product, [-1, *sizes, outputs]))
        return call(aten.permute.default, (pixels, [0, 3, 1, 2]))

    def _pointwise(self, input: Any, weight: Any, bias: Any) -> fx.Node:
        if not self.decomposed:
            return self.graph.call_function(aten.conv2d.default, (input, weight, bias))
        zero, one = [0, 0], [1, 1]
        args = (input, weight, bias, one, zero, one, False, zero, 1)
        return self.graph.call_function(aten.convolution.default, args)

    def _converted(self, node: fx.Node) -> fx.Node:
        value, layout = node.args
        assert isinstance(value, fx.Node)
        example = _example(value)
        if not _is_image(example):
            return value
        return self._contiguous(value, layout)

    def _restored(self, node: fx.Node) -> fx.Node:
        output, channels_last_weights, *inputs = node.args
        assert isinstance(output, fx.Node)
        layout = restored_layout(bool(channels_last_weights), *map(_example, inputs))
        if _example(output).dim() != 3:
            return self._contiguous(output, layout)
        image = self.graph.call_function(aten.unsqueeze.default, (output, 0))
        image = self._contiguous(image, layout)
        return self.graph.call_function(aten.squeeze.dim, (image, 0))

    def _contiguous(self, value: fx.Node, layout: Any) -> fx.Node:
        if self.decomposed:
            return self.graph.call_function(aten.clone.default, (value,), {"memory_format": layout})
        options = {"memory_format": layout}
        return self.graph.call_function(aten.contiguous.default, (value,), options)


def _example(node: Any) -> Any:
    return example_of(node) if isinstance(node, fx.Node) else node


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _sizes(value: Any, spatial: int) -> Any:
    if isinstance(value, (str, list)):
        return value
    return list(value) if isinstance(value, tuple) else [value] * spatial
