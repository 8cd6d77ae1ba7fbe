"""The host's share of a call: what makes it short, and what must stay as it was nevertheless."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dwswap
from dwswap import DepthwiseConv2d, depthwise_conv2d, registration
from dwswap.activations import ACTIVATIONS
from dwswap.cli import main
from dwswap.inference_graph import InferenceGraph
from dwswap.plain import is_plain


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(depthwise())
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner[0].weight
        return torch.conv2d(self.inner(x), weight, padding=1, groups=8) + self.shift


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(depthwise(), nn.ELU()), Functional()).eval()


# --- the code of graphs --------------------------------------------------------------------------


def test_graphs_find_modules_without_getattr():
    model = nested()
    fast = dwswap.optimize(model)
    assert isinstance(fast, InferenceGraph)
    assert 'self._modules["0"]._modules["1"](' in fast.code
    assert 'self._modules["1"]._modules["inner"]._modules["0"].weight' in fast.code
    assert "getattr" not in fast.code
    x = image(8)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)


def test_what_replaces_a_module_or_a_parameter_is_found():
    fast = dwswap.optimize(nested())
    x = image(8)
    before = fast(x)
    fast.get_submodule("0").add_module("1", nn.Tanh())
    after = fast(x)
    assert not torch.equal(before, after)
    inner = fast.get_submodule("1.inner.0")
    inner.weight = nn.Parameter(torch.zeros_like(inner.weight))
    assert not torch.equal(after, fast(x))
    # Where a parametrization or a replica of DataParallel has its parameters.
    weight = inner.weight.detach()
    del inner.weight
    inner.weight = weight
    assert fast(x).shape == before.shape


def test_a_transformer_of_the_user_runs_first_and_once():
    fast = dwswap.optimize(nested())
    seen = []

    def transformer(body):
        seen.append("getattr(" in "".join(body))
        return body

    with fast.graph.on_generate_code(lambda _: transformer):
        fast.recompile()
    assert seen == [True]
    assert "getattr" not in fast.code
    fast.recompile()
    assert seen == [True]


@pytest.mark.filterwarnings("ignore")
def test_shortened_graphs_compile_and_trace():
    fast = dwswap.optimize(nested())
    x = image(8)
    expected = fast(x)
    for other in (
        torch.compile(fast, fullgraph=True, backend="eager"),
        torch.export.export(fast, (x,)).module(),
        fx.symbolic_trace(fast),
        fx.Transformer(fast).transform(),
    ):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)


# --- plain calls ---------------------------------------------------------------------------------


def python_calls(call: Callable[[], object]) -> int:
    """Python functions that ``call`` calls."""
    events: list[str] = []
    call()
    sys.setprofile(lambda frame, event, _: events.append(event))
    try:
        call()
    finally:
        sys.setprofile(None)
    return events.count("call")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_plain_call_is_short(device, mode, monkeypatch):
    """Up to the kernel: Python functions are what the time of a call goes into."""
    conv = depthwise().to(device)
    ours = DepthwiseConv2d.from_conv2d(conv)
    x = image(8).to(device)
    monkeypatch.setattr(registration, "_at_once", lambda *_: x)
    with mode():
        theirs = python_calls(lambda: conv(x))
        assert python_calls(lambda: ours(x)) <= theirs + 11


def test_a_plain_call_on_cuda_is_one_operator(device):
    if device == "cpu":
        pytest.skip("needs a CUDA GPU: elsewhere aten computes")
    ours, x = DepthwiseConv2d.from_conv2d(depthwise().to(device)), image(8).to(device)
    with torch.no_grad():
        ours(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ours(x)
    names = {event.key for event in profile.key_averages() if event.key.startswith("dwswap::")}
    assert names == {"dwswap::_depthwise_conv2d_direct"}


def test_a_plain_call_that_is_recorded_on_cuda_is_one_node(device):
    if device == "cpu":
        pytest.skip("needs a CUDA GPU: elsewhere the node is Python")
    ours, x = DepthwiseConv2d.from_conv2d(depthwise().to(device)), image(8).to(device)
    ours(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(x)
    names = {event.key for event in profile.key_averages() if event.key.startswith("dwswap::")}
    assert names == {"dwswap::_depthwise_conv2d_recorded", "dwswap::_depthwise_conv2d_direct"}


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Ignorant(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_what_is_plain(device):
    x, conv = image(8).to(device), depthwise().to(device)
    given = (x, conv.weight, conv.bias, None)
    for mode in (nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert is_plain(*given)
    for mode in (
        Seen,
        Ignorant,
        forward_ad.dual_level,
        lambda: torch.autocast(device, torch.bfloat16),
    ):
        with mode():
            assert not is_plain(*given)
    for other in (x.as_subclass(Subclass), None, 3):
        assert not is_plain(other, *given[1:])
        assert not is_plain(x, other, conv.bias, None)
    assert not is_plain(x, conv.weight, x.as_subclass(Subclass), None)
    inside = []

    def function(x: Tensor) -> Tensor:
        inside.append(is_plain(x, *given[1:]))
        return x.sin()

    torch.func.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    make_fx(function)(x)
    make_fx(function, tracing_mode="fake")(x)
    torch.export.export(Wrapped(function), (x,), strict=False)
    torch.compile(function, backend="eager")(x)
    assert len(inside) == 6
    assert not any(inside)


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("grad", [False, True])
def test_modes_and_traces_see_the_public_operator(device, grad):
    ours, x = DepthwiseConv2d.from_conv2d(depthwise().to(device)), image(8).to(device)
    with torch.set_grad_enabled(grad):
        with Seen() as seen:
            ours(x)
        assert "dwswap::depthwise_conv2d" in seen.names
        assert "dwswap::_depthwise_conv2d_direct" not in seen.names
        targets = {str(node.target) for node in make_fx(ours)(x).graph.nodes}
        assert "dwswap.depthwise_conv2d.default" in targets


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", [1, "same"])
def test_jit_traces_see_the_public_operator(device, padding):
    ours, x = DepthwiseConv2d(8, 8, 3, padding=padding).to(device), image(8).to(device)
    with torch.no_grad():
        traced = torch.jit.trace(ours, x)
        assert "dwswap::depthwise_conv2d" in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), ours(x))


def test_the_direct_operator_computes_the_same(device):
    x, weight = image(6).to(device), torch.randn(12, 1, 3, 2, device=device)
    bias, input_bias = torch.randn(12, device=device), torch.randn(6, device=device)
    direct = torch.ops.dwswap._depthwise_conv2d_direct.default
    for (i, before), (j, after) in itertools.product(enumerate(ACTIVATIONS), repeat=2):
        result = direct(x, weight, bias, 2, 1, 0, 1, 1, 2, input_bias, 16 * i + j)
        expected = torch.ops.dwswap.depthwise_conv2d(
            x, weight, bias, (2, 1), (0, 1), (1, 2), input_bias, before, after
        )
        assert torch.equal(result, expected), (before, after)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_plain_and_other_calls_agree(device, requires_grad):
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape, device=device, dtype=torch.float64, requires_grad=requires_grad)
        for shape in ((2, 6, 9, 8), (12, 1, 3, 3), (12,), (6,))
    ]
    results = []
    for mode in (nullcontext(), Ignorant(), Seen()):
        with mode:
            x, weight, bias, input_bias = leaves
            output = depthwise_conv2d(
                x,
                weight,
                bias,
                2,
                (1, 0),
                input_bias=input_bias,
                input_activation="silu",
                activation="relu6",
            )
            assert output.requires_grad == requires_grad
            grads = torch.autograd.grad(output.square().sum(), leaves) if requires_grad else ()
            results.append([output, *grads])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


# --- autocast ------------------------------------------------------------------------------------


def draw(device: str, **dtypes: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (2, 6, 9, 8), "weight": (12, 1, 3, 3), "bias": (12,), "input_bias": (6,)}
    return [
        torch.randn(shape, generator=generator)
        .to(device, dtypes.get(name, torch.float32))
        .requires_grad_()
        for name, shape in shapes.items()
    ]


def results_under_autocast(
    mode: Any, leaves: list[Tensor], device: str, dtype: torch.dtype, absorbed: dict[str, Any]
) -> list[Tensor]:
    """Output, gradients and second derivatives of a call; ``mode`` decides which way it takes."""
    x, weight, bias, input_bias = leaves
    if absorbed:
        absorbed = {"input_bias": input_bias, **absorbed}
    else:
        leaves = leaves[:3]
    with mode, torch.autocast(device, dtype):
        output = depthwise_conv2d(x, weight, bias, 2, (1, 0), **absorbed)
    # Means, as sums leave the range of float16.
    grads = torch.autograd.grad(output.float().square().mean(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().mean() for g in grads), leaves)
    return [output, *grads, *second]


@pytest.mark.parametrize("absorbed", [{}, {"input_activation": "silu", "activation": "gelu"}])
@pytest.mark.parametrize("given", [{}, {"input": torch.bfloat16}, {"bias": torch.float16}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_calls_under_autocast_give_what_the_registered_way_gives(
    device, dtype, given, absorbed
):
    ours = results_under_autocast(nullcontext(), draw(device, **given), device, dtype, absorbed)
    theirs = results_under_autocast(Ignorant(), draw(device, **given), device, dtype, absorbed)
    assert ours[0].dtype == dtype
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_training_under_autocast_goes_past_the_dispatch_keys(device, monkeypatch):
    def dispatched(*args: Any) -> Tensor:
        raise AssertionError("through the dispatcher")

    ours, x = DepthwiseConv2d.from_conv2d(depthwise().to(device)), image(8).to(device)
    if device == "cuda":
        ours(x)  # loads the kernels
    monkeypatch.setattr(registration, "depthwise_conv2d", dispatched)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), torch.autocast(device, torch.bfloat16):
            output = ours(x)
        assert output.dtype == torch.bfloat16
    with torch.autocast(device, torch.bfloat16):
        ours(x).sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_autocast_that_is_off_or_for_another_device_casts_nothing(device):
    leaves = draw(device)
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    enabled = torch.is_autocast_enabled(other)
    torch.set_autocast_enabled(other, True)
    try:
        assert depthwise_conv2d(*leaves[:3]).dtype == torch.float32
    finally:
        torch.set_autocast_enabled(other, enabled)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert depthwise_conv2d(*leaves[:3]).dtype == torch.float32


def test_autocast_leaves_float64_and_says_what_is_mixed(device):
    x, weight, bias, _ = draw(device, input=torch.float64)
    with torch.autocast(device, torch.bfloat16):
        assert depthwise_conv2d(x, weight.double(), bias.double()).dtype == torch.float64
        with pytest.raises((TypeError, RuntimeError), match="must have the input's dtype"):
            depthwise_conv2d(x, weight, bias)


# --- parameters of modules -----------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        lambda m: parametrize.register_parametrization(m, "bias", Doubled()),
        nn.utils.weight_norm,
        lambda m: m.register_parameter("bias", None),
    ],
)
def test_parameters_that_are_kept_elsewhere(device, change):
    conv = depthwise().to(device)
    ours, x = DepthwiseConv2d.from_conv2d(conv), image(8).to(device)
    before = ours(x)
    for module in (conv, ours):
        change(module)
    torch.testing.assert_close(ours(x), conv(x))
    if change is not nn.utils.weight_norm:
        assert not torch.equal(ours(x), before)


def test_functional_call_replaces_parameters(device):
    ours, x = DepthwiseConv2d.from_conv2d(depthwise().to(device)), image(8).to(device)
    zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    assert not torch.func.functional_call(ours, zeros, (x,)).any()
    assert ours(x).any()


def test_bench_overhead(device, capsys):
    assert main(["bench", "overhead", "--device", device, "--rounds", "1"]) == 0
    output = capsys.readouterr().out
    assert output.count("inference_mode") == output.count("no_grad") == (2, 4)[device == "cuda"]
    assert output.count("training") == 2


def test_bench_overhead_refuses_no_rounds(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "overhead", "--device", "cpu", "--rounds", "0"])
    assert exit.value.code == 2
    assert "--rounds: must be an integer of at least 1, got '0'" in capsys.readouterr().err
