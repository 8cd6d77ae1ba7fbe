"""Back to plain PyTorch."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils import parametrize

from dwswap.checks import check_flags
from dwswap.classifiers import pooled_linear
from dwswap.copying import (
    commit,
    copy_model,
    is_one_graph,
    modules_by_path,
    out_of_inference_mode,
    shell_model,
)
from dwswap.cuda_graph_module import disable_cuda_graphs
from dwswap.inference_graph import FOLDED
from dwswap.means import channel_means
from dwswap.modules import DepthwiseConv2d
from dwswap.ops import squeeze_excitation
from dwswap.passes.inplace_activations import in_place_again, is_marked
from dwswap.passes.substitution import unswap_modules, unswap_training_modules
from dwswap.passes.unswap_calls import swapped_calls, unswap_call
from dwswap.report import detach, has_report
from dwswap.shuffling import interleaved
from dwswap.tracing import one_at_a_time
from dwswap.training_modules import base_of

__all__ = ["restore"]


@one_at_a_time
@out_of_inference_mode
def restore(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo the swaps of :func:`dwswap.optimize`.

    Every ``DepthwiseConv2d`` becomes an ``nn.Conv2d`` and every call of the operator in a graph
    ``torch.conv2d``, with the same parameters and ``state_dict`` keys. What was replaced for
    training, BatchNorm, activations and squeeze-and-excitation, is what it was again. A model that
    was rewritten by substitution has its own class all along; one that became a graph remains a
    graph.

    Args:
        model: any model; where there is nothing to undo it is returned as it is.
        inplace: change ``model`` itself instead of a copy. A root that is a ``DepthwiseConv2d``
            itself cannot become another object; use the return value.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, ``inplace`` no bool.
        ValueError: a graph was fused: BatchNorm is folded into other weights, a call has absorbed
            its neighbours and has no ``torch.conv2d`` to go back to, squeeze-and-excitation became
            one call, or a channel shuffle or a mean absorbed what is before it. Or a swapped
            layer was parametrized after :func:`dwswap.optimize`. ``model`` is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_flags(inplace=inplace)
    _check_parametrized(model)
    if not has_report(model) and not _has_swaps(model):
        return model
    if not inplace:
        return _restore(copy_model(model))
    # Everything is computed on a shell first; the model changes when nothing can fail any more.
    shell = shell_model(model)
    before = modules_by_path(shell)
    restored = _restore(shell)
    if restored is not shell:
        return restored
    commit(model, before, modules_by_path(restored))
    for path, module in modules_by_path(restored).items():
        if is_one_graph(module):
            target = model.get_submodule(path)
            assert isinstance(target, fx.GraphModule)
            target.graph = module.graph
    disable_cuda_graphs(model)
    detach(model)
    return model


def _check_parametrized(model: nn.Module) -> None:
    """Refuse swapped layers whose class has become the base of one that PyTorch made of it."""
    paths = [
        path
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module) and type(module).__bases__[0] is DepthwiseConv2d
    ]
    if paths:
        raise ValueError(
            "model must have no layers that were parametrized after dwswap.optimize, got "
            f"{', '.join(map(repr, paths))}: call torch.nn.utils.parametrize."
            "remove_parametrizations first, and parametrize the result anew"
        )


def _has_swaps(model: nn.Module) -> bool:
    return any(
        type(m) is DepthwiseConv2d
        or is_marked(m)
        or base_of(m) is not None
        or (isinstance(m, fx.GraphModule) and next(swapped_calls(m), None) is not None)
        for m in model.modules()
    )


def _restore(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            absorbed = _absorbed(module)
            if absorbed is not None:
                raise ValueError(
                    f"model cannot be restored: {absorbed}; restore needs the result of a swap "
                    "alone, as dwswap.optimize(model, fuse=False) makes"
                )
            for node in list(swapped_calls(module)):
                unswap_call(module, node)
            module.recompile()
    model = unswap_training_modules(unswap_modules(model))
    in_place_again(model)
    disable_cuda_graphs(model)
    detach(model)
    return model


def _absorbed(module: fx.GraphModule) -> str | None:
    """What a graph has no layers left for, but for calls that absorbed their neighbours."""
    nodes = module.graph.nodes
    if FOLDED in module.meta:
        return "BatchNorm was folded into other weights"
    if any(node.target is squeeze_excitation for node in nodes):
        return "squeeze-and-excitation became calls of an operator"
    if any(node.target is interleaved and node.kwargs for node in nodes):
        return "a channel shuffle absorbed the biases or activations before it"
    means = [node for node in nodes if node.target in (channel_means, pooled_linear)]
    if any(node.kwargs.keys() - {"keepdim"} for node in means):
        return "a mean over height and width absorbed the bias or the activation before it"
    return None
