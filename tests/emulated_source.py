"""CUDA source as C++ that calls the functions of ``emulator/include/emulator.h``.

What changes is little: asm statements, launches and dynamic shared memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Defect", "transform", "transform_files"]


class Defect(NamedTuple):
    """A change of a file of csrc: the first ``old`` becomes ``new``."""

    file: str
    old: str
    new: str


def _load(count: int, transposed: str) -> str:
    stores = " ".join(f"{{{i}}} = x_[{i}];" for i in range(count))
    call = f"emulator::load_matrices(x_, {count}, {transposed}, {{{count}}});"
    return f"{{{{ uint32_t x_[{count}]; {call} {stores} }}}}"


# By a part of the PTX that no other instruction has: C++ in which {i} is operand %i. In PTX, {NAME}
# stands for an argument of the macro that the statement is in. None: code that the emulated kernels
# include and do not run.
INSTRUCTIONS: dict[str, str | None] = {
    "ldmatrix.sync.aligned.m8n8.x4.shared": _load(4, "false"),
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared": _load(4, "true"),
    "ldmatrix.sync.aligned.m8n8.x2.shared": _load(2, "false"),
    "ldmatrix.sync.aligned.m8n8.x2.trans.shared": _load(2, "true"),
    "stmatrix.sync.aligned.m8n8.x4.shared": (
        "{{ const uint32_t x_[] = {{{1}, {2}, {3}, {4}}}; emulator::store_matrices({0}, 4, x_); }}"
    ),
    "stmatrix.sync.aligned.m8n8.x2.shared": (
        "{{ const uint32_t x_[] = {{{1}, {2}}}; emulator::store_matrices({0}, 2, x_); }}"
    ),
    "mma.sync.aligned.m16n8k16.row.col.f32.{NAME}.{NAME}.f32": (
        "{{ const uint32_t a_[] = {{{4}, {5}, {6}, {7}}}, b_[] = {{{8}, {9}}};"
        " emulator::multiply_add(16, NAME, &{0}, a_, b_); }}"
    ),
    "mma.sync.aligned.m16n8k8.row.col.f32.{NAME}.{NAME}.f32": (
        "{{ const uint32_t a_[] = {{{4}, {5}}}, b_[] = {{{6}}};"
        " emulator::multiply_add(8, NAME, &{0}, a_, b_); }}"
    ),
    "max.NaN.f32": "{0} = emulator::maximum({1}, {2});",
    "min.NaN.f32": "{0} = emulator::minimum({1}, {2});",
    "{INSTRUCTION} %0, %1, %2;": "{0} = emulator::pair_function(INSTRUCTION, {1}, {2});",
    "@p ld.shared.b32 %0, [%1]": "{0} = ({2}) != 0 ? emulator::load_shared({1}) : ({3});",
    "@p st.shared.b32 [%0], %1": "if (({2}) != 0) emulator::store_shared({0}, {1}, 4);",
    "@p st.shared.b16 [%0], %1": "if (({2}) != 0) emulator::store_shared({0}, {1}, 2);",
    "mbarrier.init": "emulator::barrier_init({0}, {1});",
    "mbarrier.arrive.expect_tx": "emulator::barrier_expect({0}, {1});",
    "mbarrier.try_wait.parity": "emulator::barrier_wait({0}, {1});",
    "fence.mbarrier_init": ";",
    "fence.proxy.async.shared::cta": "emulator::fence();",
    "cp.async.bulk.tensor.4d.shared::cluster.global": (
        "emulator::copy_box({0}, {1}, {2}, {3}, {4}, {5}, {6});"
    ),
    "cp.async.bulk.shared::cluster.global": "emulator::copy_bytes({0}, {1}, {2}, {3});",
    "cp.async.bulk.tensor.4d.global.shared": ("emulator::write_box({0}, {1}, {2}, {3}, {4}, {5});"),
    "cp.async.bulk.global.shared": "emulator::write_bytes({0}, {1}, {2});",
    "cp.async.bulk.wait_group.read 0": "emulator::wait_for_reads();",
    "cp.async.bulk.wait_group 0": "emulator::wait_for_writes();",
    "movmatrix.sync": None,
    "@wanted {LOAD}": None,
    "cp.async.cg.shared.global": None,
    "cp.async.ca.shared.global": None,
    "cp.async.commit_group": None,
    "cp.async.wait_group %0": None,
    "cp.async.wait_all": None,
}

STRING = r'"(?:[^"\\]|\\.)*"'
ASM = re.compile(r"\basm\b\s*(?:volatile\s*)?(?=\()")
SHARED = re.compile(r"extern __shared__ __align__\(\w+\) unsigned char (\w+)\[\];")
LAUNCH = re.compile(r"(\w+)<<<([^;]*?)>>>\(")


def transform_files(
    csrc: Path, files: list[str], target: Path, defect: Defect | None = None
) -> None:
    """Write ``files`` of ``csrc``, and what they include of it, to ``target``.

    Raises:
        ValueError: of an asm statement nobody knows what it does, or ``defect`` does not fit.
    """
    left, done = list(files), set()
    while left:
        name = left.pop()
        if name in done:
            continue
        done.add(name)
        source = (csrc / name).read_text()
        if defect is not None and defect.file == name:
            if defect.old not in source:
                raise ValueError(f"{name}: there is no {defect.old!r} to be replaced")
            source = source.replace(defect.old, defect.new, 1)
        left += re.findall(r'#include "(.+)"', source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(transform(source, name))


def transform(source: str, name: str) -> str:
    """The text of one file.

    Raises:
        ValueError: an asm statement that is not known.
    """
    parts, at = [], 0
    for match in ASM.finditer(source):
        end = _closing(source, match.end())
        statement = source[match.end() + 1 : end].replace("\\\n", "\n")
        parts += [source[at : match.start()], _translate(statement, name)]
        at = source.index(";", end) + 1
    text = "".join([*parts, source[at:]])
    text = SHARED.sub(r"unsigned char* const \1 = emulator::shared_memory;", text)
    return LAUNCH.sub(r"emulator::launch(__PRETTY_FUNCTION__, \1, {\2}, ", text)


def _translate(statement: str, name: str) -> str:
    """The C++ for what stands between the parentheses of an asm statement."""
    template, *sections = _split(statement, ":")
    tokens = re.findall(rf"{STRING}|\w+", template)
    ptx = "".join(t[1:-1].replace(r"\n", "\n") if t[0] == '"' else f"{{{t}}}" for t in tokens)
    if not ptx:  # hides a value from the compiler
        return ";"
    known = [part for part in INSTRUCTIONS if part in ptx]
    if len(known) != 1:
        raise ValueError(f"{name}: the emulator does not know the instruction {ptx.strip()!r}")
    operands = [
        " ".join(operand[operand.index("(") + 1 : operand.rindex(")")].split())
        for section in sections[:2]
        for operand in _split(section, ",")
        if operand.strip()
    ]
    form = INSTRUCTIONS[known[0]]
    if form is None:
        return f'emulator::unsupported("{known[0]}");'
    return form.format(*operands)


def _split(text: str, separator: str) -> list[str]:
    """At separators that are in no string and in no parentheses."""
    pieces, depth = [""], 0
    for token in re.findall(rf"{STRING}|.", text, re.DOTALL):
        depth += (token == "(") - (token == ")")
        if token == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return pieces


def _closing(text: str, at: int) -> int:
    """Where the parenthesis is closed that is opened at ``at``."""
    depth = 0
    for match in re.compile(rf"{STRING}|[()]").finditer(text, at):
        depth += (match[0] == "(") - (match[0] == ")")
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {text[at : at + 40]!r}")
