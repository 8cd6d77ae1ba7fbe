"""Copies of a model to work on, so that the caller's model is never half rewritten."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor, fx, nn

__all__ = [
    "commit",
    "complete_copy",
    "copy_model",
    "is_one_graph",
    "modules_by_path",
    "out_of_inference_mode",
    "share_model",
    "shell_model",
]

P = ParamSpec("P")
R = TypeVar("R")

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def out_of_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of what makes models: tensors that are made in inference mode cannot be trained."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy.

    Non-leaf tensors kept as attributes (the weight that ``weight_norm`` computes, say) or in dicts,
    lists and tuples there (what a forward caches), which deepcopy refuses, are copied by value.

    Raises:
        ValueError: the model holds something that cannot be copied, or is not.
    """
    try:
        result = _deepcopy(model, _non_leaf_tensors(model))
    except Exception as error:  # whatever a user's attribute raises
        raise ValueError(
            f"model must be one that copy.deepcopy can copy, or use inplace=True; got a "
            f"{type(model).__name__} for which it fails: {type(error).__name__}: {error}"
        ) from error
    _check_apart(model, result)
    return result


def share_model(model: nn.Module) -> nn.Module:
    """A copy to run or trace: shares Parameters, buffers and hook functions with ``model``.

    Costs no memory for them. All else is copied, as a forward may change it.

    Raises:
        ValueError: the model holds something that cannot be copied, or is not.
    """
    memo = _non_leaf_tensors(model)
    for module in model.modules():
        for shared in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(shared)] = shared
        for name in _CALL_HOOKS:
            for hook in (getattr(module, name, None) or {}).values():
                memo[id(hook)] = hook
    try:
        result = _deepcopy(model, memo)
    except Exception as error:  # whatever a user's attribute raises
        raise ValueError(
            f"model must have attributes that copy.deepcopy can copy; got a "
            f"{type(model).__name__} for which it fails: {type(error).__name__}: {error}"
        ) from error
    _check_apart(model, result)
    return result


def shell_model(model: nn.Module) -> nn.Module:
    """A copy whose modules can be replaced: the module tree is new, all attributes are shared.

    Not to be run, as a forward may change what it shares. A root ``GraphModule`` comes with a
    graph of its own; a TorchScript module is shared as it is.
    """
    if isinstance(model, fx.GraphModule):
        return share_model(model)
    shells: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            shells[id(module)] = module
            continue
        shell = shells[id(module)] = object.__new__(type(module))
        shell.__dict__.update(
            {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
        )
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            children = shells[id(module)]._modules
            children.update({k: v if v is None else shells[id(v)] for k, v in children.items()})
    return shells[id(model)]


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every path of every module, aliases included."""
    return dict(model.named_modules(remove_duplicate=False))


def commit(model: nn.Module, before: dict[str, nn.Module], replaced: dict[str, nn.Module]) -> None:
    """Put what was replaced, added or removed in a shared copy into ``model``, at the same paths.

    Args:
        before: :func:`modules_by_path` of the copy, before.
        replaced: the same, after.

    Only dict assignments are left to do here, so nothing can fail half-way.
    """
    parents = modules_by_path(model)
    inside_new: set[str] = set()
    for path, module in replaced.items():
        parent, _, name = path.rpartition(".")
        if path and parent in inside_new:
            inside_new.add(path)
        elif path and module is not before.get(path):
            parents[parent]._modules[name] = module
            inside_new.add(path)
        elif not isinstance(module, torch.jit.ScriptModule):  # which the copy shares
            for tensors in ("_parameters", "_buffers"):
                kept, own = getattr(module, tensors), getattr(parents[path], tensors)
                for gone in own.keys() - kept.keys():
                    del own[gone]
                own.update({name: kept[name] for name in own if kept[name] is not own[name]})
    for path in before.keys() - replaced.keys():
        parent, _, name = path.rpartition(".")
        if parent in replaced and parent not in inside_new:
            parents[parent]._modules.pop(name, None)  # two paths may be one module


def is_one_graph(model: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether ``model`` is its graph: the feature extractors of torchvision have one per mode."""
    return isinstance(model, fx.GraphModule) and not _further_graphs(model)


def _further_graphs(model: fx.GraphModule) -> list[str]:
    return [n for n, v in model.__dict__.items() if isinstance(v, fx.Graph) and n != "_graph"]


def complete_copy(source: fx.GraphModule, copied: fx.GraphModule, memo: dict[int, Any]) -> None:
    """Add what ``GraphModule.__deepcopy__`` leaves out: hooks, attributes, second names."""
    for name, value in source.__dict__.items():
        if name != "_graph":
            # What has been copied already comes from the memo.
            copied.__dict__[name] = copy.deepcopy(value, memo)
    for name in _further_graphs(source):
        if source.__dict__[name] is source.graph:
            copied.graph = copied.__dict__[name]


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    result = copy.deepcopy(model, memo)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            complete_copy(module, memo[id(module)], memo)
    # A class with a copy of its own may lose the mode, as torchvision's feature extractors do.
    for module in model.modules():
        copied = memo.get(id(module))
        if isinstance(copied, nn.Module) and not isinstance(copied, torch.jit.ScriptModule):
            copied.training = module.training
    return result


def _check_apart(model: nn.Module, copied: nn.Module) -> None:
    """What is done to a copy must not reach the model: a class may say that it is its own copy."""
    own = {id(module) for module in model.modules()}
    for path, module in copied.named_modules():
        if id(module) not in own or isinstance(module, torch.jit.ScriptModule):
            continue
        if module._modules or module._parameters or module._buffers:
            raise ValueError(
                f"model must have modules that copy.deepcopy copies; got a "
                f"{type(model).__name__} whose {path!r}, a {type(module).__name__}, is its own copy"
            )


def _non_leaf_tensors(model: nn.Module) -> dict[int, Any]:
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    for module in model.modules():
        _add_non_leaf_tensors(module.__dict__, memo, seen)
    return memo


def _add_non_leaf_tensors(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    if isinstance(value, Tensor) and not value.is_leaf:
        with torch.no_grad():
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))  # it may hold itself
        for item in value.values() if isinstance(value, dict) else value:
            _add_non_leaf_tensors(item, memo, seen)
