"""How a constant per channel passes through a node: what ``push_bias`` moves biases along.

A value carries an offset where what the graph computes is ``value - offset[channel]``. Every node
that handles such a value right, given its offset, has a :class:`Role`; for any other node the value
must be the true one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dwswap.eligibility import reason_not_plain
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.count_calls import does_nothing
from dwswap.passes.padding import is_symmetric, is_unpadded
from dwswap.passes.permutation import moved, permutation

__all__ = ["Axis", "Role", "find_roles"]

aten = torch.ops.aten

_SUMS = (operator.add, torch.add, aten.add, aten.add.Tensor, "add")
_SUMS_IN_PLACE = (operator.iadd, aten.add_, aten.add_.Tensor, "add_")
_MEANS = (torch.mean, aten.mean, aten.mean.dim, "mean")
_FLATTENS = (torch.flatten, aten.flatten, aten.flatten.using_ints, "flatten")
_POOLS = (
    *(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d),
    *(aten.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default),
)
_SPATIAL = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})


@dataclass(frozen=True)
class Axis:
    """Where the channels of a value are.

    Attributes:
        dim: counted from the end, which broadcasting does not change.
        size: number of channels.
        pooled: whether all dimensions after ``dim`` have one element.
        plain: whether the value has three or four dimensions, as the output of a 2-D convolution.
        final: whether ``dim`` is right for batches only; ``F.linear`` takes nothing else.
    """

    dim: int
    size: int
    pooled: bool = False
    plain: bool = False
    final: bool = False


@dataclass(frozen=True)
class Role:
    """What a node does with offsets.

    Attributes:
        kind: ``"layer"`` (adds a bias), ``"depthwise"`` (has an input bias), ``"sum"``, or
            ``"pass"``: its output has the offset of its input.
        operands: the arguments that may carry an offset; with repetitions.
        axis: of the output; None where it cannot carry an offset.
        call: of a layer.
    """

    kind: str
    operands: tuple[fx.Node, ...]
    axis: Axis | None
    call: AffineCall | None = None


def find_roles(graph_module: fx.GraphModule, context: Context) -> dict[fx.Node, Role]:
    """The role of every node that has one, in graph order."""
    changed = changed_tensors(graph_module)
    roles: dict[fx.Node, Role] = {}
    for node in graph_module.graph.nodes:
        call = affine_call(graph_module, node)
        if call is not None:
            role = _of_layer(graph_module, context, call, roles, changed)
        elif node.op in ("call_function", "call_method", "call_module"):
            role = _of_sum(node, roles) or _of_pass(graph_module, node, roles)
        else:
            role = None
        if role is not None:
            roles[node] = role
    return roles


def _axis(value: object, roles: dict[fx.Node, Role]) -> Axis | None:
    role = roles.get(value) if isinstance(value, fx.Node) else None
    return None if role is None else role.axis


def _of_layer(
    graph_module: fx.GraphModule,
    context: Context,
    call: AffineCall,
    roles: dict[fx.Node, Role],
    changed: set[int],
) -> Role | None:
    report = context.layers.get(context.path_of(call.node))
    if call.refusal is not None or (report is not None and report.reason == "skipped"):
        return None
    operands = [call.weight, call.bias, call.option("input_bias")]
    tensors = [None if o is None else value_of(graph_module, o) for o in operands]
    for operand, tensor in zip(operands, tensors, strict=True):
        if operand is not None and (tensor is None or not _is_plain(tensor, changed)):
            return None
    weight, bias, _ = tensors
    assert weight is not None
    taken: tuple[Any, ...] = ()
    groups = 1 if call.function is F.linear else call.option("groups")
    dim = -1 - call.spatial
    before = _axis(call.input, roles)
    if call.depthwise:
        multiple = before is not None and weight.shape[0] % before.size == 0
        takes = multiple and is_symmetric(graph_module, call)
        taken = (call.input,) if takes and before is not None and before.dim == dim else ()
        # Its own bias costs nothing, so that it may stay.
        return Role("depthwise", _nodes(taken), None, call)
    if not isinstance(groups, int):
        return None
    channels = weight.shape[1] * groups if call.transposed else weight.shape[0]
    if bias is not None and bias.shape != (channels,):
        return None
    fits = before is not None and (before.dim, before.size) == (dim, weight.shape[1] * groups)
    if fits and is_unpadded(call, weight) and not call.transposed:
        taken = (call.input,)
    return Role("layer", _nodes(taken), Axis(dim, channels, plain=call.spatial == 2), call)


def _of_sum(node: fx.Node, roles: dict[fx.Node, Role]) -> Role | None:
    if node.op == "call_module" or len(node.args) != 2 or node.kwargs:
        return None
    if node.target not in _SUMS and not _is_sum_in_place(node, roles):
        return None
    axes = [_axis(operand, roles) for operand in node.args]
    known = [axis for axis in axes if axis is not None]
    if not known or len({(a.dim, a.size) for a in known}) > 1 or any(a.final for a in known):
        return None
    # A value of one channel may be broadcast to more.
    others = any(a is None and isinstance(o, fx.Node) for a, o in zip(axes, node.args, strict=True))
    if others and known[0].size == 1:
        return None
    pooled, plain = (all(getattr(a, name) for a in known) for name in ("pooled", "plain"))
    taken = [o for o, axis in zip(node.args, axes, strict=True) if axis is not None]
    axis = replace(known[0], pooled=pooled and not others, plain=plain and not others)
    return Role("sum", _nodes(taken), axis)


def _is_sum_in_place(node: fx.Node, roles: dict[fx.Node, Role]) -> bool:
    """Whether it changes a value that is new and that nothing else reads."""
    first = node.args[0]
    if node.target not in _SUMS_IN_PLACE:
        return False
    while isinstance(first, fx.Node) and permutation(first) is not None and len(first.users) == 1:
        first = first.args[0]
    if not isinstance(first, fx.Node) or first not in roles:
        return False
    return roles[first].kind in ("layer", "sum") and len(first.users) == 1


def _of_pass(
    graph_module: fx.GraphModule, node: fx.Node, roles: dict[fx.Node, Role]
) -> Role | None:
    input = node.args[0] if node.args else None
    axis = _axis(input, roles)
    if axis is None:
        return None
    after: Axis | None = None
    given, options = node.args[1:], dict(node.kwargs)
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    target: Any = node.target if module is None else None  # a module may be called "mean"
    if module is not None and (reason_not_plain(module) is not None or given or options):
        return None
    order = permutation(node)
    if does_nothing(graph_module, node) or target == "contiguous":
        after = axis
    elif order is not None:
        after = _after_permute(axis, order)
    elif type(module) is nn.AdaptiveAvgPool2d or target in _POOLS:
        size = module.output_size if module is not None else [*given, *options.values()][:1]
        after = replace(axis, pooled=_is_one(size)) if axis.dim == -3 else None
    elif type(module) is nn.Flatten or target in _FLATTENS:
        dims: Any = given if module is None else (module.start_dim, module.end_dim)
        if axis.pooled and axis.plain and dims in ((1,), (1, -1)) and not options:
            after = Axis(-1, axis.size, final=True) if axis.size > 1 else None
    elif target in _MEANS:
        after = _after_mean(axis, given, options)
    return None if after is None else Role("pass", _nodes((input,)), after)


def _after_permute(axis: Axis, order: tuple[int, ...]) -> Axis | None:
    if axis.final or len(order) < -axis.dim:
        return None
    return replace(axis, dim=moved(axis.dim, order), pooled=False)


def _after_mean(axis: Axis, given: tuple[Any, ...], options: dict[str, Any]) -> Axis | None:
    options = dict(zip(("dim", "keepdim"), given, strict=False)) | options
    dims, keepdim = options.pop("dim", None), options.pop("keepdim", False)
    if options or not isinstance(dims, (list, tuple)) or not isinstance(keepdim, bool):
        return None
    if axis.dim != -3 or not axis.plain or set(dims) not in _SPATIAL:
        return None
    return replace(axis, pooled=True) if keepdim else Axis(-1, axis.size, final=True)


def _is_one(size: Any) -> bool:
    while isinstance(size, (list, tuple)) and len(size) == 1:
        size = size[0]
    sizes = size if isinstance(size, (list, tuple)) else [size]
    return len(sizes) > 0 and all(s == 1 for s in sizes)


def _is_plain(tensor: Tensor, changed: set[int]) -> bool:
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return ordinary and tensor.is_floating_point() and id(tensor) not in changed


def _nodes(values: Any) -> tuple[fx.Node, ...]:
    return tuple(value for value in values if isinstance(value, fx.Node))
