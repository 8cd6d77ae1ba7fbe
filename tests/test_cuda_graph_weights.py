"""CUDA graphs and their model: outputs, weights that change, hooks inside, time, threads."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda_graphs import Subclass, calls, counts, graphed, no_grad, same
from tiny_models import Block, Unfusable, depthwise, image
from torch import nn

import dwswap
from dwswap.weight_guard import WeightGuard

__all__ = ["no_grad"]
pytestmark = pytest.mark.usefixtures("no_grad")

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


def test_folded_parameters_that_change_in_place() -> None:
    model = Block().eval()
    fast, recorder = graphed(model)
    plain = dwswap.optimize(model)
    x = image()
    fast(x)
    names = [name for name, _ in fast.named_parameters()]
    assert {"depthwise_folded.weight", "depthwise_folded.bias", "expand.bias"} < {*names}
    for name in names:
        before = fast(x)
        for graph in (fast, plain):
            graph.get_parameter(name).mul_(2)
        after = fast(x)
        assert not torch.equal(before, after), name
        same(after, plain(x))
    assert counts(recorder) == (1, 2 * len(names))


CONV = "depthwise"
FOLDED = "depthwise_folded"
# A convolution is a module of the graph, or its folded tensors are attributes that the graph reads.
WHERE = pytest.mark.parametrize(
    ("cls", "path"), [(Unfusable, CONV), (Block, FOLDED)], ids=["module", "folded"]
)


def _new_parameter(fast: Any, path: str) -> None:
    conv = fast.get_submodule(path)
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def _data(fast: Any, path: str) -> None:
    conv = fast.get_submodule(path)
    conv.weight.data = conv.weight.detach() * 2


def _set(fast: Any, path: str) -> None:
    conv = fast.get_submodule(path)
    conv.weight.set_(conv.weight.detach() * 2)


def _deleted(fast: Any, path: str) -> None:
    fast.get_submodule(path).register_parameter("bias", None)


def _module(fast: Any, path: str) -> None:
    fast.set_submodule(path, depthwise())


def _norm(fast: Any, path: str) -> None:
    fast.get_submodule("norm").running_mean = torch.ones(8)


def _assign(fast: Any) -> None:
    state = {name: value * 2 for name, value in fast.state_dict().items()}
    fast.load_state_dict(state, assign=True)


def _graph(fast: Any) -> None:
    (output,) = (node for node in fast.graph.nodes if node.op == "output")
    with fast.graph.inserting_before(output):
        output.args = (fast.graph.call_function(torch.relu, output.args),)
    fast.recompile()


def _parametrized(fast: Any, path: str) -> None:
    nn.utils.parametrizations.weight_norm(fast.get_submodule(path))
    with torch.no_grad():
        fast.get_submodule(path).parametrizations.weight.original0.mul_(2)


def _child(fast: Any, path: str) -> None:
    fast.get_submodule(path).double().float()
    with torch.no_grad():
        fast.get_submodule(path).weight.mul_(2)


EVERYWHERE = [_new_parameter, _data, _set, _deleted, _module, _child]


@pytest.mark.parametrize(
    ("cls", "path", "change"),
    [
        *((Unfusable, CONV, change) for change in (*EVERYWHERE, _norm, _parametrized)),
        # What has folded weights takes no other module in its place.
        *((Block, FOLDED, change) for change in EVERYWHERE if change is not _module),
    ],
)
def test_what_is_replaced_is_noticed(
    cls: type[Block], path: str, change: Callable[[Any, str], None]
) -> None:
    fast, recorder = graphed(cls().eval())
    # What a fake replay computes would follow the change; a real one would not.
    recorder.computes = False
    x = image()
    fast(x)
    before = fast(x)
    change(fast, path)
    after = fast(x)
    assert not torch.equal(before, after)
    same(after, copy.deepcopy(fast)(x))  # which has no graphs on the CPU
    assert len(recorder.alive) == 0
    for _ in range(2):
        same(fast(x), after)
    assert recorder.records == 2
    assert len(recorder.alive) == 1


def test_a_folded_weight_that_is_parametrized_is_not_captured() -> None:
    fast, recorder = graphed()
    x = image()
    fast(x)
    before = fast(x)
    _parametrized(fast, FOLDED)
    after = fast(x)
    assert not torch.equal(before, after)
    with pytest.warns(RuntimeWarning, match=f"{FOLDED}.weight is neither a parameter nor"):
        same(calls(fast, x, x), [after] * 2)
    assert counts(recorder) == (1, 2)
    assert not recorder.alive


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
    fast, recorder = graphed(Unfusable().eval())
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


@pytest.mark.parametrize("where", ["hook", "pre-hook", "global hook"])
def test_hooks_on_what_is_left_of_a_fused_graph_run_as_ever(where: str) -> None:
    fast, recorder = graphed()
    x = image()
    fast(x)
    before = fast(x)
    called = []
    dropout = fast.get_submodule("dropout")
    if where == "hook":
        handle = dropout.register_forward_hook(lambda *_: called.append(1))
    elif where == "pre-hook":
        handle = dropout.register_forward_pre_hook(lambda *_: called.append(1))
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    same(fast(x), before)
    assert called
    assert counts(recorder) == (1, 1)
    handle.remove()
    same(fast(x), before)
    assert counts(recorder) == (1, 2)


@WHERE
def test_weights_that_cannot_be_watched(cls: type[Block], path: str) -> None:
    fast, recorder = graphed(cls().eval())
    conv = fast.get_submodule(path)
    weight = conv.weight
    conv.weight = nn.Parameter(weight.detach().as_subclass(Subclass))
    with pytest.warns(RuntimeWarning, match="it has a weight that is a Subclass"):
        calls(fast, image(), image())
    assert recorder.records == 0
    conv.weight = weight
    for _ in range(3):
        fast(image(batch=1))
    assert recorder.records == 1


@WHERE
def test_a_guard_keeps_the_memory_that_a_replay_reads(cls: type[Block], path: str) -> None:
    fast, _ = graphed(cls().eval())
    guard = WeightGuard(fast)
    weight = fast.get_submodule(path).weight
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
