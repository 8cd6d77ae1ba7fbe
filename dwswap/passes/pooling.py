"""The means of an image in a graph, as matrices and as images of one pixel."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["added_dimensions", "flattened", "pooled"]

aten = torch.ops.aten

_ADAPTIVE = (
    *(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d),
    *(aten.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default),
)
_MEANS = (torch.mean, aten.mean, aten.mean.dim, "mean")
_ONE_PIXEL = (1, (1, 1), [1, 1])
_SPATIAL = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})
_FLATTEN = (torch.flatten, aten.flatten.using_ints, "flatten")
_VIEWS = ("view", "reshape", torch.reshape, aten.view.default, aten.reshape.default)
_UNSQUEEZE = (torch.unsqueeze, aten.unsqueeze.default, "unsqueeze")
_WHOLE = slice(None, None, None)


def pooled(graph_module: fx.GraphModule, node: object) -> tuple[fx.Node, bool] | None:
    """Of what ``node`` computes the means over height and width, and whether it keeps these
    dimensions; None where it computes something else."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    input, rest = node.args[0], node.args[1:]
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        one = type(module) is nn.AdaptiveAvgPool2d and module.output_size in _ONE_PIXEL
        return (input, True) if one and not rest and not node.kwargs else None
    if _calls(node, *_ADAPTIVE):
        given = _named(node, rest, ("output_size",))
        return (input, True) if given is not None and given["output_size"] in _ONE_PIXEL else None
    if _calls(node, *_MEANS):
        given = _named(node, rest, ("dim", "keepdim"))
        dims, kept = (None, None) if given is None else (given["dim"], given["keepdim"] or False)
        if isinstance(dims, (list, tuple)) and set(dims) in _SPATIAL and isinstance(kept, bool):
            return input, kept
    return None


def flattened(graph_module: fx.GraphModule, node: fx.Node, image: fx.Node) -> fx.Node | None:
    """The means of ``image`` that ``node`` makes a matrix; None where it does something else."""
    input = node.args[0] if node.args else None
    if not isinstance(input, fx.Node):
        return None
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        flat = type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return input if flat else None
    if _calls(node, *_FLATTEN):
        given = _named(node, node.args[1:], ("start_dim", "end_dim"))
        flat = given is not None and given["start_dim"] == 1 and given["end_dim"] in (None, -1)
        return input if flat else None
    sizes = _view_sizes(node)
    return input if sizes is not None and len(sizes) == 2 and _is_batch(sizes[0], image) else None


def added_dimensions(node: fx.Node, image: fx.Node) -> tuple[Any, list[fx.Node]]:
    """The matrix that ``node`` makes an image of one pixel per sample of ``image``, and the nodes
    that do; ``node`` itself and none where it does something else."""
    input = node.args[0] if node.args else None
    sizes = _view_sizes(node)
    if sizes is not None:
        column = len(sizes) == 4 and _is_batch(sizes[0], image) and sizes[2:] == (1, 1)
        return (input, [node]) if column else (node, [])
    if node.target is operator.getitem:
        index = node.args[1]
        return (input, [node]) if index == (_WHOLE, _WHOLE, None, None) else (node, [])
    if _calls(node, *_UNSQUEEZE) and isinstance(input, fx.Node) and _calls(input, *_UNSQUEEZE):
        dims = [_named(n, n.args[1:], ("dim",)) for n in (input, node)]
        given = tuple(None if d is None else d["dim"] for d in dims)
        if given in ((-1, -1), (2, 3), (2, -1), (2, 2), (-1, 3), (-1, 2)):
            return input.args[0], [input, node]
    return node, []


def _is_batch(size: object, image: fx.Node) -> bool:
    """Whether ``size`` is the number of samples of ``image``: ``image.size(0)`` or its like."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args == (image, 0)
    if size.target is not operator.getitem or size.args[1] != 0:
        return False
    sizes = size.args[0]
    return isinstance(sizes, fx.Node) and (
        (sizes.target == "size" and sizes.args == (image,) and not sizes.kwargs)
        or (sizes.target is getattr and sizes.args == (image, "shape"))
    )


def _view_sizes(node: fx.Node) -> tuple[Any, ...] | None:
    if not _calls(node, *_VIEWS) or node.kwargs:
        return None
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = tuple(sizes[0])
    return tuple(sizes)


def _calls(node: fx.Node, *targets: Any) -> bool:
    return node.op in ("call_function", "call_method") and any(
        node.target is target or node.target == target for target in targets
    )


def _named(node: fx.Node, rest: tuple[Any, ...], names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments after the first by name, None for what is not given; None where there are
    others."""
    given = dict(zip(names, rest, strict=False)) | node.kwargs
    if len(rest) > len(names) or given.keys() - set(names):
        return None
    return {name: given.get(name) for name in names}
