"""select="measured": arguments, verdicts, what is put back, what is kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Block, ControlFlow, Functional, depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap import DepthwiseConv2d, build, selection, selection_cache
from dwswap.bench.timing import Timing
from dwswap.selection import Problem, Strided, machine, measure
from dwswap.selection_cache import FILE, Times, known_times, remember
from dwswap.swapped_layers import LayerCall


@dataclass
class FakeGPU:
    """The CPU as a GPU on which ours takes 10 us and PyTorch 20, or ``aten[channels]``."""

    name: str = "GPU of the test"
    aten: dict[int, float] = field(default_factory=dict)
    measured: list[Problem] = field(default_factory=list)

    def machine(self, device: torch.device) -> str:
        return self.name

    def measure(self, problem: Problem, device: torch.device) -> Times:
        self.measured.append(problem)
        return Times(10.0, self.aten.get(problem.input.size[-3], 20.0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DWSWAP_CACHE_DIR", str(tmp_path / "cache"))
    # Where the cache cannot be written, something else than this user's own folder is next.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "cache" / FILE


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    fake = FakeGPU()
    monkeypatch.setattr(selection, "machine", fake.machine)
    monkeypatch.setattr(selection, "measure", fake.measure)
    return fake


class Chain(nn.Module):
    """Depthwise layers of 8, 8 and 12 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one = depthwise(8)
        self.two = depthwise(8)
        self.widen = nn.Conv2d(8, 12, 1)
        self.three = depthwise(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.widen(self.two(self.one(x))))


def optimize(model: nn.Module, x: Any = None, **options: Any) -> Any:
    return dwswap.optimize(model, image(8) if x is None else x, select="measured", **options)


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.path: layer.reason for layer in dwswap.report(model).layers}


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"select must be .* got 'fastest'"):
        dwswap.optimize(Block(), image(), select="fastest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='select="measured" needs example_inputs, got None'):
        dwswap.optimize(Block(), select="measured")


def test_nothing_to_choose_without_our_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    monkeypatch.setattr(selection, "measure", None)
    with caplog.at_level(logging.INFO, logger="dwswap"):
        fast = optimize(Chain().eval())
    report = dwswap.report(fast)
    assert len(report.swapped) == 3
    assert report.select is not None
    assert str(report).splitlines()[-1] == f"select: {report.select}"
    assert "all swaps stay" in report.select
    first, summary = caplog.records
    assert "nothing to choose" in first.getMessage()
    assert {first.levelno, summary.levelno} == {logging.INFO}
    assert not cache.exists()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [Chain, lambda: ControlFlow(Chain())])
@pytest.mark.parametrize("train", [False, True])
def test_slower_layers_are_put_back(
    gpu: FakeGPU, make: Callable[[], nn.Module], train: bool, inplace: bool
) -> None:
    gpu.aten[12] = 5.0
    model, x = make().train(train), image(8)
    prefix = "block." if isinstance(model, ControlFlow) else ""
    expected, keys = model(x), list(model.state_dict())
    fast = optimize(model, x, inplace=inplace)
    layers = {layer.path: layer for layer in dwswap.report(fast).layers}
    slower = layers[prefix + "three"]
    assert (slower.decision, slower.reason) == ("kept", "slower_here")
    assert "10.0 us" in slower.detail
    assert "5.0 us" in slower.detail
    assert layers[prefix + "one"].decision == layers[prefix + "two"].decision == "swapped"
    assert type(fast.get_submodule(prefix + "three")) is nn.Conv2d
    assert type(fast.get_submodule(prefix + "one")) is DepthwiseConv2d
    assert list(fast.state_dict()) == keys
    assert "1 slower_here" in dwswap.report(fast).summary()
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-6)


def test_a_little_slower_is_not_slower(gpu: FakeGPU) -> None:
    gpu.aten |= {8: 10 / 1.02, 12: 10 / 1.04}
    assert reasons(optimize(Chain().eval())) == {
        "one": "depthwise",
        "two": "depthwise",
        "widen": "not_depthwise",
        "three": "slower_here",
    }


def test_everything_is_slower(gpu: FakeGPU) -> None:
    gpu.aten |= {8: 5.0, 12: 5.0}
    for model in (Chain().eval(), Chain().train(), depthwise().eval()):
        fast = optimize(model)
        assert dwswap.report(fast).mode == "unchanged"
        assert type(fast) is type(model)
        assert torch.equal(fast(image(8)), model(image(8)))
        assert optimize(model, inplace=True) is model


def test_slower_calls_are_put_back(gpu: FakeGPU) -> None:
    def call(x: Tensor, w: Tensor, b: Tensor, c: int) -> Tensor:
        return F.conv2d(x, w, b, padding="same", groups=c)

    model = nn.Sequential(Functional(call), nn.Conv2d(8, 12, 1), Functional(call, 12)).eval()
    gpu.aten[12] = 5.0
    fast = optimize(model)
    assert sorted(reasons(fast).values()) == ["depthwise", "not_depthwise", "slower_here"]
    assert [problem.padding for problem in gpu.measured] == ["same", "same"]
    torch.testing.assert_close(fast(image(8)), model(image(8)))


def test_verify_checks_what_is_left(gpu: FakeGPU) -> None:
    gpu.aten[12] = 5.0
    fast = optimize(Chain().eval(), verify=True)
    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed
    assert [layer.path for layer in report.layers if layer.errors] == ["one", "two"]


def test_shared_layer_is_judged_by_the_mean_of_its_calls(gpu: FakeGPU) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[..., :4])

    gpu.aten[8] = 9.0
    fast = optimize(Twice().eval())
    assert [problem.input.size[-1] for problem in gpu.measured] == [9, 4]
    assert "10.0 us, 9.0 us" in dwswap.report(fast).layers[0].detail


def test_layer_that_is_never_called_stays_swapped(gpu: FakeGPU) -> None:
    model = ControlFlow(Chain()).eval()
    model.spare = depthwise(12)
    gpu.aten[12] = 5.0
    assert reasons(optimize(model))["spare"] == "depthwise"


def test_equal_layers_are_measured_once(gpu: FakeGPU) -> None:
    optimize(Chain().eval())
    assert [problem.input.size[1] for problem in gpu.measured] == [8, 12]


def test_what_makes_layers_differ(gpu: FakeGPU) -> None:
    x = image(8)
    cases: list[tuple[nn.Module, Tensor]] = [
        (depthwise(), x),
        (depthwise(), x[:1]),
        (depthwise(), x.to(memory_format=torch.channels_last)),
        (depthwise().double(), x.double()),
        (depthwise(bias=False), x),
        (depthwise(stride=2), x),
        (depthwise(padding=2), x),
        (depthwise(padding="valid"), x),
        (depthwise(dilation=2), x),
        (depthwise(kernel_size=5), x),
        (depthwise(multiplier=2), x),
        (depthwise().to(memory_format=torch.channels_last), x),
    ]
    for model, given in cases:
        optimize(nn.Sequential(model).eval(), given)
    assert len({str(problem) for problem in gpu.measured}) == len(gpu.measured) == len(cases)


def test_dtype_is_that_of_autocast(gpu: FakeGPU) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        optimize(Chain().eval())
    assert {problem.dtype for problem in gpu.measured} == {torch.bfloat16}


def test_model_that_fails_when_it_really_runs(gpu: FakeGPU) -> None:
    class Fails(Chain):
        def forward(self, x: Tensor) -> Tensor:
            if type(x) is Tensor:
                raise RuntimeError("no real tensors")
            return super().forward(x)

    model = Fails().eval()
    with pytest.raises(ValueError, match="runs on example_inputs, got RuntimeError: no real"):
        optimize(model, fuse=False, inplace=True)
    assert type(model.one) is nn.Conv2d


def test_what_does_not_fit_stays_swapped(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    def full(*_: Any) -> Times:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(selection, "measure", full)
    assert len(dwswap.report(optimize(Chain().eval())).swapped) == 3
    assert "is not measured: out of memory" in caplog.text
    assert not cache.exists()


def test_second_call_measures_nothing(gpu: FakeGPU) -> None:
    gpu.aten[12] = 5.0
    first = optimize(Chain().eval())
    count = len(gpu.measured)
    second = optimize(Chain().eval())
    assert len(gpu.measured) == count
    assert dwswap.report(second).layers == dwswap.report(first).layers


def test_another_machine_measures_anew(gpu: FakeGPU) -> None:
    optimize(Chain().eval())
    count = len(gpu.measured)
    gpu.name, gpu.aten[12] = "another GPU", 5.0
    assert reasons(optimize(Chain().eval()))["three"] == "slower_here"
    assert len(gpu.measured) == 2 * count
    gpu.name = "GPU of the test"
    assert reasons(optimize(Chain().eval()))["three"] == "depthwise"


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, state = torch.device("cuda", 0), SimpleNamespace(name="A", library=Path("/c/key1/lib.so"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: state.name)
    monkeypatch.setattr(build, "status", lambda: build.Status(library=state.library))
    found = [machine(gpu)]
    for name, value in (("name", "B"), ("library", Path("/c/key2/lib.so"))):
        setattr(state, name, value)
        found.append(machine(gpu))
    monkeypatch.setattr(torch, "__version__", "0.1")
    found.append(machine(gpu))
    monkeypatch.setenv("DWSWAP_PORTABLE", "1")
    found.append(machine(gpu))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found.append(machine(gpu))
    assert None not in found
    assert len(set(found)) == len(found)
    assert machine(torch.device("cpu")) is None
    state.library = None
    assert machine(gpu) is None


@pytest.mark.parametrize("size", [(2, 8, 9, 9), (8, 9, 9)])
def test_measure(monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...]) -> None:
    """What is launched is the layer as the model calls it; the best round of each side counts."""
    answers = iter([7.0, 5.0, 6.0, 8.0])
    outputs = []

    def time_launches(launches: Sequence[Any], device: Any, *, budget: float) -> Timing:
        assert len({launch.args[0].data_ptr() for launch in launches}) > 1
        assert Strided.of(launches[0].args[0]) == problem.input
        outputs.append(launches[0]())
        time = next(answers)
        return Timing(time, time, time, 1, "fake")

    x = image(16)[:, ::2] if len(size) == 4 else torch.empty(size)
    weight, bias = torch.empty(16, 1, 3, 3), torch.empty(16)
    output = F.conv2d(x, weight, bias, padding="same", groups=8)
    call = LayerCall("conv", x, weight, bias, (1, "same", [1, 1], 8), output)
    problem = Problem.of(call)
    monkeypatch.setattr(selection, "time_launches", time_launches)
    state = torch.get_rng_state()
    assert measure(problem, torch.device("cpu")) == Times(6.0, 5.0)
    assert torch.equal(torch.get_rng_state(), state)
    for result in outputs:
        assert result.shape == output.shape
        torch.testing.assert_close(result, outputs[0])


def test_measure_on_the_clock() -> None:
    layout = Strided((1, 8, 9, 9), (648, 81, 9, 1))
    weight = Strided((8, 1, 3, 3), (9, 9, 3, 1))
    problem = Problem(torch.float32, layout, weight, False, (1, 1), (1, 1), (1, 1))
    assert all(time > 0 for time in measure(problem, torch.device("cpu")))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b'{"key": 1}', b'{"key": [1.0]}', b'{"key": [1.0, NaN]}'],
)
def test_corrupt_file_counts_as_empty(
    gpu: FakeGPU, cache: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    optimize(Chain().eval())
    assert f"ignoring the measured times in {cache}" in caplog.text
    assert len(known_times()) == len(gpu.measured) == 2


def test_cache_that_cannot_be_written_only_logs(
    gpu: FakeGPU, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder should be")
    optimize(Chain().eval())
    assert "using" in caplog.text  # a folder of the temp dir
    optimize(Chain().eval())
    assert len(gpu.measured) == 2
    (folder,) = tmp_path.glob("dwswap-*")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("another one")
    optimize(Chain().eval())
    assert "the measured times are not kept" in caplog.text
    assert len(gpu.measured) == 4


def test_error_of_the_program_is_not_hidden() -> None:
    with pytest.raises(TypeError):
        remember({"key": object()})  # type: ignore[dict-item]


def test_concurrent_writers_lose_nothing(cache: Path) -> None:
    def write(number: int) -> None:
        remember({f"key {number}": Times(1.0 + number, 2.0)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert known_times() == {f"key {i}": Times(1.0 + i, 2.0) for i in range(40)}
    assert {path.name for path in cache.parent.iterdir()} <= {FILE, f"{FILE}.lock"}


def test_lock_that_stays_held_only_logs(
    monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(selection_cache, "LOCK_SECONDS", 0.1)
    cache.parent.mkdir()
    with FileLock(f"{cache}.lock"):
        remember({"key": Times(1.0, 2.0)})
    assert "are not kept" in caplog.text


def test_what_stays_swapped_is_fused(gpu: FakeGPU) -> None:
    """Layers are timed alone, and one that goes back has nothing to absorb with."""
    gpu.aten[12] = 5.0
    model = nn.Sequential(
        *(depthwise(8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)),
        *(nn.ReLU(), depthwise(12), nn.BatchNorm2d(12), nn.SiLU()),
    ).eval()
    fast = optimize(model, image(8), verify=True)
    assert [problem.input.size[-3] for problem in gpu.measured] == [8, 12]
    assert reasons(fast) == {"0": "depthwise", "3": "not_depthwise", "6": "slower_here"}
    calls = [node.target for node in fast.graph.nodes if node.op.startswith("call")]
    assert calls == [dwswap.depthwise_conv2d, torch.conv2d, "5", torch.conv2d, "8"]
    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed
    changes = [[str(change) for change in layer.changes] for layer in report.layers]
    assert changes == [
        ["folded 1", "absorbed relu after it"],
        ["folded 4", "keeps its bias (not_linear: 5 is not linear)"],
        ["folded 7", "keeps its bias (not_linear: 8 is not linear)"],
    ]
    torch.testing.assert_close(fast(image(8)), model(image(8)), rtol=0, atol=1e-5)
