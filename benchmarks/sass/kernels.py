"""What the tool knows of each kernel: its threads, what a column is, the loop that counts, the shapes predicted."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.sass.listing import Block, Place
from benchmarks.sass.toolkit import CSRC

# Source lines that a usual call does not come to: class labels, losses of teachers at one temperature, weights of the
# host, rows in vectors, no smoothing, no softcap, norms that need no rescue.
OFF_FUNCTIONS = set(
    """
    cap_items cross_entropy_of_soft device_row_offset direct_square from_mixture keep_stats_alone larger
    leave_out leave_out_vectors left_out_gradient load_scalars load_soft load_words masked_gaps mix_logit
    mix_probabilities roll row_offset scale_of soft_mass soft_part store_nothing store_words stream_mixture
    teacher_index uncap_gradient
    """.split()
)
OFF_LINES = re.compile(
    r"load_as\((?:row|from)\[c|row\[c \+ v\] = part|weight\[k \* weight_stride|(?:reads \|=|total \+=).*weight_of"
    r"|all_tiles\(\[&\] \{$|sum_of_squares\(squares, tile, scale_a"
    r"|states\.at\(k, 3\)|z \+= exp_negative\(x_s|student\.(?:sum|count) \+=|device\[m \* stride"
)
JOINS = ("BRA", "BSSY", "BSYNC", "NOP", "WARPSYNC")  # where ways part and meet: they have the lines of either
NAMES = {"float": "f32", "double": "f64", "Half": "f16", "BFloat16": "bf16"}
BYTES = {"float": 4, "double": 8, "Half": 2, "BFloat16": 2, "AnyType": 4}
ROWS = 8192


class Case(NamedTuple):
    """networks: how often the loop over them runs. read, written, must: bytes a column. columns: of the whole call."""

    label: str
    networks: int
    columns: int
    read: float
    written: float
    must: float
    shared: int = 0  # dynamic, of a block


class Spec(NamedTuple):
    """loop: "loads", the outermost loop that loads most; "passes", each that loads, one after another; "work", the
    innermost of most instructions; "", the whole kernel. A thread has `items` columns, in a turn of an unrolled loop
    that loads as many more as it loads more bytes.
    """

    threads: int
    loop: str
    items: int
    cases: list[Case]
    unit: str = "column"


def short(demangled: str) -> str:
    """multi_teacher::stream_forward_kernel<bf16, float>, without namespaces that all have and without arguments."""
    name = re.sub(r"\bfastkd::|\bunleveled::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", demangled)
    name = name.removeprefix("void ")
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:at]
    return name


def arguments(name: str) -> list[str]:
    """The template's, each as it stands."""
    inner = name[name.index("<") + 1 : name.rindex(">")] if "<" in name else ""
    found, depth, current = [], 0, ""
    for character in inner:
        depth += (character == "<") - (character == ">")
        if character == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return [*found, current.strip()] if current else found


def size_of(kind: str) -> int:
    return BYTES[kind.rpartition("::")[2]]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text.partition("<")[2])]


def of(name: str) -> Spec | None:
    """By the kernel's name; None: only its registers and accesses are reported."""
    base, given = name.partition("<")[0], arguments(name)
    make = MAKERS.get(base.rpartition("::")[2] if base not in MAKERS else base)
    return make(given) if make else None


def _teachers(size: int, classes: int, gradient: bool, shared: int = 0, counts: tuple[int, ...] = (1, 4)) -> list[Case]:
    columns = ROWS * classes
    return [
        Case(
            f"[{ROWS}, {classes}] K={k}",
            k,
            columns,
            (k + 1) * size,
            size * gradient,
            size * (k + 1 + gradient),
            shared * k,
        )
        for k in counts
    ]


def _stream_forward(given: list[str]) -> Spec:
    return Spec(256, "loads", 8, _teachers(size_of(given[0]), 32000, False, 4 * 256 * size_of(given[1])))


def _stream_backward(given: list[str]) -> Spec:
    return Spec(256, "", 8, _teachers(size_of(given[0]), 32000, True))


def _stream_vectors(given: list[str], gradient: bool) -> Spec:
    size, teachers = size_of(given[0]), int(given[1])
    return Spec(256, "loads", 16 // size, _teachers(size, 32000, gradient, counts=(teachers,)))


def _on_chip(given: list[str]) -> Spec:
    threads, rows, items = numbers(given[2])
    return Spec(threads * rows, "", items, _teachers(size_of(given[0]), threads * items, True))


def _scale(given: list[str]) -> Spec:
    size = size_of(given[0])
    return Spec(256, "loads", int(given[2]), [Case(f"[{ROWS}, 32000]", 1, ROWS * 32000, size, size, 2 * size)])


def _mutual(given: list[str]) -> Spec:
    threads, rows, items = numbers(given[2])[:3]
    on_chip, size, number = given[2].endswith("true>"), size_of(given[0]), size_of(given[1])
    classes, m = (threads * items, 4) if on_chip else (32000, 3)
    shared = rows * number * (2 * m * threads * items + 7 * m + (3 + threads // 32) * m * m)
    read = m * size * (1 if on_chip else 2)
    case = Case(f"[{ROWS}, {classes}] M={m}", m, ROWS * classes, read, m * size, 2 * m * size, shared)
    return Spec(threads * rows, "" if on_chip else "passes", items, [case])


def _mutual_vectors(given: list[str]) -> Spec:
    size, m = size_of(given[0]), int(given[1])
    case = Case(f"[{ROWS}, 32000] M={m}", 1, ROWS * 32000, 2 * m * size, m * size, 2 * m * size)
    return Spec(512, "passes", 16 // size, [case])


def _stream_many(given: list[str]) -> Spec:
    size = size_of(given[0])
    return Spec(256, "loads", 16 // size, _teachers(size, 32000, True, counts=(8,)))


def _group_stats(given: list[str]) -> Spec:
    threads, rows, items = numbers(given[2])
    size, tiled = size_of(given[0]), threads * items > 4096
    classes = 32000 if tiled else threads * items
    return Spec(threads * rows, "loads" if tiled else "", items,
                [Case(f"[{ROWS}, {classes}]", 1, ROWS * classes, size, 0, size)])  # fmt: skip


def _group_stats_vectors(given: list[str]) -> Spec:
    size = size_of(given[0])
    return Spec(256, "loads", 16 // size, [Case(f"[{ROWS}, 32000]", 1, ROWS * 32000, size, 0, size)])


def _feature_rows(given: list[str]) -> Spec:
    threads, rows, items = numbers(given[3])
    size, long = size_of(given[0]) + size_of(given[1]), threads >= 512
    length = 50176 if long else threads * items
    return Spec(
        threads * rows,
        "passes",
        items,
        [Case(f"{ROWS} rows of {length}", 1, ROWS * length, size * (1 + long), 0, size)],
    )


def _feature_gradient(given: list[str]) -> Spec:
    own, size = size_of(given[0]), size_of(given[0]) + size_of(given[1])
    return Spec(256, "", 4 if given[2] == "double" else 8,
                [Case("[256, 256, 56, 56]", 1, 256 * 256 * 56 * 56, size, own, size + own)])  # fmt: skip


def _angle(given: list[str]) -> Spec:
    return Spec(128, "work", 8, [Case("N=1024", 1, 1024 * 1024 * 1023 // 2, 0, 0, 0)], "triplet")


def _differences(given: list[str], pairs: int) -> Spec:
    """16 columns of 4 x 4 pairs a turn; every 32nd or 4th turn also rolls its sums up, which is not counted."""
    columns = 2 if given[1:] == ["true"] else 16  # of squares in two floats
    return Spec(256, "work", 16 * columns, [Case("N=1024, D=2048", 1, pairs * 2048, 0, 0, 0)], "column of a pair")


MAKERS: dict[str, Callable[[list[str]], Spec]] = {
    "stream_forward_kernel": _stream_forward,
    "stream_backward_kernel": _stream_backward,
    "stream_rows_kernel": functools.partial(_stream_vectors, gradient=False),
    "stream_gradient_kernel": functools.partial(_stream_vectors, gradient=True),
    "stream_gradients_kernel": _stream_many,
    "on_chip_kernel": _on_chip,
    "divergence_kernel": _on_chip,
    "stream_divergence_gradient_kernel": _stream_backward,
    "scale_kernel": _scale,
    "mutual_kernel": _mutual,
    "vector_kernel": _mutual_vectors,
    "row_kernel": _group_stats,
    "long_row_kernel": _group_stats_vectors,
    "rows_kernel": _feature_rows,
    "gradient_kernel": _feature_gradient,
    "angle_kernel": _angle,
    "direct_kernel": functools.partial(_differences, pairs=1024 * 1023 // 2),
    "pull_kernel": functools.partial(_differences, pairs=1024 * 1024),
}


@functools.cache
def _source(file: str) -> tuple[list[str], list[str]]:
    """The lines of a file, and of each the device function that it lies in.

    A library that a compiler's cache had made from another checkout names that one's files: then those here.
    """
    path = Path(file)
    if not path.is_file():
        path = CSRC / file.rpartition("csrc/")[2]
    lines = path.read_text().splitlines() if path.is_file() else []
    functions, current = [], ""
    for at, line in enumerate(lines):
        if re.search(r"\b(?:__device__|__global__|FASTKD_HD)\b", line):
            text = " ".join(lines[at : at + 3])
            text = re.sub(
                r"__launch_bounds__\([^()]*(?:\([^()]*\)[^()]*)*\)", "", text[line.index("__") if "__" in line else 0 :]
            )
            name = re.search(r"(\w+)\(", text)
            current = name[1] if name else current
        functions.append(current)
    return lines, functions


def _is_off(place: Place, own: str) -> bool:
    lines, functions = _source(place[0])
    if not 0 < place[1] <= len(lines):
        return False
    line = lines[place[1] - 1]
    other = re.search(r"case DType::(\w+):|^\s*default:", line)
    if other and own and (other[1] or "f32") != own:
        return True
    return functions[place[1] - 1] in OFF_FUNCTIONS or bool(OFF_LINES.search(line))


def off(name: str) -> Callable[[Block], bool]:
    """Whether most of a block comes from lines that a usual call of this kernel leaves out."""
    given = arguments(name)
    own = NAMES.get(given[0], "") if given else ""
    known: dict[Place, bool] = {}

    def is_off(place: Place) -> bool:
        if place not in known:
            known[place] = _is_off(place, own)
        return known[place]

    def left_out(block: Block) -> bool:
        if any(i.kind == "CALL" for i in block.instructions):
            return True  # a division of 64-bit integers, or of numbers near the ends of their range
        own = [(i, any(map(is_off, i.places))) for i in block.instructions if i.kind not in JOINS]
        if any(hit for i, hit in own if i.loads or i.stores):
            return True
        return 2 * sum(hit for _, hit in own) > len(own)

    return left_out
