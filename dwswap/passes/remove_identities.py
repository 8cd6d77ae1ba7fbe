"""Remove what returns its input as it is: dropout and stochastic depth in eval mode, identities.

Pattern:
    ``nn.Identity``, ``nn.Dropout`` and its like, ``F.dropout`` and torchvision's
    ``stochastic_depth``, where they are not in train mode.
Reason:
    Each is a call in Python for nothing, and stands between a layer and what could become part of
    it: EfficientNet and ConvNeXt have stochastic depth between a projection and the residual sum.
Limits:
    Modules with hooks stay, and so does what the model returns: its name may be known outside.
"""

from __future__ import annotations

from torch import fx

from dwswap.eligibility import reason_not_plain
from dwswap.passes.context import Context
from dwswap.passes.count_calls import does_nothing

__all__ = ["remove_identities"]


def remove_identities(graph_module: fx.GraphModule, context: Context) -> None:
    """Remove in place."""
    for node in list(graph_module.graph.nodes):
        if not does_nothing(graph_module, node) or not node.args:
            continue
        value = node.args[0]
        if not isinstance(value, fx.Node) or any(user.op == "output" for user in node.users):
            continue
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if len(node.args) + len(node.kwargs) > 1 or reason_not_plain(module) is not None:
                continue
        node.replace_all_uses_with(value)
        graph_module.graph.erase_node(node)
        context.release(node)
