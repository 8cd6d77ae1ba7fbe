"""Whether a call is plain: nothing but its tensors says what it does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = [
    "any_autocast",
    "differentiated_elsewhere",
    "has_kernels",
    "is_plain",
    "is_plain_but_for_autocast",
    "is_watched",
    "needs_gradient",
]

_TENSORS = frozenset({Tensor, nn.Parameter})
_OPTIONAL = frozenset({Tensor, nn.Parameter, type(None)})

# By these names because each dot costs as much as the call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
any_autocast = torch._C._is_any_autocast_enabled
_functorch = torch._C._are_functorch_transforms_active
_jit_trace = torch._C._get_tracing_state


def is_plain(input: Tensor, weight: Tensor, bias: Tensor | None, input_bias: Tensor | None) -> bool:
    """Nothing wants to see or change a call with these tensors: what it computes may run at once.

    Not under torch.compile, export, make_fx, torch.jit.trace, a dispatch or function mode,
    autocast, a functorch transform or forward AD, and not with a subclass of Tensor. Gradients are
    not looked at, nor is ``torch.set_default_device``, which is a function mode as well but only
    changes where factories put their results.
    """
    return not any_autocast() and is_plain_but_for_autocast(input, weight, bias, input_bias)


def is_plain_but_for_autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None, input_bias: Tensor | None
) -> bool:
    """:func:`is_plain`, or it would be with tensors that are cast first, as autocast casts them."""
    return (
        not torch.compiler.is_compiling()
        and type(input) in _TENSORS
        and type(weight) in _TENSORS
        and type(bias) in _OPTIONAL
        and type(input_bias) in _OPTIONAL
        and not _dispatch_modes()
        and (not _function_modes() or _only_default_devices())
        and not _functorch()
        and forward_ad._current_level < 0
        and _jit_trace() is None
    )


def differentiated_elsewhere() -> bool:
    """Forward AD or a functorch transform is active: aten knows their rules, so use aten."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def has_kernels(tensor: Tensor) -> bool:
    """Whether the kernels around convolutions, which aten stands in for, take ones like it."""
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """The result of a call with these tensors is part of a graph of autograd."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def is_watched() -> bool:
    """A trace, a mode or a transform is active that must see each operator of a model called.

    Autocast, gradients and ``torch.set_default_device`` are not looked at.
    """
    return (
        torch.compiler.is_compiling()
        or bool(_dispatch_modes())
        or _functorch()
        or forward_ad._current_level >= 0
        or _jit_trace() is not None
        or bool(_function_modes() and not _only_default_devices())
    )


def _only_default_devices() -> bool:
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
