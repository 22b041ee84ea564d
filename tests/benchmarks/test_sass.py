"""`python -m benchmarks.sass`: instructions, loops and loads counted in listings whose numbers are known."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.sass import __main__ as command  # noqa: E402
from benchmarks.sass import cards, flight, kernels, listing, paths, report, table, toolkit  # noqa: E402

# Two loads, their sum, a branch around two instructions, a loop of 8 instructions.
LOOP = """
_Z4demov:
        /*0000*/                   MOV R4, RZ ;
.L_x_1:
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R12, desc[UR4][R6.64] ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   FADD R4, R4, R9 ;
        /*0050*/                   MUFU.EX2 R5, R4 ;
.L_x_2:
        /*0060*/                   FADD R4, R4, R12 ;
        /*0070*/                   ISETP.GE.AND P1, PT, R4, UR4, PT ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3) ;
"""


def kernel(text=LOOP):
    (one,) = listing.kernels(text)
    return one


def around(text=LOOP):
    found = paths.Paths(kernel(text), lambda block: False, lambda loop: 1)
    return found, [found.around(loop) for loop in found.loops]


def test_a_loop_is_its_longest_way_round():
    found, (way,) = around()
    assert [i.kind for i in way] == ["LDG", "LDG", "BRA", "FADD", "MUFU", "FADD", "ISETP", "BRA"]
    assert len(found.whole()) == 1 + len(way) + 2  # once through the loop


def test_what_is_off_is_not_on_the_way():
    found = paths.Paths(kernel(), lambda block: any(i.kind == "MUFU" for i in block.instructions), lambda loop: 3)
    (loop,) = found.loops
    assert [i.kind for i in found.around(loop)] == ["LDG", "LDG", "BRA", "FADD", "ISETP", "BRA"]
    assert len(found.whole()) == 1 + 3 * 6 + 2
    everything = paths.Paths(kernel(), lambda block: True, lambda loop: 1)
    assert len(everything.around(everything.loops[0])) == 6  # what cannot be left out is counted


def test_a_loop_within_a_loop_runs_as_often_as_is_said():
    text = LOOP.replace(".L_x_2:\n", ".L_x_2:\n        /*0058*/                   STS [R9], R4 ;\n")
    text = text.replace("        /*0060*/", "        /*005c*/               @P2 BRA `(.L_x_2) ;\n        /*0060*/")
    found = paths.Paths(kernel(text), lambda block: False, lambda loop: 5)
    outer, inner = found.loops
    assert inner.parent is outer and len(found.around(inner)) == 2
    assert len(found.around(outer)) == 8 + 5 * 2


def test_source_lines_stand_at_their_instructions():
    text = LOOP.replace(
        "        /*0040*/",
        '\t//## File "a.cuh", line 7 inlined at "b.cuh", line 9\n\t//## File "b.cuh", line 9\n        /*0040*/',
    )
    by_kind = {i.kind: i.places for i in kernel(text).instructions}
    assert by_kind["MUFU"] == (("a.cuh", 7), ("b.cuh", 9)) and by_kind["LDG"] == ()


def test_bytes_of_accesses():
    loads = [i for i in kernel().instructions if i.loads]
    assert [i.bytes for i in loads] == [16, 16]
    (store,) = [i for i in kernel().instructions if i.stores]
    assert store.bytes == 8 and flight.registers(store) == (set(), {2, 3, 4, 5})
    assert flight.registers(loads[0]) == ({8, 9, 10, 11}, {2, 3})


def of_loads(*steps):
    """A path of loads ("l1": to register 1 * 4) and uses ("u1")."""
    made = {"l": ("LDG.E.128", "R{0}, desc[UR4][R2.64]"), "u": ("FADD", "R80, R81, R{0}")}
    return [listing.Instruction("", made[s[0]][0], made[s[0]][1].format(4 * int(s[1:])), ()) for s in steps]


@pytest.mark.parametrize(
    "steps, repeats, expected",
    [
        (("l1", "l2", "u1", "u2"), False, 32),  # both arrive together
        (("l1", "u1", "l2", "u2"), False, 16),  # one after the other
        (("l1", "l2", "u1", "u2"), True, 32),
        (("l2", "u1", "l1", "u2"), True, 32),  # each is used when the next one is under way
        (("u1", "l1"), True, 16),
    ],
)
def test_bytes_under_way(steps, repeats, expected):
    assert flight.in_flight(of_loads(*steps), repeats) == expected


def test_occupancy_of_known_kernels():
    h200, small = cards.CARDS[1], cards.CARDS[2]
    assert cards.warps(h200, registers=72, threads=256, shared=9000) == 24  # 3 blocks of 8 warps by registers
    assert cards.warps(h200, registers=128, threads=512, shared=0) == 16
    assert cards.warps(h200, registers=32, threads=256, shared=0) == 64
    assert cards.warps(small, registers=32, threads=256, shared=0) == 48
    assert cards.warps(h200, registers=32, threads=128, shared=100 << 10) == 8  # 2 blocks by shared memory
    assert cards.warps(small, registers=32, threads=128, shared=100 << 10) == 0  # it does not fit


def test_the_largest_limit_is_the_prediction():
    card = cards.CARDS[1]
    demand = cards.Demand(10**9, instructions=10, special=1, read=4, written=2, flight=16)
    found = cards.seconds(card, demand, resident=32)
    assert found["memory"] == pytest.approx(6e9 / 4.3e12)
    assert found["issue"] == pytest.approx(1e10 / (132 * 1.75e9 * 128 * 0.85))
    assert found["special"] == pytest.approx(1e9 / (132 * 1.75e9 * 16))
    assert found["latency"] == pytest.approx(4e9 * 1e-6 / (132 * 32 * 32 * 16))


def test_names():
    policy = "fastkd::unleveled::RowPolicy<512, 1, 16>"
    start = "void fastkd::multi_teacher::unleveled::on_chip_kernel"
    long = f"{start}<fastkd::BFloat16, float, {policy}, false>(fastkd::multi_teacher::unleveled::Params<float>)"
    name = kernels.short(long)
    assert name == "multi_teacher::on_chip_kernel<BFloat16, float, RowPolicy<512, 1, 16>, false>"
    assert kernels.arguments(name) == ["BFloat16", "float", "RowPolicy<512, 1, 16>", "false"]
    spec = kernels.of(name)
    assert spec.threads == 512 and spec.items == 16 and [one.networks for one in spec.cases] == [1, 4]
    assert spec.cases[1].must == 6 * 2 and spec.cases[1].columns == 8192 * 8192
    assert kernels.of("relational::squares_kernel") is None
    assert table.shown(name) == "multi_teacher::on_chip_kernel<bf16, f32, RowPolicy<512, 1, 16>, false>"


def a_row(**changed):
    one = {"instructions": 30.0, "warps": 32, "in_flight": 32768, "hot_store": 16}
    row = {"registers": 64, "load": 16, "store": 16}
    row |= {key: changed.pop(key) for key in list(changed) if key in row}
    return row | {"cases": {"[2, 3]": one | changed}}


def test_what_is_worse_by_more_than_a_tenth():
    before = {"a": a_row(), "b": a_row()}
    assert report.worse({"a": a_row(instructions=32.9), "b": a_row(warps=29), "c": {}}, before) == []
    assert report.worse({"a": a_row(instructions=33.1), "b": a_row()}, before) == [
        "a [2, 3]: instructions 30.0 -> 33.1"
    ]
    said = report.worse({"a": a_row(hot_store=4, registers=80, in_flight=16384)}, before)
    assert said == [
        "a : registers 64 -> 80",
        "a [2, 3]: hot_store 16 -> 4",
        "a [2, 3]: in_flight 32768 -> 16384",
        "b: no such kernel any more",
    ]


def test_every_device_function_that_is_left_out_exists():
    """A function that got another name would be counted from then on."""
    text = "".join(path.read_text() for path in toolkit.CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu"))
    assert [name for name in kernels.OFF_FUNCTIONS if f"{name}(" not in text] == []


def committed_table() -> dict:
    """The committed table; a skip says what is missing to compare it with what was built."""
    committed = command.DOCUMENT.with_suffix(".json")
    if not list(toolkit.OBJECTS.glob("csrc/*/*.cu.o")):
        pytest.skip("the CUDA library was not built here")
    if not committed.is_file():
        pytest.skip("docs/sass.json is not there yet: python -m benchmarks.sass --write")
    before = json.loads(committed.read_text())
    missing = [tool for tool in ("nvcc", "cuobjdump", "nvdisasm", "c++filt") if toolkit.find(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    if toolkit.compiler() != before["compiler"]:
        pytest.skip(f"docs/sass.json is of {before['compiler']}, here is {toolkit.compiler()}")
    return before


@pytest.mark.slow
def test_no_kernel_is_worse_than_its_row_in_docs(tmp_path):
    """After a change that is meant: `python -m benchmarks.sass --write`."""
    before = committed_table()
    now = report.rows(toolkit.from_objects(before["architecture"], tmp_path))
    assert report.worse(now, before["kernels"]) == []
    assert {name for name in now if "cases" in now[name]} <= set(before["kernels"])  # new ones have rows
