"""optimize(cuda_graph=True) as far as it needs no GPU: the module, and what makes a signature."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda_graphs import Subclass, calls, faked, graphed, no_grad, same
from tiny_models import (
    Block,
    ControlFlow,
    Functional,
    InvertedResidual,
    Unfusable,
    depthwise,
    image,
)
from torch import Tensor, fx, nn

import dwswap
from dwswap import CudaGraphOptions
from dwswap.call_signature import NoSignature, same_tensors_together, signature
from dwswap.cuda_graph_module import CudaGraphModule

__all__ = ["no_grad"]
pytestmark = pytest.mark.usefixtures("no_grad")

# --- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Block, Unfusable])
def test_on_the_cpu_it_is_the_same_model(cls: type[Block]) -> None:
    model = cls().eval()
    plain, fast = dwswap.optimize(model), dwswap.optimize(model, cuda_graph=True)
    assert isinstance(fast, CudaGraphModule)
    assert isinstance(fast, fx.GraphModule)
    # Of a fused graph the keys are new ones.
    same_keys = model if cls is Unfusable else plain
    assert list(fast.state_dict()) == list(same_keys.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in same_keys.named_parameters()]
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in plain.named_modules()]
    assert fast.code == plain.code
    assert fast.name == "block"
    same(fast(image()), plain(image()))
    assert len(fast.cuda_graphs) == 0
    assert type(fast).__name__ == cls.__name__
    text = repr(fast)
    assert "CudaGraphOptions(max_signatures=8, clone_outputs=True), signatures captured: 0" in text
    assert ("DepthwiseConv2d(8, 8" in text) == (cls is Unfusable)
    assert ("(depthwise_folded)" in text) == (cls is Block)
    with pytest.raises(RuntimeError, match="optimized for inference"):
        fast.train()
    assert fast.eval() is fast


@pytest.mark.parametrize("cls", [Block, Unfusable])
@pytest.mark.parametrize("inplace", [False, True])
def test_models_that_are_graphs_already(inplace: bool, cls: type[Block]) -> None:
    model = cls().eval()
    for given in (fx.symbolic_trace(model), torch.export.export(model, (image(),)).module()):
        expected = given(image())
        before = list(given.state_dict())
        keys = list(dwswap.optimize(given).state_dict())
        assert list(given.state_dict()) == before
        assert (keys == before) == (cls is Unfusable)
        fast, recorder = faked(dwswap.optimize(given, cuda_graph=True, inplace=inplace))
        assert list(fast.state_dict()) == keys
        assert list(given.state_dict()) == (keys if inplace else before)
        for _ in range(3):
            torch.testing.assert_close(fast(image()), expected, rtol=0, atol=1e-6)
        assert recorder.replays == 2
        assert dwswap.report(fast).swapped


def test_report() -> None:
    report = dwswap.report(dwswap.optimize(Block().eval(), cuda_graph=True))
    assert report.cuda_graph == "on: at most 8 signatures, for calls on CUDA"
    assert str(report).splitlines()[-1] == f"cuda_graph {report.cuda_graph}"
    assert report.to_dict()["cuda_graph"] == report.cuda_graph
    assert dwswap.report(dwswap.optimize(Block().eval())).cuda_graph is None


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Block().train(), {}, "train mode"),
        (Block().eval(), {"fuse": False}, "fuse=False"),
        (ControlFlow(depthwise(3)).eval(), {}, "control flow"),
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


def test_graphs_inside_a_model_get_theirs() -> None:
    fast = dwswap.optimize(ControlFlow().eval(), cuda_graph=True)
    assert type(fast) is ControlFlow
    assert isinstance(fast.block, CudaGraphModule)
    assert dwswap.report(fast).cuda_graph == "on in block: at most 8 signatures, for calls on CUDA"


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
    fast, recorder = graphed(Unfusable().eval())
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


@pytest.mark.parametrize("inplace", [False, True])
def test_restore_of_a_call(inplace: bool) -> None:
    fast, recorder = graphed(Functional(_conv2d, channels=3).eval())
    x = image()
    expected = fast(x)
    assert "depthwise_conv2d" in fast.code
    restored = dwswap.restore(fast, inplace=inplace)
    assert (restored is fast) == inplace
    assert "depthwise_conv2d" not in restored.code
    for _ in range(2):
        torch.testing.assert_close(restored(x), expected, rtol=0, atol=1e-6)
    assert recorder.replays == 0
    assert len(recorder.alive) == (0 if inplace else 1)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=groups)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Block(), "model cannot be restored: BatchNorm was folded"),
        (nn.Sequential(depthwise(3), nn.ReLU()), "cannot be restored"),
    ],
    ids=["folded", "absorbed"],
)
def test_a_fused_graph_that_cannot_be_restored_keeps_its_cuda_graphs(
    model: nn.Module, reason: str, inplace: bool
) -> None:
    fast, recorder = graphed(model.eval())
    x = image()
    expected = fast(x)
    with pytest.raises(ValueError, match=reason):
        dwswap.restore(fast, inplace=inplace)
    same(fast(x), expected)
    assert (recorder.records, recorder.replays) == (1, 1)
    assert len(recorder.alive) == 1
    assert dwswap.report(fast).cuda_graph == "on: at most 8 signatures, for calls on CUDA"


def test_a_fused_block_of_mobilenet_v2() -> None:
    """Folded, absorbed and replayed: keys, numbers, weights, hooks and copies, all of them."""
    model = InvertedResidual().eval()
    checkpoint = model.state_dict()
    plain = dwswap.optimize(model)
    optimized = dwswap.optimize(model, image(), verify=True, cuda_graph=True)
    fast, recorder = faked(optimized)
    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed
    assert (report.calls_before, report.calls_after) == (9, 4)
    assert fast.code == plain.code
    assert list(fast.state_dict()) == [
        *("conv.0.0_folded.weight", "conv.0.0_folded.bias"),
        *("conv.1.0_folded.weight", "conv.1.0_folded.bias"),
        *("conv.2_folded.weight", "conv.2_folded.bias"),
    ]
    for seed in range(3):
        for batch in (1, 2):
            x = image(batch=batch) + seed
            same(fast(x), plain(x))
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert (recorder.records, recorder.replays) == (2, 10)

    x = image()
    before = fast(x)
    for name, parameter in fast.named_parameters():
        for changed in (parameter, plain.get_parameter(name)):
            changed.mul_(0.5)
        assert not torch.equal(fast(x), before)
        same(fast(x), plain(x))
    assert recorder.records == 2
    fast.load_state_dict(plain.state_dict())
    same(fast(x), plain(x))

    handle = fast.register_forward_hook(_plus_one)
    same(fast(x), plain(x) + 1)
    handle.remove()
    for again in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(again, CudaGraphModule)
        same(again(x), plain(x))
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="folded into other weights"):
                again.load_state_dict(checkpoint, strict=strict)
        with pytest.raises(ValueError, match="BatchNorm was folded"):
            dwswap.restore(again)
        same(again(x), plain(x))
    assert recorder.records == 2


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
