"""The rewriting passes, in the order in which they run.

A pass is a function ``(graph_module, context) -> None`` that edits the graph in place. It says in
``context`` what it did. To add one: a file of its own, its line in a list below, tests for what it
must and must not rewrite.
"""

from __future__ import annotations

from torch import fx

from dwswap.passes.absorb_activation import absorb_activation
from dwswap.passes.absorb_before_pool import absorb_before_pool
from dwswap.passes.absorb_before_shuffle import absorb_before_shuffle
from dwswap.passes.channel_shuffle import fuse_shuffle
from dwswap.passes.context import Context, GraphPass
from dwswap.passes.fold_batchnorm import fold_batchnorm
from dwswap.passes.fold_pointwise import fold_pointwise
from dwswap.passes.fold_scale import fold_scale
from dwswap.passes.fuse_separable import fuse_separable
from dwswap.passes.lay_out_linear import lay_out_linear
from dwswap.passes.memory_format import set_memory_format
from dwswap.passes.pointwise_product import multiply_pointwise
from dwswap.passes.pointwise_residual import fuse_residual
from dwswap.passes.pooled_linear import fuse_pooled_linear
from dwswap.passes.push_bias import push_bias
from dwswap.passes.rank_checks import hoist_rank_checks
from dwswap.passes.recompose_activation import recompose_activation
from dwswap.passes.remove_identities import remove_identities
from dwswap.passes.squeeze_excitation import fuse_squeeze_excitation
from dwswap.passes.swap_depthwise import swap_depthwise
from dwswap.passes.swap_layer_norm import swap_layer_norm
from dwswap.passes.swap_norm_calls import swap_norm_calls
from dwswap.passes.swap_stem import swap_stem

__all__ = [
    "COMPILED_PASSES",
    "EXACT_PASSES",
    "INFERENCE_PASSES",
    "TRAINING_PASSES",
    "Context",
    "GraphPass",
    "run_passes",
]

# Exact in training too: parameters, state_dict keys and gradients stay. The passes for inference
# run only where these have swapped something.
EXACT_PASSES: tuple[GraphPass, ...] = (swap_depthwise,)
INFERENCE_PASSES: tuple[GraphPass, ...] = (
    remove_identities,
    hoist_rank_checks,
    fold_batchnorm,
    fold_scale,
    fold_pointwise,
    recompose_activation,
    absorb_activation,
    fuse_squeeze_excitation,
    push_bias,
    set_memory_format,
    fuse_shuffle,
    absorb_before_shuffle,
    absorb_before_pool,
    fuse_residual,
    multiply_pointwise,
    swap_layer_norm,
    fuse_separable,
    swap_stem,
    lay_out_linear,
    fuse_pooled_linear,
)
# In front of a compiler that chooses layouts itself.
COMPILED_PASSES: tuple[GraphPass, ...] = (
    fold_batchnorm,
    fold_pointwise,
    recompose_activation,
    absorb_activation,
    push_bias,
)
# The same where gradients are recorded.
TRAINING_PASSES: tuple[GraphPass, ...] = (swap_norm_calls,)


def run_passes(
    graph_module: fx.GraphModule, context: Context, passes: tuple[GraphPass, ...]
) -> None:
    """Run ``passes`` over ``graph_module``, checking the graph after each, then recompile it."""
    for graph_pass in passes:
        graph_pass(graph_module, context)
        graph_module.graph.lint()
    graph_module.recompile()
