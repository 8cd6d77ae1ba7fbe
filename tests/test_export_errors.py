"""Exports that cannot work: clear errors with their cause, and the old file stays."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import Block, depthwise, image
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

import dwswap
from dwswap import export
from dwswap.export import ExportError, load, save

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def fast() -> nn.Module:
    return dwswap.optimize(Block().eval())


# where to


def test_unknown_format(fast, tmp_path):
    with pytest.raises(ValueError, match="pt2, aten, onnx, aoti, got 'tflite'"):
        save(fast, tmp_path / "m.pt2", image(), format="tflite")
    with pytest.raises(ValueError, match=r"pt2, aten, onnx, aoti, got \['pt2'\]"):
        save(fast, tmp_path / "m.pt2", image(), format=["pt2"])


def test_dynamic_batch_is_a_flag(fast, tmp_path):
    with pytest.raises(TypeError, match="dynamic_batch must be True or False, got 'yes'"):
        save(fast, tmp_path / "m.pt2", image(), dynamic_batch="yes")


@pytest.mark.parametrize(("format", "name"), [("pt2", "m.onnx"), ("onnx", "m.pt2"), ("aoti", "m")])
def test_wrong_ending(fast, tmp_path, format, name):
    with pytest.raises(
        ValueError, match=f'path must end with .* for format="{format}", got .*{name}'
    ):
        save(fast, tmp_path / name, image(), format=format)


def test_a_path_that_is_none(fast):
    with pytest.raises(TypeError, match="path must be a string or a path, got 3"):
        save(fast, 3, image())
    with pytest.raises(TypeError, match="path must be a string or a path, got 3"):
        load(3)


def test_junk_is_told(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"junk" * 9)
    with pytest.raises(ExportError, match=r"m\.pt2 is neither a \.pt2 archive nor an ONNX file"):
        load(tmp_path / "m.pt2")


def test_zip_archives_of_another_kind_are_told(tmp_path, capfd, caplog):
    """PyTorch's loader logs a traceback for each, and its error points there."""
    model, path = nn.Conv2d(3, 3, 1).eval(), tmp_path / "m.pt2"
    for write in (
        lambda: torch.save(model.state_dict(), path),
        lambda: torch.jit.save(torch.jit.trace(model, torch.randn(1, 3, 2, 2)), path),
    ):
        write()
        with pytest.raises(ExportError, match=r"m\.pt2 must hold .*, of torch\.save or torch\.jit"):
            load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/other.txt", "other")
    with pytest.raises(ExportError, match=r"an exported program, got another zip archive$"):
        load(path)
    assert not caplog.records
    assert "Traceback" not in "".join(capfd.readouterr())


def test_missing_folder(fast, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing does not"):
        save(fast, tmp_path / "missing" / "m.pt2", image())


def test_a_folder_in_the_place_of_the_file(fast, tmp_path):
    (tmp_path / "m.pt2").mkdir()
    with pytest.raises(IsADirectoryError, match=r"m\.pt2 is a folder"):
        save(fast, tmp_path / "m.pt2", image())


def test_unwritable_folder_is_found_before_the_work(fast, tmp_path, monkeypatch):
    folder = Path("/sys") if os.geteuid() == 0 else tmp_path
    if os.geteuid() != 0:
        folder.chmod(0o500)
    monkeypatch.setattr(export, "to_program", lambda *_: pytest.fail("exported in vain"))
    with pytest.raises(PermissionError) as caught:
        save(fast, folder / "m.pt2", image())
    assert caught.value.filename == str(folder / "m.pt2")


# what


@pytest.mark.parametrize("model", [None, torch.relu, {"weight": 1}])
def test_not_a_model(tmp_path, model):
    with pytest.raises(TypeError, match=f"nn.Module or .*, got {type(model).__name__}"):
        save(model, tmp_path / "m.pt2", image())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.freeze(torch.jit.script(m))]
)
def test_torchscript(tmp_path, make):
    script = make(depthwise().eval())
    with pytest.raises(ExportError, match="takes no TorchScript, got a RecursiveScriptM"):
        save(script, tmp_path / "m.pt2", image(8), dynamic_batch=True)


def test_no_example_inputs(fast, tmp_path):
    with pytest.raises(ValueError, match=r"example_inputs must be given .* got None"):
        save(fast, tmp_path / "m.pt2")


@pytest.mark.parametrize("inputs", [image(5), image().double()])
def test_example_inputs_that_the_model_refuses(fast, tmp_path, inputs):
    message = f"example_inputs must be inputs that {type(fast).__name__} accepts; it fails"
    with pytest.raises(ValueError, match=message):
        save(fast, tmp_path / "m.pt2", inputs)


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (3, TypeError, "must be a dict by names of arguments or a tuple .* got 3"),
        (({9: Dim("b")},), ValueError, r"must name .* 0 to 3 of x, .* shape \[2, 3, 9, 9\], got 9"),
        ({"x": {"a": Dim("b")}}, ValueError, "must name dimensions from 0 to 3 of x, .* got 'a'"),
    ],
)
def test_dynamic_shapes_that_fit_no_input(fast, tmp_path, shapes, error, message):
    with pytest.raises(error, match=f"dynamic_shapes {message}"):
        save(fast, tmp_path / "m.pt2", image(), dynamic_shapes=shapes)


def test_example_inputs_of_a_wrong_kind(fast, tmp_path):
    with pytest.raises(TypeError, match=r"example_inputs must be a tensor, .* got list"):
        save(fast, tmp_path / "m.pt2", [image()])
    with pytest.raises(ValueError, match="example_inputs must fit the forward"):
        save(fast, tmp_path / "m.pt2", (image(), image()))


def test_train_mode(tmp_path):
    model = dwswap.optimize(Block().train())
    with pytest.raises(ValueError, match=r"eval mode.*model\.eval\(\)"):
        save(model, tmp_path / "m.pt2", image())


def test_compiled_models(fast, tmp_path):
    with pytest.raises(TypeError, match=r"must not be compiled, got the result of torch.compile"):
        save(torch.compile(fast, backend="eager"), tmp_path / "m.pt2", image())
    model = Block().eval()
    model.compile(backend="eager")
    with pytest.raises(TypeError, match="must not be compiled"):
        save(model, tmp_path / "m.pt2", image())


def test_meta_tensors(fast, tmp_path):
    with torch.device("meta"):
        model = Block().eval()
    for given, x in ((model, image()), (fast, image().to("meta"))):
        with pytest.raises(ValueError, match="must have data, got tensors on the meta device"):
            save(given, tmp_path / "m.pt2", x)


def test_several_devices(tmp_path):
    model = Block().eval()
    with FakeTensorMode():
        model.norm.weight = nn.Parameter(torch.empty(8, device="cuda"))
    with pytest.raises(ValueError, match="must be on one device, got tensors on cpu, cuda:0"):
        save(model, tmp_path / "m.pt2", image())


def test_dynamic_batch_of_inputs_without_one(fast, tmp_path):
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    args = (torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"first dimension, got shapes \[2, 3\], \[3\]"):
        save(Sum().eval(), tmp_path / "m.pt2", args, dynamic_batch=True)
    with pytest.raises(ValueError, match="must not both be given"):
        save(fast, tmp_path / "m.pt2", image(), dynamic_batch=True, dynamic_shapes=({0: 2},))


@pytest.mark.parametrize("format", ["pt2", "aten", "onnx"])
def test_dynamic_batch_of_inputs_without_names(tmp_path, format):
    """torch.export writes a comparison of their sizes that fails in every call."""
    if format == "onnx":
        pytest.importorskip("onnxscript")

    class Sum(nn.Module):
        def forward(self, x, **others):
            return x + others["y"]

    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    inputs = {"x": image(), "y": image()}
    with pytest.raises(ExportError, match=r"forward names: Sum takes some by \*\*others"):
        save(Sum().eval(), path, inputs, format=format, dynamic_batch=True)
    assert list(tmp_path.iterdir()) == []
    loaded = load(save(Sum().eval(), path, inputs, format=format))
    torch.testing.assert_close(loaded(**inputs), image() * 2)


def test_inputs_for_a_program(fast, tmp_path):
    program = torch.export.export(fast, (image(),))
    with pytest.raises(ValueError, match="must not be given for an ExportedProgram"):
        save(program, tmp_path / "m.pt2", image())


# extras


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_exporter(fast, tmp_path, monkeypatch, package):
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", sys)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"package {package}, .* 'dwswap\[onnx\]'"):
        save(fast, tmp_path / "m.onnx", image(), format="onnx")


def test_missing_runtime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a")
    message = r"running an ONNX file needs .* onnxruntime, .* pip install 'onnxruntime'"
    with pytest.raises(ModuleNotFoundError, match=message):
        load(tmp_path / "m.onnx")


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    pytest.importorskip("onnxscript")

    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match=r"No ONNX function found for .*bessel_j0") as caught:
        save(Bessel().eval(), tmp_path / "m.onnx", image(), format="onnx")
    assert "\x1b" not in str(caught.value)


def test_an_onnx_file_that_would_be_too_large(fast, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export.onnx, "MOST_BYTES", 100)
    with pytest.raises(ExportError, match=r"less than 2 GiB, the weights are [\d,]+ bytes"):
        save(fast, tmp_path / "m.onnx", image(), format="onnx")


# files


def test_a_failing_export_leaves_the_old_file(fast, tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_text("old")

    def fails(program, partial):
        partial.write_text("half a file")
        raise RuntimeError("the compiler stopped\nlast line")

    monkeypatch.setitem(export._WRITERS, "aoti", fails)
    with pytest.raises(
        ExportError, match=r'format="aoti": RuntimeError: the compiler stopped$'
    ) as e:
        save(fast, path, image(), format="aoti")
    assert str(e.value.__cause__) == "the compiler stopped\nlast line"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_text("old")
    code = """
import sys, time, torch
from dwswap import export
def slow(program, partial):
    partial.write_text("half a file")
    print("writing", flush=True)
    time.sleep(60)
export._WRITERS["pt2"] = slow
export.save(torch.nn.ReLU().eval(), sys.argv[1], torch.ones(2))
"""
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".tmp"] == ["m.pt2"]
    save(torch.nn.ReLU().eval(), path, torch.ones(2))
    assert load(path)(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]


def test_a_file_has_the_rights_of_any_other(fast, tmp_path):
    (tmp_path / "other").touch()
    path = save(fast, tmp_path / "m.pt2", image())
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.pt2", "other"]


def test_a_file_keeps_its_rights(fast, tmp_path):
    path = tmp_path / "m.pt2"
    path.touch()
    path.chmod(0o664)
    save(fast, path, image())
    assert path.stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(fast, tmp_path, there):
    real, link = tmp_path / "elsewhere" / "latest", tmp_path / "m.pt2"
    real.parent.mkdir()
    if there:
        real.write_text("old")
    link.symlink_to(Path("elsewhere") / "latest")
    assert save(fast, link, image()) == link
    assert link.is_symlink()
    assert not real.is_symlink()
    assert load(link)(image()).shape == fast(image()).shape
    assert list(real.parent.iterdir()) == [real]


def test_what_is_no_file_stays(fast, tmp_path):
    pipe = tmp_path / "m.pt2"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"m\.pt2"):
        save(fast, pipe, image())
    assert pipe.is_fifo()


# loading


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m\.pt2"):
        load(tmp_path / "m.pt2")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no model"])
def test_a_file_that_is_no_model(tmp_path, content):
    if not content.startswith(b"P"):
        pytest.importorskip("onnxruntime")
    path = tmp_path / "m.pt2"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.pt2 "):
        load(path)


def test_a_truncated_file(fast, tmp_path):
    path = save(fast, tmp_path / "m.pt2", image())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"m\.pt2 "):
        load(path)


@pytest.mark.slow
def test_a_process_without_dwswap_says_what_is_missing(fast, tmp_path):
    path = save(fast, tmp_path / "m.pt2", image())
    code = "import sys, torch; torch.export.load(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "torch.ops.dwswap.depthwise_conv2d" in done.stderr
    assert "import the custom op" in done.stderr


@pytest.mark.parametrize("format", ["pt2", "aten"])
@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((image().numpy(),), {}, r"args\[0\] must be a tensor, got ndarray"),
        ((None,), {}, r"args\[0\] must be a tensor, got NoneType \(args\[0\] is x\)$"),
        ((), {}, r"the arguments must be args\[0\], got none \(args\[0\] is x\)$"),
        ((image(), image()), {}, r"the arguments must be args\[0\], got args\[0\], args\[1\]"),
        (([image()] * 20,), {}, r"got args\[0\]\[0\], .*, \.\.\. \("),
        ((), {"x": image()}, r"the arguments must be args\[0\], got kwargs\['x'\]"),
    ],
)
def test_arguments_that_a_program_does_not_take(fast, tmp_path, format, args, kwargs, text):
    loaded = load(save(fast, tmp_path / "m.pt2", image(), format=format))
    with pytest.raises(TypeError, match=text):
        loaded(*args, **kwargs)
    assert torch.equal(loaded(image()), copy.deepcopy(loaded)(image()))
