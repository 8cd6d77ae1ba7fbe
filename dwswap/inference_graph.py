"""The result of a trace: a GraphModule that keeps what torch.fx alone would lose."""

from __future__ import annotations

import functools
import gc
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode
from torch.fx.graph_module import _deserialize_graph_module, _forward_from_src

from dwswap.copying import complete_copy
from dwswap.forward_code import called_functions, names_in
from dwswap.module_access import shortened

__all__ = [
    "EXPORTED",
    "FOLDED",
    "InferenceGraph",
    "InlinedModule",
    "bake",
    "graph_at",
    "name_taken",
]

EXPORTED = "dwswap_exported"
"""Key in ``GraphModule.meta`` of the graph of an exported program."""

FOLDED = "dwswap_folded"
"""Key in ``GraphModule.meta``: keys of the original's ``state_dict`` that a fold used up."""

_BAKED = "_dwswap_baked"
_ANEW = "set it on the original and call dwswap.optimize again"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class InferenceGraph(fx.GraphModule):
    """A ``torch.fx.GraphModule`` for inference, traced from a model in eval mode.

    Against a plain GraphModule it keeps the model's parameter and buffer order, unused modules and
    second names of shared modules, non-persistent buffers and plain attributes (numbers, strings
    and containers of them), also through deepcopy and pickle. ``train()`` raises: the graph has
    the eval behaviour of dropout and its like baked in. So does setting an attribute that a
    forward read, or a module that the graph does not call, and loading weights that were folded
    into others.
    """

    @classmethod
    def from_trace(
        cls,
        root: nn.Module,
        graph: fx.Graph,
        constants: Mapping[str, Any] | None = None,
    ) -> InferenceGraph:
        """The graph over the modules and tensors of ``root``, which are shared, not copied.

        Args:
            constants: attributes that the trace added to its root.
        """
        added = dict(constants or {})
        root.__dict__.update(added)
        try:
            result = cls(root, graph, class_name=type(root).__name__)
        finally:
            for name in added:
                del root.__dict__[name]
        made: dict[nn.Module, nn.Module] = {}
        _mirror(root, result, made)
        inlined = {source: target for source, target in made.items() if source is not target}
        read = _names_in_forwards({type(source) for source in inlined})
        for source, target in inlined.items():
            if target is not result:
                target.__class__ = InlinedModule
            _keep_attributes(source, target, read)
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        """As ever, but for attributes that a forward of the original read.

        Raises:
            AttributeError: one read ``name``, so that setting it would do nothing; or it is a
                module that the graph does not call, or was one that others have absorbed.
        """
        _check_not_baked(self, name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return _found(self, name)

    def recompile(self) -> PythonCode:
        """As ever, but the new code has short ways to its modules."""
        graph = self.graph
        with graph.on_generate_code(lambda before: shortened(self, graph, before)):
            code = super().recompile()
        # The generated code calls torch.fx.wrap, whose frame refers to itself and to its callers,
        # so to the model that is optimized: its weights would stay until Python cleans up.
        gc.collect(0)
        return code

    def train(self, mode: bool = True) -> InferenceGraph:
        """``train(False)`` and ``eval()`` are fine.

        Raises:
            RuntimeError: ``mode`` is true. (``train_guard`` puts back what PyTorch has changed
                around this graph by then.)
        """
        if mode:
            raise RuntimeError(
                "this model was optimized for inference; call dwswap.optimize(model.train()) on "
                "the original to fine-tune"
            )
        return super().train(False)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse a checkpoint of the original, also with ``strict=False``, before any is loaded.

        Raises:
            RuntimeError: ``state_dict`` has weights that this graph has folded into others.
        """
        for name in self.meta.get(FOLDED, ()):
            if prefix + name in state_dict:
                raise RuntimeError(
                    f"{prefix}{name} cannot be loaded: this graph has it folded into other "
                    "weights; load the checkpoint into the original model and call "
                    "dwswap.optimize again, or use dwswap.optimize(model, fuse=False)"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> InferenceGraph:
        result: Any = super().__deepcopy__(memo)
        complete_copy(self, result, memo)
        result.__class__.__name__ = type(self).__name__
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        _, (state, imports) = super().__reduce__()
        return _rebuild, (state, imports, type(self).__name__)


class InlinedModule(nn.Module):
    """What is left of a module whose code is in the graph: tensors, submodules, attributes.

    Nothing calls it, so it takes no hooks, and no modules and parameters under new names.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """As that of :class:`InferenceGraph`."""
        _check_not_baked(self, name, value)
        if isinstance(value, nn.Parameter) and name not in self._parameters:
            raise _not_read(name)
        if isinstance(value, nn.Module) and name not in self._modules:
            _check_called(name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return _found(self, name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As ever, but for modules under new names and those in the place of what is not called.

        Raises:
            AttributeError: nothing would call ``module``.
        """
        _check_not_baked(self, name, module)
        if module is not None and name not in self._modules:
            _check_called(name, module)
        super().add_module(name, module)

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a RuntimeError: a hook would not be called."""
        raise RuntimeError(
            "hooks on this module would not be called: its code is in the graph around it; "
            "register them on the original and call dwswap.optimize again, or use "
            "dwswap.optimize(model, fuse=False)"
        )

    register_forward_pre_hook = _refuse_hook
    register_forward_hook = _refuse_hook
    register_full_backward_pre_hook = _refuse_hook
    register_full_backward_hook = _refuse_hook
    register_backward_hook = _refuse_hook


def bake(module: nn.Module, name: str) -> None:
    """The submodule ``name`` of a part of a graph is gone: another cannot be set in its place."""
    if isinstance(module, (InferenceGraph, InlinedModule)):
        module.__dict__[_BAKED] = module.__dict__.get(_BAKED, frozenset()) | {name}


def _check_not_baked(module: nn.Module, name: str, value: object) -> None:
    child = module.__dict__.get("_modules", {}).get(name)
    if isinstance(child, InlinedModule) and not isinstance(value, InlinedModule):
        raise _not_read(name)
    if name not in module.__dict__.get(_BAKED, ()) or name in module._buffers:
        return
    known = f" {module.__dict__[name]!r}" if name in module.__dict__ else ""
    raise AttributeError(
        f"{name} cannot be set: this graph was made with its value{known}; {_ANEW}"
    )


def _check_called(name: str, module: nn.Module) -> None:
    # Parametrizations compute what is read under the old name.
    if not isinstance(module, InlinedModule) and name != "parametrizations":
        raise _not_read(name)


def _not_read(name: str) -> AttributeError:
    return AttributeError(
        f"{name} cannot be set: the code of this part of the model is in a graph, which would not "
        f"use it; {_ANEW}"
    )


def _found(module: nn.Module, name: str) -> Any:
    """As ``nn.Module.__getattr__``, with an error that says what a graph does not have."""
    parameters = module.__dict__.get("_parameters", ())
    if name in parameters:  # what the code of a graph asks for, call by call
        return parameters[name]
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError as error:
        if name.startswith("__"):
            raise
        raise AttributeError(
            f"{error}: dwswap.optimize made a graph of this part of the model, with its tensors, "
            "submodules and plain attributes, but no methods; dwswap.optimize(model, fuse=False) "
            "keeps the modules"
        ) from None


def _names_in_forwards(classes: Collection[type[nn.Module]]) -> set[str]:
    functions = [f for cls in classes for f in called_functions(cls, cls.forward)]
    return {name for function in functions for name in names_in(function.__code__)}


def _keep_attributes(source: nn.Module, target: nn.Module, read: Collection[str]) -> None:
    """Give ``target`` the plain attributes of ``source``; none that is ``read`` can be set."""
    baked = (source.__dict__.keys() & read) - _names_of_graphs()
    for name, value in source.__dict__.items():
        if _is_plain(value) and not hasattr(target, name):
            target.__dict__[name] = value
    target.__dict__[_BAKED] = source.__dict__.get(_BAKED, frozenset()) | baked


def name_taken(root: nn.Module) -> str | None:
    """A name in ``root`` under which its graph would have something else; None if there is none.

    What a graph would not keep anyway, as it is neither plain nor a tensor, does not count.
    """
    names = [*root._modules, *root._parameters, *root._buffers]
    if not isinstance(root, fx.GraphModule):
        kept = (n for n, v in root.__dict__.items() if isinstance(v, torch.Tensor) or _is_plain(v))
        names += kept
    # What a graph has beside a module: graph, code, meta and others.
    own = _names_of_graphs() - {*dir(nn.Module), *vars(nn.Module())}
    return next((name for name in names if name in own), None)


@functools.cache
def _names_of_graphs() -> frozenset[str]:
    empty = InferenceGraph(nn.Module(), fx.Graph())
    return frozenset({*dir(InferenceGraph), *vars(empty)})


def graph_at(model: nn.Module, path: str) -> fx.GraphModule:
    """The graph that ``model`` has become at ``path``; as a whole at ``""``."""
    graph_module = model.get_submodule(path)
    assert isinstance(graph_module, fx.GraphModule)
    return graph_module


def _rebuild(state: dict[str, Any], imports: str, name: str) -> InferenceGraph:
    """Inverse of :meth:`InferenceGraph.__reduce__`."""
    forward = _forward_from_src(imports + state["_code"], {})
    # torch changes its argument, and sets what is baked in, which the result would refuse.
    body = {key: value for key, value in state.items() if key != _BAKED}
    # Not reduce_graph_module: the code of its plain graph fails where a name is a keyword.
    result: Any = _deserialize_graph_module(forward, body, graph_module_cls=InferenceGraph)
    result.__class__.__name__ = name
    result.__dict__.update(state)
    return result


def _mirror(source: nn.Module, target: nn.Module, seen: dict[nn.Module, nn.Module]) -> None:
    """Give ``target`` (made by torch.fx from ``source``) all of the state of ``source``.

    torch.fx makes empty modules for those that it inlined and leaves out what the graph does not
    use; here they get the parameters, buffers and children of the originals, in their order.
    """
    seen[source] = target
    target.training = source.training
    extra = {n: b for n, b in target._buffers.items() if n not in source._buffers}
    _refill(target._parameters, source._parameters)
    _refill(target._buffers, {**source._buffers, **extra})
    target._non_persistent_buffers_set = {*source._non_persistent_buffers_set, *extra}
    children: dict[str, nn.Module | None] = {}
    for name, child in source._modules.items():
        made = target._modules.get(name)
        if child is None or child in seen:
            children[name] = None if child is None else seen[child]
        elif made is None or made is child:
            children[name] = seen[child] = child
        else:
            _mirror(child, made, seen)
            children[name] = made
    _refill(target._modules, children)


def _refill(target: dict[str, Any], content: Mapping[str, Any]) -> None:
    content = dict(content)
    target.clear()
    target.update(content)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return isinstance(value, _PLAIN)
