import re

from kernel_cases import ROWS

from dwswap.compilation import csrc_dir


def test_every_family_and_every_compiled_size_is_covered():
    """Sizes as the sources list them: ``X(kernel_h, kernel_w, stride)``, ``DWSWAP_CASE(K, S)``."""
    folder = csrc_dir() / "depthwise_conv2d"
    families = re.findall(r'^    \{"(\w+)", ', (folder / "choice.cpp").read_text(), re.MULTILINE)
    assert set(families) == {row.family for row in ROWS.values()}
    # Or sizes that are named elsewhere.
    any_size = {"general", "toeplitz", "channel_columns", "channel_direct", "points"}
    for family in set(families) - any_size:
        headers = (folder / f"{family}.cuh", folder / f"{family}_cut.h")
        source = "".join(header.read_text() for header in headers if header.exists())
        found = re.findall(r"\b(?:X|DWSWAP_CASE)\((\d+(?:, \d+)+)\)", source)
        sizes = [tuple(map(int, numbers.split(", "))) for numbers in found]
        covered = {
            (*kernel, stride)
            for row in ROWS.values()
            if row.family == family
            for kernel in row.kernels
            for stride in row.strides
        }
        assert sizes
        # Square kernels are listed by their side.
        assert {size if len(size) == 3 else (size[0], *size) for size in sizes} <= covered
