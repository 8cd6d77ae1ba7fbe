"""Run the graph in one memory format, and give the outputs the layout that they had.

Pattern:
    Inputs of the graph that reach a 2-D convolution; the weights of dense 2-D convolutions;
    outputs computed from them.
Reason:
    On GPUs channels_last is the layout of matrix products and of the fast convolutions. Kernels
    choose by their inputs and weights, so one conversion at each edge is enough.
Limits:
    Values of state_dict stay, strides of the weights change. A view that may not exist in the
    other layout becomes a reshape. Where the code could see the layout (strides, functions that
    are not known, memory that is changed through a view), or the layout of an output is not
    known, the graph stays as it is, with the reason.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from dwswap.layouts import memory_format, restored, to_layout
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import FUNCTIONS, MODULES, changed_operand, is_in_place, library_of
from dwswap.passes.channel_shuffle import keep_layout
from dwswap.passes.context import Context
from dwswap.passes.layout_kinds import (
    CONSTANT,
    IMAGE,
    LAST,
    PLAIN,
    SAME,
    SLICE,
    LayoutKinds,
    name_of,
    root_of,
)
from dwswap.passes.module_tree import replace_tensors
from dwswap.precision import rounds_to_tf32

__all__ = ["MemoryFormat", "set_memory_format"]

MemoryFormat: TypeAlias = Literal["auto", "preserve", "channels_last", "contiguous"]

CHANNELS_LAST = torch.channels_last
aten = torch.ops.aten

_DENSE = (IMAGE, LAST, PLAIN)
_SEES_LAYOUT = {
    *("stride", "is_contiguous", "as_strided", "data_ptr", "storage", "untyped_storage", "numpy"),
    *("storage_offset", "set", "resize", "view_as_complex", "view_as_real", "tolist", "rand_like"),
    *("randn_like", "bernoulli", "normal", "uniform", "is_non_overlapping_and_dense", "data"),
}
_MAY_COPY = {"contiguous", "flatten", "ravel", "reshape", "reshape_as"}
_RESHAPES: dict[Any, Any] = {
    "view": "reshape",
    "view_as": "reshape_as",
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}


def set_memory_format(graph_module: fx.GraphModule, context: Context) -> None:
    """Convert in place; writes what it did, or why not, to ``context.layout``."""
    asked = context.memory_format
    calls = [affine_call(graph_module, node) for node in graph_module.graph.nodes]
    found = [_weight(graph_module, call) for call in calls if call is not None]
    weights = {id(weight): weight for weight in found if weight is not None}
    if asked == "preserve" or not weights:
        return
    if asked == "auto":
        fits = all(_gains(w) for w in weights.values())
        asked = "channels_last" if fits else "preserve"
        if not fits:
            return
    layout = getattr(torch, "channels_last" if asked == "channels_last" else "contiguous_format")
    # Weights of one column are in both layouts; those of depthwise layers tell by their strides.
    wide = [w for w in weights.values() if w[0].numel() > 1]
    known = {memory_format(w) for w in [w for w in wide if w.shape[1] > 1] or wide}
    images = _images(graph_module)
    kinds = LayoutKinds(graph_module, images, known == {CHANNELS_LAST}).kinds
    outputs = {node: kinds[node] for node in _outputs(graph_module.graph)}
    refusal = _refusal(graph_module, images)
    for node, kind in outputs.items():
        if kind not in (*_DENSE, SAME, CONSTANT):
            refusal = refusal or f"the layout of the output {node.name} is not known"
    if len(known) > 1:
        refusal = "its weights are in several layouts already"
    if refusal is not None:
        context.layout = f"preserve ({refusal})"
        return
    outputs = {n: kind for n, kind in outputs.items() if kind in _DENSE and n not in images}
    sources = {node: _sources(node, kinds, images) for node in outputs}
    if layout is CHANNELS_LAST:
        replaced = keep_layout(graph_module)
        outputs = {replaced.get(node, node): kind for node, kind in outputs.items()}
        sources = {replaced.get(node, node): given for node, given in sources.items()}
    _restore(graph_module.graph, outputs, sources)
    _convert(graph_module, images, layout)
    for node in filter(_is_view, graph_module.graph.nodes):
        node.target = _RESHAPES[node.target]
    if context.values:
        _convert_weights(graph_module, weights, layout)
    context.layout = f"{asked} (converted: {len(images)} inputs, {len(outputs)} outputs)"


def _weight(graph_module: fx.GraphModule, call: AffineCall) -> Tensor | None:
    """Of a 2-D convolution that is plain."""
    if call.spatial != 2 or call.refusal is not None:
        return None
    weight = value_of(graph_module, call.weight)
    plain = type(weight) in (Tensor, nn.Parameter) and weight is not None and weight.dim() == 4
    return weight if plain else None


def _gains(weight: Tensor) -> bool:
    if weight.is_cuda and weight.dtype is torch.float32:
        # Without TF32 cuDNN takes more memory for channels_last (MobileNetV2, 32 images: 464 MB,
        # not 440).
        return rounds_to_tf32(weight.device)
    return weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)


def _images(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The placeholders that reach a 2-D convolution."""
    reaches: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        call = affine_call(graph_module, node)
        if (call is not None and call.spatial == 2) or not reaches.isdisjoint(node.users):
            reaches.add(node)
    return {node for node in reaches if node.op == "placeholder"}


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    """What the graph returns, alone or in containers."""
    found: list[fx.Node] = []
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop(0)
        if _is_container(node):
            pending += node.all_input_nodes
        elif node not in found:
            found.append(node)
    return found


def _is_container(node: fx.Node) -> bool:
    return isinstance(node.target, type) and issubclass(node.target, (dict, list, tuple))


def _refusal(graph_module: fx.GraphModule, images: set[fx.Node]) -> str | None:
    held: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        target: Any = node.target
        known = True
        if node.op == "call_module":
            known = type(graph_module.get_submodule(target)).__module__.startswith(MODULES)
        elif node.op == "call_function":
            known = library_of(target) in FUNCTIONS
        if not known:
            return f"{node.name} may depend on the layout"
        seen = node.args[1] if target is getattr else name_of(node)
        if seen in _SEES_LAYOUT:
            return f"{node.name} depends on the layout"
        if is_in_place(graph_module, node) and node.all_input_nodes:
            changed = changed_operand(node)
            if not isinstance(changed, fx.Node):
                changed = node.all_input_nodes[0]
            root = root_of(graph_module, changed)
            if root in images or root in held:
                return f"{node.name} changes an input or a view in place"
        if _is_view(node) or _may_copy(graph_module, node):
            held.add(root_of(graph_module, node))
        elif _is_container(node):
            held |= {root_of(graph_module, value) for value in node.all_input_nodes}
    return None


def _sources(
    node: fx.Node, kinds: dict[fx.Node, str | None], images: set[fx.Node]
) -> list[fx.Node]:
    """The images whose layout ``node`` has, in the order of the graph's inputs."""
    followed = {node}
    for user in reversed(node.graph.nodes):
        if user in followed:
            followed |= {n for n in user.all_input_nodes if kinds[n] in (IMAGE, IMAGE + SLICE)}
    followed &= images
    return [n for n in node.graph.nodes if n in followed]


def _restore(
    graph: fx.Graph, outputs: dict[fx.Node, str | None], sources: dict[fx.Node, list[fx.Node]]
) -> None:
    returning = [node for node in graph.nodes if node.op == "output" or _is_container(node)]
    for node, kind in outputs.items():
        given = (kind == LAST, *(sources[node] if kind == IMAGE else ()))
        with graph.inserting_before(next(user for user in returning if user in node.users)):
            new = graph.call_function(restored, (node, *given))
        new.meta["is_wrapped"] = True
        for user in returning:
            user.replace_input_with(node, new)


def _convert(
    graph_module: fx.GraphModule, images: set[fx.Node], layout: torch.memory_format
) -> None:
    graph = graph_module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in images:
        with graph.inserting_after(last):
            new = graph.call_function(to_layout, (node, layout))
        new.meta["is_wrapped"] = True
        for user in list(node.users):
            # The guards of an exported program look at what it was given.
            guards = user.op == "call_module" and "guards" in str(user.target)
            given = user.op == "output" or user.target is restored or _is_container(user)
            if user is not new and not given and not guards:
                user.replace_input_with(node, new)


def _is_view(node: fx.Node) -> bool:
    """Whether it is a view that other strides may forbid."""
    if node.op not in ("call_method", "call_function"):
        return False
    arguments = (*node.args, *node.kwargs.values())
    cast = any(isinstance(argument, torch.dtype) for argument in arguments)
    return not cast and any(node.target is view or node.target == view for view in _RESHAPES)


def _may_copy(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is a view, or its input itself, in one layout and a copy in the other."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) is nn.Flatten
    arguments = (*node.args, *node.kwargs.values())
    given = any(isinstance(argument, torch.memory_format) for argument in arguments)
    return name_of(node) in _MAY_COPY or (name_of(node) == "to" and given)


@torch.no_grad()
def _convert_weights(
    graph_module: fx.GraphModule, weights: dict[int, Tensor], layout: torch.memory_format
) -> None:
    new: dict[int, Tensor] = {}
    for key, weight in weights.items():
        # Depthwise calls follow their input, unless the weight says channels_last.
        if memory_format(weight) == layout or (weight.shape[1] == 1 and layout is CHANNELS_LAST):
            continue
        new[key] = weight.detach().to(memory_format=layout)
    replace_tensors(graph_module, new)
