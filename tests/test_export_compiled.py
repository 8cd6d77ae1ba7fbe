"""Compiled packages: what their inputs must be, and how that is said."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import Block, image
from torch import Tensor, nn

import dwswap
from dwswap.export import ExportError, load, save
from dwswap.export.aoti import libraries_to_link
from dwswap.export.input_specs import InputSpecs


class Scaled(nn.Module):
    def forward(self, x: Tensor, *, factor: Tensor, times: int = 2) -> Tensor:
        return x * factor * times


@pytest.fixture(scope="module")
def specs() -> InputSpecs:
    batch = torch.export.Dim("batch", max=16)
    program = torch.export.export(
        Scaled().eval(),
        (image().to(memory_format=torch.channels_last),),
        {"factor": torch.ones(2, 1, 1, 1), "times": 3},
        dynamic_shapes={"x": {0: batch}, "factor": {0: batch}, "times": None},
    )
    return InputSpecs.from_json(InputSpecs.of_program(program).to_json())


def call(specs: InputSpecs, x: object, **changes: object) -> tuple[Tensor, Tensor]:
    kwargs = {"factor": torch.ones(2, 1, 1, 1), "times": 3} | changes
    (x,), kwargs = specs.conform((x,), kwargs)
    return x, kwargs["factor"]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_strides_are_made_right(specs, batch):
    factor = torch.arange(batch * 2.0).view(batch, 1, 1, 2)[..., :1]
    given = image(batch=batch)
    x, factor_out = call(specs, given, factor=factor)
    assert torch.equal(x, given)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(factor_out, factor)
    assert factor_out.is_contiguous()


class OfDicts(nn.Module):
    def forward(self, images: dict[str, Tensor], *, more: dict[str, Tensor], x: Tensor) -> Tensor:
        return images["a"] - images["b"] + more["c"] * more["d"] - x


def test_dicts_filled_in_another_order() -> None:
    """The compiled code takes tensors by their order, which was that of the export."""
    a, b, c, d, x = (torch.full((2,), float(i)) for i in range(5))
    kwargs = {"more": {"d": d, "c": c}, "x": x}
    program = torch.export.export(OfDicts().eval(), ({"b": b, "a": a},), kwargs)
    specs = InputSpecs.of_program(program)
    for images, others in (
        ({"b": b, "a": a}, kwargs),
        ({"a": a, "b": b}, {"x": x, "more": {"c": c, "d": d}}),
    ):
        found = torch.utils._pytree.tree_leaves(specs.conform((images,), others))
        assert [tensor[0].item() for tensor in found] == [1, 0, 3, 2, 4]


def test_right_inputs_are_not_copied(specs):
    given = image().to(memory_format=torch.channels_last)
    assert call(specs, given)[0] is given


@pytest.mark.parametrize(
    ("x", "changes", "error", "text"),
    [
        (image(size=10), {}, ValueError, r"args\[0\] must have shape \[2, 3, 9, 9\], got"),
        (image()[0], {}, ValueError, r"args\[0\] must have shape \[\w+, 3, 9, 9\], got"),
        (image(batch=3), {}, ValueError, r"kwargs\['factor'\] must have shape \[3, 1, 1, 1\]"),
        (image().double(), {}, TypeError, r"args\[0\] must be float32 on cpu, got float64 on cpu"),
        (image().to("meta"), {}, TypeError, "must be float32 on cpu, got float32 on meta"),
        (3.0, {}, TypeError, r"args\[0\] must be a tensor, got float"),
        (image(), {"times": 2}, ValueError, r"kwargs\['times'\] must be 3, .* got 2"),
        (image(), {"more": image()}, TypeError, r"the arguments must be .*, got .*'more'"),
        (
            image(batch=17),
            {"factor": torch.ones(17, 1, 1, 1)},
            ValueError,
            "must be at least 0 and at most 16, got 17",
        ),
    ],
)
def test_wrong_inputs(specs, x, changes, error, text):
    with pytest.raises(error, match=text):
        call(specs, x, **changes)


def test_missing_inputs(specs):
    with pytest.raises(TypeError, match=r"the arguments must be .*kwargs\['factor'\].*, got args"):
        specs.conform((image(),), {})


def test_example_inputs_that_cannot_be_described():
    x = torch.ones(4, 6).t()
    program = torch.export.export(nn.ReLU().eval(), (x,))
    with pytest.raises(ValueError, match=r"got shape \[6, 4\] with strides \(1, 6\)"):
        InputSpecs.of_program(program)


@pytest.mark.slow
def test_a_package(tmp_path: Path) -> None:
    fast = dwswap.optimize(Block().eval())
    path = save(fast, tmp_path / "m.pt2", image(), format="aoti", dynamic_batch=True)
    loaded = load(path)
    for x in (image(batch=1), image(batch=5), image().to(memory_format=torch.channels_last)):
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), fast(x))
    with pytest.raises(ValueError, match="must have shape"):
        loaded(image(size=10))


def test_a_package_of_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def get_metadata(self) -> dict[str, str]:
            return {"AOTI_DEVICE_KEY": "cpu"}

    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/aotinductor/model/code.so", b"")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: Other())
    with pytest.raises(ExportError, match=r"was not written by dwswap.export"):
        load(path)


def test_the_libstdcxx_of_torch_is_linked(tmp_path: Path) -> None:
    """By a compiler with only a static one as well."""
    ask = ["g++", "-print-file-name=libstdc++.a"]
    found = shutil.which("g++") and subprocess.run(ask, capture_output=True, text=True, check=True)
    if not found or not Path(found.stdout.strip()).is_absolute():
        pytest.skip("needs g++ with a static libstdc++")
    (tmp_path / "libstdc++.a").symlink_to(found.stdout.strip())
    (tmp_path / "code.cpp").write_text("void fail() { throw 1; }")
    library = tmp_path / "code.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    # As AOTInductor does, in one string that is split.
    command = f"g++ -B{tmp_path} -shared -fPIC {tmp_path}/code.cpp -o {library} -L{torch_lib}"
    for names, shared in (([], False), (libraries_to_link(), True)):
        flags = " ".join(f"-l{name}" for name in names)
        subprocess.run(shlex.split(f"{command} {flags}"), check=True)
        assert (b"libstdc++.so.6" in library.read_bytes()) == shared


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    fast = dwswap.optimize(Block(channels=9).eval())
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ExportError, match='cannot be saved as format="aoti"') as caught,
    ):
        save(fast, tmp_path / "m.pt2", image(), format="aoti")
    assert caught.value.__cause__ is not None
    assert not (tmp_path / "m.pt2").exists()
