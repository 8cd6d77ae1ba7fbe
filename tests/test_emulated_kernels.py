"""plane_bands and diagonal, run on the CPU by the emulator: no GPU is needed."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ACTIVATION_NAMES, EXACT_ACTIVATIONS
from emulated_kernels import (
    DEVICES,
    TIMINGS,
    Emulator,
    Problem,
    check,
    compile_emulator,
    make_tensors,
)
from emulated_source import Defect, transform

pytestmark = pytest.mark.slow  # a minute and a half of two processors

FAMILIES = ("plane_bands", "diagonal")
DTYPES = (torch.float16, torch.bfloat16)
# A longer campaign: so many random problems of each family and dtype.
PROBLEMS = int(os.environ.get("DWSWAP_EMULATED_PROBLEMS", "0"))


def random_problem(family: str, dtype: torch.dtype, seed: int) -> Problem:
    rng = random.Random(f"{family} {dtype} {seed}")
    if family == "plane_bands":
        kernel, stride = rng.choice([(5, 1), (5, 2), (7, 1)])
        channels = rng.choice([1, 2, 3, 4, 5, 6, 8, 16])
        most_padding, activations = kernel // 2, EXACT_ACTIVATIONS
    else:
        kernel, stride = rng.choice([5, 7]), rng.choice([1, 2])
        channels = 8 * rng.choice([1, 2, 3, 4, 5, 8])
        most_padding, activations = kernel + 4, (*EXACT_ACTIVATIONS, *ACTIVATION_NAMES)
    same = rng.random() < 0.5
    problem = Problem(
        family,
        dtype,
        batch=rng.choice([1, 2, 3, 4, 5, 9, 16, 17]),
        channels=channels,
        height=rng.choice([rng.randint(1, 9), rng.randint(4, 20), rng.randint(10, 60), 14]),
        width=rng.choice([rng.randint(1, 9), rng.randint(4, 20), rng.randint(10, 60), 14]),
        kernel=kernel,
        stride=stride,
        padding_h=kernel // 2 if same else rng.randint(0, most_padding),
        padding_w=kernel // 2 if same else rng.randint(0, most_padding),
        activation=rng.choice(activations),
        bias=rng.random() < 0.5,
        integers=rng.random() < 0.8,
        # The copy engine reads weights of diagonal, whose biases are read in pairs.
        bias_offset=2 * rng.randint(0, 3),
        device=rng.choice(DEVICES),
        timing=rng.choice(TIMINGS),
        rank=rng.choice([0, 0, rng.randint(1, 10), rng.randint(1, 200)]),
        seed=seed,
    )
    if family == "plane_bands":
        problem = replace(
            problem, reversed_taps=rng.random() < 0.3, weight_offset=rng.randint(0, 7)
        )
        if rng.random() < 0.3:
            problem = replace(
                problem,
                input_activation=rng.choice(EXACT_ACTIVATIONS),
                input_bias=rng.random() < 0.5,
            )
    kind = rng.random()
    if kind < 0.15:
        problem = replace(problem, not_finite=rng.randint(1, 6))
    elif kind < 0.25 and not problem.input_bias:
        problem = replace(
            problem, large=rng.randint(1, 30), activation=rng.choice(EXACT_ACTIVATIONS)
        )
    while problem.batch * problem.channels * problem.height * problem.width > 30000:
        largest = max(("batch", "height", "width"), key=lambda name: getattr(problem, name))
        problem = replace(problem, **{largest: (getattr(problem, largest) + 1) // 2})
    return problem


def faults_of(emulator: Emulator, problem: Problem) -> list[str]:
    tensors = make_tensors(problem)
    result = emulator.run(problem, tensors)
    assert result is not None
    return check(problem, tensors, result)


def instantiations(family: str, dtype: torch.dtype) -> set[str]:
    element = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}[dtype]
    if family == "plane_bands":
        sizes = ("5, 1", "5, 2", "7, 1")
        forms, last = ("kPlain", "kClamp"), ("1, 1", "2, 1", "2, 2")
    else:
        sizes = ("5, 1", "5, 2", "7, 1", "7, 2")
        forms, last = ("kClamp", "kAny"), ("0", "1", "2", "3")
    return {
        f"{element}, {size}, dwswap::Form::{form}, {end}"
        for size, form, end in itertools.product(sizes, forms, last)
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_problems_in_every_instantiation(
    emulator: Emulator, family: str, dtype: torch.dtype
) -> None:
    left, timings = instantiations(family, dtype), set()
    for seed in range(3000):
        if not left:
            break
        problem = random_problem(family, dtype, seed)
        chosen = emulator.choose(problem)
        if chosen is not None and chosen.kernel in left:
            left.remove(chosen.kernel)
            timings.add(problem.timing)
            assert faults_of(emulator, problem) == [], problem
    assert not left
    assert timings == set(TIMINGS)


@pytest.mark.skipif(PROBLEMS == 0, reason="DWSWAP_EMULATED_PROBLEMS is not set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_problems(emulator: Emulator, family: str, dtype: torch.dtype) -> None:
    faults = {}
    for seed in range(10_000, 10_000 + PROBLEMS):
        problem = random_problem(family, dtype, seed)
        if emulator.choose(problem) is not None:
            faults[problem] = faults_of(emulator, problem)
    assert {problem: found for problem, found in faults.items() if found} == {}


def test_values_that_are_not_finite_are_computed_anew(emulator: Emulator) -> None:
    """And only these: numbers that overflow are not."""
    plane_bands = Problem("plane_bands", torch.float16, 4, 4, 9, 14, 5, 1, 2, 2, seed=1)
    diagonal = Problem("diagonal", torch.float16, 2, 32, 9, 14, 7, 1, 3, 3, seed=1)
    for problem in (plane_bands, diagonal):
        for changes, anew in (({}, False), ({"not_finite": 3}, True), ({"large": 9}, False)):
            changed = replace(problem, **changes)
            tensors = make_tensors(changed)
            result = emulator.run(changed, tensors)
            assert result is not None
            assert check(changed, tensors, result) == []
            assert (result.recomputed > 0) == anew


def walks(dtype: torch.dtype) -> Iterator[Problem]:
    """Of plane_bands: planes of few rows, for units of 16 images."""
    for kernel, stride in ((5, 1), (5, 2), (7, 1)):
        for padding in range(kernel // 2 + 1):
            for height in range(1, 15):
                yield Problem(
                    "plane_bands", dtype, 16, 2, height, 8, kernel, stride, padding, kernel // 2,
                    activation="relu6", timing=height % 3, device=2, seed=height,
                )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_walks_that_end_with_the_image(emulator: Emulator, dtype: torch.dtype) -> None:
    """Rows outside are passed over by walks down whole planes, which units of 16 images have."""
    seen = set()
    for problem in walks(dtype):
        for rank in range(40):  # the best cuts may have fewer images
            ranked = replace(problem, rank=rank)
            chosen = emulator.choose(ranked)
            if chosen is None or chosen.images == 16:
                break
        if chosen is None or chosen.images != 16:
            continue
        seen.add((problem.kernel, problem.stride, problem.padding_h))
        assert faults_of(emulator, ranked) == [], ranked
    assert len(seen) == 3 + 3 + 4


PLANE_BANDS = "depthwise_conv2d/plane_bands.cuh"
DIAGONAL = "depthwise_conv2d/diagonal.cuh"
DEFECTS = {
    "no fence": Defect(
        PLANE_BANDS,
        "    fence_for_bulk_copies();\n    if (threadIdx.x < kWalks) wait_for_bulk_reads();",
        "    if (threadIdx.x < kWalks) wait_for_bulk_reads();",
    ),
    "a row too few": Defect(PLANE_BANDS, "int steps = (walk_rows - 1) * S + K - skipped;",
                            "int steps = (walk_rows - 1) * S + K - 1 - skipped;"),
    "a wrong shift": Defect(DIAGONAL, "(i * Traits::kShift + j) % kPeriod",
                            "((i + 1) * Traits::kShift + j) % kPeriod"),
    "no wait for reads": Defect(DIAGONAL, "if (threadIdx.x < RING) wait_for_bulk_reads();", ";"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_noticed(emulator_folder: Path, tmp_path: Path, name: str) -> None:
    emulator = Emulator(compile_emulator(tmp_path, DEFECTS[name], emulator_folder))
    family = "diagonal" if DEFECTS[name].file == DIAGONAL else "plane_bands"
    for seed in range(200):
        problem = random_problem(family, torch.float16, seed)
        if emulator.choose(problem) is not None and faults_of(emulator, problem):
            return
    pytest.fail("no problem of 200 shows it")


def test_an_instruction_that_is_not_known_is_an_error() -> None:
    source = 'asm volatile("bar.warp.sync %0;" ::"r"(mask));'
    with pytest.raises(ValueError, match=r"fence\.cuh: .* instruction 'bar\.warp\.sync %0;'"):
        transform(source, "fence.cuh")
