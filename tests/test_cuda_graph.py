"""optimize(cuda_graph=True) as far as it needs no GPU; a fake recorder stands for CUDA."""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda_graphs import FakeRecorder, faked
from tiny_models import Block, ControlFlow, depthwise, image
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dwswap
from dwswap import CudaGraphOptions
from dwswap.call_signature import NoSignature, same_tensors_together, signature
from dwswap.cuda_graph_module import CudaGraphModule
from dwswap.weight_guard import WeightGuard


def graphed(model: nn.Module | None = None, **options: Any) -> tuple[Any, FakeRecorder]:
    model = Block().eval() if model is None else model
    return faked(dwswap.optimize(model, cuda_graph=CudaGraphOptions(**options)))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def calls(fast: Any, *inputs: Tensor) -> list[Any]:
    return [fast(x) for x in inputs]


def same(result: Any, expected: Any) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


# --- the module ---------------------------------------------------------------------------------


def test_on_the_cpu_it_is_the_same_model() -> None:
    model = Block().eval()
    plain, fast = dwswap.optimize(model), dwswap.optimize(model, cuda_graph=True)
    assert isinstance(fast, CudaGraphModule)
    assert isinstance(fast, fx.GraphModule)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in plain.named_modules()]
    assert fast.code == plain.code
    assert fast.name == "block"
    same(fast(image()), plain(image()))
    assert len(fast.cuda_graphs) == 0
    assert type(fast).__name__ == "Block"
    text = repr(fast)
    assert "CudaGraphOptions(max_signatures=8, clone_outputs=True), signatures captured: 0" in text
    assert "DepthwiseConv2d(8, 8" in text
    with pytest.raises(RuntimeError, match="optimized for inference"):
        fast.train()
    assert fast.eval() is fast


@pytest.mark.parametrize("inplace", [False, True])
def test_models_that_are_graphs_already(inplace: bool) -> None:
    model = Block().eval()
    for given in (fx.symbolic_trace(model), torch.export.export(model, (image(),)).module()):
        expected = given(image())
        fast, recorder = faked(dwswap.optimize(given, cuda_graph=True, inplace=inplace))
        assert list(fast.state_dict()) == list(given.state_dict())
        for _ in range(3):
            torch.testing.assert_close(fast(image()), expected, rtol=0, atol=1e-6)
        assert recorder.replays == 2
        assert dwswap.report(fast).swapped


def test_report() -> None:
    report = dwswap.report(dwswap.optimize(Block().eval(), cuda_graph=True))
    assert report.cuda_graph == "on: at most 8 signatures"
    assert str(report).splitlines()[-1] == "cuda_graph on: at most 8 signatures"
    assert report.to_dict()["cuda_graph"] == report.cuda_graph
    assert dwswap.report(dwswap.optimize(Block().eval())).cuda_graph is None


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Block().train(), {}, "train mode"),
        (Block().eval(), {"fuse": False}, "fuse=False"),
        (ControlFlow().eval(), {}, "control flow"),
        (nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), {}, "nothing was swapped"),
        (fx.symbolic_trace(Block().eval()).train(), {}, "train mode"),
    ],
)
def test_models_that_get_none_say_why(model: nn.Module, options: Any, reason: str) -> None:
    fast = dwswap.optimize(model, cuda_graph=True, **options)
    assert not isinstance(fast, CudaGraphModule)
    found = dwswap.report(fast).cuda_graph
    assert found is not None
    assert found.startswith("off: ")
    assert reason in found


def test_wrong_options() -> None:
    with pytest.raises(TypeError, match=r"cuda_graph must be a bool or dwswap\.CudaGraphOptions"):
        dwswap.optimize(Block().eval(), cuda_graph=8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_signatures must be of type int, got True"):
        CudaGraphOptions(max_signatures=True)
    with pytest.raises(ValueError, match="max_signatures must be at least 1, got 0"):
        CudaGraphOptions(max_signatures=0)
    with pytest.raises(TypeError, match="clone_outputs must be of type bool, got 1"):
        CudaGraphOptions(clone_outputs=1)  # type: ignore[arg-type]


def test_copies_have_graphs_of_their_own() -> None:
    fast, recorder = graphed(max_signatures=3)
    x = image()
    expected = fast(x)
    fast.register_forward_hook(_plus_one)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(fast))))),
        torch.load(buffer, weights_only=False),
    ):
        assert isinstance(again, CudaGraphModule)
        assert type(again).__name__ == "Block"
        assert again.cuda_graphs is not fast.cuda_graphs
        assert again.cuda_graphs is not None
        assert again.cuda_graphs.options == CudaGraphOptions(max_signatures=3)
        assert len(again.cuda_graphs) == 0
        assert list(again.state_dict()) == list(fast.state_dict())
        assert dwswap.report(again) == dwswap.report(fast)
        again, other = faked(again)
        for _ in range(2):
            same(again(x), expected + 1)
        assert (other.records, other.replays) == (1, 1)
    assert len(recorder.alive) == 1


def _plus_one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


@pytest.mark.parametrize("inplace", [False, True])
def test_restore(inplace: bool) -> None:
    fast, recorder = graphed()
    x = image()
    expected = fast(x)
    restored = dwswap.restore(fast, inplace=inplace)
    assert (restored is fast) == inplace
    assert type(restored.get_submodule("depthwise")) is nn.Conv2d
    for _ in range(2):
        torch.testing.assert_close(restored(x), expected, rtol=0, atol=1e-6)
    assert recorder.replays == 0
    assert len(recorder.alive) == (0 if inplace else 1)
    assert "cuda_graph=False" in repr(restored)
    again = pickle.loads(pickle.dumps(copy.deepcopy(restored)))
    torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-6)


def test_optimize_again() -> None:
    fast, _ = graphed()
    again = dwswap.optimize(fast, cuda_graph=CudaGraphOptions(max_signatures=2))
    assert isinstance(again, CudaGraphModule)
    assert again.cuda_graphs is not None
    assert again.cuda_graphs.options.max_signatures == 2
    same(again(image()), fast(image()))


@pytest.mark.filterwarnings("ignore")
def test_compile_export_and_traces_see_the_code_of_the_graph() -> None:
    torch._dynamo.reset()
    fast, recorder = graphed()
    x = image()
    expected = fast(x)
    for other in (
        torch.compile(fast, fullgraph=True, backend="eager"),
        torch.compile(fast, fullgraph=True, backend="aot_eager"),
        torch.export.export(fast, (x,)).module(),
        torch.export.export(fast, (x,), strict=True).module(),
        fx.symbolic_trace(fast),
        fx.Transformer(fast).transform(),
        torch.jit.trace(fast, x, check_trace=False),
    ):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)
    assert (recorder.records, recorder.replays) == (1, 0)


def test_hooks_of_the_model_run() -> None:
    fast, recorder = graphed()
    x = image()
    expected = fast(x)
    fast.register_forward_pre_hook(lambda _, args: (args[0] * 0 + x,))
    fast.register_forward_hook(_plus_one)
    same(fast(torch.ones_like(x)), expected + 1)
    assert recorder.replays == 1


# --- signatures ---------------------------------------------------------------------------------


def key(*args: Any, **kwargs: Any) -> Any:
    return signature(args, kwargs)[0]


def test_what_makes_a_signature() -> None:
    x = image()
    assert key(x) == key(torch.zeros_like(x)) == key(nn.Parameter(x))
    others = [
        (x[:1],),
        (x.to(memory_format=torch.channels_last),),
        (x.double(),),
        (x.to("meta"),),
        (x, x),
        ([x],),
        ((x,),),
        (x, 1),
        (x, 1.0),
        (x, True),
        (x, 0.0),
        (x, -0.0),
        (x, float("nan")),
        (x, 1j),
        (x, "a"),
        (x, None),
        (x, torch.float32),
        ({"a": x},),
        ({"b": x},),
        (Pair(x, x),),
    ]
    keys = {key(x), *(key(*args) for args in others), key(x=x)}
    assert len(keys) == len(others) + 2
    assert all(key(*args) in keys for args in others)
    assert signature((x, {"a": [2, (x,)]}), {"z": x})[1] == [x, x, x]


Pair = collections.namedtuple("Pair", "first second")


class Subclass(Tensor):
    pass


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_signature() -> None:
    for argument in (
        image().as_subclass(Subclass),
        image().to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        object(),
        {1, 2},
        nn.ReLU(),
        collections.OrderedDict(),
    ):
        for args in ((argument,), (image(), [argument])):
            with pytest.raises(NoSignature):
                signature(args, {})


def test_outputs_of_any_structure() -> None:
    x, y = image(), image()
    output = {"a": (x, [y, x]), "b": Pair(1, None), "c": collections.OrderedDict(d=y)}
    tensors, rebuild = same_tensors_together(output)
    assert len(tensors) == 2
    again = rebuild([t + 1 for t in tensors])
    assert again["a"][0] is again["a"][1][1]
    assert again["a"][1][0] is again["c"]["d"]
    assert type(again["b"]) is Pair
    assert again["b"] == (1, None)
    same(again["a"][0], x + 1)
    for wrong in (object(), [x, {1}], (x.as_subclass(Subclass),)):
        with pytest.raises(NoSignature, match="it returns a"):
            same_tensors_together(wrong)


class Flexible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(3)

    def forward(self, x: Any, scale: Any) -> Any:
        y = self.conv(x["image"]) * scale[1]
        return {"result": (y, y), "other": y + 1}


def test_arguments_and_outputs_of_any_structure() -> None:
    model = Flexible().eval()
    fast, recorder = graphed(model)
    for value in (1.0, 2.0):
        x = image()
        for _ in range(3):
            result = fast({"image": x + value}, scale=(0, value))
            expected = model({"image": x + value}, (0, value))
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
            assert result["result"][0] is result["result"][1]
    assert (recorder.records, recorder.replays) == (2, 4)


def test_each_signature_is_captured_once() -> None:
    fast, recorder = graphed()
    plain = dwswap.optimize(fast)
    for _ in range(3):
        for batch in (1, 2, 3):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = image(batch=batch).to(memory_format=memory_format) + batch
                result = fast(x)
                same(result, plain(x))
                assert result.is_contiguous(memory_format=memory_format)
    assert (recorder.records, recorder.replays) == (6, 12)
    assert len(fast.cuda_graphs) == 6


def test_the_least_recently_used_is_dropped() -> None:
    fast, recorder = graphed(max_signatures=2)
    for batch, records, replays in ((1, 1, 0), (2, 2, 0), (1, 2, 1), (3, 3, 1), (1, 3, 2)):
        fast(image(batch=batch))
        assert (recorder.records, recorder.replays) == (records, replays), batch
    assert [r.inputs[0].shape[0] for r in recorder.alive] == [1, 3]
    fast(image(batch=2))
    assert [r.inputs[0].shape[0] for r in recorder.alive] == [1, 2]
    assert len(fast.cuda_graphs) == 2


def test_a_pool_is_not_used_after_its_last_graph() -> None:
    fast, recorder = graphed(max_signatures=1)
    for batch in (1, 2, 1):
        before = recorder.resets
        fast(image(batch=batch))
        assert recorder.resets == before + 1


def test_too_many_signatures_warn_once() -> None:
    fast, _ = graphed(max_signatures=1)
    with pytest.warns(RuntimeWarning, match="4 CUDA graphs were captured, of which") as seen:
        calls(fast, *(image(batch=batch) for batch in range(1, 8)))
    assert len(seen) == 1


# --- calls that are not replayed ----------------------------------------------------------------


class Ignorant(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def counts(recorder: FakeRecorder) -> tuple[int, int]:
    return recorder.records, recorder.replays


def test_modes_and_transforms_run_as_ever() -> None:
    fast, recorder = graphed()
    x = image()
    expected = fast(x)
    for mode in (Ignorant, Seen, torch.autograd.forward_ad.dual_level):
        with mode():
            same(fast(x), expected)
    torch.testing.assert_close(torch.func.vmap(fast)(x[:, None])[:, 0], expected)
    fast(x.as_subclass(Subclass))
    fast(image().to_sparse().to_dense())
    assert counts(recorder) == (1, 1)
    with torch.device("cpu"):
        for _ in range(2):
            same(fast(x), expected)
    assert counts(recorder) == (2, 2)


def test_inside_a_capture_nothing_is_captured_or_replayed() -> None:
    fast, recorder = graphed()
    x = image()
    recorder.capturing = True
    expected = fast(x)
    recorder.capturing = False
    for _ in range(2):
        fast(x)
    recorder.capturing = True
    same(fast(x), expected)
    assert counts(recorder) == (1, 1)


def test_other_devices_run_as_ever() -> None:
    fast, recorder = graphed()
    recorder.device_type = "cuda"
    fast(image())
    mixed, other = graphed(Flexible().eval())
    mixed.to("meta")
    mixed({"image": image().to("meta")}, (0, torch.ones(())))
    assert recorder.records == other.records == 0


@torch.enable_grad()
def test_gradients_run_as_ever() -> None:
    fast, recorder = graphed()
    x = image()
    with pytest.warns(RuntimeWarning, match=r"no effect while gradients .*inference_mode") as seen:
        results = calls(fast, x, x, x)
    assert len(seen) == 1
    assert all(result.requires_grad for result in results)
    with torch.no_grad():
        for _ in range(2):
            fast(x)
    assert fast(x).requires_grad
    assert counts(recorder) == (1, 1)
    fast.requires_grad_(False)
    assert not fast(x).requires_grad
    x.requires_grad_()
    assert fast(x).requires_grad
    assert counts(recorder) == (1, 2)


def test_results_in_every_mode_are_what_they_are_without_graphs() -> None:
    for first, second in ((torch.no_grad, torch.inference_mode), (torch.inference_mode,) * 2):
        fast, recorder = graphed()
        with first():
            x = image()
            expected = fast(x)
            result = fast(x)
            assert result.is_inference() == expected.is_inference() == (first != torch.no_grad)
        with second():
            assert fast(image()).is_inference()
        result = fast(image())
        assert not result.is_inference()
        same(result, expected)
        assert counts(recorder) == (1, 3)


def test_what_changes_numbers_has_a_graph_of_its_own() -> None:
    fast, recorder = graphed()
    x = image()
    fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert fast(x).dtype == torch.bfloat16
    assert counts(recorder) == (2, 1)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if before != "tf32" else "ieee"
        fast(x)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    torch.use_deterministic_algorithms(True)
    try:
        fast(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counts(recorder) == (4, 1)


def test_a_failed_capture_is_one_warning() -> None:
    fast, recorder = graphed()
    plain = dwswap.optimize(fast)
    recorder.fails = RuntimeError("operation not permitted when stream is capturing\nand more")
    x = image()
    with pytest.warns(RuntimeWarning) as seen:
        *results, _ = calls(fast, x, x, x, image(batch=1))
    same(results, [plain(x)] * 3)
    assert len(seen) == 1
    assert str(seen[0].message) == (
        "dwswap: calls like this one run without a CUDA graph: RuntimeError: "
        "operation not permitted when stream is capturing"
    )
    assert recorder.records == 2
    recorder.fails = None
    for _ in range(2):
        fast(image(batch=3))
    assert recorder.replays == 1
    # After a change of the weights another attempt is made.
    fast.float()
    for _ in range(2):
        fast(x)
    assert recorder.replays == 2


def test_the_first_of_two_errors_is_the_cause() -> None:
    fast, recorder = graphed()

    def record(*_: Any) -> Any:
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError("the end of the capture failed, too")

    recorder.record = record  # type: ignore[method-assign]
    try:
        raise KeyError("the caller's own")
    except KeyError:
        with pytest.warns(RuntimeWarning, match="ValueError: the cause"):
            fast(image())


def test_an_error_of_the_model_is_the_callers() -> None:
    fast, recorder = graphed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="channels"):
                fast(image(5))
        with pytest.raises(TypeError):
            fast(image(), image())
        fast(image())
        fast(image())
    assert counts(recorder) == (1, 1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.conv(x) + self.calls


def test_a_model_that_changes_its_buffers_is_not_captured() -> None:
    fast, recorder = graphed(Counting().eval())
    with pytest.warns(RuntimeWarning, match="it changes a buffer in place"):
        calls(fast, image(), image(), image())
    assert fast.calls == 3
    assert recorder.records == 0


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(3)

    def forward(self, x: Tensor) -> Any:
        return {"a": self.conv(x), "b": slice(0, 1)}


def test_an_output_that_may_hide_a_tensor_is_not_captured() -> None:
    fast, recorder = graphed(Opaque().eval())
    with pytest.warns(RuntimeWarning, match="it returns a slice"):
        fast(image())
    assert fast(image())["b"] == slice(0, 1)
    assert recorder.records == 0


# --- weights ------------------------------------------------------------------------------------


def test_outputs_outlive_the_next_call() -> None:
    for clone in (True, False):
        fast, _ = graphed(clone_outputs=clone)
        fast(image())
        first = fast(image())
        kept = first.clone()
        second = fast(image() + 1)
        assert (first is second) == (not clone)
        assert torch.equal(first, kept) == clone


def test_values_that_change_in_place_are_used_without_a_new_capture() -> None:
    fast, recorder = graphed()
    x = image()
    fast(x)
    before = fast(x)
    state = {name: value * 2 for name, value in fast.state_dict().items()}
    fast.load_state_dict(state)
    after = fast(x)
    assert not torch.equal(before, after)
    same(after, dwswap.optimize(fast)(x))
    assert counts(recorder) == (1, 2)


CONV = "depthwise"


def _new_parameter(fast: Any) -> None:
    conv = fast.get_submodule(CONV)
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def _data(fast: Any) -> None:
    conv = fast.get_submodule(CONV)
    conv.weight.data = conv.weight.detach() * 2


def _set(fast: Any) -> None:
    conv = fast.get_submodule(CONV)
    conv.weight.set_(conv.weight.detach() * 2)


def _deleted(fast: Any) -> None:
    fast.get_submodule(CONV).register_parameter("bias", None)


def _module(fast: Any) -> None:
    fast.add_module(CONV, depthwise())


def _norm(fast: Any) -> None:
    fast.get_submodule("norm").running_mean = torch.ones(8)


def _assign(fast: Any) -> None:
    state = {name: value * 2 for name, value in fast.state_dict().items()}
    fast.load_state_dict(state, assign=True)


def _graph(fast: Any) -> None:
    (output,) = (node for node in fast.graph.nodes if node.op == "output")
    with fast.graph.inserting_before(output):
        output.args = (fast.graph.call_function(torch.relu, output.args),)
    fast.recompile()


def _parametrized(fast: Any) -> None:
    nn.utils.parametrizations.weight_norm(fast.get_submodule(CONV))
    with torch.no_grad():
        fast.get_submodule(CONV).parametrizations.weight.original0.mul_(2)


def _child(fast: Any) -> None:
    fast.get_submodule(CONV).double().float()
    with torch.no_grad():
        fast.get_submodule(CONV).weight.mul_(2)


@pytest.mark.parametrize(
    "change", [_new_parameter, _data, _set, _deleted, _module, _norm, _parametrized, _child]
)
def test_what_is_replaced_is_noticed(change: Callable[[Any], None]) -> None:
    fast, recorder = graphed()
    # What a fake replay computes would follow the change; a real one would not.
    recorder.computes = False
    x = image()
    fast(x)
    before = fast(x)
    change(fast)
    after = fast(x)
    assert not torch.equal(before, after)
    same(after, dwswap.optimize(fast)(x))
    assert len(recorder.alive) == 0
    for _ in range(2):
        same(fast(x), after)
    assert recorder.records == 2
    assert len(recorder.alive) == 1


@pytest.mark.parametrize(
    "change",
    [
        _assign,
        lambda fast: fast.double(),
        lambda fast: fast.half(),
        lambda fast: fast.to("meta"),
        _graph,
        lambda fast: fast.release_cuda_graphs(),
    ],
)
def test_memory_is_given_back_at_once(change: Callable[[Any], None]) -> None:
    fast, recorder = graphed()
    fast(image())
    assert recorder.alive
    change(fast)
    assert not recorder.alive
    assert fast.cuda_graphs._guard is None


def test_functional_call_never_pays_for_a_capture() -> None:
    fast, recorder = graphed()
    recorder.computes = False
    x = image()
    expected = fast(x)
    zeros = {name: torch.zeros_like(p) for name, p in fast.named_parameters()}
    for _ in range(3):
        assert not torch.func.functional_call(fast, zeros, (x,)).any()
        same(fast(x), expected)
    assert recorder.records == 1


@pytest.mark.parametrize("where", ["hook", "pre-hook", "global hook", "train"])
def test_hooks_inside_and_train_mode_run_as_ever(where: str) -> None:
    fast, recorder = graphed()
    x = image()
    fast(x)
    before = fast(x)
    called = []
    conv, norm = fast.get_submodule(CONV), fast.get_submodule("norm")
    if where == "hook":
        handle = conv.register_forward_hook(lambda *_: called.append(1))
    elif where == "pre-hook":
        handle = conv.register_forward_pre_hook(lambda *_: called.append(1))
    elif where == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    else:
        state = copy.deepcopy(norm.state_dict())
        norm.train()
    for batch in (2, 3):
        after = fast(image(batch=batch))
    assert counts(recorder) == (1, 1)
    if where == "train":
        assert not torch.equal(before, after[:2])
        norm.eval().load_state_dict(state)
    else:
        assert called
        handle.remove()
    same(fast(x), before)
    assert counts(recorder) == (1, 2)


def test_weights_that_cannot_be_watched() -> None:
    fast, recorder = graphed()
    conv = fast.get_submodule(CONV)
    weight = conv.weight
    conv.weight = nn.Parameter(weight.detach().as_subclass(Subclass))
    with pytest.warns(RuntimeWarning, match="it has a weight that is a Subclass"):
        calls(fast, image(), image())
    assert recorder.records == 0
    conv.weight = weight
    for _ in range(3):
        fast(image(batch=1))
    assert recorder.records == 1


def test_a_guard_keeps_the_memory_that_a_replay_reads() -> None:
    fast, _ = graphed()
    guard = WeightGuard(fast)
    weight = fast.get_submodule(CONV).weight
    address = weight.data_ptr()
    weight.data = torch.zeros_like(weight)
    gc.collect()
    assert not guard.holds()
    held = [t for t in guard._memory if t.data_ptr() == address]
    assert len(held) == 1
    assert held[0].any()


# --- the host's time ----------------------------------------------------------------------------


def test_a_replay_takes_few_python_calls() -> None:
    """Counted, as a time would depend on the machine; half of them are torch's own."""
    fast, recorder = graphed()
    x = image()
    fast(x)
    recorder.alive[0].replay = lambda tensors: tensors  # type: ignore[method-assign]
    events: list[str] = []
    sys.setprofile(lambda frame, event, _: events.append(event))
    try:
        fast(x)
    finally:
        sys.setprofile(None)
    assert events.count("call") <= 22, events.count("call")


# --- threads ------------------------------------------------------------------------------------


def test_threads() -> None:
    fast, recorder = graphed(max_signatures=2)
    plain = dwswap.optimize(fast)
    inputs = [image(batch=1 + n % 3) + n for n in range(8)]
    expected = [plain(x) for x in inputs]
    wrong: list[Any] = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(40):
                if not torch.equal(fast(inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert recorder.most_busy == 1
    assert len(fast.cuda_graphs) <= 2
    assert len(recorder.alive) == len(fast.cuda_graphs)


def test_data_parallel_replicas_do_not_replay() -> None:
    fast, recorder = graphed()
    replica = fast._replicate_for_data_parallel()
    replica(image())
    replica(image())
    assert recorder.records == 0
