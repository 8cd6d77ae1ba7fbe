"""BatchNorm in eval mode: what is folded, and what must stay."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_traps import TaggedTensor
from tiny_models import Functional, depthwise, image
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize

import dwswap
from dwswap import depthwise_conv2d
from dwswap.changes import Change
from dwswap.verify import compare

Make = Callable[[], nn.Module]


def norm(channels: int = 8, kind: type[_BatchNorm] = nn.BatchNorm2d, **options: Any) -> Any:
    """A BatchNorm that does something."""
    made = kind(channels, **options)
    for tensor in (made.weight, made.bias, made.running_mean):
        if tensor is not None:
            nn.init.uniform_(tensor, -2, 2)
    if made.running_var is not None:
        nn.init.uniform_(made.running_var, 0.3, 3)
    return made


class Before(nn.Sequential):
    """``layers``, with a depthwise layer in front: without one, a model stays as it is."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(depthwise(), nn.MaxPool2d(1), *layers)


def optimized(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """The result, in double precision checked to be the same function as ``model``."""
    model = model.eval()
    before = copy.deepcopy(model.state_dict())
    fast = dwswap.optimize(model, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        exact, own, other = wide(x.double()), fast(x), model(x)
    assert own.dtype == other.dtype
    assert own.shape == other.shape
    error, usual = ((y - exact).abs().max() for y in (own, other))
    eps = torch.finfo(own.dtype).eps
    assert error <= 2 * usual + 8 * eps * exact.abs().max(), (error, usual)
    return fast


def norms(fast: fx.GraphModule) -> int:
    return sum(
        "batch_norm" in str(node.target)
        or (
            node.op == "call_module"
            and isinstance(fast.get_submodule(str(node.target)), _BatchNorm)
        )
        for node in fast.graph.nodes
    )


def changes(fast: nn.Module, kind: str = "batchnorm") -> list[Change]:
    report = dwswap.report(fast)
    found = [c for layer in report.layers for c in layer.changes]
    found += [c for more in report.elsewhere.values() for c in more]
    return [change for change in found if change.kind == kind]


def reasons(fast: nn.Module) -> list[str]:
    return [change.reason for change in changes(fast)]


FOLDED: dict[str, Make] = {
    "depthwise": lambda: nn.Sequential(depthwise(), norm()),
    "depthwise without bias": lambda: nn.Sequential(depthwise(bias=False), norm()),
    "multiplier 2": lambda: nn.Sequential(depthwise(multiplier=2), norm(16)),
    "strided, dilated": lambda: nn.Sequential(depthwise(stride=2, dilation=2), norm()),
    "same": lambda: nn.Sequential(depthwise(padding="same"), norm()),
    "operator module": lambda: nn.Sequential(dwswap.DepthwiseConv2d(8, 8, 3), norm()),
    "dense": lambda: Before(nn.Conv2d(8, 5, 3, bias=False), norm(5)),
    "pointwise": lambda: Before(nn.Conv2d(8, 5, 1), norm(5)),
    "grouped": lambda: Before(nn.Conv2d(8, 12, 3, groups=4), norm(12)),
    "transposed": lambda: Before(nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), norm(6)),
    "transposed, grouped": lambda: Before(
        nn.ConvTranspose2d(8, 12, 3, groups=4, bias=False), norm(12)
    ),
    "transposed, depthwise": lambda: Before(nn.ConvTranspose2d(8, 16, 2, groups=8), norm(16)),
    "twice": lambda: nn.Sequential(depthwise(), norm(), norm()),
    "no affine": lambda: nn.Sequential(depthwise(), norm(affine=False)),
    "eps and momentum": lambda: nn.Sequential(depthwise(), norm(eps=0.3, momentum=None)),
    "linear": lambda: Before(nn.Flatten(), nn.Linear(8 * 49, 6), norm(6, nn.BatchNorm1d)),
    "linear chain": lambda: Before(
        nn.Flatten(),
        nn.Linear(8 * 49, 6, bias=False),
        norm(6, nn.BatchNorm1d),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(6, 4),
        norm(4, nn.BatchNorm1d),
    ),
    "three dimensions": lambda: Before(
        nn.Unflatten(0, (-1, 1)), Move(), nn.Conv3d(8, 4, (1, 3, 3)), norm(4, nn.BatchNorm3d)
    ),
}


class Move(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = FOLDED[name]().to(dtype)
    x = image(8, size=7).to(dtype)
    expected = sum(isinstance(m, _BatchNorm) for m in model.modules())
    fast = optimized(model, x)
    assert norms(fast) == 0
    assert reasons(fast) == ["folded"] * expected
    assert not any(isinstance(m, _BatchNorm) for m in fast.modules())
    assert all(value.dtype == dtype for value in fast.state_dict().values())
    for again in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        dwswap.optimize(fast),
        torch.compile(fast, fullgraph=True, backend="eager"),
    ):
        torch.testing.assert_close(again(x), fast(x), rtol=0, atol=0)
        assert list(again.state_dict()) == list(fast.state_dict()) or not isinstance(
            again, fx.GraphModule
        )


def test_parameters_before_the_norm_are_gone_and_named_anew() -> None:
    model = nn.Sequential(depthwise(bias=False), norm(), nn.Conv2d(8, 3, 1)).eval()
    fast = dwswap.optimize(model)
    keys = ["2.weight", "2.bias", "0_folded.weight", "0_folded.bias"]
    assert list(fast.state_dict()) == keys
    assert fast.get_parameter("2.weight") is not model[2].weight
    (first, _) = dwswap.report(fast).layers
    assert first.path == "0"
    assert [str(change) for change in first.changes] == ["folded 1"]
    assert first.swapped
    report = dwswap.report(fast).to_dict()
    assert report["layers"][0]["changes"][0]["subject"] == "1"
    assert (report["calls_before"], report["calls_after"]) == (3, 2)


def test_weights_updated_in_place_take_effect() -> None:
    model = nn.Sequential(depthwise(), norm()).eval()
    fast = dwswap.optimize(model)
    x = image(8)
    before = fast(x)
    with torch.no_grad():
        fast.get_parameter("0_folded.bias").add_(1)
    torch.testing.assert_close(fast(x), before + 1)


class Norm(nn.Module):
    """A convolution and F.batch_norm; ``call`` says how."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.call = depthwise(), call
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.gain, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv(x), self.mean, self.var, self.gain, self.shift)


NORM_CALLS: dict[str, Callable[..., Tensor]] = {
    "positional": lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, False, 0.1, 1e-3),
    "keywords": lambda x, m, v, w, b: F.batch_norm(
        input=x, running_var=v, running_mean=m, bias=b, weight=w
    ),
    "no affine": lambda x, m, v, w, b: F.batch_norm(x, m, v),
    "torch": lambda x, m, v, w, b: torch.batch_norm(x, w, b, m, v, False, 0.1, 1e-5, False),
    "aten": lambda x, m, v, w, b: torch.ops.aten.batch_norm.default(
        x, w, b, m, v, False, 0.1, 1e-5, False
    ),
}


@pytest.mark.parametrize("name", NORM_CALLS)
def test_folded_call(name: str) -> None:
    model, x = Norm(NORM_CALLS[name]), image(8)
    fast = optimized(model, x, example_inputs=x)
    assert reasons(fast) == ["folded"]
    left = [] if name != "no affine" else ["gain", "shift"]
    assert list(fast.state_dict()) == [*left, "conv_folded.weight", "conv_folded.bias"]
    # Nothing told that the input is a batch of images: for others dimension 1 is another one.
    assert reasons(optimized(model, x)) == ["rank_unknown"]


def test_an_unbatched_image_is_not_normalized_by_rows() -> None:
    """F.batch_norm takes dimension 1 for the channels; here that is the height."""
    model, x = Norm(NORM_CALLS["positional"]), image(8, size=8)[0]
    for example in (None, x):
        assert reasons(optimized(model, x, example_inputs=example)) == ["rank_unknown"]


def test_norm_over_the_sequence_after_linear_stays() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = depthwise(), nn.Linear(8, 8)
            self.norm = norm(8, nn.BatchNorm1d)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(self.conv(x).flatten(2).transpose(1, 2)))

    x = torch.randn(2, 8, 2, 4)
    assert x.flatten(2).shape[1:] == (8, 8)
    for example in (None, x):
        assert reasons(optimized(Sequence(), x, example_inputs=example)) == ["rank_unknown"]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b, c: F.conv2d(x, w, b, padding="same", groups=c),
        lambda x, w, b, c: torch.ops.aten.conv2d.default(x, w, None, [1, 1], [1, 1], [1, 1], c),
        lambda x, w, b, c: depthwise_conv2d(x, w, b, padding=1),
        lambda x, w, b, c: torch.convolution(x, w, b, (1, 1), (1, 1), (1, 1), False, (0, 0), c),
    ],
)
def test_into_a_convolution_call(call: Callable[..., Tensor]) -> None:
    x = image(8)
    # + 1 comes between.
    fast = optimized(nn.Sequential(Functional(call), norm()), x)
    assert reasons(fast) == ["no_convolution"]

    class Direct(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return self.call(x, self.weight, self.bias, self.channels)

    fast = optimized(nn.Sequential(Direct(call), norm()), x)
    assert reasons(fast) == ["folded"]
    assert "0.weight" not in fast.state_dict()


def test_exported_program() -> None:
    x = image(8)
    model = nn.Sequential(depthwise(), norm(), nn.Conv2d(8, 4, 1), norm(4)).eval()
    module = torch.export.export(model, (x,)).module()
    fast = dwswap.optimize(module)
    assert norms(fast) == 0
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    assert dwswap.optimize(module, inplace=True) is module
    assert list(module.state_dict()) == list(fast.state_dict())
    torch.testing.assert_close(module(x), model(x), rtol=0, atol=1e-5)


# --- must stay --------------------------------------------------------------------------------


def _patched(module: Any) -> Any:
    module.forward = type(module).forward.__get__(module)
    return module


def _hooked(module: Any, register: str = "register_forward_hook") -> Any:
    getattr(module, register)(lambda *_: None)
    return module


def _weight_norm(module: Any) -> Any:
    return parametrizations.weight_norm(module)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _parametrized(module: Any, name: str = "weight") -> Any:
    parametrize.register_parametrization(module, name, Halved())
    return module


def _tagged(module: Any) -> Any:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(TaggedTensor))
    return module


def _plain(module: Any) -> Any:
    weight = module.weight.detach() + 1
    del module.weight
    module.weight = weight
    return module


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


KEPT: dict[str, tuple[str, Make]] = {
    "statistics of the batch": (
        "no_statistics",
        lambda: nn.Sequential(depthwise(), norm(track_running_stats=False)),
    ),
    "subclass": ("norm_type", lambda: nn.Sequential(depthwise(), norm(kind=OwnNorm))),
    "norm with a plain tensor": (
        "weight_not_parameter",
        lambda: nn.Sequential(depthwise(), _plain(norm())),
    ),
    "norm with hook": ("forward_hook", lambda: nn.Sequential(depthwise(), _hooked(norm()))),
    "norm with state hook": (
        "state_dict_hook",
        lambda: nn.Sequential(depthwise(), _hooked(norm(), "register_state_dict_pre_hook")),
    ),
    "norm with its own forward": (
        "patched_forward",
        lambda: nn.Sequential(depthwise(), _patched(norm())),
    ),
    "parametrized norm": (
        "parametrized",
        lambda: nn.Sequential(depthwise(), _parametrized(norm())),
    ),
    "convolution with hook": (
        "forward_hook",
        lambda: Before(_hooked(nn.Conv2d(8, 8, 1)), norm()),
    ),
    "convolution with pre-hook": (
        "forward_pre_hook",
        lambda: Before(_hooked(nn.Conv2d(8, 8, 1), "register_forward_pre_hook"), norm()),
    ),
    "convolution with its own forward": (
        "patched_forward",
        lambda: Before(_patched(nn.Conv2d(8, 8, 1)), norm()),
    ),
    "weight_norm": ("parametrized", lambda: Before(_weight_norm(nn.Conv2d(8, 8, 1)), norm())),
    "old weight_norm": (
        "weight_norm",
        lambda: Before(nn.utils.weight_norm(nn.Conv2d(8, 8, 1)), norm()),
    ),
    "reflected": (
        "padding_mode",
        lambda: Before(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), norm()),
    ),
    "tensor subclass": ("tensor_subclass", lambda: Before(_tagged(nn.Conv2d(8, 8, 1)), norm())),
    "no convolution": ("no_convolution", lambda: Before(nn.ReLU(), norm())),
    "another activation first": (
        "activation_before",
        lambda: nn.Sequential(Activated(), norm()),
    ),
}


class Activated(nn.Module):
    """The operator with an activation, then BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise()

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.conv.weight, self.conv.bias, activation="relu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KEPT)
def test_stays(name: str) -> None:
    reason, make = KEPT[name]
    torch.manual_seed(0)
    model, x = make(), image(8)
    model.eval()
    fast = dwswap.optimize(model)
    (change,) = changes(fast)
    assert (change.done, change.reason) == (False, reason)
    assert "{" not in change.detail
    assert norms(fast) == 1 or name in ("subclass",)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert f"({reason}: " in dwswap.report(fast).render(400)


def test_train_mode_stays() -> None:
    """One norm in train mode, and the model is no graph; a call may say so as well."""
    model, x = nn.Sequential(depthwise(), norm()).eval(), image(8)
    model[1].train()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "substitution"
    assert isinstance(fast[1], nn.BatchNorm2d)
    call = Norm(lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, True)).eval()
    fast = dwswap.optimize(call, x)
    assert reasons(fast) == ["train_mode"]
    torch.testing.assert_close(fast(x), call(x), rtol=0, atol=1e-5)


class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = depthwise(), norm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class InPlaceBetween(TwoUsers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.add_(1)
        return self.norm(y)


class Changing(TwoUsers):
    """The forward changes the statistics that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.mean.add_(1)
        return F.batch_norm(y, self.mean, self.var) + self.norm(x)


class ChangingView(Changing):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.mean.view(2, 4).add_(1)
        return F.batch_norm(y, self.mean, self.var) + self.norm(x)


class ComputedWeight(TwoUsers):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.conv.weight * 2, None, 1, 1, 1, 8))


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("other_users", TwoUsers),
        ("other_users", InPlaceBetween),
        ("changed_in_graph", Changing),
        ("changed_in_graph", ChangingView),
        ("computed", ComputedWeight),
    ],
)
def test_graphs_that_stay(reason: str, make: Make) -> None:
    model, x = make().eval(), image(8)
    fast = dwswap.optimize(model, x)
    assert reasons(fast)[0] == reason
    for _ in range(2):
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)


def test_skipped_layers_stay() -> None:
    model = nn.Sequential(depthwise(), norm(), depthwise(), norm()).eval()
    fast = optimized(model, image(8), skip=lambda module, path: path == "2")
    assert [(c.subject, c.reason) for c in changes(fast)] == [("1", "folded"), ("3", "skipped")]
    assert type(fast.get_submodule("2")) is nn.Conv2d


# --- shared modules and tensors ---------------------------------------------------------------


class Shared(nn.Module):
    """``first`` and ``second`` may be one module, and so may the norms."""

    def __init__(self, first: nn.Module, norm: nn.Module, second: nn.Module, other: nn.Module):
        super().__init__()
        self.first, self.norm, self.second, self.other = first, norm, second, other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(torch.sin(self.norm(self.first(x)))))


def test_a_shared_convolution_keeps_its_weights_for_the_other_call() -> None:
    conv = depthwise()
    fast = optimized(Shared(conv, norm(), conv, nn.Identity()), image(8))
    assert reasons(fast) == ["folded"]
    assert {"first.weight", "first_folded.weight"} <= fast.state_dict().keys()
    # Both are calls of their own where each has its norm; the original is not needed any more.
    fast = optimized(Shared(conv, norm(), conv, norm()), image(8))
    assert norms(fast) == 0
    keys = ["first_folded.weight", "first_folded.bias", "first_folded_1.weight"]
    assert list(fast.state_dict()) == [*keys, "first_folded_1.bias"]


def test_a_shared_norm_stays_for_the_other_call() -> None:
    shared = norm()

    class Other(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x).relu())

    fast = optimized(Other(depthwise(), shared, depthwise(), nn.Identity()), image(8))
    assert sorted(reasons(fast)) == ["folded", "no_convolution"]
    assert "norm.running_mean" in fast.state_dict()
    assert norms(fast) == 1


def test_a_block_called_twice_is_folded_once() -> None:
    block = nn.Sequential(depthwise(), norm())
    fast = optimized(nn.Sequential(block, nn.Sigmoid(), block, nn.MaxPool2d(2), block), image(8))
    assert norms(fast) == 0
    assert [name for name, _ in fast.named_parameters()] == ["0.0_folded.weight", "0.0_folded.bias"]
    weights = {n.target for n in fast.graph.nodes if n.op == "get_attr"}
    assert weights == {"0.0_folded.weight", "0.0_folded.bias"}


def test_tied_weights_of_another_layer_stay() -> None:
    model = nn.Sequential(depthwise(), norm(), depthwise(), nn.MaxPool2d(1))
    model[2].weight = model[0].weight
    fast = optimized(model, image(8))
    keys = ["2.weight", "2.bias", "0_folded.weight", "0_folded.bias"]
    assert sorted(fast.state_dict()) == sorted(keys)
    assert torch.equal(fast.get_parameter("2.weight"), model[0].weight)


def test_a_weight_that_is_read_elsewhere_stays() -> None:
    class Read(TwoUsers):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.conv.weight.sum() + self.norm.running_mean.sum()

    fast = optimized(Read(), image(8))
    assert reasons(fast) == ["folded"]
    assert {"conv.weight", "norm.running_mean"} <= fast.state_dict().keys()
    assert norms(fast) == 0


# --- dtypes, devices, layouts -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_norm", [None, torch.float32])
def test_half_precision(dtype: torch.dtype, of_norm: torch.dtype | None) -> None:
    """float64 arithmetic and one rounding, to a value next to the exact one; a float32 norm does
    not make float32 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(depthwise(), norm(), nn.Conv2d(8, 4, 1, bias=False), norm(4)).to(dtype)
    for i in (1, 3):
        model[i].to(of_norm or dtype)
    model.eval()
    fast = dwswap.optimize(model)
    assert norms(fast) == 0
    assert {value.dtype for value in fast.state_dict().values()} == {dtype}
    scale = model[1].weight.double() / (model[1].running_var.double() + 1e-5).sqrt()
    exact = model[0].weight.double() * scale.view(-1, 1, 1, 1)
    folded = fast.get_parameter("0_folded.weight").double()
    assert ((folded - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()
    x = torch.randn(16, 8, 9, 9, dtype=dtype)
    exact = copy.deepcopy(model).double()(x.double())
    assert compare(fast(x), model(x), exact).passed


@pytest.mark.parametrize("value", [1e-12, 1e12])
def test_weights_that_a_dtype_cannot_hold_are_not_folded(value: float) -> None:
    model = nn.Sequential(depthwise(), norm(affine=False)).half().eval()
    model[1].float().running_var.fill_(value**-2)
    model[1].eps = 1e-300
    nn.init.zeros_(model[1].running_mean)
    nn.init.zeros_(model[0].bias)
    fast = dwswap.optimize(model)
    assert reasons(fast) == ["not_representable"]
    x = image(8).half()
    torch.testing.assert_close(fast(x), model(x), equal_nan=True)


def test_other_mixtures_of_dtypes_stay() -> None:
    model = nn.Sequential(depthwise(), norm().double()).eval()
    fast = dwswap.optimize(model)
    assert reasons(fast) == ["dtypes"]
    assert changes(fast)[0].detail == "it is float64, the layer before it float32"


def test_channels_last_and_meta() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), norm(), depthwise(), norm())
    model.eval().to(memory_format=torch.channels_last)
    fast = dwswap.optimize(model)
    assert fast.get_parameter("0_folded.weight").stride() == model[0].weight.stride()
    on_meta = dwswap.optimize(copy.deepcopy(model).to("meta"))
    assert all(value.is_meta for value in on_meta.state_dict().values())
    assert list(on_meta.state_dict()) == list(fast.state_dict())


def test_explain_makes_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from dwswap import rewrite

    seen: list[nn.Module] = []
    fuse = rewrite.fuse_graph
    monkeypatch.setattr(rewrite, "fuse_graph", lambda g, *a: (seen.append(g), fuse(g, *a))[1])
    model = nn.Sequential(depthwise(), norm(), nn.Conv2d(8, 8, 1), norm(), depthwise()).eval()
    report = dwswap.explain(model)
    new = {k: v for k, v in seen[0].state_dict().items() if "_folded" in k}
    assert len(new) == 4
    assert all(value.is_meta for value in new.values())
    assert report == dwswap.report(dwswap.optimize(model))
    assert len([c for layer in report.layers for c in layer.changes]) == 4


# --- options ----------------------------------------------------------------------------------


def test_fuse_false_folds_nothing() -> None:
    model, x = nn.Sequential(depthwise(), norm(), nn.ReLU()).eval(), image(8)
    for source in (model, fx.symbolic_trace(model)):
        fast = optimized(source, x, fuse=False)
        assert list(fast.state_dict()) == list(model.state_dict())
        assert changes(fast) == []
        assert type(dwswap.restore(fast).get_submodule("0")) is nn.Conv2d


@pytest.mark.parametrize("inplace", [True, False])
def test_verify_sees_a_wrong_fold(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    fold = importlib.import_module("dwswap.passes.fold_batchnorm")
    model, x = nn.Sequential(depthwise(), norm(), nn.Conv2d(8, 4, 1)).eval(), image(8)
    fast = dwswap.optimize(model, x, verify=True)
    assert dwswap.report(fast).verification.passed
    assert dwswap.report(fast).layers[0].errors is not None
    right = fold._folded
    monkeypatch.setattr(fold, "_folded", lambda *args: tuple(t * 1.001 for t in right(*args)))
    fast = dwswap.optimize(model, x, verify=True, inplace=inplace)
    report = dwswap.report(fast)
    assert not report.verification.passed
    assert report.mode == "unchanged"
    assert changes(fast) == []
    assert torch.equal(fast(x), model(x))
    assert type(fast) is nn.Sequential


def _frozen(channels: int = 8) -> Any:
    made = pytest.importorskip("torchvision.ops.misc").FrozenBatchNorm2d(channels, eps=1e-3)
    for tensor in (made.weight, made.bias, made.running_mean):
        nn.init.uniform_(tensor, -2, 2)
    nn.init.uniform_(made.running_var, 0.3, 3)
    return made


def test_the_frozen_norm_of_torchvision_is_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(depthwise(), _frozen(), nn.ReLU(), nn.Conv2d(8, 5, 1), _frozen(5)).eval()
    before = copy.deepcopy(model.state_dict())
    x = image(8, size=7)
    fast = dwswap.optimize(model)
    assert reasons(fast) == ["folded"] * 2
    assert not [key for key in fast.state_dict() if "running" in key]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_a_frozen_norm_without_a_convolution_stays() -> None:
    model = nn.Sequential(depthwise(), nn.ReLU(), _frozen()).eval()
    fast = dwswap.optimize(model)
    assert "folded" not in reasons(fast)
    with torch.no_grad():
        assert torch.equal(fast(image(8)), model(image(8)))


def test_a_frozen_norm_stays_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(depthwise(), _frozen(), nn.ReLU()).train()
    fast = dwswap.optimize(model)
    assert set(fast.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(fast(image(8)), model(image(8)))


@torch.no_grad()
def test_a_norm_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = depthwise(), nn.BatchNorm2d(8)
            nn.init.uniform_(self.norm.running_mean, -1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(x))

    model = Named().eval()
    fast = dwswap.optimize(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(fast(image(8)), model(image(8)))
