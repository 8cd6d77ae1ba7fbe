"""Proxies that refuse what torch.fx decides while it traces or leaves out of the graph.

A plain ``torch.fx.Proxy`` answers ``isinstance(x, list)``, ``hasattr(x, "mask")``, ``hash(x)`` and
``str(x)`` for itself, forgets ``x.data = ...``, takes ``x += y`` for ``x = x + y``, and raises for
control flow an error that a forward may swallow. ``mask is None`` asks nobody: the code that makes
calls of the graph is searched for it.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from dwswap.forward_code import codes, package_of
from dwswap.identity_tests import reads_local, tests_of_locals, tests_result_for_none

__all__ = ["GuardedProxy", "GuardingTracer", "NotTraceable", "check_arguments", "check_order"]

_TRUSTED = {"torch", "dwswap", "copy", "inspect"}
# Functions here test types for their caller: torch.is_tensor, torch.jit.isinstance.
_TESTS_TYPES = ("torch.jit", "torch._jit_internal")
_TYPE_TESTS = {"__instancecheck__", "__subclasscheck__"}
_READS = {"LOAD_ATTR", "LOAD_METHOD"}
# What is no tensor, which ``n += 1`` does not change.
_NUMBERS = {"size", "shape", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "item"}
_NUMBERS |= {"tolist", "storage_offset", "element_size"}
# Of a dict, which gives None where there is nothing else; a tensor has none of them.
_LOOKUPS = {"get", "pop", "setdefault"}
_ON_NUMBERS = ("_operator", "builtins", "math")
_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.GELU,
    nn.LeakyReLU,
    nn.Mish,
    nn.Identity,
)
# Those that tensors have; ``@=`` is none of them.
_IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)


class NotTraceable(Exception):
    """The module has no graph that does exactly what the module does; the text says why."""


class GuardingTracer(fx.Tracer):
    """``torch.fx.Tracer`` with guarded proxies, which remembers what they refused.

    Refusals count even where a forward catches the exception.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refused: str | None = None
        self._type_tests: dict[tuple[CodeType, int], str] = {}
        self._texts: list[tuple[str, str]] = []
        self._modes = _modes()

    @property
    def refused(self) -> str | None:
        """The first refusal, if any."""
        noted = [*self._type_tests.values(), *(reason for _, reason in self._texts)]
        return next(iter(noted), self._refused)

    def refuse(self, reason: str) -> NoReturn:
        self.note(reason)
        raise NotTraceable(reason)

    def note(self, reason: str) -> None:
        """Refuse in the end."""
        self._refused = self._refused or reason

    def note_type_test(self, frame: FrameType) -> None:
        """Refuse in the end, unless the test turns out to be part of a torch function's call."""
        reason = f"{_where(frame)} tests the type of a value, which is a proxy in a trace"
        self._type_tests.setdefault((frame.f_code, frame.f_lasti), reason)

    def note_torch_function(self, frame: FrameType) -> None:
        # The argument parser of a torch function written in C++ asks for types, too, before it
        # hands the call to __torch_function__. Such a test is at the same instruction.
        self._type_tests.pop((frame.f_code, frame.f_lasti), None)

    def note_text(self, text: str, frame: FrameType) -> None:
        """Refuse in the end, unless ``text`` turns out to be in the message of an assertion."""
        self._texts.append((text, f"{_where(frame)} makes text of a value, {text} in a trace"))

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        if target is torch._assert:
            message = str(kwargs.get("message", args[-1]))
            self._texts = [noted for noted in self._texts if noted[0] not in message]
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind != "placeholder":
            if self._modes != _modes():
                self.note(f"{node.name} is called in another mode of autograd or autocast")
            self._check_identity_tests(node, sys._getframe(1))
        return node

    def _check_identity_tests(self, node: fx.Node, frame: FrameType | None) -> None:
        """Look for tests of ``node`` in the code that makes it, and of the values around it."""
        innermost = True
        while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
            tests = tests_of_locals(frame.f_code)
            if (innermost or tests) and not _is_trusted(frame):
                if innermost:
                    for_none = tests_result_for_none(frame.f_code, frame.f_lasti)
                    if for_none is False or (for_none and _may_be_none(node)):
                        self.note(_compares(frame, node.name))
                    innermost = False
                for name, for_none in tests:
                    value = frame.f_locals.get(name)
                    if type(value) is GuardedAttribute or (
                        type(value) is GuardedProxy and (not for_none or _may_be_none(value.node))
                    ):
                        self.note(_compares(frame, name))
            frame = frame.f_back

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return GuardedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse(f"control flow depends on the value of {obj.node.name}")

    def iter(self, obj: fx.Proxy) -> Any:
        parts = _parts(obj.node, self.root)
        if parts is None:
            self.refuse(f"control flow depends on the length of {obj.node.name}, which is iterated")
        return iter([obj[index] for index in range(parts)])  # type: ignore[index]


class _Guarded(fx.Proxy):
    tracer: GuardingTracer

    # No zero-argument super() in this class: the property takes the name of its hidden cell.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = _caller(2)
        if not _is_trusted(frame):
            self.tracer.note_type_test(frame)
        return type(self)

    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None
    ) -> fx.Proxy:
        result = fx.Proxy.__torch_function__.__func__(cls, orig_method, types, args, kwargs)  # type: ignore[attr-defined]
        result.tracer.note_torch_function(sys._getframe(1))
        return result

    def __getattr__(self, k: str) -> Attribute:
        frame = _caller(2)
        opcode = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if opcode not in _READS and not _is_trusted(frame):
            self.tracer.refuse(f"{_where(frame)} asks whether a value has the attribute {k}")
        if tests_result_for_none(frame.f_code, frame.f_lasti) is not None:
            self.tracer.note(_compares(frame, f"the attribute {k}"))
        return GuardedAttribute(self, k)

    def __setattr__(self, name: str, value: object) -> None:
        frame = _caller(2)
        if not _is_trusted(frame):
            self.tracer.refuse(f"{_where(frame)} sets the attribute {name} of a value")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        self.tracer.refuse(f"{_where(_caller(2))} deletes the attribute {name} of a value")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.tracer.refuse("its forward makes a deep copy of a value")

    def __hash__(self) -> int:
        frame = _caller(2)
        if not _is_trusted(frame):
            self.tracer.refuse(f"{_where(frame)} needs the hash of {self.node.name}")
        return object.__hash__(self)

    def __repr__(self) -> str:
        return self._text(_caller(2))

    def __str__(self) -> str:
        return self._text(_caller(2))

    def __format__(self, spec: str) -> str:
        return self._text(_caller(2))

    def _text(self, frame: FrameType) -> str:
        text = f"Proxy({self.node.name})"
        if not _is_trusted(frame):
            self.tracer.note_text(text, frame)
        return text

    def __len__(self) -> int:
        parts = _parts(self.node, self.tracer.root)
        if parts is None:
            self.tracer.refuse(f"its forward needs the length of {self.node.name}")
        return parts

    def __int__(self) -> int:
        self.tracer.refuse(f"its forward needs the value of {self.node.name} as a number")

    def __float__(self) -> float:
        self.tracer.refuse(f"its forward needs the value of {self.node.name} as a number")


def check_arguments(
    graph: fx.Graph, forward: Sequence[FunctionType], helpers: Sequence[FunctionType]
) -> None:
    """Refuse arguments that no operation takes, where a function may have compared them.

    Args:
        forward: the functions of the traced module, its forward first; none of PyTorch's own.
        helpers: what else the forwards in the trace call, as far as they name it.

    Raises:
        NotTraceable: there is such an argument.
    """
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    unused = [str(node.target) for node in inputs if not node.users]
    for name in unused:
        if not any(reads_local(function.__code__, name) for function in forward[:1]):
            continue
        for helper in helpers:
            if any(map(tests_of_locals, codes(helper.__code__))):
                raise NotTraceable(
                    f"{helper.__name__} may compare {name} with `is`, which a graph omits"
                )


def check_order(graph: fx.Graph) -> None:
    """Refuse a required keyword-only argument behind one with a default.

    The code of a graph writes all inputs without ``*``, where Python does not allow that order.

    Raises:
        NotTraceable: there is such an argument.
    """
    defaulted: str | None = None
    for node in graph.nodes:
        if node.op != "placeholder" or str(node.target).startswith("*"):
            continue
        if node.args:
            defaulted = str(node.target)
        elif defaulted is not None:
            raise NotTraceable(
                f"its forward has {node.target} without a default behind {defaulted} with one"
            )


def _in_place(name: str) -> Callable[[fx.Proxy, Any], Any]:
    def method(self: fx.Proxy, other: Any) -> Any:
        if _is_number(self.node):
            return NotImplemented
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(_Guarded, f"__{_name}__", _in_place(_name))


def _modes() -> tuple[bool, bool, int]:
    """What ``torch.no_grad``, ``torch.autocast`` and the like change, by whatever name."""
    torch.autocast_increment_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.autocast_decrement_nesting(),
    )


def _may_be_none(node: fx.Node) -> bool:
    """Whether it may be ``None``: an argument, an attribute, what a dict or a function of the user
    returns, or an item of what may hold it."""
    if node.target is not operator.getitem:
        return node.op == "placeholder" or node.target is getattr or _returns_anything(node)
    root: Any = node
    while isinstance(root, fx.Node) and root.target is operator.getitem:
        root = root.args[0]
    if not isinstance(root, fx.Node):
        return False
    return root.op in ("placeholder", "call_module") or _returns_anything(root)


def _returns_anything(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _LOOKUPS
    if node.op != "call_function":
        return False
    # Of a builtin function of torch it is None.
    module = getattr(node.target, "__module__", None)
    if not isinstance(module, str) or module in _ON_NUMBERS:
        return False
    return package_of(module) not in (*_TRUSTED, "torchvision")


def _parts(node: fx.Node, root: nn.Module) -> int | None:
    """How many tensors a call returns that cuts a tensor up; None where that is not known."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", None)
    given: dict[Any, Any] = dict(zip(("input", name, "dim"), node.args, strict=False))
    given |= node.kwargs
    if name == "chunk":
        chunks = given.get("chunk", given.get("chunks"))
        if not isinstance(chunks, int) or chunks < 1 or given.get("dim") != 1:
            return None
        channels = _channels(given["input"], root)
        # Each has as many as it takes for so many chunks; there may be fewer.
        return -(-channels // -(-channels // chunks)) if channels else None
    if name in ("split", "split_with_sizes"):
        sizes = given.get(name, given.get("split_size_or_sections", given.get("split_size")))
        return len(sizes) if isinstance(sizes, (list, tuple)) else None
    return None


def _channels(value: object, root: nn.Module) -> int | None:
    """The size of dimension 1 where BatchNorm tells; a convolution would take a single image, too,
    whose dimension 1 is another."""
    while isinstance(value, fx.Node) and value.op == "call_module":
        module: Any = root.get_submodule(str(value.target))
        if type(module) in (nn.BatchNorm2d, nn.BatchNorm3d):
            return int(module.num_features)
        if type(module) not in _ELEMENTWISE:
            return None
        value = value.args[0] if value.args else None
    return None


def _is_number(node: fx.Node) -> bool:
    """Whether it computes a number or numbers from sizes and the like."""
    if node.op == "call_method" or node.target is getattr:
        return (node.target if node.op == "call_method" else node.args[1]) in _NUMBERS
    inputs, module = node.all_input_nodes, getattr(node.target, "__module__", None)
    return bool(inputs) and module in _ON_NUMBERS and all(map(_is_number, inputs))


class GuardedProxy(_Guarded):
    """A value of a trace by :class:`GuardingTracer`."""


class GuardedAttribute(_Guarded, Attribute):
    """An attribute of such a value, or its method about to be called."""


def _caller(depth: int) -> FrameType:
    """The frame that asks, without those of metaclasses that answer isinstance."""
    frame = sys._getframe(depth)
    while frame.f_code.co_name in _TYPE_TESTS and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_trusted(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    if module == "torch" or module.startswith(_TESTS_TYPES):
        return False
    return module.partition(".")[0] in _TRUSTED


def _where(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} in {frame.f_globals.get('__name__', '?')}"


def _compares(frame: FrameType, what: str) -> str:
    return f"{_where(frame)} compares {what} with `is`, but gets a proxy in a trace"
