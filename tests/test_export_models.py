"""What can be exported: graphs of every kind, shapes that vary, several inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Block, ControlFlow, InvertedResidual, depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.export import ExportError, load, save
from dwswap.export.program import to_aten, to_program
from dwswap.schema import depthwise_conv2d as operator


def targets(program: torch.export.ExportedProgram) -> list[object]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


class TwoInputs(nn.Module):
    """A tensor by position, one by name, a number, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = depthwise(), depthwise(stride=2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"left": self.left(x) * scale, "right": self.right(y).relu()}


MODELS = {
    "graph": lambda: dwswap.optimize(Block().eval()),
    "channels_last graph": lambda: dwswap.optimize(Block().eval(), memory_format="channels_last"),
    "cuda_graph": lambda: dwswap.optimize(Block().eval(), cuda_graph=True),
    "modules": lambda: dwswap.optimize(Block().eval(), fuse=False),
    "multiplier": lambda: dwswap.optimize(Block(multiplier=2).eval()),
    "residual": lambda: dwswap.optimize(InvertedResidual().eval()),
    "not optimized": lambda: Block().eval(),
}


@pytest.mark.parametrize("format", ["pt2", "aten"])
@pytest.mark.parametrize("kind", MODELS)
def test_kinds_of_models(tmp_path: Path, kind: str, format: str) -> None:
    model = MODELS[kind]()
    path = save(model, tmp_path / "m.pt2", image(batch=1), format=format, dynamic_batch=True)
    loaded = load(path)
    for x in (image(batch=1), image(batch=4), image().to(memory_format=torch.channels_last)):
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pt2_keeps_the_operator_and_aten_has_none(memory_format: torch.memory_format) -> None:
    fast = dwswap.optimize(Block().eval())
    x = image().to(memory_format=memory_format)
    program = to_program(fast, x, False, None)
    assert operator in targets(program)
    lowered = targets(to_aten(program))
    names = [str(target) for target in lowered]
    assert not any("dwswap" in name for name in names)
    # Not decomposed any further, and folded: no BatchNorm.
    assert names.count("aten.conv2d.default") == 2
    assert not any("norm" in name or "convolution" in name for name in names)


def test_a_program_without_the_operator_stays_as_it_is() -> None:
    program = to_program(nn.ReLU().eval(), image(), False, None)
    assert to_aten(program) is program


def test_parameters_that_need_no_copy_are_not_changed(tmp_path: Path) -> None:
    fast = dwswap.optimize(Block().eval())
    before = {k: (v.data_ptr(), v.requires_grad) for k, v in fast.named_parameters()}
    save(fast, tmp_path / "m.pt2", image(), format="aten")
    assert {k: (v.data_ptr(), v.requires_grad) for k, v in fast.named_parameters()} == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("format", ["pt2", "aten", pytest.param("onnx", marks=pytest.mark.slow)])
def test_dynamic_sizes(tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    fast = dwswap.optimize(Block().eval())
    shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    loaded = load(save(fast, path, image(), format=format, dynamic_shapes=shapes))
    for size in (5, 9, 32):
        x = image(size=size, batch=3)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), fast(x))


def test_a_fixed_batch_refuses_another(tmp_path: Path) -> None:
    loaded = load(save(dwswap.optimize(Block().eval()), tmp_path / "m.pt2", image()))
    with pytest.raises((AssertionError, RuntimeError), match="2"):
        loaded(image(batch=3))


@pytest.mark.parametrize("format", ["pt2", "aten"])
def test_several_inputs_and_outputs(tmp_path: Path, format: str) -> None:
    fast = dwswap.optimize(TwoInputs().eval())
    inputs = {"x": image(8), "y": image(8), "scale": 0.5}
    path = save(fast, tmp_path / "m.pt2", inputs, format=format, dynamic_batch=True)
    given = {"x": image(8, batch=5), "y": image(8, batch=5), "scale": 0.5}
    with torch.no_grad():
        torch.testing.assert_close(load(path)(**given), fast(**given))


def test_onnx_of_several_inputs_and_outputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    fast = dwswap.optimize(TwoInputs().eval())
    x, y = image(8), image(8) + 1
    loaded = load(save(fast, tmp_path / "m.onnx", (x, y), format="onnx"))
    with torch.no_grad():
        expected = tuple(fast(x, y).values())
    torch.testing.assert_close(loaded(x, y), expected)
    torch.testing.assert_close(loaded(x, y=y), expected)
    with pytest.raises(TypeError, match="x, y"):
        loaded(x)


class Unshuffled(nn.Module):
    """Of a dynamic height, PyTorch computes the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pixel_unshuffle(x, 2))


@pytest.mark.parametrize("fuse", [True, False])
def test_channels_that_are_computed_are_a_number_of_groups(tmp_path: Path, fuse: bool) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    fast, x = dwswap.optimize(Unshuffled().eval(), fuse=fuse), torch.randn(2, 3, 16, 16)
    dims = ({2: torch.export.Dim.DYNAMIC},)
    loaded = load(save(fast, tmp_path / "m.onnx", x, format="onnx", dynamic_shapes=dims))
    x = torch.randn(2, 3, 20, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), fast(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["pt2", "aten"])
def test_outputs_come_in_containers_that_can_be_changed(tmp_path: Path, format: str) -> None:
    fast = dwswap.optimize(TwoInputs().eval())
    path = save(fast, tmp_path / "m.pt2", (image(8), image(8)), format=format)
    assert type(load(path)(image(8), image(8))) is dict


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = depthwise()

    def forward(self, x: Tensor, scale: float = 2.0, shift: bool = True) -> Tensor:
        y = self.depthwise(x) * scale
        return y + 3 if shift else y


def test_onnx_of_arguments_that_are_no_tensors(tmp_path: Path) -> None:
    """They are part of the file: other values would be computed with those of the export."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    fast, x = dwswap.optimize(Scaled().eval()), image(8)
    loaded = load(save(fast, tmp_path / "m.onnx", (x, 2.0, True), format="onnx"))
    with torch.no_grad():
        expected = fast(x)
    for given in ((x, 2.0, True), (x, 2.0), (x,)):
        torch.testing.assert_close(loaded(*given), expected)
    with pytest.raises(ValueError, match=r"args\[1\] must be 2.0, .* in the export, got 5.0$"):
        loaded(x, 5.0)
    with pytest.raises(TypeError, match=r"kwargs\['other'\] must be left out, .*, got 1$"):
        loaded(x, other=1)
    loaded = load(save(fast, tmp_path / "m.onnx", x, format="onnx"))
    torch.testing.assert_close(loaded(x), expected)
    with pytest.raises(TypeError, match=r"args\[1\] must be left out, .*, got 2.0$"):
        loaded(x, 2.0)


class Counting(nn.Module):
    """A buffer changes in every call; outputs depend on it where they are ``shifted``."""

    calls: Tensor

    def __init__(self, shifted: bool = True, size: tuple[int, ...] = (8, 1, 1)) -> None:
        super().__init__()
        self.depthwise, self.shifted = depthwise(), shifted
        self.register_buffer("calls", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.depthwise(x)
        return y + self.calls if self.shifted else y


@pytest.mark.parametrize("optimized", [False, True])
def test_onnx_of_buffers_that_change(tmp_path: Path, optimized: bool) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    x, path = image(8), tmp_path / "m.onnx"
    for shifted in (True, False):
        model: nn.Module = Counting(shifted).eval()
        expected = model.depthwise(x).detach()
        model = dwswap.optimize(model) if optimized else model
        if shifted:
            with pytest.raises(ExportError, match=r"in every call, the forward changes calls$"):
                save(model, path, x, format="onnx")
            assert not path.exists()
        else:
            loaded = load(save(model, path, x, format="onnx"))
            torch.testing.assert_close(loaded(x), expected)


class Returning(nn.Module):
    """What ``more`` makes of the input, next to an image."""

    def __init__(self, more: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.more = depthwise(), more

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"image": self.conv(x), "more": [self.more(x)]}


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    ("more", "format", "got"),
    [
        (lambda x: "text", "pt2", "'text'"),
        (lambda x: "text", "aten", "'text'"),
        (lambda x: 2.5, "aoti", "2.5"),
        (lambda x: 3, "onnx", "3"),
        (lambda x: x.shape[0], "onnx", "one of type int"),
    ],
)
def test_outputs_that_a_file_cannot_hold(
    tmp_path: Path, more: Callable[[Tensor], Any], format: str, got: str, optimized: bool
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
    model: nn.Module = Returning(more).eval()
    model = dwswap.optimize(model) if optimized else model
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    expected = rf"got {re.escape(got)} as output\['more'\]\[0\]$"
    with pytest.raises(ExportError, match=expected):
        save(model, path, image(8), format=format, dynamic_batch=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["pt2", "aten"])
@pytest.mark.parametrize("more", [lambda x: 2.5, lambda x: x.shape[0], lambda x: None])
def test_outputs_that_are_no_tensors(
    tmp_path: Path, more: Callable[[Tensor], Any], format: str
) -> None:
    model, x = Returning(more).eval(), image(8)
    loaded = load(save(dwswap.optimize(model), tmp_path / "m.pt2", x, format=format))
    result = loaded(x)
    assert result["more"] == [more(x)]
    torch.testing.assert_close(result["image"], model(x)["image"])


@pytest.mark.parametrize("persistent", [False, True])
def test_compiled_buffers_of_one_element_that_change(tmp_path: Path, persistent: bool) -> None:
    model = Counting(size=())
    model.register_buffer("calls", torch.zeros(()), persistent=persistent)
    with pytest.raises(ExportError, match=r"in every call, the forward changes calls$"):
        save(dwswap.optimize(model.eval()), tmp_path / "m.pt2", image(8), format="aoti")


class OfDicts(nn.Module):
    def forward(
        self, x: Tensor, images: dict[str, Tensor], more: list[Any]
    ) -> tuple[Tensor, Tensor]:
        """An input that is an output has another name in the file."""
        return x + 10 * images["a"] + 100 * images["b"] + 1000 * more[1], images["a"]


@pytest.mark.parametrize("by_name", [False, True])
def test_onnx_of_dicts_filled_in_another_order(tmp_path: Path, by_name: bool) -> None:
    """The file knows no paths, so dwswap notes them there."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    x, a, b, c = (torch.full((2,), float(i)) for i in range(4))
    images, swapped = {"b": b, "a": a}, {"a": a, "b": b}
    example = {"x": x, "images": images, "more": [5, c]} if by_name else (x, images, [5, c])
    loaded = load(save(OfDicts().eval(), tmp_path / "m.onnx", example, format="onnx"))
    expected = OfDicts()(x, images, [5, c])
    for given in (images, swapped):
        if by_name:
            torch.testing.assert_close(loaded(more=[5, c], images=given, x=x), expected)
        else:
            torch.testing.assert_close(loaded(x, given, [5, c]), expected)
    with pytest.raises(TypeError, match=r"must be x, .*, got args\[0\], args\[1\]\['a'\]$"):
        loaded(x, {"a": a})
    if not by_name:
        with pytest.raises(TypeError, match=r"got args\[0\], .*, kwargs\['x'\]$"):
            loaded(x, images, [5, c], x=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_onnx_of_half_precision_is_valid(tmp_path: Path, dtype: torch.dtype) -> None:
    """Convolutions take bfloat16 from opset 22 on; ONNX Runtime has none of them on the CPU."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    fast = dwswap.optimize(Block().eval().to(dtype))
    path = save(fast, tmp_path / "m.onnx", image().to(dtype), format="onnx", dynamic_batch=True)
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_names_in_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    fast = dwswap.optimize(TwoInputs().eval())
    inputs = {"x": image(8), "y": image(8)}
    path = save(fast, tmp_path / "m.onnx", inputs, format="onnx", dynamic_batch=True)
    graph = onnx.load(path).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "x": ["batch", 8, 9, 9],
        "y": ["batch", 8, 9, 9],
        "output_0": ["batch", 8, 9, 9],
        "output_1": ["batch", 8, 5, 5],
    }


def test_an_exported_program(tmp_path: Path) -> None:
    fast = dwswap.optimize(Block().eval())
    program = torch.export.export(fast, (image(),))
    for format in ("pt2", "aten"):
        loaded = load(save(program, tmp_path / "m.pt2", format=format))
        with torch.no_grad():
            torch.testing.assert_close(loaded(image()), fast(image()))


def test_part_of_an_untraceable_model(tmp_path: Path) -> None:
    """What was rewritten in parts is exported as a whole where torch.export can follow it."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 100:  # torch.fx cannot trace this, torch.export can
                return x
            return self.block(x)

    fast = dwswap.optimize(Parts().eval())
    assert dwswap.report(fast).swapped
    loaded = load(save(fast, tmp_path / "m.pt2", image(), format="aten"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(image()), fast(image()))


def test_what_torch_export_cannot_follow_is_an_export_error(tmp_path: Path) -> None:
    fast = dwswap.optimize(ControlFlow().eval())
    with pytest.raises(dwswap.export.ExportError, match="cannot export ControlFlow") as caught:
        save(fast, tmp_path / "m.pt2", image())
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []
