"""Which convolution modules may be swapped, and why the others may not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dwswap.checks import whole
from dwswap.modules import DepthwiseConv2d
from dwswap.report import REASONS, Layer, dtype_name

__all__ = [
    "DTYPES",
    "HOOKS",
    "Skip",
    "inspect_modules",
    "is_convolution",
    "is_prepared",
    "reason_not_plain",
    "reason_to_keep",
]

Skip = Callable[[nn.Module, str], bool]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Attribute of nn.Module -> reason code, for every kind of hook that one module can have.
HOOKS: dict[str, str] = {
    "_forward_pre_hooks": "forward_pre_hook",
    "_forward_hooks": "forward_hook",
    "_backward_hooks": "backward_hook",
    "_backward_pre_hooks": "backward_hook",
    "_state_dict_hooks": "state_dict_hook",
    "_state_dict_pre_hooks": "state_dict_hook",
    "_load_state_dict_pre_hooks": "state_dict_hook",
    "_load_state_dict_post_hooks": "state_dict_hook",
}
_METHODS = ("forward", "_conv_forward", "__call__", "_call_impl")
_REPARAMETRIZATIONS: tuple[tuple[type, str], ...] = (
    (WeightNorm, "weight_norm"),
    (SpectralNorm, "spectral_norm"),
    (prune.BasePruningMethod, "pruned"),
)


def inspect_modules(model: nn.Module, skip: Skip | None = None) -> dict[str, Layer]:
    """A :class:`Layer` for every convolution module of ``model``, by its first path.

    Reads only. ``skip`` is asked about modules that would be swapped, under each of their paths.

    Raises:
        TypeError: ``skip`` is not callable.
    """
    if skip is not None and not callable(skip):
        raise TypeError(f"skip must be callable as skip(module, path) -> bool, got {skip!r}")
    if skip is not None:
        _check_signature(skip)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_convolution(module):
            paths.setdefault(module, []).append(path)
    layers = {}
    prepared = is_prepared(model)
    for module, names in paths.items():
        layer = _describe(module, names)
        code, facts = _judge(module)
        if code == "depthwise" and prepared:
            code = "quantization_prepared"
        if code == "depthwise" and skip and any(skip(module, name) for name in names):
            code = "skipped"
        decision = "swapped" if code in ("depthwise", "already_swapped") else "kept"
        layers[names[0]] = layer.decided(decision, code, **facts)
    return layers


def _check_signature(skip: Skip) -> None:
    try:
        signature = inspect.signature(skip)
    except ValueError:  # of a function in C
        return
    try:
        signature.bind(nn.Identity(), "")
    except TypeError as error:
        raise TypeError(
            f"skip must be callable as skip(module, path) -> bool, got one of {signature}: {error}"
        ) from error


def is_prepared(model: nn.Module) -> bool:
    """Whether quantization has put observers into ``model``, to convert it later.

    Those inside its own layers, which are left alone anyway, do not count.
    """
    layers = (m for m in model.modules() if any(map(_is_quantized_class, type(m).__mro__)))
    inside = {module for layer in layers for module in layer.modules()}
    return any(
        cls.__name__ in ("ObserverBase", "FakeQuantizeBase")
        for module in model.modules()
        if module not in inside
        for cls in type(module).__mro__
    )


def is_convolution(module: nn.Module) -> bool:
    """Any convolution layer: 1-D to 3-D, transposed, lazy, quantized, scripted, subclasses."""
    if isinstance(module, _ConvNd):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", "")).startswith(("Conv", "LazyConv"))
    # Quantized layers do not derive from nn's; their own modules are slow to import.
    return any("Conv" in c.__name__ and _is_quantized_class(c) for c in type(module).__mro__)


def reason_to_keep(module: nn.Module) -> str | None:
    """None where ``module`` is a convolution that may be swapped, else a code of ``REASONS``."""
    code, _ = _judge(module)
    return None if code == "depthwise" else code


def _judge(module: Any) -> tuple[str, dict[str, object]]:
    """Reason code and the facts of its sentence. The order is from kind to condition."""
    cls = type(module)
    facts: dict[str, object] = {"type": cls.__name__}
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted", facts
    if any(_is_quantized_class(c) for c in cls.__mro__):
        is_qat = any(".qat" in c.__module__ for c in cls.__mro__)
        return "qat" if is_qat else "quantized", facts
    tensors = [module._parameters.get("weight"), module._parameters.get("bias")]
    lazy = any(map(is_lazy, tensors))
    if lazy or isinstance(module, LazyModuleMixin):
        return "lazy", facts
    if parametrize.is_parametrized(module):
        return "parametrized", {"names": ", ".join(module.parametrizations)}
    for hook in module._forward_pre_hooks.values():
        for kind, code in _REPARAMETRIZATIONS:
            if isinstance(hook, kind):
                return code, facts
    if isinstance(module, _ConvTransposeNd):
        return "transposed", facts
    if not isinstance(module, nn.Conv2d):
        return "not_conv2d", facts
    if cls is DepthwiseConv2d:
        return "already_swapped", facts
    if module.in_channels == 1:
        return "single_channel", facts
    if module.groups != module.in_channels:
        return "not_depthwise", {"groups": module.groups, "channels": module.in_channels}
    if cls is not nn.Conv2d:
        return "subclass", facts
    return _judge_state(module)


def _judge_state(conv: nn.Conv2d) -> tuple[str, dict[str, object]]:
    """The conditions on an exact nn.Conv2d with groups == in_channels > 1."""
    weight = conv._parameters.get("weight")
    bias = conv._parameters.get("bias")
    found = _judge_handling(conv)
    if found is not None:
        return found
    if weight is None or (bias is None and "bias" not in conv._parameters):
        return "weight_not_parameter", {}
    found = _judge_tensors(weight, bias)
    if found is not None:
        return found
    if conv.padding_mode != "zeros":
        return "padding_mode", {"padding_mode": conv.padding_mode}
    expected = (conv.out_channels, 1, *conv.kernel_size)
    if tuple(weight.shape) != expected or conv.out_channels % conv.in_channels:
        return "inconsistent_shape", {"shape": tuple(weight.shape)}
    return "depthwise", {}


def reason_not_plain(module: nn.Module) -> tuple[str, dict[str, object]] | None:
    """Why a call of ``module`` may do more than its class says: a code and facts; None if plain."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted", {}
    if parametrize.is_parametrized(module):
        return "parametrized", {"names": ", ".join(module.parametrizations)}  # type: ignore[arg-type]
    for hook in module._forward_pre_hooks.values():
        for kind, code in _REPARAMETRIZATIONS:
            if isinstance(hook, kind):
                return code, {}
    # Plain attributes, which are no operands of a graph.
    if any(isinstance(module.__dict__.get(name), torch.Tensor) for name in ("weight", "bias")):
        return "weight_not_parameter", {}
    return _judge_handling(module) or _judge_tensors(*module._parameters.values())


def _judge_handling(module: nn.Module) -> tuple[str, dict[str, object]] | None:
    for attribute, code in HOOKS.items():
        if getattr(module, attribute, None):
            return code, {}
    patched = [name for name in _METHODS if name in module.__dict__]
    if patched:
        return "patched_forward", {"names": ", ".join(patched)}
    return None if module._compiled_call_impl is None else ("compiled_in_place", {})


def _judge_tensors(*parameters: torch.Tensor | None) -> tuple[str, dict[str, object]] | None:
    for tensor in parameters:
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter:
            return "tensor_subclass", {"type": type(tensor).__name__}
        if tensor.layout != torch.strided:
            return "weight_layout", {"layout": tensor.layout}
        if tensor.dtype not in DTYPES:
            return "dtype", {"dtype": dtype_name(tensor.dtype)}
    return None


def _is_quantized_class(cls: type) -> bool:
    return cls.__module__.startswith(
        (
            "torch.ao.nn.quantized",
            "torch.ao.nn.qat",
            "torch.ao.nn.intrinsic.quantized",
            "torch.ao.nn.intrinsic.qat",
        )
    )


def _describe(module: Any, paths: list[str]) -> Layer:
    def sizes(name: str) -> Any:
        return whole(getattr(module, name, None))

    weight = next(_weights(module), None)
    return Layer(
        path=paths[0],
        kind="module",
        decision="kept",
        reason="not_conv2d",
        detail=REASONS["not_conv2d"],
        weight_shape=None if weight is None else tuple(weight.shape),
        kernel_size=sizes("kernel_size"),
        stride=sizes("stride"),
        padding=sizes("padding"),
        dilation=sizes("dilation"),
        groups=sizes("groups"),
        dtype=None if weight is None else dtype_name(weight.dtype),
        aliases=tuple(paths[1:]),
    )


def _weights(module: Any) -> Iterator[torch.Tensor]:
    """The weight without running code: no parametrization, no unpacking of a quantized weight."""
    if parametrize.is_parametrized(module, "weight"):
        originals = module.parametrizations["weight"].named_parameters()
        yield from (parameter for name, parameter in originals if name == "original")
    parameters = dict(module.named_parameters(recurse=False))
    for name in ("weight", "weight_v", "weight_orig"):
        for found in (parameters.get(name), module.__dict__.get(name)):
            if isinstance(found, torch.Tensor) and not is_lazy(found):
                yield found
