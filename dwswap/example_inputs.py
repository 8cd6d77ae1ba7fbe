"""``example_inputs``: what it may be, running a model on it, the shapes that this shows."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules import module as module_globals
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from dwswap.copying import share_model
from dwswap.eligibility import is_convolution
from dwswap.forward_code import package_of

__all__ = ["Arguments", "ObservedShapes", "observe_shapes", "runnable_copy"]


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, model: nn.Module, example_inputs: Any) -> Arguments:
        """``example_inputs`` as arguments of ``model``.

        Raises:
            TypeError: it is no tensor, tuple or dict.
            ValueError: the model's forward does not take such arguments.
        """
        result = cls.of(example_inputs)
        try:
            signature = inspect.signature(model.forward)
        except ValueError:  # TorchScript that was traced or frozen has none; a call will tell
            return result
        try:
            signature.bind(*result.args, **result.kwargs)
        except TypeError as error:
            hint = ""
            if isinstance(example_inputs, dict):
                hint = (
                    " (a dict is keyword arguments; a tuple, (batch,), passes one that is a dict)"
                )
            raise ValueError(
                f"example_inputs must fit the forward of {type(model).__name__}: {error}{hint}"
            ) from error
        return result

    @classmethod
    def of(cls, example_inputs: Any) -> Arguments:
        """``example_inputs`` as arguments of whatever takes them.

        Raises:
            TypeError: it is no tensor, tuple or dict.
        """
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,))
        if isinstance(example_inputs, tuple):
            return cls(example_inputs)
        if isinstance(example_inputs, dict):
            return cls((), dict(example_inputs))
        raise TypeError(
            "example_inputs must be a tensor, a tuple of positional arguments or a dict of "
            f"keyword arguments, got {type(example_inputs).__name__}"
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same arguments with ``function`` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Arguments(args, kwargs)

    def call(self, model: Callable[..., Any]) -> Any:
        return model(*self.args, **self.kwargs)

    def positional(self, function: Callable[..., Any]) -> tuple[Any, ...]:
        """All arguments of ``function`` in its order, defaults filled in."""
        bound = inspect.signature(function).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return bound.args


@dataclass
class ObservedShapes:
    """Input shapes of convolution modules, by path, and shapes of a graph's values."""

    modules: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nodes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)


def observe_shapes(model: nn.Module, arguments: Arguments) -> ObservedShapes:
    """Shapes as ``model`` runs in eval mode on ``arguments``: on fake tensors where that works.

    A model whose control flow reads tensor values stops a fake run. What came before it counts;
    then the model runs once on the real tensors. On the meta device there are none to read.

    No hook of the user is called. One on a forward may change what the module gets or returns, so
    the run ends where it would be called, and what comes after it stays unknown.

    Raises:
        ValueError: the model fails on ``arguments``, or cannot be copied.
    """
    shared = share_model(model)  # which fails, if it does, whatever the inputs are
    seen = ObservedShapes()
    everywhere = (module_globals._global_forward_pre_hooks, module_globals._global_forward_hooks)
    if _has_users(getattr(model, "_forward_pre_hooks", {}), *everywhere):
        return seen
    try:
        if _has_other_dtypes(model, arguments):
            raise TypeError("fake convolutions take inputs and weights of any two dtypes")
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        subject = _made_runnable(shared, mode.from_tensor)
        _record(subject, seen)
        with _up_to_hooks(subject), torch.no_grad(), mode:
            arguments.map(mode.from_tensor).call(subject)
    except Exception as reason:  # anything: a real run decides
        try:
            if not any(p.is_meta for p in model.parameters()):
                subject = runnable_copy(model)
                _record(subject, seen)
                with _up_to_hooks(subject):
                    run(subject, arguments)
        except Exception as error:
            raise ValueError(
                f"example_inputs must be inputs that {type(model).__name__} accepts; it fails "
                f"on them: {type(error).__name__}: {error}"
            ) from reason
    if isinstance(model, fx.GraphModule):
        seen.nodes = _node_shapes(model, arguments)
    return seen


def _has_other_dtypes(model: nn.Module, arguments: Arguments) -> bool:
    """Whether an argument is of floating point, of another dtype than all parameters."""
    own = {p.dtype for p in model.parameters()}
    given = [
        leaf
        for leaf in pytree.tree_leaves((arguments.args, arguments.kwargs))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    on_meta = any(p.is_meta for p in model.parameters())
    return bool(own) and not on_meta and any(tensor.dtype not in own for tensor in given)


def _copied(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:  # without its gradient
        return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return copy.deepcopy(tensor) if isinstance(tensor, nn.Parameter) else tensor.clone()


def runnable_copy(model: nn.Module, copied: Callable[[Tensor], Tensor] = _copied) -> nn.Module:
    """A copy in eval mode, with parameters and buffers of its own, as a forward may change them.

    Args:
        model: parameters of TorchScript modules inside are shared.
        copied: what makes the copy of a parameter or buffer.
    """
    return _made_runnable(share_model(model), copied)


def _made_runnable(subject: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """``subject``, which shares its tensors with a model, as :func:`runnable_copy` gives it."""
    copies: dict[int, Tensor] = {}
    for module in subject.modules():
        if isinstance(module, torch.jit.ScriptModule):
            module.eval()
            continue
        # Not .eval(): models override it with side effects.
        module.training = False
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = copied(tensor)
                    tensors[name] = copies[id(tensor)]
    return subject


def run(model: nn.Module, arguments: Arguments) -> Any:
    """Outputs of ``model`` without gradients, with fixed random numbers that stay inside."""
    devices = {
        t.device
        for t in pytree.tree_leaves((arguments.args, arguments.kwargs))
        if isinstance(t, Tensor) and t.is_cuda
    }
    devices |= {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        # Not torch.manual_seed, which seeds every GPU.
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(0)
        return arguments.map(Tensor.clone).call(model)


class _Unknown(BaseException):
    """Ends a run where a hook would be called. No Exception, which the model might catch."""


@contextlib.contextmanager
def _up_to_hooks(model: nn.Module) -> Iterator[None]:
    """Take the user's hooks from ``model``, a copy to throw away; a run ends at the first of them.

    Those of backward, which a forward calls that computes gradients, change no shapes.
    """

    def stop(*_: Any) -> None:
        raise _Unknown

    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # has none
            continue
        module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        if _has_users(module._forward_pre_hooks):
            module._forward_pre_hooks = OrderedDict()
            module.register_forward_pre_hook(stop)
        if _has_users(module._forward_hooks):
            module._forward_hooks = OrderedDict()
            module.register_forward_hook(stop)
    with contextlib.suppress(_Unknown):
        yield


def _has_users(*hooks: Mapping[int, Any]) -> bool:
    """Whether any is neither PyTorch's nor ours. A module may not work without these, as that of
    ``weight_norm``, which computes the weight."""
    for hook in itertools.chain.from_iterable(each.values() for each in hooks):
        function = hook.func if isinstance(hook, partial) else hook
        if package_of(str(getattr(function, "__module__", None))) not in ("torch", "dwswap"):
            return True
    return False


def _record(model: nn.Module, seen: ObservedShapes) -> None:
    """Have ``model``, a copy to throw away, note the input shapes of its convolutions."""

    def record(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.modules.setdefault(path, tuple(args[0].shape))

    for path, module in model.named_modules():
        if is_convolution(module) and not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(partial(record, path))


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def _node_shapes(
    graph_module: fx.GraphModule, arguments: Arguments
) -> dict[fx.Node, tuple[int, ...]]:
    if any(map(is_lazy, (*graph_module.parameters(), *graph_module.buffers()))):
        return {}  # no fake tensor can stand for what has no shape yet
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    subject = runnable_copy(graph_module, mode.from_tensor)
    assert isinstance(subject, fx.GraphModule)
    recorder = _ShapeRecorder(subject)
    # A graph that needs real values yields the shapes up to there.
    with _up_to_hooks(subject), torch.no_grad(), mode, contextlib.suppress(Exception):
        recorder.run(*arguments.map(mode.from_tensor).positional(graph_module.forward))
    pairs = zip(graph_module.graph.nodes, subject.graph.nodes, strict=True)
    return {node: recorder.shapes[copy] for node, copy in pairs if copy in recorder.shapes}
