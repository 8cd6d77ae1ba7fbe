"""Squeeze-and-excitation in training: its two ends are operators, and the results the same."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from norm_models import Calls, at, pickled, same, step, trains_as
from numerics import Judge
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.activations import PAIRS
from dwswap.channel_scale import GATES, excite, squeeze, takes_gates

misc = pytest.importorskip("torchvision.ops.misc")
scaling = importlib.import_module("dwswap.channel_scale")

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
PATH = "1"


def excited(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(depthwise(), block, nn.Conv2d(8, 8, 1)).train()


def torchvisions(gate: Any = nn.Sigmoid, activation: Any = nn.SiLU) -> nn.Sequential:
    torch.manual_seed(0)
    return excited(misc.SqueezeExcitation(8, 4, activation=activation, scale_activation=gate))


def efficient(**options: Any) -> nn.Sequential:
    module = pytest.importorskip("timm.models._efficientnet_blocks")
    torch.manual_seed(0)
    return excited(module.SqueezeExcite(8, rd_channels=4, **options))


def timms(name: str, **options: Any) -> nn.Sequential:
    module = pytest.importorskip("timm.layers.squeeze_excite")
    torch.manual_seed(0)
    return excited(getattr(module, name)(8, **options))


def timms_sigmoid() -> Any:
    return pytest.importorskip("timm.layers.activations").Sigmoid


MODELS: dict[str, tuple[Callable[[], nn.Sequential], str]] = {
    "torchvision": (torchvisions, "sigmoid"),
    "torchvision, hardsigmoid": (
        lambda: torchvisions(nn.Hardsigmoid, lambda: nn.ReLU(inplace=True)),
        "hardsigmoid",
    ),
    "torchvision, no gate": (lambda: torchvisions(nn.Identity), "none"),
    "efficientnet": (efficient, "sigmoid"),
    "efficientnet, sigmoid of timm": (lambda: efficient(gate_layer=timms_sigmoid()), "sigmoid"),
    "efficientnet, hard": (lambda: efficient(gate_layer="hard_sigmoid"), "hardsigmoid"),
    "se": (lambda: timms("SEModule", rd_channels=4), "sigmoid"),
    "se, norm": (lambda: timms("SEModule", rd_channels=4, norm_layer=nn.BatchNorm2d), "sigmoid"),
    "effective": (lambda: timms("EffectiveSEModule"), "hardsigmoid"),
}
EACH_MODEL = pytest.mark.parametrize("kind", MODELS)


@LAYOUTS
@EACH_MODEL
def test_a_model_trains_as_before(
    kind: str, layout: torch.memory_format, excitation_calls: Calls
) -> None:
    build, gate = MODELS[kind]
    model = build().to(memory_format=layout)
    fast = dwswap.optimize(model)
    assert type(at(fast, PATH)).__module__ == "dwswap.excitation_modules"
    assert isinstance(at(fast, PATH), type(at(model, PATH)))
    assert list(fast.state_dict()) == list(model.state_dict())
    for seed in range(3):
        x = image(8, batch=2 + seed).contiguous(memory_format=layout)
        trains_as(fast, model, x)
    assert excitation_calls == [gate] * 3


@EACH_MODEL
def test_without_a_kernel_it_computes_what_it_did(kind: str) -> None:
    model = MODELS[kind][0]()
    fast = dwswap.optimize(model)
    for ours, theirs in zip(step(fast, image(8)), step(model, image(8)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inplace", [True, False])
@EACH_MODEL
def test_copies_files_and_the_way_back(kind: str, inplace: bool, excitation_calls: Calls) -> None:
    build, gate = MODELS[kind]
    model = build()
    original = copy.deepcopy(model)
    fast = dwswap.optimize(model, inplace=inplace)
    assert (fast is model) == inplace
    for copied in (copy.deepcopy(fast), pickled(fast), dwswap.optimize(fast)):
        trains_as(copied, copy.deepcopy(original))
    assert excitation_calls == [gate] * 3
    restored = dwswap.restore(fast)
    assert [type(m) for m in restored.modules()] == [type(m) for m in original.modules()]
    for module, before in zip(restored.modules(), original.modules(), strict=True):
        assert module.__dict__.keys() == before.__dict__.keys()
    trains_as(restored, original)
    assert excitation_calls == [gate] * 3


@EACH_MODEL
def test_the_argument_has_the_name_that_it_had(kind: str, excitation_calls: Calls) -> None:
    model = MODELS[kind][0]()
    ours, theirs = (at(of, PATH) for of in (dwswap.optimize(model), model))
    (name,) = inspect.signature(theirs.forward).parameters
    assert [*inspect.signature(ours.forward).parameters] == [name]
    same(ours(**{name: image(8)}), theirs(**{name: image(8)}))
    assert len(excitation_calls) == 1


def test_the_report() -> None:
    model = torchvisions()
    for report in (dwswap.explain(model), dwswap.report(dwswap.optimize(model))):
        (change,) = report.elsewhere[PATH]
        assert (change.kind, change.done, change.name) == ("excitation", True, "sigmoid")
        assert str(change) == "runs a kernel of dwswap in training on CUDA"
        assert "the pooling and the scaling of 1 squeeze-and-excitations" in str(report)
    assert type(at(model, PATH)) is misc.SqueezeExcitation


class Derived(misc.SqueezeExcitation):  # type: ignore[misc]
    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, 2 * super().forward(input))


def hooked(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda _module, _args, output: 2 * output)


KEPT: dict[str, Callable[[nn.Sequential], object]] = {
    "a subclass": lambda m: m.__setitem__(1, Derived(8, 4)),
    "another gate": lambda m: setattr(m[1], "scale_activation", nn.Tanh()),
    "hooks": hooked,
    "a forward of its own": lambda m: setattr(m[1], "forward", lambda x: 2 * x),
    "another pooling": lambda m: setattr(m[1], "avgpool", nn.AdaptiveMaxPool2d(1)),
    "in a list": lambda m: setattr(m, "all", [m[1]]),
    "eval mode": lambda m: m[1].eval(),
    "jit": lambda m: m.__setitem__(1, torch.jit.script(m[1])),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KEPT)
def test_what_stays_as_it_is(kind: str, excitation_calls: Calls) -> None:
    model = torchvisions()
    KEPT[kind](model)
    fast = dwswap.optimize(model)
    assert type(at(fast, PATH)).__module__ != "dwswap.excitation_modules"
    fast(image(8))
    assert excitation_calls == []


def test_a_class_whose_forward_is_another_one(
    monkeypatch: pytest.MonkeyPatch, excitation_calls: Calls
) -> None:
    monkeypatch.setattr(misc.SqueezeExcitation, "forward", lambda self, x: self.fc2(self.fc1(x)))
    model = torchvisions()
    trains_as(dwswap.optimize(model), model)
    assert excitation_calls == []


def test_a_max_of_timm_stays(excitation_calls: Calls) -> None:
    model = timms("SEModule", rd_channels=4)
    at(model, PATH).add_maxpool = True
    fast = dwswap.optimize(model)
    assert type(at(fast, PATH)) is type(at(model, PATH))
    trains_as(fast, model)
    assert excitation_calls == []


# --- changed afterwards --------------------------------------------------------------------------


def doubled(_module: Any, _args: Any, output: Tensor) -> Tensor:
    return 2 * output


def half(block: Any) -> None:
    block.fc2.register_forward_hook(lambda _module, _args, output: output.bfloat16())


def patched(path: str, **attributes: Any) -> Callable[[Any], object]:
    return lambda block: at(block, path).__dict__.update(attributes)


def replaced(**modules: nn.Module) -> Callable[[Any], object]:
    return lambda block: [block.add_module(*named) for named in modules.items()]


def one_gate() -> nn.Conv2d:
    """For all channels."""
    return nn.Conv2d(4, 1, 1).requires_grad_(False)


def detached(_module: Any, _args: Any, output: Tensor) -> Tensor:
    return output.detach()


LATER: dict[str, tuple[Callable[[Any], object], Calls]] = {
    "a hook on it": (lambda b: b.register_forward_hook(doubled), ["sigmoid"]),
    "hooks on a layer": (lambda b: b.fc1.register_forward_hook(doubled), ["sigmoid"]),
    "hooks on the pooling": (lambda b: b.avgpool.register_forward_hook(doubled), []),
    "hooks on the gate": (lambda b: b.scale_activation.register_forward_hook(doubled), []),
    "a patched gate": (patched("scale_activation", forward=torch.tanh), []),
    "another gate": (lambda b: replaced(scale_activation=nn.Tanh())(b), []),
    "another known gate": (replaced(scale_activation=nn.Hardsigmoid()), ["hardsigmoid"]),
    "another pooling": (replaced(avgpool=nn.AdaptiveMaxPool2d(1)), []),
    "one pixel": (patched("avgpool", output_size=(1, 1)), ["sigmoid"]),
    "several pixels": (lambda b: setattr(b.avgpool, "output_size", 9), []),
    "a method": (patched("", _scale=lambda x: x.mean((2, 3), keepdim=True)), []),
    "other layers": (replaced(fc1=nn.Identity(), fc2=nn.Tanh()), ["sigmoid"]),
    "one gate": (lambda b: replaced(fc2=one_gate())(b), []),
    "narrower gates": (half, ["sigmoid"]),
    "eval mode": (lambda b: b.eval(), []),
    "frozen": (lambda b: b.requires_grad_(False), ["sigmoid"]),
    "a frozen layer": (lambda b: b.fc1.requires_grad_(False), ["sigmoid"]),
    "detached": (lambda b: b.fc2.register_forward_hook(detached), ["sigmoid"]),
}


@LAYOUTS
@pytest.mark.parametrize("kind", LATER)
def test_changed_afterwards(
    kind: str, layout: torch.memory_format, excitation_calls: Calls
) -> None:
    change, expected = LATER[kind]
    model = torchvisions().to(memory_format=layout)
    fast = dwswap.optimize(model)
    for of in (fast, model):
        torch.manual_seed(1)
        change(at(of, PATH))
    x = image(8).contiguous(memory_format=layout)
    same(step(fast, x), step(model, x), 1e-2 if kind == "narrower gates" else 1e-5)
    assert excitation_calls == expected


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_what_needs_gradients(learns: bool, needs_gradient: bool, excitation_calls: Calls) -> None:
    model = nn.Sequential(torchvisions()[1], depthwise()).train()
    model.requires_grad_(learns)
    fast = dwswap.optimize(model)
    same(step(fast, image(8), needs_gradient), step(model, image(8), needs_gradient))
    assert excitation_calls == ["sigmoid"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, excitation_calls: Calls) -> None:
    model = torchvisions()
    fast = dwswap.optimize(model)
    with mode():
        same(fast(image(8)), model(image(8)))
    assert excitation_calls == ["sigmoid"]


INPUTS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(0, 8, 9, 9),
    "not dense": lambda: image(8, size=18)[:, :, ::2, ::2],
    "expanded": lambda: image(8, batch=1).expand(4, -1, -1, -1),
    "float64": lambda: image(8).double(),
    "one image": lambda: image(8)[0],
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_are_left_to_the_base_class(kind: str, excitation_calls: Calls) -> None:
    x = INPUTS[kind]()
    model = nn.Sequential(torchvisions()[1], depthwise()).train().to(x.dtype)
    ours, theirs = step(dwswap.optimize(model), x), step(model, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert excitation_calls == []


# --- the operators -------------------------------------------------------------------------------


def scaled(x: Tensor, first: Tensor, second: Tensor, gate: str) -> Tensor:
    """Squeeze-and-excitation of two linear layers."""
    squeezed = squeeze(x, gate)
    gates = (squeezed.means.flatten(1) @ first).tanh() @ second
    return excite(squeezed, gates[..., None, None], gate)


@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("learned", [(True,) * 3, (True, False, False), (False, True, True)])
@LAYOUTS
def test_the_formulas(gate: str, learned: tuple[bool, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(3)
    shapes = ((2, 3, 2, 3), (3, 2), (2, 3))
    x, *weights = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    tensors = (x.contiguous(memory_format=layout), *weights)
    leaves = [t.requires_grad_(needed) for t, needed in zip(tensors, learned, strict=True)]
    assert torch.autograd.gradcheck(lambda *of: scaled(*of, gate), leaves)
    assert torch.autograd.gradgradcheck(lambda *of: scaled(*of, gate), leaves)


@pytest.mark.parametrize("gate", sorted(GATES))
@LAYOUTS
def test_an_input_that_is_needed_elsewhere_too(gate: str, layout: torch.memory_format) -> None:
    """Before, behind and beside it; the means, and the gates."""
    torch.manual_seed(3)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64).contiguous(memory_format=layout)

    def call(leaf: Tensor) -> Tensor:
        inner = leaf.sin()
        squeezed = squeeze(inner, gate)
        gates = squeezed.means.tanh() * inner.amax((2, 3), keepdim=True)
        output = excite(squeezed, gates, gate)
        return output * leaf + inner + squeezed.means.exp() + gates

    assert torch.autograd.gradcheck(call, x.requires_grad_())
    assert torch.autograd.gradgradcheck(call, x)


def test_the_means_alone() -> None:
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: squeeze(t, "sigmoid").means, x)
    assert torch.autograd.gradgradcheck(lambda t: squeeze(t, "sigmoid").means.sin(), x)


def test_gradients_of_one_tensor_alone() -> None:
    torch.manual_seed(0)
    x, first, second = leaves = [
        torch.randn(shape, requires_grad=True) for shape in ((2, 3, 4, 4), (3, 2), (2, 3))
    ]
    output = scaled(x, first, second, "sigmoid")
    means = x.mean((2, 3))
    expected = x * torch.sigmoid((means @ first).tanh() @ second)[..., None, None]
    grad = torch.randn_like(x)
    for leaf in leaves:
        (ours,), (theirs,) = (
            torch.autograd.grad(of, leaf, grad, retain_graph=True) for of in (output, expected)
        )
        same(ours, theirs)


def test_an_input_that_changes_before_the_backward_is_an_error() -> None:
    leaf = image(3).requires_grad_()
    x = leaf * 2
    squeezed = squeeze(x, "sigmoid")
    output = excite(squeezed, squeezed.means, "sigmoid")
    output.detach().add_(1)  # which nobody needs
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_input_that_no_gradient_needs_may_change() -> None:
    """Gates that have none do not need it either."""
    leaf = image(3).requires_grad_()
    x = leaf * 2
    squeezed = squeeze(x, "sigmoid")
    gates = squeezed.means.detach()
    output = excite(squeezed, gates, "sigmoid")
    x.add_(1)
    output.sum().backward()
    same(leaf.grad, torch.full_like(leaf, 2) * gates.sigmoid())


def test_a_gradient_of_the_means_alone_is_dense() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image(3).contiguous(memory_format=layout).requires_grad_()
        (grad,) = torch.autograd.grad(squeeze(x, "sigmoid").means.sum(), x)
        same(grad.add_(1), torch.full_like(grad, 1 + 1 / 81))


def test_the_image_is_saved_once() -> None:
    x, seen = image(3).requires_grad_(), []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.data_ptr())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        squeezed = squeeze(x, "sigmoid")
        gates = squeezed.means * 2
        output = excite(squeezed, gates, "sigmoid")
    assert seen == [x.data_ptr(), gates.data_ptr()]
    output.sum().backward()
    other = image(3).requires_grad_()
    (other * torch.sigmoid(2 * other.mean((2, 3), keepdim=True))).sum().backward()
    same(x.grad, other.grad)


class Subclass(Tensor):
    pass


def test_gates_that_are_not_taken() -> None:
    squeezed = squeeze(image(3), "sigmoid")
    gates = squeezed.means
    assert takes_gates(squeezed, gates)
    assert takes_gates(squeezed, gates.half())
    assert takes_gates(squeezed, gates.contiguous(memory_format=torch.channels_last))
    for other in (
        gates.double(),
        gates[:, :1],
        gates.flatten(1),
        gates.to("meta"),
        gates[:1].expand_as(gates),
        gates.as_subclass(Subclass),
        None,
    ):
        assert not takes_gates(squeezed, cast(Tensor, other))
    narrow = squeeze(image(3).half(), "sigmoid")
    assert not takes_gates(narrow, gates)
    assert not takes_gates(narrow, gates.bfloat16())


def test_the_numbers_of_the_gates() -> None:
    for gate in GATES:
        x, z = image(3), torch.randn(2, 3)
        exact = {"none": z, "sigmoid": z.sigmoid(), "hardsigmoid": (z / 6 + 0.5).clamp(0, 1)}[gate]
        ours = torch.ops.dwswap._channel_scale(x, z, z, PAIRS["none", gate])
        same(ours, x * exact[..., None, None] + z[..., None, None] / 81)


# --- whole models --------------------------------------------------------------------------------


def models() -> dict[str, Callable[[], nn.Module]]:
    from torchvision import models as theirs

    def of_timm(name: str) -> nn.Module:
        return cast(nn.Module, pytest.importorskip("timm").create_model(name, num_classes=8))

    return {
        "efficientnet_b0": lambda: theirs.efficientnet_b0(num_classes=8, stochastic_depth_prob=0.0),
        "mobilenet_v3_small": lambda: theirs.mobilenet_v3_small(num_classes=8),
        "timm efficientnet_b0": lambda: of_timm("efficientnet_b0"),
        "timm mobilenetv3_small_050": lambda: of_timm("mobilenetv3_small_050"),
        "timm ese_vovnet19b_dw": lambda: of_timm("ese_vovnet19b_dw"),
    }


COUNTS = {
    "efficientnet_b0": (16, "sigmoid"),
    "mobilenet_v3_small": (9, "hardsigmoid"),
    "timm efficientnet_b0": (16, "sigmoid"),
    "timm mobilenetv3_small_050": (9, "hardsigmoid"),
    "timm ese_vovnet19b_dw": (4, "hardsigmoid"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_whole_models(name: str, norm_calls: Calls, excitation_calls: Calls) -> None:
    """Against float64: all gradients together, as two largest errors are compared."""
    torch.manual_seed(0)
    model = models()[name]().train().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fast = dwswap.optimize(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    x = image(3, size=64, batch=4)
    judge, found = Judge(), []
    for of in (fast, model, copy.deepcopy(model).double()):
        output = of(x.to(next(of.parameters()).dtype))
        output.square().mean().backward()
        found.append({n: cast(Tensor, p.grad) for n, p in of.named_parameters()} | {"": output})
    assert excitation_calls == [COUNTS[name][1]] * COUNTS[name][0]
    assert norm_calls
    for key in found[0]:
        ours, theirs, exact = (of[key] for of in found)
        scale = exact.abs().max()  # those of layers differ by orders of magnitude
        if scale > 1e-6:  # else it is 0 but for rounding, as in front of BatchNorm
            judge.add("outputs and gradients", ours / scale, theirs / scale, exact / scale)
    judge.check()
    model.eval(), fast.eval()
    same(fast(x), model(x), 1e-3)
    assert len(excitation_calls) == COUNTS[name][0]
