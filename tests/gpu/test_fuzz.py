"""Random shapes, arguments, dtypes and layouts against PyTorch and float64.

``DWSWAP_FUZZ_CASES`` sets the number of cases per dtype and layout (500), ``DWSWAP_FUZZ_SEED``
draws other ones, ``DWSWAP_FUZZ_DEVICE=cpu`` tries the drivers without a GPU.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from cases import DENSE_LAYOUTS, EXACT_ACTIVATIONS, ODD_LAYOUTS, Case, random_case
from numerics import Judge, forward_errors, gradient_errors, integer_mismatch

CASES = int(os.environ.get("DWSWAP_FUZZ_CASES", "500"))
SEED = os.environ.get("DWSWAP_FUZZ_SEED", "0")
DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST = 16 if DEVICE == "cpu" else 40
# Below the size from which some cases have millions of outputs: aten's gradients of these take
# seconds, and their errors are its own.
SMALL = min(LARGEST, 39)
# Each case asks for one, which runs where it covers the case; the empty one leaves the choice.
FAMILIES = (
    "",
    "channel_columns",
    "channel_tiles",
    "channel_direct",
    "points",
    "diagonal",
    "",
    "plane_strips",
    "plane_bands",
    "rolling_rows",
    "toeplitz",
)
# Cases between two synchronisations.
BATCH = 50

pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _family_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWSWAP_FAMILY", "")  # fuzz() sets others; this puts back what was


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
dense_layouts = pytest.mark.parametrize("layout", DENSE_LAYOUTS)
odd_layouts = pytest.mark.parametrize("layout", ODD_LAYOUTS)


def cases(
    what: str, dtype: torch.dtype, layout: str, count: int, largest: int = LARGEST
) -> Iterator[Case]:
    rng = random.Random(f"{SEED} {what} {dtype} {layout}")
    for _ in range(count):
        yield random_case(rng, dtype, layout, largest=largest)


def fuzz(run, drawn: Iterator[Case]) -> None:
    judge = Judge()
    for i, case in enumerate(drawn):
        os.environ["DWSWAP_FAMILY"] = FAMILIES[i % len(FAMILIES)]
        run(case, DEVICE, judge)
        if i % BATCH == BATCH - 1:
            judge.check()
    judge.check()


@each_dtype
@dense_layouts
def test_forward(dtype, layout):
    fuzz(forward_errors, cases("forward", dtype, layout, CASES))


@each_dtype
@dense_layouts
def test_gradients(dtype, layout):
    fuzz(gradient_errors, cases("gradients", dtype, layout, CASES, SMALL))


@each_dtype
@odd_layouts
def test_forward_of_odd_views(dtype, layout):
    fuzz(forward_errors, cases("odd forward", dtype, layout, -(-CASES // 10)))


@each_dtype
@odd_layouts
def test_gradients_of_odd_views(dtype, layout):
    fuzz(gradient_errors, cases("odd gradients", dtype, layout, -(-CASES // 25), SMALL))


@each_dtype
@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, *ODD_LAYOUTS])
def test_integers_match_exactly(dtype, layout):
    """Down to a single output: here nothing is left to chance."""
    rng = random.Random(f"{SEED} integers {dtype} {layout}")
    drawn, mismatches = [], []
    for _ in range(-(-CASES // 5)):
        tiny = rng.random() < 0.7
        largest = 12 if tiny else LARGEST
        case = random_case(rng, dtype, layout, largest=largest, enough=not tiny)
        exact = {name: rng.choice(EXACT_ACTIVATIONS) for name in ("input_activation", "activation")}
        drawn.append(Case(**{**case.__dict__, **exact}))
        mismatches.append(integer_mismatch(drawn[-1], DEVICE))
    wrong = torch.stack(mismatches).tolist()
    failures = [f"{count} of {case}" for case, count in zip(drawn, wrong, strict=True) if count]
    assert not failures, "\n".join(failures[:10])
