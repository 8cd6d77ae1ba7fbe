"""Tracing with convolution and norm layers as leaves, and when a trace may not be trusted."""

from __future__ import annotations

import builtins
import functools
import math
import numbers
import pickle
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.modules import module as module_globals
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from dwswap.called_modules import lists_tensors
from dwswap.convolution_call import has_depthwise_call
from dwswap.copying import share_model
from dwswap.eligibility import HOOKS, is_convolution, reason_to_keep
from dwswap.forward_code import (
    called_functions,
    catches_errors,
    global_names,
    names_in,
    only_of_self,
    package_of,
)
from dwswap.frozen_norm import is_frozen_norm
from dwswap.guarded_proxy import GuardingTracer, NotTraceable, check_arguments, check_order
from dwswap.inference_graph import EXPORTED, FOLDED, InferenceGraph, name_taken
from dwswap.ops import depthwise_conv2d
from dwswap.passes.aliasing import changed_tensors
from dwswap.state_marks import Variable, attributes, changed, surroundings
from dwswap.weight_reads import WeightReads

__all__ = [
    "NotTraceable",
    "Tracer",
    "is_training",
    "one_at_a_time",
    "trace",
    "traceable_submodules",
]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
# Context managers that torch.fx runs while it traces and then leaves out of the graph, and tests
# that it answers once and for all.
_NOT_RECORDED = {"autocast", "no_grad", "enable_grad", "set_grad_enabled", "inference_mode"}
_NOT_RECORDED |= {"is_grad_enabled", "is_inference_mode_enabled", "is_tensor", "suppress"}
_NOT_RECORDED |= {"is_autocast_enabled", "is_autocast_cpu_enabled", "get_autocast_dtype"}
_CONTAINERS = (dict, list, immutable_dict, immutable_list)
_SAVING = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")
_VARIADIC = 0x04 | 0x08  # inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


class Tracer(GuardingTracer):
    """A tracer whose leaves are torch.nn modules, convolutions and norms of any class.

    Buffers are read by the graph, not baked into it.
    """

    proxy_buffer_attributes = True

    def __init__(self, inlined: Collection[nn.Module] = ()) -> None:
        """``inlined``: convolutions and norms that are no leaves."""
        super().__init__(autowrap_modules=(math,), autowrap_functions=(depthwise_conv2d,))
        self.inlined = inlined
        self.surroundings: dict[tuple[str, int], Variable] = {}
        self.helpers: list[FunctionType] = []
        self._surrounded: set[type] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        opaque = (_ConvNd, LazyModuleMixin, torch.jit.ScriptModule, *_NORMS)
        if isinstance(m, opaque) or is_convolution(m) or is_frozen_norm(m):
            return m not in self.inlined
        # The wrapper that torch.compile returns is dynamo's, and its forward must not be traced.
        return type(m).__module__.startswith("torch._dynamo") or super().is_leaf_module(
            m, module_qualified_name
        )

    def create_arg(self, a: Any) -> Any:
        """As in torch.fx, which makes a plain dict or list of every subclass, but for numbers of
        NumPy."""
        if type(a) is OrderedDict:
            items = self.create_arg(list(a.items()))
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, (dict, list)) and type(a) not in _CONTAINERS:
            raise NotTraceable(f"it handles {type(a).__name__}, which a graph would not keep")
        if type(a).__module__ == "numpy":
            # The generated code would have it as np.float64(...), where np is not known.
            if not isinstance(a, (numbers.Real, str)):
                name = type(a).__name__
                raise NotTraceable(f"it handles numpy.{name}, which a graph would not keep")
            a = a.item()  # type: ignore[union-attr]
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.surround(type(m), check_inlined(m, path))
        return super().call_module(m, forward, args, kwargs)

    def surround(self, cls: type, functions: list[FunctionType]) -> None:
        """Note what ``functions`` may change beside the modules of the model."""
        if cls not in self._surrounded:
            self._surrounded.add(cls)
            self.surroundings = surroundings(cls, functions) | self.surroundings
            self.helpers += functions[1:]


# torch.fx puts functions of its own in the place of nn.Module's, for all threads.
_TRACING = threading.RLock()
P = ParamSpec("P")
R = TypeVar("R")


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of what traces models or looks into them: calls of other threads wait."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _TRACING:
            return function(*args, **kwargs)

    return call


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of ``model`` and the constants that it needs beside the model's attributes.

    ``model`` keeps its state: a copy of its module tree is traced.

    Raises:
        NotTraceable: torch.fx cannot trace it, or the graph would differ in what it does.
    """
    functions = _check_root(model)
    try:
        subject = share_model(model)
    except ValueError as error:
        raise NotTraceable(one_line(error)) from error
    # Not during the trace: one trace cannot run inside another.
    inside = [m for m in subject.modules() if m is not subject]
    inlined = {m for m in inside if _calls_depthwise(m) or _calls_batch_norm(m)}
    before = {path: attributes(m) for path, m in subject.named_modules()}
    random_states = _random_states()
    tracer = Tracer(inlined)
    tracer.surround(type(model), functions)
    weights = WeightReads(subject)
    try:
        with _TRACING, weights:
            graph = tracer.trace(subject)
    except NotTraceable:
        raise
    except Exception as error:  # a forward that gets proxies for tensors may raise anything
        reason = tracer.refused or f"{type(error).__name__}: {one_line(error)}"
        raise NotTraceable(reason) from error
    finally:
        drew = _restore_random_states(random_states)
        refused, around, helpers = tracer.refused, tracer.surroundings, tracer.helpers
        # It is in a cycle with functions that it put in the place of others, and it knows all
        # tensors: they would stay until Python cleans up.
        vars(tracer).clear()
    if refused is not None:
        raise NotTraceable(refused)
    if drew:
        raise NotTraceable("its forward draws random numbers, which a graph would freeze")
    check_arguments(graph, functions, helpers)
    check_order(graph)
    for (name, _), variable in around.items():
        if variable.is_changed:
            raise NotTraceable(f"its forward changes {name}")
    for node in graph.nodes:
        # Annotations end up in the generated code, and strings among them break pickle.
        node.type = None
    constants = {}
    for path, module in subject.named_modules():
        for name, value in changed(before.get(path, {}), attributes(module)).items():
            if path or not name.startswith("_") or "_constant" not in name:
                where = f"{path}.{name}" if path else name
                raise NotTraceable(f"its forward changes the attribute {where}")
            constants[name] = value
    computed = any(getattr(value, "requires_grad", False) for value in constants.values())
    listed = any(map(lists_tensors, (*functions, *helpers)))
    if computed or listed or weights.found or weights.are_among(constants.values()):
        raise NotTraceable("its forward computes with parameters, which a graph would freeze")
    return graph, constants


def build_graph_module(model: nn.Module) -> InferenceGraph:
    """:func:`trace` as a module that shares the tensors and leaf modules of ``model``.

    Raises:
        NotTraceable: also where the result would have another ``state_dict``.
    """
    check_not_compiled(model)
    graph, constants = trace(model)
    taken = name_taken(model)
    if taken is not None:
        raise NotTraceable(f"{_named(model, '')} has {taken}, which a graph has for its own use")
    result = InferenceGraph.from_trace(model, graph, constants)
    _check_constants(result, constants)
    for path, module in model.named_modules():
        if result.get_submodule(path) is not module:
            _check_saving(module, path)
    difference = sorted(model.state_dict().keys() ^ result.state_dict().keys())
    if difference:
        raise NotTraceable(f"a graph would have other state_dict keys: {difference[0]}")
    return result


def _check_constants(graph_module: fx.GraphModule, constants: dict[str, Any]) -> None:
    """Refuse tensors that ``forward`` makes for each call, and that are not the same after it."""
    changed = changed_tensors(graph_module)
    if any(id(value) in changed for value in constants.values()):
        raise NotTraceable("its forward changes a tensor that it makes, which a graph would keep")
    for node in graph_module.graph.output_node().all_input_nodes:
        if node.op == "get_attr" and node.target in constants:
            raise NotTraceable(
                "its forward returns a tensor that it makes, which a graph would share"
            )


def traceable_submodules(model: nn.Module) -> Iterator[tuple[str, InferenceGraph]]:
    """The largest submodules that can be traced, none inside another, with their graphs.

    The model itself is not tried. Leaves of the tracer are not worth a graph and left out.
    """
    pending = list(model.named_children())
    seen: set[nn.Module] = set()
    while pending:
        path, module = pending.pop(0)
        leaf = Tracer().is_leaf_module(module, path) and not _calls_depthwise(module)
        if leaf or module in seen:
            continue
        seen.add(module)
        try:
            yield path, build_graph_module(module)
        except NotTraceable:
            pending[:0] = [(f"{path}.{name}", child) for name, child in module.named_children()]


def is_training(model: nn.Module) -> bool:
    """Whether any module is in train mode; the empty modules that torch.fx makes do not count.

    The graph of an exported program has its mode in its calls, and flags that mean nothing.
    """
    if isinstance(model, fx.GraphModule):
        if any(_trains(node) for node in model.graph.nodes):
            return True
        # A subclass may have no ``meta``: torchvision's feature extractors.
        if "train" in model.__dict__ or EXPORTED in getattr(model, "meta", ()):
            return False
    # A frozen TorchScript module has no mode.
    return any(getattr(m, "training", False) for m in model.modules() if type(m) is not nn.Module)


def _trains(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return any(given.get(name) is True for name in ("training", "train"))


def check_inlined(module: nn.Module, path: str) -> list[FunctionType]:
    """Refuse to inline ``module`` where its call does more than what a graph records.

    Returns:
        Its forward and the functions that this names.

    Raises:
        NotTraceable: hooks, a decorated forward, context managers or type tests in forward.
    """
    name = _named(module, path)
    for attribute, code in HOOKS.items():
        if getattr(module, attribute, None) and code != "state_dict_hook":
            raise NotTraceable(f"{name} has a {code.replace('_', ' ')}")
    forward = getattr(module.forward, "__func__", module.forward)
    if hasattr(forward, "__wrapped__"):
        raise NotTraceable(f"the forward of {name} is decorated")
    functions = called_functions(type(module), forward)
    for function in functions:
        where = f"{function.__name__} of {name}"
        wrapper = str(function.__globals__.get("__name__"))
        if package_of(wrapper) == "torch":
            raise NotTraceable(f"{where} has a decorator of {wrapper}, which a graph omits")
        if catches_errors(function.__code__):
            raise NotTraceable(f"{where} catches errors, which a graph would not")
        names = {
            name
            for name in names_in(function.__code__) & _NOT_RECORDED
            if not (_is_plain(module, name) and only_of_self(function.__code__, name))
        }
        if names:
            raise NotTraceable(f"{where} uses {', '.join(sorted(names))}, which a graph omits")
        for asked in global_names(function.__code__):
            value = function.__globals__.get(asked, getattr(builtins, asked, None))
            if value is type or value is callable:
                raise NotTraceable(f"{where} calls {asked}, which a proxy in a trace deceives")
            own_name = getattr(value, "__name__", None)
            if own_name in _NOT_RECORDED and value is getattr(torch, own_name, None):
                raise NotTraceable(f"{where} uses {own_name} as {asked}, which a graph omits")
    return functions


def _is_plain(module: nn.Module, name: str) -> bool:
    """Whether its attribute is data: ``self.inference_mode = True``, say."""
    return isinstance(vars(module).get(name, module), (bool, int, float, str, type(None)))


def check_not_compiled(model: nn.Module) -> None:
    """Refuse a graph of a model on which, or inside which, ``compile()`` was called.

    Raises:
        NotTraceable: it was.
    """
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise NotTraceable(
                f"{_named(module, path)} was compiled in place, which a graph or a copy loses; "
                "call compile() on the result"
            )


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()


def _named(module: nn.Module, path: str) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


def _check_saving(module: nn.Module, path: str) -> None:
    """Refuse to inline ``module`` where it saves or loads its state in a way of its own."""
    cls = type(module)
    for name in _SAVING:
        # That of BatchNorm adds what files from before PyTorch 0.4.1 lack.
        usual = (getattr(nn.Module, name), _NormBase._load_from_state_dict)
        own = name in module.__dict__ or getattr(cls, name) not in usual
        if isinstance(module, InferenceGraph) and FOLDED not in module.meta:
            continue
        # The one of torchvision is MNASNet's. It converts files of its first version, which a
        # graph refuses by their shapes.
        if own and package_of(cls.__module__) != "torchvision":
            raise NotTraceable(f"{_named(module, path)} overrides {name}")
    for attribute, code in HOOKS.items():
        if code == "state_dict_hook" and getattr(module, attribute, None):
            raise NotTraceable(f"{_named(module, path)} has a hook on saving or loading its state")


def _check_root(model: nn.Module) -> list[FunctionType]:
    functions = check_inlined(model, "")
    if any(getattr(module_globals, name, None) for name in _GLOBAL_HOOKS):
        raise NotTraceable("global module hooks are registered")
    # torch.fx traces forward; for the modules inside it runs the call as it is.
    for name in ("__call__", "_call_impl"):
        own = getattr(type(model), name) is not getattr(nn.Module, name)
        if own and not isinstance(model, fx.GraphModule):
            raise NotTraceable(f"{type(model).__name__} overrides {name}")
    if "forward" in model.__dict__:
        raise NotTraceable("forward was replaced on the instance")
    forward = type(model).forward
    code = getattr(forward, "__code__", None)
    if code is None or code.co_flags & _VARIADIC:
        raise NotTraceable("its forward has no fixed list of arguments")
    defaults = (*(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values())
    if any(value is None for value in defaults):
        raise NotTraceable("its forward has arguments that may be None, which a graph cannot test")
    return functions


class _RandomStates(NamedTuple):
    python: Any
    cpu: Tensor
    gpus: list[Tensor]
    numpy: bytes | None  # pickled, as it holds an array; None where NumPy was not imported


def _random_states() -> _RandomStates:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False))
    return _RandomStates(random.getstate(), torch.get_rng_state(), on_gpu, of_numpy)


def _restore_random_states(states: _RandomStates) -> bool:
    """Back to ``states``; whether anything had been drawn since."""
    now = _random_states()
    same = now.python == states.python and torch.equal(now.cpu, states.cpu)
    same = same and all(map(torch.equal, now.gpus, states.gpus))
    same = same and states.numpy in (None, now.numpy)
    if not same:
        random.setstate(states.python)
        torch.set_rng_state(states.cpu)
        if states.gpus:
            torch.cuda.set_rng_state_all(states.gpus)
        if states.numpy is not None:
            sys.modules["numpy"].random.set_state(pickle.loads(states.numpy))
    return not same


def _calls_depthwise(module: nn.Module) -> bool:
    """A subclass of nn.Conv2d whose forward, traced, shows a call that can be swapped."""
    if not isinstance(module, nn.Conv2d) or reason_to_keep(module) != "subclass":
        return False
    try:
        return has_depthwise_call(build_graph_module(module))
    except NotTraceable:
        return False


def _calls_batch_norm(module: nn.Module) -> bool:
    """A subclass of BatchNorm in eval mode whose forward, traced, shows a call that can be folded:
    timm's, which has an activation as well."""
    if not isinstance(module, _NormBase) or module.training:
        return False
    if package_of(type(module).forward.__module__) == "torch":
        return False
    try:
        check_not_compiled(module)
        for path, part in module.named_modules():
            if part is module or not Tracer().is_leaf_module(part, path):
                _check_saving(part, path)
        graph, _ = trace(module)  # without the code of a module, which takes longer
    except NotTraceable:
        return False
    return any(node.target is F.batch_norm for node in graph.nodes)
