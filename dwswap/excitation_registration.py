"""Every kernel of ``squeeze_excitation`` that is not CUDA C++.

| dispatch key              | kernel                                                           |
| ------------------------- | ---------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library     |
| CompositeExplicitAutograd | aten; on CUDA tensors it first loads the library and calls again |
| Meta (fake tensors)       | shape and layout                                                 |
| Autograd                  | aten where something is differentiated, it has the derivatives   |
| AutogradCUDA              | ``csrc/autograd/``: below it, or to Autograd what is recorded    |
| Autocast                  | aten's rules for each of the steps                               |
| FuncTorchBatched (vmap)   | the batch folded into N; a call each where weights are batched   |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dwswap import build
from dwswap.activations import ACTIVATIONS
from dwswap.checks import (
    check_choice,
    check_dense,
    check_extents,
    check_rank,
    check_same,
    check_vector,
    raise_typed,
    value_check,
)
from dwswap.layouts import empty_image, laid_out, memory_format
from dwswap.plain import differentiated_elsewhere, needs_gradient
from dwswap.schema import library, squeeze_excitation
from dwswap.transforms import cast

__all__ = ["apply", "decomposed"]

NAME = "dwswap.squeeze_excitation"
NAMES = ("input", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias")


def _check_arguments(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
) -> None:
    """Refuse what the operator cannot compute, in words that name argument, rule and value.

    Raises:
        TypeError: layouts, dtypes that differ.
        ValueError: everything else.
    """
    tensors = (input, reduce_weight, reduce_bias, expand_weight, expand_bias)
    check_dense(*tensors, op=NAME, names=NAMES)
    check_rank(input, NAME)
    check_extents(input, NAME)
    channels = input.shape[-3]
    for name, weight in (("reduce_weight", reduce_weight), ("expand_weight", expand_weight)):
        _check_matrix(name, weight)
    hidden = reduce_weight.shape[0]
    value_check(
        reduce_weight.shape[1] == channels,
        lambda: (
            f"{NAME}: reduce_weight.shape[1] must be the input's {channels} channels, "
            f"got {reduce_weight.shape[1]}"
        ),
    )
    value_check(
        expand_weight.shape[0] == channels and expand_weight.shape[1] == hidden,
        lambda: (
            f"{NAME}: expand_weight must be ({channels}, {hidden}), "
            f"got shape {list(expand_weight.shape)}"
        ),
    )
    check_vector("reduce_bias", reduce_bias, hidden, NAME)
    check_vector("expand_bias", expand_bias, channels, NAME)
    for name, tensor in zip(NAMES, tensors, strict=True):
        if tensor is not None:
            check_same(name, tensor, input, NAME)
    check_choice("activation", activation, NAME)
    check_choice("gate", gate, NAME)


def _check_matrix(name: str, weight: Tensor) -> None:
    shape = weight.shape
    value_check(
        (len(shape) == 2 or (len(shape) == 4 and shape[2] == 1 and shape[3] == 1))
        and shape[0] > 0
        and shape[1] > 0,
        lambda: (
            f"{NAME}: {name} must be (K, C) or (K, C, 1, 1) with K and C of at least 1, "
            f"got shape {list(shape)}"
        ),
    )


# --- forward on every device ------------------------------------------------------------------


def _scale(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
) -> Tensor:
    """The gates: ``(N, C, 1, 1)``."""
    pooled = torch.ops.aten.adaptive_avg_pool2d(input, [1, 1])
    hidden = torch.conv2d(pooled, _kernel(reduce_weight), reduce_bias)
    hidden = ACTIVATIONS[activation].forward(hidden)
    return ACTIVATIONS[gate].forward(torch.conv2d(hidden, _kernel(expand_weight), expand_bias))


def _kernel(weight: Tensor) -> Tensor:
    return weight[:, :, None, None] if weight.dim() == 2 else weight


def decomposed(input: Tensor, *args: Any) -> Tensor:
    """The operator made of aten's: what it means, on every device and in every trace."""
    _check_arguments(input, *args)
    return laid_out(input * _scale(input, *args), _layout(input))


def _layout(input: Tensor) -> torch.memory_format:
    """That of an image without a batch is the one that it has as a batch of one."""
    return memory_format(input.unsqueeze(0) if input.dim() == 3 else input)


def _forward_aten(input: Tensor, *args: Any) -> Tensor:
    _check_arguments(input, *args)
    return torch.mul(
        input, _scale(input, *args), out=empty_image(input.shape, input, _layout(input))
    )


def _forward(input: Tensor, *args: Any) -> Tensor:
    if input.is_cuda and build.load():
        # Dense tensors have a CUDA kernel from now on; others would come back here for ever.
        check_dense(input, *args[:4], op=NAME, names=NAMES)
        return squeeze_excitation(input, *args)
    return _forward_aten(input, *args)


def _forward_fake(input: Tensor, *args: Any) -> Tensor:
    _check_arguments(input, *args)
    return empty_image(input.shape, input, _layout(input))


# --- autograd, autocast, vmap -----------------------------------------------------------------


def _below_autograd(*args: Any) -> Tensor:
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return squeeze_excitation(*args)
    except RuntimeError as error:
        raise_typed(error)


def _forward_autograd(*args: Any) -> Tensor:
    if differentiated_elsewhere() or needs_gradient(*args[:5]):
        return decomposed(*args)
    return _below_autograd(*args)


def apply(plain: bool, *args: Any) -> Tensor:
    """Call the operator; a plain call without a gradient past its dispatch keys.

    Args:
        plain: what ``is_plain`` says of the tensors.
        args: all seven of the operator, in its order.
    """
    if plain and not needs_gradient(*args[:5]):
        return _below_autograd(*args)
    return squeeze_excitation(*args)


def _autocast_kernel(device_type: str, key: str) -> Callable[..., Tensor]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward_autocast(input: Tensor, *args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        *tensors, activation, gate = args
        tensors = [cast(tensor, device_type, dtype) for tensor in tensors]
        if input.dtype == dtype and all(t is None or t.dtype == dtype for t in tensors):
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return squeeze_excitation(input, *tensors, activation, gate)
        # The product has another dtype than the gates, or aten has words for what is mixed.
        return laid_out(input * _scale(input, *args), _layout(input))

    return forward_autocast


def _forward_vmap(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, *args: Any
) -> tuple[Tensor, int]:
    """The mapped dimension goes into N; where weights have one, there is a call for each."""
    *tensors, activation, gate = args
    size, dims = info.batch_size, in_dims[:5]
    if all(dim is None for dim in dims[1:]):
        assert dims[0] is not None
        mapped = input.movedim(dims[0], 0)
        images = mapped if mapped.dim() == 4 else mapped.flatten(0, 1)
        return squeeze_excitation(images, *args).reshape(mapped.shape), 0
    outputs = []
    for i in range(size):
        given = [
            tensor if dim is None or tensor is None else tensor.select(dim, i)
            for tensor, dim in zip((input, *tensors), dims, strict=True)
        ]
        outputs.append(squeeze_excitation(*given, activation, gate))
    return torch.stack(outputs), 0


# --- registration -----------------------------------------------------------------------------

library.impl("squeeze_excitation", _forward, "CompositeExplicitAutograd")
library.impl("_squeeze_excitation_aten", _forward_aten, "CompositeExplicitAutograd")
torch.library.register_fake("dwswap::squeeze_excitation", _forward_fake, lib=library)
torch.library.register_fake("dwswap::_squeeze_excitation_aten", _forward_fake, lib=library)
library.impl("squeeze_excitation", _forward_autograd, "Autograd")
for _device_type, _key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
    library.impl("squeeze_excitation", _autocast_kernel(_device_type, _key), _key)
torch.library.register_vmap("dwswap::squeeze_excitation", _forward_vmap, lib=library)
