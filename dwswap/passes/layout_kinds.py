"""How the layout of the values of a graph depends on that of its images, for ``memory_format``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from dwswap.passes.activation_call import activation_call
from dwswap.passes.affine_call import affine_call, value_of
from dwswap.passes.aliasing import changed_operand, is_in_place
from dwswap.passes.channel_shuffle import shuffle_input
from dwswap.passes.count_calls import does_nothing
from dwswap.passes.norm_call import norm_call

__all__ = [
    "CONSTANT",
    "IMAGE",
    "LAST",
    "PLAIN",
    "SAME",
    "SLICE",
    "LayoutKinds",
    "name_of",
    "root_of",
]

IMAGE = "image"
"""Dense, in the layout of the images that the graph is given."""
LAST = "channels_last"
"""Dense, and channels_last in the original, whatever it is given: its weights are."""
PLAIN = "plain"
"""Dense, and contiguous in the original, whatever it is given."""
SLICE = " slice"
"""After one of these: some of its channels."""
CONSTANT = "constant"
"""A parameter, or a number."""
SAME = "same"
"""Its strides do not depend on the layout of any image."""

_NUMBERS = ("size", "dim", "numel", "shape", "ndim", "dtype", "device", "is_cuda")
_ELEMENTWISE = {"add", "sub", "mul", "div", "truediv", "neg", "float", "half", "bfloat16", "double"}
_ELEMENTWISE |= {"squeeze_excitation"}  # in the layout of what it scales
_POOLS = {"adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "adaptive_max_pool2d", "interpolate"}
_POOL_MODULES = (
    *(nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d),
    *(nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d),
)
_VIEWS = {
    *("view", "view_as", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "flatten"),
    *("unflatten", "expand", "expand_as", "chunk", "split", "unbind", "narrow", "select", "detach"),
    *("getitem", "contiguous", "to", "movedim", "swapaxes", "reshape_as", "type_as", "float"),
    "ravel",
}
_VIEW_MODULES = (nn.Flatten, nn.Unflatten)
# Of what is contiguous; expanded, to a convolution.
_STAY_CONTIGUOUS = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "mean"}
_STAY_CONTIGUOUS |= {"expand", "expand_as"}
_MATRICES = {"mm", "addmm"}  # these return
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
_SPATIAL = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})


class LayoutKinds:
    """The kind of every value; None where nothing is known."""

    def __init__(
        self, graph_module: fx.GraphModule, images: set[fx.Node], channels_last_weights: bool
    ) -> None:
        """``images``: the inputs of the graph whose layout is changed."""
        self.graph_module, self.channels_last_weights = graph_module, channels_last_weights
        self.kinds: dict[fx.Node, str | None] = {}
        for node in graph_module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                other = SAME if node.op == "placeholder" else CONSTANT
                self.kinds[node] = IMAGE if node in images else other
            elif node.op != "output":
                self.kinds[node] = self._kind(node)

    def _kind(self, node: fx.Node) -> str | None:
        name = name_of(node)
        if _asks_number(node):
            return CONSTANT
        given = {self.kinds[n] for n in node.all_input_nodes}
        call = affine_call(self.graph_module, node)
        if call is not None and call.refusal is None and call.spatial == 2:
            # Its weights make the layout of what it is given count, and give it themselves.
            if self.channels_last_weights:
                return LAST
            before = self._of_image(call.input)
            return PLAIN if before is None and self._is_contiguous(call.input) else before
        if given <= {CONSTANT, SAME}:
            return SAME if SAME in given else CONSTANT
        if call is not None and call.refusal is None:
            return SAME if call.spatial == 0 else None
        if name in _MATRICES and not is_in_place(self.graph_module, node):
            return SAME
        if self._is_elementwise(node, name):
            if is_in_place(self.graph_module, node):
                return self.kinds.get(changed_operand(node))
            if not self._follows_images(node, name):
                return None
            images = {self._of_image(n) for n in node.all_input_nodes if self.kinds[n] != CONSTANT}
            return images.pop() if len(images) == 1 else None
        input = node.args[0] if node.args else None
        if does_nothing(self.graph_module, node):
            return self.kinds.get(input) if isinstance(input, fx.Node) else None
        shuffled = shuffle_input(node)
        if shuffled is not None:
            return None if self._of_image(shuffled) is None else PLAIN
        image = self._of_image(input)
        if image is None:
            return None
        if name in ("chunk", "split"):
            return image + SLICE if _argument(node, 2, "dim", 0) == 1 else None
        if name == "getitem":
            return self.kinds[node.all_input_nodes[0]] if self._is_slice(input) else None
        if name == "mean":
            dims, kept = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
            if not isinstance(dims, (list, tuple)) or set(dims) not in _SPATIAL:
                return None
            return SAME if kept is False else image if kept is True else None
        module = self._module(node)
        if name == "flatten" or type(module) is nn.Flatten:
            if self._is_slice(input):
                return None  # a view with the strides of all channels, or a copy
            dims = node.args[1:] if module is None else (module.start_dim, module.end_dim)
            return SAME if dims in ((1,), (1, -1)) and not node.kwargs else None
        return None

    def _of_image(self, value: object) -> str | None:
        kind = self.kinds.get(value) if isinstance(value, fx.Node) else None
        kind = None if kind is None else kind.removesuffix(SLICE)
        return kind if kind in (IMAGE, LAST, PLAIN) else None

    def _is_contiguous(self, value: object) -> bool:
        """Whether what does not depend on any image's layout is contiguous, in any case."""
        if not isinstance(value, fx.Node) or self.kinds.get(value) not in (SAME, CONSTANT):
            return False
        if value.op == "get_attr":
            tensor = value_of(self.graph_module, value)
            return tensor is not None and tensor.is_contiguous()
        name = name_of(value)
        call = affine_call(self.graph_module, value)
        if (call is not None and call.spatial == 0) or name in _MATRICES:
            return True
        given = value.all_input_nodes
        if name in _STAY_CONTIGUOUS or type(self._module(value)) in _VIEW_MODULES:
            # An image if it is flattened or its pixels are averaged.
            return self._of_image(given[0]) is not None or self._is_contiguous(given[0])
        if self._is_elementwise(value, name) or does_nothing(self.graph_module, value):
            return all(self._is_contiguous(n) or self._is_number(n) for n in given)
        return False

    def _is_number(self, node: fx.Node) -> bool:
        """Whether it is a number for certain, and no tensor."""
        if _asks_number(node):
            return True
        given = node.all_input_nodes
        return self.kinds[node] == CONSTANT and bool(given) and all(map(self._is_number, given))

    def _follows_images(self, node: fx.Node, name: str) -> bool:
        """Whether no constant has a say in the strides of an elementwise result.

        They are those of the first operand that has several dimensions, of a concatenation
        channels_last where all are.
        """
        for operand in node.all_input_nodes:
            if self.kinds[operand] != CONSTANT:
                if name != "cat":
                    return True
            elif not self._is_number(operand):
                value = value_of(self.graph_module, operand)
                flat = value is not None and sum(size > 1 for size in value.shape) <= 1
                if name == "cat" or not flat:
                    return False
        return True

    def _is_slice(self, value: object) -> bool:
        kind = self.kinds.get(value) if isinstance(value, fx.Node) else None
        return kind is not None and kind.endswith(SLICE)

    def _is_elementwise(self, node: fx.Node, name: str) -> bool:
        known = activation_call(self.graph_module, node) or norm_call(self.graph_module, node)
        module = self._module(node)
        if known is not None or type(module) in _POOL_MODULES:
            return True
        if name == "cat":
            return _argument(node, 1, "dim", 0) == 1
        return name in _ELEMENTWISE or name in _POOLS

    def _module(self, node: fx.Node) -> Any:
        if node.op != "call_module":
            return None
        return self.graph_module.get_submodule(str(node.target))


def _asks_number(node: fx.Node) -> bool:
    """Whether it asks a tensor for what is no tensor."""
    asked = node.args[1] if node.target is getattr else name_of(node)
    return asked in _NUMBERS


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def name_of(node: fx.Node) -> str:
    """Name of the function or method that ``node`` calls, without marks of in-place forms."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target).rstrip("_")
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2].rstrip("_")
    name = str(getattr(target, "__name__", target)).rstrip("_")
    return _IN_PLACE.get(name, name)


def root_of(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that made the tensor that ``node`` may share its memory with."""
    while node.op.startswith("call") and isinstance(changed_operand(node), fx.Node):
        shares = name_of(node) in _VIEWS or is_in_place(graph_module, node)
        if node.op == "call_module":
            shares = shares or type(graph_module.get_submodule(str(node.target))) in _VIEW_MODULES
        if not shares and not does_nothing(graph_module, node):
            break
        node = changed_operand(node)
    return node
