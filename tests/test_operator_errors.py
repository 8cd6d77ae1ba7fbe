"""What the operator refuses, and in which words: argument, requirement, value.

Python finds ValueErrors and TypeErrors; what the C++ of the CUDA kernel finds is a RuntimeError.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap import depthwise_conv2d

ERRORS = {
    "cpu": (ValueError, TypeError),
    "meta": (ValueError, TypeError),
    "cuda": (ValueError, TypeError, RuntimeError),
}


def arguments(device: str, **changes: Any) -> dict[str, Any]:
    """A valid call but for ``changes``; tuples are shapes of tensors of ones."""
    given: dict[str, Any] = {"input": (2, 4, 8, 9), "weight": (4, 1, 3, 3), **changes}
    shapes = ("input", "weight", "bias", "input_bias")
    return {
        name: torch.ones(value, device=device) if name in shapes and type(value) is tuple else value
        for name, value in given.items()
    }


REFUSED = {
    # Shapes.
    "2-D": ({"input": (8, 9)}, r"input must be 4-D .*or 3-D .*got shape \[8, 9\]"),
    "5-D": ({"input": (1, 2, 4, 8, 9)}, r"input must be 4-D .*3-D .*\[1, 2, 4, 8, 9\]"),
    "no channels": ({"input": (2, 0, 8, 9)}, r"input must have .*at least 1.*\[2, 0, 8, 9\]"),
    "no height": ({"input": (2, 4, 0, 9)}, r"input must have .*at least 1.*\[2, 4, 0, 9\]"),
    "no width": ({"input": (2, 4, 8, 0)}, r"input must have .*at least 1.*\[2, 4, 8, 0\]"),
    "weight 3-D": ({"weight": (4, 3, 3)}, r"weight must be 4-D .*\[4, 3, 3\]"),
    "channels": ({"weight": (6, 1, 3, 3)}, r"weight\.shape\[0\] .*multiple of .*4 .*got 6"),
    "no outputs": ({"weight": (0, 1, 3, 3)}, r"weight\.shape\[0\] .*multiple of .*4 .*got 0"),
    "dense": ({"weight": (4, 4, 3, 3)}, r"weight must .*one input channel.*\[4, 4, 3, 3\]"),
    "no kernel": ({"weight": (4, 1, 0, 3)}, r"weight must .*at least 1 x 1.*\[4, 1, 0, 3\]"),
    "long bias": ({"bias": (5,)}, r"bias must be 1-D of length 4, got shape \[5\]"),
    "2-D bias": ({"bias": (4, 1)}, r"bias must be 1-D of length 4, got shape \[4, 1\]"),
    "input_bias": ({"input_bias": (3,)}, r"input_bias must be 1-D of length 4, got shape \[3\]"),
    "2-D input_bias": ({"input_bias": (1, 4)}, r"input_bias must be 1-D .*got shape \[1, 4\]"),
    "kernel too large": (
        {"weight": (4, 1, 3, 12), "padding": 1},
        r"kernel must fit .*along the width .*12 elements .*padded input has 11",
    ),
    "dilated kernel too large": (
        {"dilation": (5, 1)},
        r"kernel must fit .*along the height .*11 elements \(dilation 5\).*padded input has 8",
    ),
    # Geometry.
    "stride 0": ({"stride": 0}, r"stride must be at least 1, got .0, 0."),
    "stride -1": ({"stride": (1, -1)}, r"stride must be at least 1, got .1, -1."),
    "padding -1": ({"padding": (-1, 0)}, r"padding must be at least 0, got .-1, 0."),
    "dilation 0": ({"dilation": 0}, r"dilation must be at least 1, got .0, 0."),
    "stride of three": ({"stride": (1, 1, 1)}, r"stride must be .*pair.*got .*1, 1, 1"),
    "stride of none": ({"stride": ()}, r"stride must be .*pair.*got"),
    "padding of three": ({"padding": [1, 1, 1]}, r"padding must be .*pair.*got .*1, 1, 1"),
    "dilation of three": ({"dilation": (1, 1, 1)}, r"dilation must be .*pair.*got .*1, 1, 1"),
    "float stride": ({"stride": 1.5}, r"stride must be .*int.*got 1\.5"),
    "bool padding": ({"padding": True}, r"padding must be .*int.*got True"),
    "None": ({"dilation": None}, r"dilation must be .*int.*got None"),
    "padding by name": ({"padding": "foo"}, r"padding must be .*\"same\" or \"valid\", got 'foo'"),
    "same with stride": (
        {"padding": "same", "stride": 2},
        r"padding=\"same\" needs stride 1, got stride \(2, 2\)",
    ),
    "uneven same with input_bias": (
        {"padding": "same", "weight": (4, 1, 2, 3), "input_bias": (4,)},
        r"padding=\"same\" needs an asymmetric border .*cannot be combined",
    ),
    "uneven same with input_activation": (
        {"padding": "same", "weight": (4, 1, 2, 3), "input_activation": "relu"},
        r"padding=\"same\" needs an asymmetric border .*cannot be combined",
    ),
    "groups by name": ({"groups": "4"}, r"groups must be an integer or None, got '4'"),
    "groups": ({"groups": 2}, r"groups = 2 channels, got shape \[2, 4, 8, 9\]"),
    # Names.
    "activation": (
        {"activation": "tanh"},
        r"activation must be one of none, relu, .*sigmoid, got 'tanh'",
    ),
    "input_activation": (
        {"input_activation": "RELU"},
        r"input_activation must be one of none, relu, .*, got 'RELU'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(device, changes, message):
    given = arguments(device, **changes)
    with pytest.raises(ERRORS[device], match=message):
        depthwise_conv2d(**given)
    with pytest.raises(ERRORS["meta"], match=message):
        depthwise_conv2d(**arguments("meta", **changes))


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_gradients(device, changes, message):
    given = arguments(device, **changes)
    for value in given.values():
        if isinstance(value, Tensor):
            value.requires_grad_()
    with pytest.raises(ERRORS[device], match=message):
        depthwise_conv2d(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": [0, 1]}, "stride must be at least 1"),
        ({"padding": [0, -1]}, "padding must be at least 0"),
        ({"dilation": [0, 1]}, "dilation must be at least 1"),
        ({"stride": [1, 1, 1]}, "stride must be .*pair"),
    ],
)
def test_the_operator_itself_refuses(device, changes, message):
    """Where no Python function stands in front: an exported program, say."""
    given = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **changes}
    with pytest.raises(ERRORS[device], match=message):
        torch.ops.dwswap.depthwise_conv2d(
            torch.ones(1, 2, 5, 5, device=device),
            torch.ones(2, 1, 3, 3, device=device),
            None,
            **given,
        )


@pytest.mark.parametrize("name", ["weight", "bias", "input_bias"])
def test_mixed_dtypes(device, name):
    given = arguments(device, bias=(4,), input_bias=(4,))
    given[name] = given[name].half()
    message = rf"{name} must have the input's dtype .*([Ff]loat).*, got .*(Half|float16)"
    with pytest.raises(ERRORS[device], match=message):
        depthwise_conv2d(**given)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "input_bias"])
@pytest.mark.parametrize("other", ["cpu", "meta", "cuda"])
def test_mixed_devices(device, name, other):
    """aten accepts a meta input with a CPU weight silently; a wrong device must not pass."""
    if other == device:
        pytest.skip("the same device")
    if other == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    given = arguments(device, bias=(4,), input_bias=(4,))
    given[name] = given[name].to(other)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"must be on the .*device"):
        depthwise_conv2d(**given)


KINDS = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "sparse_csr": lambda tensor: tensor[0, 0].to_sparse_csr(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8),
    "mkldnn": lambda tensor: tensor.to_mkldnn(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1]]),
    "jagged": lambda tensor: torch.nested.nested_tensor(
        [tensor[0], tensor[1]], layout=torch.jagged
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_tensors_that_are_not_dense(kind, name):
    given = arguments("cpu", bias=(4, 2, 2, 2) if name == "bias" else None)
    given[name] = KINDS[kind](given[name])
    message = {
        # PyTorch's dispatcher itself turns these away, where it is asked.
        "nested": rf"{name} must be a dense strided tensor|Could not run 'dwswap::.*Nested",
        "jagged": r"dwswap\.depthwise_conv2d|dwswap::depthwise_conv2d",
    }.get(kind, f"{name} must be a dense strided tensor, got")
    with pytest.raises((TypeError, NotImplementedError), match=message):
        depthwise_conv2d(**given)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_aten_refuses(device, dtype):
    given = {name: value.to(dtype) for name, value in arguments(device).items()}
    with pytest.raises((NotImplementedError, RuntimeError)) as theirs:
        F.conv2d(**given, groups=4)
    with pytest.raises((NotImplementedError, RuntimeError)) as ours:
        depthwise_conv2d(**given)
    if device == "cpu":
        assert str(ours.value) == str(theirs.value)
    else:
        assert str(dtype).rpartition(".")[2].lower()[:6] in str(ours.value).lower()


@pytest.mark.parametrize("padding", [1 << 31, 1 << 40])
def test_padding_beyond_32_bits(device, padding):
    """Too large to compute, whatever the machine: no crash, no wrap-around to something small."""
    with pytest.raises((ValueError, RuntimeError), match=r"fewer than 2\^60 elements|below 2\^40"):
        depthwise_conv2d(**arguments(device, padding=padding))


def test_padding_beyond_32_bits_with_few_outputs(device):
    """Where stride makes the output small again, offsets past 2^31 still have to be right."""
    padding, stride = 1 << 31, (1 << 31) + 4
    ours = depthwise_conv2d(
        torch.ones(1, 1, 9, 9, device=device),
        torch.ones(1, 1, 1, 1, device=device),
        None,
        stride,
        padding,
    )
    # Rows and columns 0, 2^31 + 4, 2^32 + 8 of the padded image; the second is row 4 of the input.
    assert ours.tolist() == [[[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]]


@pytest.mark.parametrize(("position", "name"), [(0, "input"), (1, "weight")])
def test_what_is_no_tensor_is_named(position, name):
    arguments = [torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3)]
    arguments[position] = None
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
        depthwise_conv2d(*arguments, padding="same")
