"""optimize and explain: modes, arguments, what the caller's model keeps."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import MODES, Block, ControlFlow, depthwise, image, optimized, snapshot
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import dwswap
from dwswap import DepthwiseConv2d, build, depthwise_conv2d, inner_graphs, rewrite


def test_eval_mode_gives_a_graph_for_inference() -> None:
    model = Block().eval()
    x = image()
    expected = model(x)
    before = snapshot(model)

    fast = dwswap.optimize(model)

    assert isinstance(fast, fx.GraphModule)
    assert snapshot(model) == before
    nodes = [n.target for n in fast.graph.nodes if n.op.startswith("call")]
    assert nodes == [torch.conv2d, depthwise_conv2d, "dropout"]
    keys = ["expand.weight", "expand.bias", "depthwise_folded.weight", "depthwise_folded.bias"]
    assert list(fast.state_dict()) == keys
    assert fast.name == "block"
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", MODES[1:])
def test_substitution_keeps_the_class(how: dict[str, bool]) -> None:
    model, fast = optimized(how)
    assert type(fast) is Block
    assert fast.method() == "block"
    assert type(fast.depthwise) is DepthwiseConv2d
    assert type(model.depthwise) is nn.Conv2d
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [m.training for m in fast.modules()] == [m.training for m in model.modules()]
    torch.manual_seed(0)
    expected = model(image())
    torch.manual_seed(0)
    torch.testing.assert_close(fast(image()), expected, rtol=0, atol=1e-5)


def test_train_mode_trains() -> None:
    model = Block().train()
    fast = dwswap.optimize(model)
    for m in (model, fast):
        torch.manual_seed(0)
        m(image()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    in_eval = dwswap.optimize(fast.eval())
    assert dwswap.report(in_eval).mode == "graph"
    torch.testing.assert_close(in_eval(image()), fast(image()))


@pytest.mark.parametrize("how", MODES[1:])
def test_checkpoints_load_both_ways(how: dict[str, bool]) -> None:
    model, fast = optimized(how)
    other, other_fast = optimized(how)
    other.load_state_dict(fast.state_dict())
    other_fast.load_state_dict(model.state_dict())
    for m in (other, other_fast):
        for name, value in m.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoints_of_what_was_folded_do_not_load(strict: bool) -> None:
    model, fast = optimized({"train": False, "fuse": True})
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    checkpoint = {name: value + 1 for name, value in model.state_dict().items()}
    whole = nn.Sequential(fast)
    prefixed = {f"0.{name}": value for name, value in checkpoint.items()}
    again = pickle.loads(pickle.dumps(fast))
    for target, state in ((fast, checkpoint), (whole, prefixed), (again, checkpoint)):
        with pytest.raises(RuntimeError, match=r"depthwise\.weight cannot be loaded.*fuse=False"):
            target.load_state_dict(state, strict=strict)
    for name, value in fast.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Its own loads, and nothing of it into the original by mistake.
    _, other = optimized({"train": False, "fuse": True})
    other.load_state_dict(fast.state_dict(), strict=strict)
    torch.testing.assert_close(other(image()), fast(image()), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(fast.state_dict())
    assert "depthwise.weight" not in fast.state_dict()


@pytest.mark.parametrize("how", MODES)
def test_inplace_shares_the_parameters(how: dict[str, bool]) -> None:
    model = Block().train(how["train"])
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    fast = dwswap.optimize(model, inplace=True, fuse=how["fuse"])
    substitution = dwswap.report(fast).mode == "substitution"
    assert (fast is model) == substitution
    assert type(model.depthwise) is (DepthwiseConv2d if substitution else nn.Conv2d)
    new = {name for name, p in fast.named_parameters() if p is not parameters.get(name)}
    assert new == (set() if substitution else {"depthwise_folded.weight", "depthwise_folded.bias"})
    assert all(b is buffers[name] for name, b in fast.named_buffers())
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_copy_shares_nothing() -> None:
    model = Block().eval()
    fast = dwswap.optimize(model)
    mine = {t.data_ptr() for t in model.state_dict().values()}
    assert mine.isdisjoint(t.data_ptr() for t in fast.state_dict().values())


@pytest.mark.parametrize("train", [True, False])
def test_inplace_beside_a_module_of_torchscript(train: bool) -> None:
    model = nn.Sequential(depthwise(), torch.jit.script(nn.ReLU())).train(train)
    with torch.no_grad():
        expected = model(image(8))
        fast = dwswap.optimize(model, inplace=True, fuse=False)
        assert fast is model
        assert type(model[0]) is DepthwiseConv2d
        torch.testing.assert_close(fast(image(8)), expected)
        assert type(dwswap.restore(fast, inplace=True)[0]) is nn.Conv2d


def test_a_hook_handle_of_the_original_still_removes_after_inplace() -> None:
    model = nn.Sequential(depthwise(), nn.ReLU())
    handle = model[1].register_forward_hook(lambda _m, _args, output: output + 1)
    dwswap.optimize(model, inplace=True, fuse=False)
    handle.remove()
    assert model(image(8)).min() == 0


def test_autocast_reaches_the_operator() -> None:
    model = Block().eval()
    fast = dwswap.optimize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = fast(image()), model(image())
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def test_no_depthwise_convolution_leaves_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    fast = dwswap.optimize(model)
    assert type(fast) is nn.Sequential
    assert fast is not model
    assert dwswap.report(fast).mode == "unchanged"
    assert dwswap.optimize(model, inplace=True) is model


def test_idempotent() -> None:
    for train in (False, True):
        once = dwswap.optimize(Block().train(train))
        twice = dwswap.optimize(once)
        assert [layer.reason for layer in dwswap.report(twice).swapped] == ["already_swapped"]
        assert dwswap.report(twice).mode == dwswap.report(once).mode
        assert dwswap.optimize(once, inplace=True) is once
        assert list(twice.state_dict()) == list(once.state_dict())


def test_graph_module_in_graph_module_out() -> None:
    model = Block().eval()
    traced = fx.symbolic_trace(model)
    traced.register_forward_hook(lambda _m, _args, output: output + 1)
    fast = dwswap.optimize(traced)
    assert isinstance(fast, fx.GraphModule)
    assert dwswap.report(fast).mode == "graph"
    calls = [n.target for n in fast.graph.nodes if n.op == "call_function"]
    assert calls == [torch.conv2d, depthwise_conv2d]
    assert type(traced.depthwise) is nn.Conv2d
    expected = traced(image())
    torch.testing.assert_close(fast(image()), expected)
    assert dwswap.optimize(traced, inplace=True) is traced
    assert not hasattr(traced, "norm")
    assert list(traced.state_dict()) == list(fast.state_dict())
    torch.testing.assert_close(traced(image()), expected)
    with pytest.raises(ValueError, match="BatchNorm was folded"):
        dwswap.restore(traced)
    swapped = dwswap.optimize(fx.symbolic_trace(model), fuse=False)
    assert type(swapped.depthwise) is DepthwiseConv2d
    assert list(swapped.state_dict()) == list(model.state_dict())


def test_exported_program_module() -> None:
    model = Block().eval()
    program = torch.export.export(model, (image(),))
    module = program.module()
    fast = dwswap.optimize(module)
    (layer,) = dwswap.report(fast).swapped
    assert layer.kind == "functional"
    torch.testing.assert_close(fast(image()), module(image()))


def test_skip_on_an_exported_program() -> None:
    """Its nodes name modules that it does not have; the one nearest above is asked about."""
    module = torch.export.export(Block().eval(), (image(),)).module()
    asked = []
    fast = dwswap.optimize(module, skip=lambda m, path: asked.append((m, path)) is None)
    assert [(type(m), path) for m, path in asked] == [(type(module.depthwise), "depthwise")]
    assert [layer.reason for layer in dwswap.report(fast).layers] == ["not_depthwise", "skipped"]


def test_skip() -> None:
    model = nn.Sequential(depthwise(), depthwise(), nn.Conv2d(8, 8, 1)).eval()
    asked = []

    def skip(module: nn.Module, path: str) -> bool:
        asked.append(path)
        return module is model[1]

    fast = dwswap.optimize(model, skip=skip)
    assert [layer.reason for layer in dwswap.report(fast).layers] == [
        "depthwise",
        "skipped",
        "not_depthwise",
    ]
    assert asked == ["0", "1"]
    assert type(fast.get_submodule("1")) is nn.Conv2d


@pytest.mark.parametrize(
    "options",
    [{}, {"fuse": False}, {"example_inputs": image(), "verify": True}],
    ids=["fused", "swapped", "verified"],
)
def test_the_original_does_not_wait_for_the_cyclic_garbage_collector(
    options: dict[str, Any],
) -> None:
    """Its weights may be as many as what a GPU has left."""
    model = Block().eval()
    weight = weakref.ref(model.depthwise.weight)
    gc.collect()
    gc.disable()
    try:
        fast = dwswap.optimize(model, **options)
        del model
        assert weight() is None or weight() in set(fast.parameters())
        del fast
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"fuse": False}], ids=["fused", "swapped"])
def test_nothing_waits_for_a_full_run_of_the_garbage_collector(options: dict[str, Any]) -> None:
    """What lives while it runs is old for it at once, and what is old it leaves alone."""

    def parameters() -> dict[int, nn.Parameter]:
        return {id(o): o for o in gc.get_objects() if type(o) is nn.Parameter}

    model = Block().eval()
    gc.collect()
    before, thresholds = parameters(), gc.get_threshold()
    gc.set_threshold(1, 1, 1 << 30)
    try:
        fast = dwswap.optimize(model, **options)
    finally:
        gc.set_threshold(*thresholds)
    known = {*before, *map(id, fast.parameters())}
    assert not [tuple(value.shape) for key, value in parameters().items() if key not in known]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("case", ["graph", "substitution", "root"])
def test_failure_leaves_the_model_untouched(
    monkeypatch: pytest.MonkeyPatch, inplace: bool, case: str
) -> None:
    models = {
        "graph": Block().eval(),
        "substitution": ControlFlow().eval(),
        "root": fx.symbolic_trace(Block().eval()),
    }
    model = models[case]
    x = image()
    expected = model(x)
    before = snapshot(model)

    def failing(*_: Any) -> None:
        raise RuntimeError("half-way")

    if case == "substitution":
        monkeypatch.setattr(inner_graphs, "traceable_submodules", failing)
    else:
        monkeypatch.setattr(rewrite, "INFERENCE_PASSES", (failing,))
    with pytest.raises(RuntimeError, match="half-way"):
        dwswap.optimize(model, inplace=inplace)
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


def test_explain_changes_nothing_and_agrees_with_optimize() -> None:
    for model in (Block().eval(), Block().train(), ControlFlow().eval(), depthwise().eval()):
        before = snapshot(model)
        report = dwswap.explain(model)
        assert snapshot(model) == before
        assert report == dwswap.report(dwswap.optimize(model))


def test_explain_runs_on_meta_and_copies_no_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(depthwise(1 << 20), nn.Linear(1 << 20, 1 << 20)).eval()
    (layer,) = dwswap.explain(model).layers
    assert layer.decision == "swapped"


def test_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dwswap"):
        fast = dwswap.optimize(Block().eval())
    assert [r.getMessage() for r in caplog.records] == [dwswap.report(fast).summary()]
    assert caplog.records[0].levelno == logging.INFO


def test_example_inputs_give_shapes() -> None:
    model = Block().eval()
    for example in (image(), (image(),), {"x": image()}):
        shapes = [layer.input_shape for layer in dwswap.explain(model, example).layers]
        assert shapes == [(2, 3, 9, 9), (2, 8, 9, 9)]
    for other in (ControlFlow().eval(), Block().train()):
        report = dwswap.explain(other, image())
        assert [layer.input_shape for layer in report.layers] == shapes
    on_meta = dwswap.explain(Block().to("meta"), image().to("meta"))
    assert [layer.input_shape for layer in on_meta.layers] == shapes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_example_inputs_have_a_dtype_that_the_model_takes(dtype: torch.dtype) -> None:
    for options in ({}, {"verify": True}):
        with pytest.raises(ValueError, match="example_inputs must be inputs that Block accepts"):
            dwswap.optimize(Block().eval(), image().to(dtype), **options)

    class Casts(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    fast = dwswap.optimize(Casts().eval(), image().to(dtype))
    assert dwswap.report(fast).layers[1].input_shape == (2, 8, 9, 9)


def test_example_inputs_leave_batchnorm_statistics() -> None:
    model = nn.Sequential(ControlFlow()).train()
    before = copy.deepcopy(model.state_dict())
    dwswap.explain(model, image())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_example_inputs_leave_buffers_that_a_forward_changes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs.add_(1)
            return self.conv(x)

    for options in ({}, {"fuse": False}, {"verify": True}):
        model = Counting().eval()
        fast = dwswap.optimize(model, image(8), **options)
        assert model.runs == fast.runs == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: ("model",), TypeError, "model must be .* got str"),
        (lambda: (torch.compile(Block()),), TypeError, "must not be compiled"),
        (lambda: (Block(), [image()]), TypeError, "example_inputs must be .* got list"),
        (lambda: (Block(), (image(), image())), ValueError, "must fit the forward of Block"),
        (lambda: (Block(), {"y": image()}), ValueError, r"must fit .* of Block: .*\(a dict is key"),
        (lambda: (Block(), image(5)), ValueError, "that Block accepts; it fails on them"),
        (lambda: (Block().eval(), image(5)), ValueError, "accepts; it fails on them"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    for function in (dwswap.optimize, dwswap.explain):
        with pytest.raises(error, match=message):
            function(*arguments())


def test_wrong_options() -> None:
    with pytest.raises(TypeError, match="skip must be callable"):
        dwswap.optimize(Block(), skip="features")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"skip must be callable as skip\(module, path\)"):
        dwswap.optimize(Block(), skip=lambda module: True)  # type: ignore[arg-type,misc]
    for name in ("inplace", "fuse", "verify"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
            dwswap.optimize(Block(), **{name: "no"})
    with pytest.raises(TypeError, match="fuse must be True or False, got None"):
        dwswap.explain(Block(), fuse=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verify=True needs example_inputs"):
        dwswap.optimize(Block(), verify=True)


def test_model_that_cannot_be_copied() -> None:
    model = ControlFlow().eval()
    model.stream = (i for i in range(3))
    with pytest.raises(ValueError, match="inplace=True"):
        dwswap.optimize(model)
    dwswap.optimize(model, inplace=True)
    assert isinstance(model.block, fx.GraphModule)
    assert next(model.stream) == 0


class _Caching(nn.Module):
    """As the attention of LeViT, whose eval forward keeps what it computed with its weights."""

    def __init__(self, kept_in: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.scale = depthwise(), nn.Parameter(torch.rand(8, 1, 1))
        self.kept_in, self.cache = kept_in, None

    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.kept_in(self.scale * 2)
        return self.conv(x)


@pytest.mark.parametrize(
    "kept_in",
    [
        lambda y: y,
        lambda y: {"a": y},
        lambda y: [y, y],
        lambda y: {"b": [(y, 1), None]},
    ],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_a_model_that_keeps_what_it_computed(kept_in: Callable[[Tensor], Any], fuse: bool) -> None:
    model, x = _Caching(kept_in).eval(), image(8)
    expected = model(x)
    (kept, *_) = tensors = [t for t in pytree.tree_leaves(model.cache) if isinstance(t, Tensor)]
    assert not kept.is_leaf
    fast = dwswap.optimize(model, x, fuse=fuse, verify=True)
    assert dwswap.report(fast).swapped
    torch.testing.assert_close(fast(x), expected)
    assert [id(t) for t in pytree.tree_leaves(model.cache) if isinstance(t, Tensor)] == [
        id(t) for t in tensors
    ]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (build.Status(loaded=True), "CUDA kernels"),
        (build.Status(loaded=True, seconds=41.6), "CUDA kernels, built in 42 s"),
        (build.Status(attempted=True, reason="no nvcc"), "aten on CUDA: no nvcc"),
    ],
)
def test_kernels_of_a_model_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, status: build.Status, text: str
) -> None:
    loads = []
    monkeypatch.setattr(build, "load", lambda: loads.append(1))
    monkeypatch.setattr(build, "status", lambda: status)
    with FakeTensorMode():
        on_gpu = torch.empty(1, device="cuda")  # says that it is
    for model in (Block().eval(), nn.Sequential(nn.ReLU())):
        model.register_buffer("on_gpu", on_gpu)
        swapped = len(dwswap.explain(model).swapped)
        assert loads == []
        fast = dwswap.optimize(model, inplace=True)
        assert dwswap.report(fast).kernels == text
        assert len(loads) == swapped
        loads.clear()


def test_kernels_of_a_model_without_gpu() -> None:
    assert dwswap.explain(Block()).kernels == "composite (CPU)"
    assert dwswap.explain(Block().to("meta")).kernels == "composite (META)"


class _WeightsChange(nn.Module):
    """As a layer with a constraint on the norm of its weights does, in either way."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv = depthwise()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.in_place:
                self.conv.weight.mul_(0.9)
            else:
                self.conv.weight.data = self.conv.weight.data.clamp(-0.1, 0.1)
        return self.conv(x)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"verify": True}, None])
def test_example_inputs_leave_weights_that_a_forward_changes(in_place, train, options) -> None:
    model = _WeightsChange(in_place).train(train)
    weight, values = model.conv.weight, model.conv.weight.detach().clone()
    if options is None:
        dwswap.explain(model, image(8))
    else:
        fast = dwswap.optimize(model, image(8), **options)
        assert not fast.conv.weight.is_meta
    assert model.conv.weight is weight
    assert torch.equal(weight, values)


@pytest.mark.parametrize("fuse", [True, False])
def test_what_is_made_in_inference_mode_can_be_trained(fuse: bool) -> None:
    model = Block().train()
    with torch.inference_mode():
        fast = dwswap.optimize(model, image(), fuse=fuse, verify=True)
        plain = dwswap.restore(fast)
    assert dwswap.report(fast).swapped
    for subject in (fast, plain):
        subject(image()).sum().backward()
        assert all(p.grad is not None for p in subject.parameters())


class OwnCopy(nn.Sequential):
    """As of frozen parts of a model that its copies are to share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        return self


@pytest.mark.parametrize("inputs", [(), (torch.ones(1, 8, 6, 6),)], ids=["alone", "with inputs"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("call", [dwswap.optimize, dwswap.explain])
def test_a_module_that_is_its_own_copy_is_left_alone(
    call: Callable[..., Any], training: bool, inputs: tuple[Tensor, ...]
) -> None:
    """Its weights were folded in the original, or became fake tensors."""
    shared = OwnCopy(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), shared).train(training)
    modules = list(model.modules())
    tensors = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    if call is dwswap.explain and not inputs:
        call(model)
    else:
        with pytest.raises(ValueError, match=r"whose '1', a OwnCopy, is its own copy"):
            call(model, *inputs)
    assert list(model.modules()) == modules
    assert [module.training for module in modules] == [training] * len(modules)
    assert model.state_dict().keys() == tensors.keys()
    for name, value in model.state_dict().items():
        assert value.data_ptr() == tensors[name][0].data_ptr()
        assert torch.equal(value, tensors[name][1])


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_modules_with_inputs() -> None:
    """In a graph, whose weights have no shape yet."""
    x = torch.randn(1, 3, 6, 6)
    model = nn.Sequential(nn.LazyConv2d(8, 1), nn.Conv2d(8, 8, 3, groups=8)).eval()
    assert [layer.reason for layer in dwswap.explain(model, x).layers][-1] == "depthwise"
    fast = dwswap.optimize(model, x)
    first = fast(x)
    model.load_state_dict(fast.state_dict())
    torch.testing.assert_close(first, model(x))
