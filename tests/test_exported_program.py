"""``optimize`` of a ``torch.export.ExportedProgram``: the graph, the signature, the tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_torchvision import DEPTHWISE, build_with_data
from tiny_models import Block, InvertedResidual, Unfusable, depthwise, image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

import dwswap

OPERATOR = torch.ops.dwswap.depthwise_conv2d.default
DIALECTS = [
    pytest.param(lambda program: program, id="training"),
    pytest.param(lambda program: program.run_decompositions(), id="aten"),
]
Dialect = Callable[[ExportedProgram], ExportedProgram]


def targets(program: ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def check(fast: ExportedProgram, model: nn.Module, *inputs: Any) -> None:
    """``fast`` is valid and computes what ``model`` does, with the same strides."""
    fast.validate()
    with torch.no_grad():
        ours, theirs = fast.module()(*inputs), model(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.stride() == theirs.stride()
    for node in fast.graph.nodes:
        assert "val" in node.meta or node.op in ("get_attr", "output")
    specs = fast.graph_signature.input_specs
    tensors = {**fast.state_dict, **fast.constants}
    assert {spec.target for spec in specs if spec.target is not None} <= tensors.keys()


# --- what is rewritten --------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_all_passes_run(dialect: Dialect) -> None:
    model, x = InvertedResidual().eval(), image()
    fast = dwswap.optimize(dialect(export(model, (x,))))

    assert targets(fast).count(OPERATOR) == 1
    assert len(targets(fast)) == 4  # three convolutions and the sum
    (call,) = (node for node in fast.graph.nodes if node.target is OPERATOR)
    assert call.kwargs["activation"] == call.kwargs["input_activation"] == "relu6"
    assert call.kwargs["input_bias"].op == "placeholder"
    check(fast, model, x)
    report = dwswap.report(fast)
    assert report.mode == "graph"
    assert report.model == "InvertedResidual"
    assert report.summary() == dwswap.report(fast.module()).summary()


def test_the_result_is_that_of_the_module() -> None:
    program = export(InvertedResidual().eval(), (image(),))
    fast, module = dwswap.optimize(program), dwswap.optimize(program.module())
    assert fast.state_dict.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(fast.state_dict[name], tensor)
    ours, theirs = dwswap.report(fast), dwswap.report(module)
    assert [layer.reason for layer in ours.layers] == [layer.reason for layer in theirs.layers]
    assert [len(layer.changes) for layer in ours.layers] == [
        len(layer.changes) for layer in theirs.layers
    ]
    assert (ours.calls_before, ours.calls_after) == (9, 4)
    assert dwswap.explain(program).to_dict()["layers"] == ours.to_dict()["layers"]


class Convolution(nn.Module):
    def __init__(self, call: Callable[..., Tensor], kernel: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 1, *kernel))
        self.bias = nn.Parameter(torch.randn(16))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, (3, 3)),
        ({"stride": (2, 1), "padding": (0, 2), "dilation": 2}, (3, 3)),
        ({"padding": "same"}, (3, 5)),
        ({"padding": "same"}, (2, 4)),
        ({"padding": "valid", "stride": 2}, (2, 2)),
    ],
)
def test_every_form_of_the_convolution(
    dialect: Dialect, options: dict[str, Any], kernel: tuple[int, int]
) -> None:
    model = Convolution(lambda x, w, b: F.conv2d(x, w, b, groups=8, **options), kernel)
    x = image(8)
    fast = dwswap.optimize(dialect(export(model, (x,))))
    assert OPERATOR in targets(fast)
    check(fast, model, x)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(8, 8, 3),
        nn.ConvTranspose2d(8, 8, 3, groups=8),
    ],
)
def test_other_convolutions_stay(dialect: Dialect, convolution: nn.Module) -> None:
    model = nn.Sequential(convolution, nn.BatchNorm2d(8)).eval()
    program = dialect(export(model, (image(8),)))
    fast = dwswap.optimize(program)
    assert targets(fast) == targets(program)
    assert dwswap.report(fast).mode == "unchanged"
    assert fast.state_dict.keys() == program.state_dict.keys()
    check(fast, model, image(8))


class Rest(nn.Module):
    """Every other layer that a pass makes a functional call of."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8))
        self.depthwise = nn.Sequential(depthwise(8), nn.BatchNorm2d(8), nn.Hardswish())
        self.project = nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.line = nn.Sequential(nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6))
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.project(self.depthwise(self.up(x))))
        return self.head(self.line(x.flatten(2)).mean(2))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_layers_beside_the_depthwise_one_are_folded_too(dialect: Dialect) -> None:
    model, x = Rest(), image()
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    model.eval()
    program = dialect(export(model, (x,)))
    fast = dwswap.optimize(program, x, verify=True)
    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed, str(report)
    assert not any("norm" in str(target) for target in targets(fast))
    linear = "addmm" if "addmm" in str(program.graph) else "linear"
    assert sum(linear in str(target) for target in targets(fast)) == 1
    check(fast, model, x)


class Product(nn.Module):
    """What is a linear layer only in its first form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.depthwise, self.norm = depthwise(8), nn.BatchNorm1d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x).mean((2, 3))
        forms = {
            "linear": lambda: torch.addmm(self.bias, x, self.weight.t()),
            "no bias": lambda: torch.mm(x, self.weight.t()),
            "a matrix is added": lambda: torch.addmm(self.matrix, x, self.weight.t()),
            "scaled": lambda: torch.addmm(self.bias, x, self.weight.t(), alpha=2),
            "not transposed": lambda: torch.addmm(self.bias, x, self.weight),
            "computed": lambda: torch.mm(x, (self.weight * 2).t()),
        }
        return self.norm(forms[self.form]())


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("form", "folds"),
    [
        ("linear", True),
        ("no bias", True),
        ("a matrix is added", False),
        ("scaled", False),
        ("not transposed", False),
        ("computed", False),
    ],
)
def test_products_that_are_linear_layers(form: str, folds: bool, dialect: Dialect) -> None:
    model, x = Product(form).eval(), image(8)
    nn.init.uniform_(model.norm.running_mean, -1, 1)
    fast = dwswap.optimize(dialect(export(model, (x,))), memory_format="channels_last")
    assert any("norm" in str(target) for target in targets(fast)) != folds
    assert dwswap.report(fast).memory_format.startswith("channels_last")
    check(fast, model, x)


def test_a_residual_sum_in_place_carries_biases() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
            self.depthwise = depthwise(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            y = self.layers[1](x)
            y += x
            return self.depthwise(y)

    model, x = Residual().eval(), image(8)
    program = export(model, (x,))
    assert torch.ops.aten.add_.Tensor in targets(program)
    fast = dwswap.optimize(program)
    check(fast, model, x)
    pushed = [c for layer in dwswap.report(fast).layers for c in layer.changes]
    assert [c.reason for c in pushed if c.kind == "bias"] == ["pushed", "pushed"]


def test_a_sum_in_place_that_is_read_elsewhere_stays() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.depthwise = nn.Conv2d(8, 8, 1), depthwise(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = y.add_(x)
            return self.depthwise(z) + torch.tanh(y)

    model, x = Residual().eval(), image(8)
    fast = dwswap.optimize(export(model, (x,)))
    check(fast, model, x)


# --- dynamic shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("strict", "memory_format"),
    [
        *((False, "preserve"), (False, "channels_last"), (True, "preserve")),
        pytest.param(True, "channels_last", marks=pytest.mark.slow),
    ],
)
def test_dynamic_shapes_stay(dialect: Dialect, strict: bool, memory_format: Any) -> None:
    model, x = InvertedResidual().eval(), image(size=12)
    height = Dim("height", min=4, max=64)
    shapes = ({0: Dim("batch", min=1, max=16), 2: height, 3: 2 * Dim("half", min=2, max=32)},)
    program = dialect(export(model, (x,), dynamic_shapes=shapes, strict=strict))
    fast = dwswap.optimize(program, memory_format=memory_format)

    assert fast.range_constraints == program.range_constraints
    for batch, h, w in ((1, 4, 4), (5, 9, 20), (16, 33, 64)):
        check(fast, model, torch.randn(batch, 3, h, w))
    for bad in (torch.randn(17, 3, 8, 8), torch.randn(2, 3, 65, 8), torch.randn(2, 4, 8, 8)):
        for module in (program.module(), fast.module()):
            with pytest.raises((RuntimeError, AssertionError), match=r"x\.size"):
                module(bad)


# --- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_the_program_stays_as_it_is(inplace: bool) -> None:
    program = export(Unfusable().eval(), (image(),))
    before = str(program), {k: (id(v), v.clone()) for k, v in program.state_dict.items()}
    metadata = [dict(node.meta) for node in program.graph.nodes]
    fast = dwswap.optimize(program, inplace=inplace)

    assert str(program) == before[0]
    assert [node.meta for node in program.graph.nodes] == metadata
    for name, (identity, value) in before[1].items():
        assert id(program.state_dict[name]) == identity
        assert torch.equal(program.state_dict[name], value)
    for name, tensor in fast.state_dict.items():
        assert (tensor.data_ptr() == program.state_dict[name].data_ptr()) is inplace
    with pytest.raises(ValueError, match="must come from"):
        dwswap.report(program)


class Tensors(nn.Module):
    """Tied, unused, non-persistent, constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = depthwise(8, bias=False), depthwise(8, bias=False)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("offset", torch.randn(8, 1, 1), persistent=False)
        self.register_buffer("gain", torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).abs() * self.gain) + self.offset
        return x + torch.tensor([2.0])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_kind_of_tensor_stays(dialect: Dialect) -> None:
    model, x = Tensors().eval(), image(8)
    program = dialect(export(model, (x,)))
    fast = dwswap.optimize(program)
    check(fast, model, x)
    assert targets(fast).count(OPERATOR) == 2
    assert list(fast.state_dict) == list(program.state_dict)
    assert fast.constants.keys() == program.constants.keys()
    assert fast.state_dict["first.weight"] is fast.state_dict["second.weight"]
    specs = fast.graph_signature.input_specs
    assert [(s.kind, s.target, s.persistent) for s in specs] == [
        (s.kind, s.target, s.persistent) for s in program.graph_signature.input_specs
    ]


def test_folded_weights_are_parameters_of_the_signature() -> None:
    program = export(Block().eval(), (image(),))
    fast = dwswap.optimize(program)
    specs = {spec.target: spec.kind for spec in fast.graph_signature.input_specs}
    assert specs["depthwise_folded.weight"] is InputKind.PARAMETER
    assert specs["depthwise_folded.bias"] is InputKind.PARAMETER
    assert "depthwise.weight" not in specs
    assert "norm.running_mean" not in fast.state_dict
    assert isinstance(fast.state_dict["depthwise_folded.weight"], nn.Parameter)
    assert fast.state_dict.keys() == specs.keys() - {None}


class Keyed(nn.Module):
    """Paths that are no identifiers, and that would be the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"a-1": Block(), "a_1": Block()})

    def forward(self, x: Tensor) -> Tensor:
        return self.stages["a-1"](x) + self.stages["a_1"](x)


@torch.no_grad()
def test_folded_weights_of_paths_that_are_no_identifiers() -> None:
    model = Keyed().eval()
    fast = dwswap.optimize(torch.export.export(model, (image(),)))
    torch.testing.assert_close(fast.module()(image()), model(image()))


class Counting(nn.Module):
    """Changes a buffer in every call; ``inside`` says which."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.block, self.inside = Block(), inside
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.inside:
            self.block.norm.running_mean += 0.5
        return self.block(x) + self.calls


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_buffer_that_changes(dialect: Dialect, inside: bool) -> None:
    model, x = Counting(inside).eval(), image()
    program = dialect(export(model, (x,)))
    fast = dwswap.optimize(program)
    assert OPERATOR in targets(fast)
    kept = "block.norm.running_mean" in fast.state_dict
    assert kept is inside
    mutated = program.graph_signature.buffers_to_mutate
    assert set(fast.graph_signature.buffers_to_mutate.values()) == set(mutated.values())
    ours, theirs = fast.module(), program.module()
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(ours.calls, torch.tensor(3.0))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_input_that_changes(dialect: Dialect) -> None:
    class Changing(Block):
        def forward(self, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
            result = super().forward(x)
            count.add_(1)
            return result, count * 2

    model, x = Changing().eval(), image()
    program = dialect(export(model, (x, torch.zeros(2))))
    fast = dwswap.optimize(program)
    for module in (fast.module(), program.module()):
        count = torch.zeros(2)
        result, doubled = module(x, count)
        assert torch.equal(count, torch.ones(2))
        assert torch.equal(doubled, 2 * count)
    torch.testing.assert_close(result, fast.module()(x, torch.zeros(2))[0])
    signature = fast.graph_signature.user_inputs_to_mutate
    assert list(signature.values()) == list(program.graph_signature.user_inputs_to_mutate.values())


# --- train mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_program_in_train_mode_is_swapped_only(dialect: Dialect) -> None:
    torch.manual_seed(0)
    x = image()
    program = dialect(export(InvertedResidual().train(), (x,)))
    fast = dwswap.optimize(program)
    assert targets(fast).count(OPERATOR) == 1
    assert len(targets(fast)) == len(targets(program))
    assert list(fast.state_dict) == list(program.state_dict)
    assert all(not layer.changes for layer in dwswap.report(fast).layers)

    ours, theirs = fast.module(), program.module()
    torch.testing.assert_close(ours(x), theirs(x))
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name))
    assert int(ours.get_buffer("conv.0.1.num_batches_tracked")) == 1
    if program.verifier.dialect != "TRAINING":
        return  # PyTorch itself cannot differentiate the writes into the buffers
    for module in (ours, theirs):
        module(x).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4)


def test_fuse_false_swaps_only() -> None:
    program = export(InvertedResidual().eval(), (image(),))
    fast = dwswap.optimize(program, fuse=False)
    assert targets(fast).count(OPERATOR) == 1
    assert len(targets(fast)) == len(targets(program))
    assert list(fast.state_dict) == list(program.state_dict)


# --- inputs and outputs -------------------------------------------------------------------------


class Structured(Block):
    def forward(self, x: Tensor, scale: float, *, more: dict[str, Tensor]) -> dict[str, Any]:  # type: ignore[override]
        y = super().forward(x) * scale
        return {"y": [y, y + more["b"]], "same": y, "size": x.shape[0], "none": None, "x": x}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_structures_of_inputs_and_outputs_stay(dialect: Dialect) -> None:
    model, x = Structured().eval(), image()
    more = {"a": torch.zeros(1), "b": torch.ones(1)}
    batch = Dim("batch", min=1, max=16)
    shapes = {"x": {0: batch}, "scale": None, "more": {"a": {}, "b": {}}}
    program = dialect(export(model, (x, 0.5), {"more": more}, dynamic_shapes=shapes))
    fast = dwswap.optimize(program)
    for x in (image(batch=1), image(batch=5)):
        ours, theirs = fast.module()(x, 0.5, more=more), model(x, 0.5, more=more)
        torch.testing.assert_close(ours, theirs)
        assert ours["x"] is x
    assert fast.call_spec == program.call_spec


def test_example_inputs_and_verify() -> None:
    class Keywords(Block):
        def forward(self, x: Tensor, *, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + a - b

    model, x = Keywords().eval(), image()
    a, b = torch.ones(1), torch.rand(1)
    program = export(model, (x,), {"a": a, "b": b})

    with pytest.raises(ValueError, match="example_inputs must be as the program's own"):
        dwswap.optimize(program, (x, a, b))
    with pytest.raises(ValueError, match="example_inputs must be as the program's own"):
        dwswap.optimize(program, x)
    program = export(Block().eval(), (x,))
    fast = dwswap.optimize(program, x, verify=True)
    verification = dwswap.report(fast).verification
    assert verification is not None
    assert verification.passed
    assert not verification.notes
    assert dwswap.report(fast).swapped[0].input_shape == (2, 8, 9, 9)


def test_verify_puts_back_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from dwswap import registration

    right = registration._at_once

    def wrong(*args: Any) -> Tensor:
        return right(*args) * 1.001

    program, x = export(InvertedResidual().eval(), (image(),)), image()
    monkeypatch.setattr(registration, "_at_once", wrong)
    fast = dwswap.optimize(program, x, verify=True)
    monkeypatch.undo()
    assert OPERATOR not in targets(fast)
    assert not dwswap.report(fast).swapped
    check(fast, program.module(), x)


def test_control_flow_stays() -> None:
    class Branch(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.cond(y.sum() > 1e6, torch.sin, lambda value: value * 2, (y,))

    model, x = Branch().eval(), image()
    program = export(model, (x,))
    fast = dwswap.optimize(program)
    assert OPERATOR in targets(fast)
    check(fast, model, x)


# --- refusals -----------------------------------------------------------------------------------


def test_refusals() -> None:
    x = image()
    program = export(Block().eval(), (x,))
    with pytest.raises(ValueError, match="cuda_graph must be False for an ExportedProgram"):
        dwswap.optimize(program, cuda_graph=True)
    with pytest.raises(ValueError, match="verify=True needs example_inputs"):
        dwswap.optimize(program, verify=True)
    with pytest.raises(TypeError, match="example_inputs must be a tensor"):
        dwswap.optimize(program, [x])
    kept = export(Block().eval(), (x,), preserve_module_call_signature=("depthwise",))
    with pytest.raises(ValueError, match=r"preserve_module_call_signature.*depthwise"):
        dwswap.optimize(kept)


def test_skip() -> None:
    program = export(InvertedResidual().eval(), (image(),))
    asked: list[str] = []

    def skip(module: nn.Module, path: str) -> bool:
        asked.append(path)
        return True

    fast = dwswap.optimize(program, skip=skip)
    assert OPERATOR not in targets(fast)
    assert set(asked) == {"conv.1.0"}


def test_a_second_optimize_changes_nothing() -> None:
    model, x = InvertedResidual().eval(), image()
    once = dwswap.optimize(export(model, (x,)))
    twice = dwswap.optimize(once)
    assert targets(twice) == targets(once)
    check(twice, model, x)


# --- whole models -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_mobilenet_v3(dialect: Dialect) -> None:
    """With squeeze-and-excitation, and with the sums that a GPU would have in the products."""
    model = build_with_data("mobilenet_v3_small")
    shapes = ({0: Dim("batch", min=1, max=16)},)
    program = dialect(export(model, (torch.rand(2, 3, 64, 64),), dynamic_shapes=shapes))
    fast = dwswap.optimize(program, memory_format="channels_last")
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast.module()(x), model(x), rtol=1e-4, atol=1e-4)
    assert targets(fast).count(OPERATOR) == DEPTHWISE["mobilenet_v3_small"]
    excitations = targets(fast).count(torch.ops.dwswap.squeeze_excitation.default)
    assert excitations == (9 if "adaptive_avg_pool2d" in str(program.graph) else 0)
