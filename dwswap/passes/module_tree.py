"""New tensors of a graph, and modules and tensors that it does not need any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from dwswap.inference_graph import InlinedModule, bake
from dwswap.passes.affine_call import transposed

__all__ = ["add_parameter", "add_parameters", "remove_released", "replace_tensors"]


def add_parameters(
    graph_module: fx.GraphModule,
    path: str,
    tensors: Iterable[Tensor],
    requires_grad: Iterable[bool],
) -> tuple[str, str | None]:
    """Make ``tensors`` the weight, and the bias if there are two, of a new module beside ``path``;
    their paths."""
    made = [nn.Parameter(*given) for given in zip(tensors, requires_grad, strict=True)]
    parameters = dict(zip(("weight", "bias"), made, strict=False))
    where = _add_holder(graph_module, path, "_folded", parameters)
    return f"{where}.weight", f"{where}.bias" if len(made) > 1 else None


def add_parameter(
    graph_module: fx.GraphModule, path: str, name: str, tensor: Tensor, requires_grad: bool
) -> str:
    """Make ``tensor``, a bias that was pushed here, a parameter beside ``path``; its path."""
    parameters = {name: nn.Parameter(tensor, requires_grad)}
    return f"{_add_holder(graph_module, path, '_pushed', parameters)}.{name}"


def _add_holder(
    graph_module: fx.GraphModule, path: str, suffix: str, parameters: dict[str, nn.Parameter]
) -> str:
    parent_path, _, name = path.rpartition(".")
    parent = graph_module.get_submodule(parent_path)
    # What was folded once may be folded again.
    name = f"{name.partition('_folded')[0].partition('_pushed')[0]}{suffix}"
    number = 0
    while hasattr(parent, name if not number else f"{name}_{number}"):
        number += 1
    name = f"{name}_{number}" if number else name
    holder = InlinedModule()
    holder._parameters.update(parameters)
    holder.eval()
    parent.add_module(name, holder)
    return f"{parent_path}.{name}" if parent_path else name


def replace_tensors(graph_module: fx.GraphModule, new: Mapping[int, Tensor]) -> None:
    """Replace tensors in the modules of the graph, which an original shares at most by name.

    Args:
        new: by the ``id`` of a parameter or buffer; in the place of a parameter it becomes one.
    """
    made: dict[int, Tensor] = {}
    for module in graph_module.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in holders:
            for name, tensor in tensors.items():
                key = id(tensor)
                if key in new and key not in made:
                    parameter = isinstance(tensor, nn.Parameter)
                    value = new[key]
                    made[key] = nn.Parameter(value, tensor.requires_grad) if parameter else value
                if key in made:
                    tensors[name] = made[key]


def remove_released(graph_module: fx.GraphModule, released: Iterable[str]) -> None:
    """Remove what is at the paths ``released`` as far as the graph neither calls nor reads it.

    A module that is not called but whose tensors are read becomes an ``InlinedModule`` with these,
    under the same keys. All names of a module are one.
    """
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        is_released = node.op == "get_attr" and str(node.target) in released
        if not node.users and (is_released or transposed(node) is not None):
            graph.erase_node(node)
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    called = {modules[str(n.target)] for n in graph.nodes if n.op == "call_module"}
    read = {_owner(modules, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    for path in released:
        owner, name = _owner(modules, path)
        if path not in modules and owner not in called and (owner, name) not in read:
            for tensors in (owner._parameters, owner._buffers) if owner is not None else ():
                tensors.pop(name, None)
    replaced: dict[nn.Module, nn.Module | None] = {}
    for path in released:
        module = modules.get(path)
        if module is not None and module not in called:
            kept = any(owner is module for owner, _ in read)
            replaced[module] = _holder(module) if kept else None
    for parent in list(graph_module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replaced:
                new = replaced[child]
                if new is None:
                    del parent._modules[name]
                    bake(parent, name)
                else:
                    parent._modules[name] = new


def _owner(modules: dict[str, nn.Module], path: str) -> tuple[nn.Module | None, str]:
    parent, _, name = path.rpartition(".")
    return modules.get(parent), name


def _holder(module: nn.Module) -> nn.Module:
    holder = InlinedModule()
    holder._parameters.update(module._parameters)
    holder._buffers.update(module._buffers)
    holder._modules.update(module._modules)
    holder._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    return holder.train(module.training)
