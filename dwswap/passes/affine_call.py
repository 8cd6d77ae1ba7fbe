"""Convolutions and linear layers in a graph, modules and calls alike, as one kind of call.

A pass that changes the weights or the bias of one call replaces its node by the functional form,
whose tensors are ``get_attr`` nodes: the module may be called elsewhere as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from dwswap.checks import whole
from dwswap.convolution_call import OPERATOR, bind
from dwswap.eligibility import reason_not_plain
from dwswap.modules import DepthwiseConv2d
from dwswap.ops import depthwise_conv2d

__all__ = ["AffineCall", "Operand", "affine_call", "attribute", "transposed", "value_of"]

Operand = fx.Node | str
"""A tensor that a call takes: a node, or the path of a module's parameter."""

aten = torch.ops.aten

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_ABSORBED = ("input_bias", "input_activation", "activation")
_NEUTRAL: dict[str, Any] = {"input_bias": None, "input_activation": "none", "activation": "none"}

# What decomposed programs have for a linear layer of two dimensions, and for the transpose in it.
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_TRANSPOSES = (aten.t.default, aten.permute.default)

# Functional form -> its options in order, and the spatial dimensions.
_FORMS: dict[Any, tuple[tuple[str, ...], int]] = {
    torch.conv1d: (_CONV, 1),
    torch.conv2d: (_CONV, 2),
    torch.conv3d: (_CONV, 3),
    torch.conv_transpose1d: (_TRANSPOSED, 1),
    torch.conv_transpose2d: (_TRANSPOSED, 2),
    torch.conv_transpose3d: (_TRANSPOSED, 3),
    F.linear: ((), 0),
    depthwise_conv2d: ((*_CONV, *_ABSORBED), 2),
}
_MODULES: dict[type, Any] = {
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
    nn.ConvTranspose1d: torch.conv_transpose1d,
    nn.ConvTranspose2d: torch.conv_transpose2d,
    nn.ConvTranspose3d: torch.conv_transpose3d,
    nn.Linear: F.linear,
    DepthwiseConv2d: depthwise_conv2d,
}
_CALLS: dict[Any, Any] = {
    **{form: form for form in _FORMS},
    **dict.fromkeys((aten.conv1d, aten.conv1d.default, aten.conv1d.padding), torch.conv1d),
    **dict.fromkeys((aten.conv2d, aten.conv2d.default, aten.conv2d.padding), torch.conv2d),
    **dict.fromkeys((aten.conv3d, aten.conv3d.default, aten.conv3d.padding), torch.conv3d),
    **dict.fromkeys((torch.convolution, aten.convolution, aten.convolution.default), None),
    **dict.fromkeys((aten.conv_transpose2d, aten.conv_transpose2d.input), torch.conv_transpose2d),
    **dict.fromkeys((aten.linear, aten.linear.default), F.linear),
    **dict.fromkeys(OPERATOR, depthwise_conv2d),
}
# ``aten.convolution``: whether it is transposed, dimensions of the weight -> functional form.
_GENERAL: dict[tuple[Any, int], Any] = {
    (transposed, spatial + 2): function
    for function, (options, spatial) in _FORMS.items()
    for transposed in (False, True)
    if function is not depthwise_conv2d and options is (_TRANSPOSED if transposed else _CONV)
}


@dataclass(frozen=True)
class AffineCall:
    """A node that computes a convolution or a linear layer.

    Attributes:
        function: the functional form, a key of ``_FORMS``.
        options: what the function takes beside input, weight and bias.
        module: what the node calls, where it calls a module.
        refusal: a reason code and its facts: why the call must stay as it is.
    """

    node: fx.Node
    function: Callable[..., Tensor]
    input: fx.Node | None
    weight: Operand | None = None
    bias: Any = None
    options: dict[str, Any] | None = None
    module: nn.Module | None = None
    refusal: tuple[str, dict[str, object]] | None = None

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions; 0 of a linear layer."""
        return _FORMS[self.function][1]

    @property
    def transposed(self) -> bool:
        return _FORMS[self.function][0] is _TRANSPOSED

    @property
    def depthwise(self) -> bool:
        """Whether it runs the operator of dwswap."""
        return self.function is depthwise_conv2d

    @property
    def absorbed(self) -> dict[str, Any]:
        """The options by which a depthwise call has absorbed its neighbours."""
        return {n: self.option(n) for n in _ABSORBED if self.option(n) != _NEUTRAL[n]}

    def option(self, name: str) -> Any:
        return (self.options or {}).get(name, _NEUTRAL.get(name))

    def is_size(self, name: str, size: int) -> bool:
        """Whether an option is ``size`` in every direction."""
        option = self.option(name)
        sizes = option if isinstance(option, (list, tuple)) else [option]
        return all(type(given) is int and given == size for given in sizes)

    def with_tensors(self, weight: Operand | None, bias: Operand | None) -> AffineCall:
        return replace(self, weight=weight, bias=bias)

    def with_input(self, input: fx.Node) -> AffineCall:
        return replace(self, input=input)

    def with_options(self, **options: Any) -> AffineCall:
        return replace(self, options={**(self.options or {}), **options})

    def rewrite(self) -> fx.Node:
        """Put this call, in functional form, in the place of its node; returns the new node."""
        graph, old = self.node.graph, self.node
        options = {**_NEUTRAL, **(self.options or {})}
        with graph.inserting_before(old):
            tensors = [
                graph.get_attr(operand) if isinstance(operand, str) else operand
                for operand in (self.weight, self.bias)
            ]
            if isinstance(options["input_bias"], str):
                options["input_bias"] = graph.get_attr(options["input_bias"])
            names = _FORMS[self.function][0]
            args, kwargs = (self.input, *tensors), {}
            if self.depthwise:
                # What is neutral is left out, which keeps the code readable.
                given = (name for name in names if options[name] != _NEUTRAL.get(name, ()))
                kwargs = {name: options[name] for name in given}
            else:
                args += tuple(options[name] for name in names)
            new = graph.call_function(self.function, args, kwargs)
        new.meta = dict(old.meta)
        if self.depthwise:
            # torch.fx traces the generated code when it unpickles; this keeps the call one node.
            new.meta["is_wrapped"] = True
        old.replace_all_uses_with(new)
        graph.erase_node(old)
        return new


def affine_call(graph_module: fx.GraphModule, node: object) -> AffineCall | None:
    """``node`` as a convolution or linear layer; None where it is none."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _of_module(graph_module.get_submodule(str(node.target)), node)
    if node.op == "call_function":
        return _of_function(graph_module, node)
    return None


def attribute(graph_module: fx.GraphModule, path: str) -> Any:
    """What a ``get_attr`` node of ``path`` reads."""
    return reduce(getattr, path.split("."), graph_module)


def value_of(graph_module: fx.GraphModule, operand: object) -> Tensor | None:
    """The tensor that ``operand`` is in every run; None where it is computed."""
    if isinstance(operand, fx.Node) and operand.op == "get_attr":
        operand = str(operand.target)
    if not isinstance(operand, str):
        return None
    value = attribute(graph_module, operand)
    return value if isinstance(value, Tensor) else None


def transposed(node: object) -> fx.Node | None:
    """The matrix whose transpose ``node`` is, where it is a tensor of the graph."""
    if not isinstance(node, fx.Node) or node.target not in _TRANSPOSES:
        return None
    matrix, *order = node.args
    if not isinstance(matrix, fx.Node) or matrix.op != "get_attr":
        return None
    return matrix if order in ([], [[1, 0]]) else None


def _of_module(module: nn.Module, node: fx.Node) -> AffineCall | None:
    function = _MODULES.get(type(module))
    if function is None:
        if not isinstance(module, (_ConvNd, nn.Linear)):
            return None
        facts: dict[str, object] = {"type": type(module).__name__}
        why = reason_not_plain(module) or ("subclass", facts)
        return AffineCall(node, F.linear, None, module=module, refusal=why)
    given = dict(zip(("input",), node.args, strict=False)) | node.kwargs
    input = given.get("input")
    refusal = reason_not_plain(module)
    parameters = {name: module._parameters.get(name) for name in ("weight", "bias")}
    if refusal is not None:
        pass
    elif any(t is None and getattr(module, n) is not None for n, t in parameters.items()):
        refusal = "weight_not_parameter", {}
    elif getattr(module, "padding_mode", "zeros") != "zeros":
        refusal = "padding_mode", {"padding_mode": module.padding_mode}
    elif len(node.args) + len(node.kwargs) != 1 or not isinstance(input, fx.Node):
        refusal = "call_form", {}
    return AffineCall(
        node,
        function,
        input if isinstance(input, fx.Node) else None,
        f"{node.target}.weight",
        None if parameters["bias"] is None else f"{node.target}.bias",
        {n: whole(getattr(module, n)) for n in _FORMS[function][0] if hasattr(module, n)},
        module,
        refusal,
    )


def _of_product(graph_module: fx.GraphModule, node: fx.Node) -> AffineCall | None:
    """``bias + input @ weight.T``, unless something else than a vector is added."""
    *added, input, factor = node.args
    weight, bias = transposed(factor), added[0] if added else None
    if weight is None or node.kwargs or not isinstance(input, fx.Node):
        return None
    matrix, vector = value_of(graph_module, weight), value_of(graph_module, bias)
    if matrix is None or (bias is not None and (vector is None or vector.dim() != 1)):
        return None
    return AffineCall(node, F.linear, input, weight, bias, {})


def _of_function(graph_module: fx.GraphModule, node: fx.Node) -> AffineCall | None:
    if node.target in _PRODUCTS:
        return _of_product(graph_module, node)
    try:
        if node.target not in _CALLS:
            return None
    except TypeError:  # an unhashable callable
        return None
    function = _CALLS[node.target]
    if function is F.linear:
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    else:
        given = bind(node)
    weight, input = given.get("weight"), given.get("input")
    if function is None:  # of any number of dimensions, transposed or not
        known = value_of(graph_module, weight)
        if known is not None:
            function = _GENERAL.get((given.get("transposed"), known.dim()))
        if function is None:
            return AffineCall(node, torch.conv2d, None, refusal=("call_form", {}))
    options = {"output_padding": 0, **_NEUTRAL, **given}
    return AffineCall(
        node,
        function,
        input if isinstance(input, fx.Node) else None,
        weight if isinstance(weight, fx.Node) else None,
        given.get("bias"),
        {name: options[name] for name in _FORMS[function][0]},
        None,
        None if isinstance(weight, fx.Node) and isinstance(input, fx.Node) else ("call_form", {}),
    )
