"""What two calls must have in common for one CUDA graph to serve both."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

__all__ = ["NoSignature", "from_tensors", "same_tensors_together", "signature", "surroundings"]

_TENSORS = frozenset({Tensor, nn.Parameter})
_CONSTANTS = (
    bool,
    int,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_SLOT = object()
"""Where a tensor was in the arguments of a call, or in what it returned."""

_STRIDED = torch.strided

# By these names because each dot costs as much as the call.
_precision = torch._C._get_fp32_precision_getter
_deterministic = torch._C._get_deterministic_algorithms
_cudnn_deterministic = torch._C._get_cudnn_deterministic
_autocast = torch._C._is_any_autocast_enabled
_default_dtype = torch.get_default_dtype
_function_modes = torch._C._len_torch_function_stack


class NoSignature(Exception):
    """A call that no other call can be known to equal."""


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, list[Tensor]]:
    """A key for the arguments of a call, and the tensors among them, in order.

    Of tensors shape, strides, dtype and device are in the key; of all else the structure, the
    types and the values. Floats are told apart bit by bit.

    Raises:
        NoSignature: a tensor subclass or a layout other than strided, or an argument that is
            neither a tensor nor a plain constant nor a tuple, list or dict of such.
    """
    try:
        if len(args) == 1 and not kwargs and type(args[0]) in _TENSORS:
            x = args[0]
            if x.layout is not _STRIDED:
                raise NoSignature(f"an argument has the layout {x.layout}")
            return (x.shape, x.stride(), x.dtype, x.device), [x]
        tensors: list[Tensor] = []
        return (_key(args, tensors), _key(kwargs, tensors)), tensors
    except RuntimeError as error:  # nested tensors have no strides
        raise NoSignature(str(error)) from error


def surroundings() -> Hashable:
    """What decides, beside arguments and weights, which kernels a call of aten runs."""
    autocast = None
    if _autocast():
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    device = None
    if _function_modes():
        device = tuple(str(mode.device) for mode in _get_current_function_mode_stack())
    return (
        autocast,
        device,
        _default_dtype(),
        _precision("cuda", "conv"),
        _precision("cuda", "matmul"),
        _deterministic(),
        _cudnn_deterministic(),
    )


def from_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[list[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function from tensors, in the order of :func:`signature`, to arguments like these."""
    template = _template(args), _template(kwargs)

    def arguments(tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(tensors)
        result: tuple[tuple[Any, ...], dict[str, Any]] = _filled(template, remaining)
        return result

    return arguments


def same_tensors_together(output: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The distinct tensors of ``output``, and a function from such tensors to the like of it.

    Raises:
        NoSignature: it holds what could hide a tensor, or a tensor subclass.
    """
    if type(output) in _TENSORS:
        return [output], lambda tensors: tensors[0]
    leaves, spec = pytree.tree_flatten(output)
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    plan: list[tuple[bool, Any]] = []
    for leaf in leaves:
        if type(leaf) in _TENSORS:
            if id(leaf) not in places:
                places[id(leaf)] = len(tensors)
                tensors.append(leaf)
            plan.append((True, places[id(leaf)]))
        elif isinstance(leaf, (*_CONSTANTS, float, complex, torch.Size)):
            plan.append((False, leaf))
        else:
            raise NoSignature(f"it returns a {type(leaf).__name__}")

    def rebuild(tensors: list[Tensor]) -> Any:
        return pytree.tree_unflatten(
            [tensors[item] if is_tensor else item for is_tensor, item in plan], spec
        )

    return tensors, rebuild


def _key(value: Any, tensors: list[Tensor]) -> Hashable:
    kind = type(value)
    if kind in _TENSORS:
        if value.layout is not _STRIDED:
            raise NoSignature(f"an argument has the layout {value.layout}")
        tensors.append(value)
        return _SLOT, value.shape, value.stride(), value.dtype, value.device
    if kind in _CONSTANTS:
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind is complex:
        return kind, value.real.hex(), value.imag.hex()
    if kind in (tuple, list, torch.Size) or _is_namedtuple(value):
        return kind, *[_key(item, tensors) for item in value]
    if kind is dict:
        return kind, *[(_key(k, tensors), _key(v, tensors)) for k, v in value.items()]
    raise NoSignature(f"an argument is a {kind.__name__}")


def _template(value: Any) -> Any:
    if type(value) in _TENSORS:
        return _SLOT
    if isinstance(value, (tuple, list)):
        return _like(value, [_template(item) for item in value])
    if isinstance(value, dict):
        return {k: _template(v) for k, v in value.items()}
    return value


def _filled(template: Any, tensors: Any) -> Any:
    if template is _SLOT:
        return next(tensors)
    if isinstance(template, (tuple, list)):
        return _like(template, [_filled(item, tensors) for item in template])
    if isinstance(template, dict):
        return {k: _filled(v, tensors) for k, v in template.items()}
    return template


def _like(sequence: Any, items: list[Any]) -> Any:
    return type(sequence)(*items) if _is_namedtuple(sequence) else type(sequence)(items)


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")
