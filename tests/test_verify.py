"""verify=True: the rule, what it finds, what it puts back."""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Block, ControlFlow, Functional, depthwise, image
from torch import Tensor, fx, nn

import dwswap
from dwswap import DepthwiseConv2d, precision, registration, verify
from dwswap.activations import ACTIVATIONS
from dwswap.bench.random_weights import randomize
from dwswap.precision import exact_float64
from dwswap.report import LayerErrors, Verification
from dwswap.verify import compare


def verified(model: nn.Module, example_inputs: Any, **options: Any) -> tuple[Any, Verification]:
    fast = dwswap.optimize(model, example_inputs, verify=True, **options)
    verification = dwswap.report(fast).verification
    assert verification is not None
    return fast, verification


@pytest.fixture
def wrong_layers(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of channels for which the operator returns wrong results."""
    channels: set[int] = set()
    right = registration.apply

    def wrong(plain: bool, input: Tensor, *args: Any) -> Tensor:
        output = right(plain, input, *args)
        return output + 1e-2 if input.shape[-3] in channels else output

    monkeypatch.setattr(registration, "apply", wrong)
    return channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fuse", [True, False])
def test_passes(dtype: torch.dtype, fuse: bool) -> None:
    fast, verification = verified(Block().eval().to(dtype), image().to(dtype), fuse=fuse)
    assert verification.passed
    assert verification.notes == ()
    report = dwswap.report(fast)
    (layer,) = report.swapped
    for errors in (layer.errors, verification.outputs["output"]):
        assert errors is not None
        assert errors.ours <= errors.limit
        assert errors.pytorch > 0 or dtype == torch.float64
    assert report.layers[0].errors is None


def test_failing_layer_is_put_back(wrong_layers: set[int]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = depthwise(8)
            self.widen = nn.Conv2d(8, 12, 1)
            self.bad = depthwise(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.bad(self.widen(self.good(x)))

    wrong_layers.add(12)
    x = image(8)
    for model in (Two().eval(), Two().train(), ControlFlow(Two()).eval()):
        for inplace in (False, True):
            prefix = "block." if isinstance(model, ControlFlow) else ""
            fast, verification = verified(model, x, inplace=inplace)
            assert verification.passed
            assert any("put back 1 of 2" in note for note in verification.notes)
            layers = {layer.path: layer for layer in dwswap.report(fast).layers}
            bad = layers[prefix + "bad"]
            assert (bad.decision, bad.reason) == ("kept", "verify_failed")
            assert bad.errors is not None
            assert bad.errors.ours > bad.errors.limit
            assert layers[prefix + "good"].decision == "swapped"
            graph = fast.block if prefix else fast
            if isinstance(graph, fx.GraphModule):  # had absorbed the bias before it
                assert torch.conv2d in [n.target for n in graph.graph.nodes]
                assert dwswap.depthwise_conv2d not in [n.target for n in graph.graph.nodes]
            else:
                assert type(fast.get_submodule(prefix + "bad")) is nn.Conv2d
            assert type(fast.get_submodule(prefix + "good")) is DepthwiseConv2d
            dwswap.restore(model, inplace=True)
            torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)


def test_failing_call_is_put_back(wrong_layers: set[int]) -> None:
    def call(x: Tensor, w: Tensor, b: Tensor, c: int) -> Tensor:
        return F.conv2d(x, w, b, padding="same", groups=c)

    wrong_layers.add(8)
    x = image(8)
    for child in (Functional(call), nn.Sequential(Functional(call), Functional(call))):
        for model in (child.eval(), ControlFlow(child).eval()):
            mixed = nn.Sequential(OrderedDict(fine=depthwise(), model=model)).eval()
            wrong_layers.clear()
            fast, verification = verified(mixed, x)
            assert verification.passed
            assert all(layer.errors for layer in dwswap.report(fast).swapped)
            wrong_layers.add(8)
            fast, verification = verified(model, x)
            assert verification.passed
            reasons = {layer.reason for layer in dwswap.report(fast).layers}
            assert reasons == {"verify_failed"}
            assert dwswap.report(fast).mode == "unchanged"
            assert type(fast) is type(model)
            torch.testing.assert_close(fast(x), model(x))


def test_everything_is_put_back_when_the_whole_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is right on what it gets here, in a model that is wrong all the same."""
    from dwswap import rewrite

    def break_output(graph_module: fx.GraphModule, context: Any) -> None:
        (output,) = (n for n in graph_module.graph.nodes if n.op == "output")
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.mul, (output.args[0], 1.001)),)

    monkeypatch.setattr(rewrite, "INFERENCE_PASSES", (break_output,))
    model = Block().eval()
    fast, verification = verified(model, image())
    assert not verification.passed
    assert "every layer was put back" in verification.notes[-1]
    assert dwswap.report(fast).mode == "unchanged"
    assert dwswap.report(fast).layers[1].reason == "verify_failed"
    assert type(fast) is Block
    assert torch.equal(fast(image()), model(image()))
    assert dwswap.optimize(model, image(), verify=True, inplace=True) is model
    assert type(model.depthwise) is nn.Conv2d


def test_original_comes_back_whatever_else_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that the operator ran before is no reason to keep a result that is wrong."""
    from dwswap import rewrite

    def break_output(graph_module: fx.GraphModule, context: Any) -> None:
        (output,) = (n for n in graph_module.graph.nodes if n.op == "output")
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.mul, (output.args[0], 1.001)),)

    monkeypatch.setattr(rewrite, "INFERENCE_PASSES", (break_output,))
    model = nn.Sequential(depthwise(), DepthwiseConv2d(8, 8, 3)).eval()
    x = image(8)
    fast, verification = verified(model, x)
    assert not verification.passed
    assert dwswap.report(fast).mode == "unchanged"
    assert [layer.reason for layer in dwswap.report(fast).layers] == [
        "verify_failed",
        "already_swapped",
    ]
    assert fast is not model
    assert [type(m) for m in fast] == [nn.Conv2d, DepthwiseConv2d]
    assert torch.equal(fast(x), model(x))
    assert verified(model, x, inplace=True)[0] is model
    assert type(model[0]) is nn.Conv2d


class OneLogit(nn.Sequential):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 16, 3, stride=2), nn.Hardswish())
        for _ in range(4):
            block = Block(16)
            block.expand = nn.Conv2d(16, 16, 1)
            self.append(block)
        self.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1)])
        self.eval()


def tap_by_tap(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *absorbed: Any
) -> Tensor:
    """As accurate as PyTorch, summed in another order."""
    _, input_bias, *activations = absorbed
    before, after = (ACTIVATIONS[name].forward for name in activations)
    input = before(input if input_bias is None else input + input_bias.view(-1, 1, 1))
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = (
        (size - k) // s + 1
        for size, k, s in zip(padded.shape[-2:], weight.shape[-2:], stride, strict=True)
    )
    output = torch.zeros(())
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            rows_of_tap = slice(i, i + stride[0] * (rows - 1) + 1, stride[0])
            columns_of_tap = slice(j, j + stride[1] * (columns - 1) + 1, stride[1])
            tap = weight[:, 0, i, j].view(-1, 1, 1)
            output = output + padded[..., rows_of_tap, columns_of_tap] * tap
    return after(output if bias is None else output + bias.view(-1, 1, 1))


@pytest.mark.slow
def test_one_logit_is_not_judged_by_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "apply", lambda plain, *args: tap_by_tap(*args))
    for seed in range(20):
        fast, verification = verified(OneLogit(seed), image(size=32, batch=1))
        assert verification.passed, str(dwswap.report(fast))
        assert len(dwswap.report(fast).swapped) == 4


@pytest.mark.slow
def test_one_logit_shows_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each layer, on its own, was found right."""
    right = registration.apply
    for seed in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(registration, "apply", lambda *a: right(*a) * (1 + 1e-3))
            fast, verification = verified(OneLogit(seed), image(size=32, batch=1))
            assert {layer.reason for layer in dwswap.report(fast).layers if layer.groups == 16} == {
                "verify_failed"
            }
            patch.setattr(verify, "_compare_layer", lambda *_: LayerErrors(0, 0, 0))
            _, verification = verified(OneLogit(seed), image(size=32, batch=1))
            assert not verification.passed


def clamped(seed: int) -> tuple[nn.Module, Tensor]:
    """Two folded layers and a clamp at the end, which leaves few elements to be rounded."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(8, generator=generator)

    norms = (nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    for norm in norms:
        norm.load_state_dict(
            {
                "weight": drawn(-30, 30),
                "bias": drawn(-6, 6),
                "running_mean": drawn(-2, 2),
                "running_var": drawn(0.1, 1.1),
            },
            strict=False,
        )
    first, second = (nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in norms)
    end = nn.Hardsigmoid() if seed % 2 else nn.ReLU6()
    model = nn.Sequential(first, norms[0], nn.ReLU6(), second, norms[1], end)
    return model.eval(), torch.randn(1, 8, 6, 6, generator=generator)


# Those of the first 400 in whose output PyTorch's own error is small by luck.
SEEDS = (29, 78, 104, 106, 123, 341, 349)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clamped_output_is_not_judged_by_luck(seed: int) -> None:
    fast, verification = verified(*clamped(seed))
    assert verification.passed, str(dwswap.report(fast))


# Of 106 the first layer decides nothing: the ReLU6 behind it has all of its outputs at an end.
@pytest.mark.parametrize("seed", [seed for seed in SEEDS if seed != 106])
def test_a_clamped_output_shows_weights_that_are_off(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dwswap import rewrite

    def verify_wrong(model: nn.Module, result: nn.Module, *rest: Any) -> Any:
        with torch.no_grad():
            next(p for p in result.parameters() if p.ndim == 4).mul_(1 + 2.0**-16)
        return verify.verify_result(model, result, *rest)

    monkeypatch.setattr(rewrite, "verify_result", verify_wrong)
    _, verification = verified(*clamped(seed))
    assert not verification.passed


def test_another_decision_is_no_rounding_error() -> None:
    """Runs on nudged inputs that pick another element must not widen the limit."""

    class Flipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            moved = x.dtype == torch.float32 and x.flatten()[0] != 1
            return self.conv(x).sum() + (100 if moved else 0)

    x = image(8)
    x[0, 0, 0, 0] = 1
    _, verification = verified(Flipping().eval(), x, fuse=False)
    assert verification.outputs["output"].limit < 1e-2


def test_nudged_inputs_stay_in_range() -> None:
    class Checked(nn.Sequential):
        def forward(self, x: Tensor, empty: Tensor, index: Tensor) -> Tensor:
            if x.min() < 0 or x.max() > 1:
                raise ValueError("not an image")
            return super().forward(x).mean() + empty.sum() + index

    x = image(8).clamp(0, 1)
    arguments = (x, torch.zeros(0), torch.tensor(1))
    _, verification = verified(Checked(depthwise()).eval(), arguments, fuse=False)
    assert verification.passed


def test_tf32_is_off_while_it_compares() -> None:
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    seen = []

    class Watching(Block):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((cudnn.conv.fp32_precision, matmul.fp32_precision))
            if x.dtype == torch.float64 and model.fails:
                raise RuntimeError("no float64")
            return super().forward(x)

    model: Any = Watching().eval()
    before = cudnn.conv.fp32_precision, matmul.fp32_precision
    cudnn.conv.fp32_precision = matmul.fp32_precision = "tf32"
    try:
        for model.fails in (False, True):
            seen.clear()
            with pytest.raises(ValueError, match="float64") if model.fails else nullcontext():
                dwswap.optimize(model, image(), verify=True, fuse=False)
            # The first run only shows the shapes.
            assert set(seen[1:]) == {("ieee", "ieee")}
            assert (cudnn.conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
    finally:
        cudnn.conv.fp32_precision, matmul.fp32_precision = before


def test_the_reference_divides_by_six() -> None:
    """aten multiplies by a float32 sixth on CUDA, in float64 too."""
    seen: dict[torch.dtype, list[bool]] = {}

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
            seen.setdefault(x.dtype, []).append(precision._DivideBySix in map(type, modes))
            return F.hardswish(x)

    model = nn.Sequential(depthwise(4), Watched()).eval()
    verified(model, image(4, 8))
    assert all(seen[torch.float64])
    assert not any(seen[torch.float32])


def test_exact_float64_in_place_and_in_other_dtypes() -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    exact = (x + 3).clamp(0, 6) / 6
    changed, narrow = x.clone(), x.float()
    usual = F.hardsigmoid(narrow)
    with exact_float64():
        assert F.hardsigmoid(x).equal(exact)
        assert F.hardsigmoid(changed, inplace=True) is changed
        assert F.hardsigmoid(narrow).equal(usual)
        assert nn.Hardswish(inplace=True)(x.clone()).equal(x * exact)
    assert changed.equal(exact)


def test_exact_float64_of_compiled_code_and_of_branches() -> None:
    compiled = torch.compile(F.hardswish, backend="eager", fullgraph=True)

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.cond(x.sum() > 0, compiled, torch.relu, (x,))

    class Compiled(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return compiled(x)

    for last in (Branches(), Compiled()):
        verified(nn.Sequential(depthwise(4), last).eval(), image(4, 8))


def test_outputs_of_any_structure() -> None:
    class Detector(ControlFlow):
        def forward(self, images: list[Tensor], *, scale: float) -> list[dict[str, Any]]:
            return [
                {
                    "scores": super(Detector, self).forward(x[None])[0] * scale,
                    "labels": self.block(x[None]).flatten().argmax(),
                    "name": "image",
                    "size": (x.shape[0], [torch.tensor(True)]),
                }
                for x in images
            ]

    model = Detector().eval()
    example = {"images": [image(batch=1)[0], image(batch=1)[0] + 1], "scale": 2.0}
    _, verification = verified(model, example)
    assert verification.passed
    assert sorted(verification.outputs) == [
        f"output[{i}]{name}"
        for i in range(2)
        for name in ("['labels']", "['scores']", "['size'][1][0]")
    ]


def test_outputs_of_data_dependent_shape() -> None:
    class Rounding(Block):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y if x.dtype == torch.float64 else y[:1], y.sum()

    fast, verification = verified(Rounding().eval(), image(), fuse=False)
    assert verification.passed
    assert list(verification.outputs) == ["output[1]"]
    assert "output[0] has another shape in float64" in verification.notes[0]
    assert len(dwswap.report(fast).swapped) == 1


def test_train_mode_is_compared_in_eval_mode() -> None:
    model = Block().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast, verification = verified(model, image())
    assert verification.passed
    assert "train mode" in verification.notes[0]
    assert all(module.training for module in fast.modules())
    for name, value in (*model.state_dict().items(), *fast.state_dict().items()):
        assert torch.equal(value, before[name]), name


def test_random_numbers_and_inputs_are_left_alone() -> None:
    class Random(Block):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return super().forward(F.dropout(x, 0.5, training=True))

    model = Random().eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    x = image()
    _, verification = verified(model, x, fuse=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, image())
    assert verification.outputs


def test_shared_module_reports_its_worst_call(wrong_layers: set[int]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)) + self.conv(x * 0)

    wrong_layers.add(8)
    fast, _ = verified(Twice().eval(), image(8))
    assert dwswap.report(fast).layers[0].reason == "verify_failed"


def test_layer_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    for fuse in (True, False):
        fast, verification = verified(Keyword().eval(), {"x": image(8)}, fuse=fuse)
        assert verification.passed
        assert dwswap.report(fast).layers[0].errors is not None


def test_models_that_cannot_be_verified() -> None:
    with pytest.raises(ValueError, match="meta device"):
        dwswap.optimize(Block().to("meta").eval(), image().to("meta"), verify=True)

    class Half(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.half())

    model = Half().eval().half()
    with pytest.raises(ValueError, match="runs on example_inputs in float64"):
        dwswap.optimize(model, image(), verify=True, inplace=True)
    assert type(model.depthwise) is nn.Conv2d


def test_rule() -> None:
    exact = torch.tensor([1.0, 3.0, -4.0], dtype=torch.float64)
    theirs = exact.float() + torch.tensor([0, 0, 1e-3])
    ulp = 2.0**-23 * 4
    ours = compare(exact.float(), theirs, exact)
    assert ours.passed
    assert ours.limit == pytest.approx(2e-3 + ulp, rel=1e-3)
    assert compare(exact.float() + 1.9e-3, theirs, exact).passed
    assert not compare(exact.float() + 2.1e-3, theirs, exact).passed
    # One ulp at the scale of 4 where PyTorch is exact, not more.
    assert compare(exact.float() + ulp, exact.float(), exact).passed
    assert not compare(exact.float() + 2 * ulp, exact.float(), exact).passed
    zero = torch.zeros(2)
    assert compare(zero, zero, zero.double()).limit == 0
    assert compare(zero[:0], zero[:0], zero[:0].double()).passed


@pytest.mark.parametrize(
    ("ours", "theirs", "problem"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "shape"),
        (torch.zeros(2), torch.zeros(2).half(), "dtype"),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), "strides"),
        (torch.tensor([math.nan, 1]), torch.tensor([1, math.nan]), "NaN"),
        (torch.tensor([math.inf, 1]), torch.tensor([1.0, 1]), "not finite"),
    ],
)
def test_kinds_of_difference(ours: Tensor, theirs: Tensor, problem: str) -> None:
    found = compare(ours, theirs, theirs.double())
    assert not found.passed
    assert problem in str(found.problem)


def test_overflow_and_nan_where_pytorch_has_them() -> None:
    exact = torch.tensor([1e6, math.nan, 2.0], dtype=torch.float64)
    theirs = exact.half()
    assert theirs[0].isinf()
    assert compare(theirs, theirs, exact).passed


def test_integers_count() -> None:
    exact = torch.tensor([1, 2, 3, 4])
    assert compare(exact, exact, exact).passed
    assert not compare(exact + 1, exact, exact).passed
    assert compare(exact, torch.tensor([1, 2, 3, 5]), exact).ours == 0


def test_an_output_that_is_an_input_changed_in_place() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.act = depthwise(), nn.SiLU(inplace=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(self.depthwise(x)), self.act(x)

    fast, verification = verified(Both().eval(), image(8))
    assert verification.passed
    assert dwswap.report(fast).mode == "graph"


class CountingCalls(nn.Module):
    """Every call returns something else."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = depthwise()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return (F.relu(self.depthwise(x)) * self.calls).mean((2, 3))


def test_every_run_starts_from_the_same_state() -> None:
    model = CountingCalls().eval()
    fast, verification = verified(model, image(8))
    assert verification.passed
    assert dwswap.report(fast).mode == "graph"
    assert [m.calls.item() for m in (model, fast)] == [0, 0]


@pytest.mark.parametrize("x", [image(8)[:0], image(8) * math.nan])
def test_nothing_to_compare_is_told(x: Tensor) -> None:
    _, verification = verified(depthwise().eval(), x)
    assert verification.passed
    assert "output has no finite element" in verification.notes[-1]


@pytest.mark.slow
@torch.no_grad()
def test_a_feature_extractor_of_torchvision_keeps_its_mode() -> None:
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    x = image(size=64)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = models.mobilenet_v3_small(weights=None)
            randomize(whole, image(size=64))
            self.features = extraction.create_feature_extractor(whole.eval(), {"flatten": "y"})

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x)["y"]

    model = Wrapped().eval()
    for subject in (model, model.features):
        for options in ({}, {"fuse": False}, {"example_inputs": x, "verify": True}):
            fast = dwswap.optimize(subject, **options)
            assert dwswap.report(fast).swapped
            assert not any(
                module.training for module in fast.modules() if type(module) is not nn.Module
            )
            torch.testing.assert_close(fast(x), subject(x), rtol=1e-3, atol=1e-4)
