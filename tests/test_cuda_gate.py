"""The gate over compiled CUDA kernels says no when it should: for recorded output of the tools, and
for kernels compiled here where nvcc and a disassembler are present."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import replace

import cuda_gate
import pytest
from cuda_budgets import BUDGETS, Budget, registers_for
from cuda_gate import Kernel
from cuda_instructions import Part, parts_of
from cuda_work import WORK, Work


def judge(kernels, budgets, work=()) -> list[str]:
    return cuda_gate.judge(kernels, budgets, work)


def kernel(name="a_kernel<float>", arch=90, registers=40, stack=0, loads=None, stores=None, bulk=0):
    loads, stores = Counter(loads or {16: 4}), Counter(stores or {16: 2})
    return Kernel(name, arch, registers, stack, loads, stores, bulk)


WIDE = Budget(
    "a_kernel", registers=64, why="four blocks",
    wide_loads=1, wide_stores=1, narrow_loads=0, narrow_stores=0, instructions=100,
)  # fmt: skip


def test_a_kernel_within_its_budget():
    assert judge([kernel()], [WIDE]) == []
    assert judge([kernel(registers=64)], [WIDE]) == []
    assert judge([kernel(loads={4: 9}, stores={4: 9})], [Budget("a_", 64, "")]) == []
    assert judge([kernel(loads={4: 0}, stores={4: 0}, bulk=2)], [WIDE]) == []


@pytest.mark.parametrize(
    ("faulty", "complaint"),
    [
        (kernel(registers=65), "65 registers, at most 64: four blocks"),
        (kernel(stack=8), "8 bytes of registers in memory, at most 0"),
        (replace(kernel(), instructions=101), "101 instructions, at most 100: four blocks"),
        (kernel(loads={8: 0}), "0 global loads of 16 bytes, at least 1"),
        (kernel(loads={4: 1, 16: 8}), "1 global loads below 16 bytes, at most 0"),
        (kernel(stores={4: 4, 16: 1}), "4 global stores below 16 bytes, at most 0: 4 of 4 bytes"),
    ],
)
def test_a_kernel_outside_of_its_budget(faulty, complaint):
    (found,) = judge([kernel(), faulty], [WIDE])
    assert found.startswith("a_kernel<float> for sm_90: ") and complaint in found


def test_exceptions_are_stated_in_the_row():
    row = Budget("a_", 64, "", stack=16, wide_loads=1, narrow_loads=2, since=90)
    assert judge([kernel(stack=16, loads={2: 2, 16: 9})], [row]) == []
    assert judge([kernel(arch=80, loads={2: 30})], [row]) == []
    assert judge([kernel(loads={2: 30, 16: 1})], [Budget("a_", 64, "", wide_loads=1)]) == []
    assert len(judge([kernel(arch=120, loads={2: 3, 16: 1})], [row])) == 1


def test_every_kernel_needs_a_row_and_every_row_a_kernel():
    found = judge([kernel("new_kernel")], [])
    assert found == ["new_kernel for sm_90: no row in cuda_budgets.py"]
    assert judge([], [WIDE]) == ["a_kernel: row in cuda_budgets.py, no kernel"]


def test_the_first_row_that_fits_decides():
    rows = [Budget("a_kernel<double", 200, ""), Budget("a_kernel", 64, "")]
    assert judge([kernel("a_kernel<double>", registers=150), kernel()], rows) == []
    rows[0] = Budget("a_kernel.* sm_120$", 64, "", stack=8)
    assert judge([kernel(stack=8, arch=120), kernel()], rows) == []
    assert len(judge([kernel(stack=8, arch=120), kernel(stack=8)], rows)) == 1


def test_registers_that_keep_blocks_resident():
    assert registers_for(threads=128, blocks=4) == 128
    assert registers_for(threads=256, blocks=5) == 48
    assert registers_for(threads=64, blocks=1) == 255
    assert registers_for(threads=576, blocks=1) == 96  # 18 warps: five in one quarter


def test_rows_say_why():
    assert all(row.why for row in BUDGETS)
    assert len({row.kernel for row in BUDGETS}) == len(BUDGETS)


# A loop that moves 16 bytes; a loop, and in it one of sums with a wait inside; then what full warps
# never reach: code for divided ones, and a function.
LOOPS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R11], [R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   IADD3 R5, R5, 0x1, RZ ;
.L_x_3:
"""
LOOPS += "        /*0050*/                   FFMA R4, R5, R6, R4 ;\n" * 40
LOOPS += """
        /*0070*/                   BRA.DIV ~URZ, `(.L_x_6) ;
        /*0080*/                   NOP ;
.L_x_4:
        /*0090*/                   YIELD ;
        /*00a0*/              @!P2 BRA `(.L_x_4) ;
        /*00b0*/                   BRA P3, `(.L_x_3) ;
        /*00c0*/              @!P4 BRA `(.L_x_2) ;
        /*00d0*/                   MUFU.RCP R4, R5 ;
        /*00e0*/                   EXIT ;
.L_x_6:
        /*00f0*/                   WARPSYNC R4 ;
        /*0100*/                   BRA `(.L_x_4) ;
.L_x_7:
        /*0110*/                   BRA `(.L_x_7) ;
"""


def test_parts_of_code():
    found = parts_of(LOOPS.splitlines())
    parts = sorted(found, key=lambda part: part.instructions)
    assert parts == [
        Part(2, moves=1),
        Part(2, walks=True),
        Part(2, walks=True),
        Part(4),
        Part(42, walks=True, sums=True),
    ]


TASK = Work("a_", elements=25, units=4, turns=3)
PARTS = [Part(4), Part(2, moves=1), Part(2, walks=True), Part(42, walks=True, sums=True)]


def test_instructions_of_a_unit():
    """The loop of sums three times, and the copies as often as 25 elements of 4 units take."""
    assert TASK.per_unit(PARTS, 2) == (3 * 42 + 4 + 2 + 2 * (25 * 2 * 4 / 16)) / 4
    walking = replace(TASK, walks=True)
    assert walking.per_unit(PARTS, 2) == (3 * 42 + 2) / 4
    versions = [*PARTS, Part(30, walks=True, sums=True)]
    assert TASK.per_unit(versions, 2) == TASK.per_unit(PARTS, 2)
    assert replace(TASK, loops=2).per_unit(versions, 2) == TASK.per_unit(PARTS, 2) + 3 * 30 / 4
    pair = replace(walking, threads=2)
    assert pair.per_unit(PARTS, 2) == (3 * 42 + 2 * 2) / 4


def test_a_kernel_with_too_many_instructions_for_a_unit():
    row = Budget("a_", 64, "", work=True)
    assert TASK.ceiling(2) == 344 and TASK.ceiling(4) == 688  # of KERNELS: 50 bytes and 100
    fits = replace(
        kernel("a_kernel<Half, Silu<float>>"), parts=[Part(3 * 4), Part(4 * 340 // 3, sums=True)]
    )
    assert judge([fits], [row], [TASK]) == []
    over = replace(fits, parts=[*fits.parts, Part(40)])
    (found,) = judge([over], [row], [TASK])
    assert found.startswith(
        "a_kernel<Half, Silu<float>> for sm_90: 353 instructions for each unit, at most 344"
    )
    assert judge([replace(over, name="a_kernel<float>")], [row], [TASK]) == []
    known = replace(TASK, most=353, why="both ways of copying")
    assert judge([over], [row], [known]) == []
    (found,) = judge([replace(over, parts=[*over.parts, Part(4)])], [row], [known])
    assert found.endswith("354 instructions for each unit, at most 353: both ways of copying")


def test_a_fast_path_needs_a_row_and_its_loop():
    row = Budget("a_", 64, "", work=True)
    assert judge([kernel()], [row]) == ["a_kernel<float> for sm_90: no row in cuda_work.py"]
    (found,) = judge([kernel()], [row], [TASK])
    assert found == "a_kernel<float> for sm_90: no loop of sums"
    found = judge([kernel()], [Budget("a_", 64, "")], [Work("b_", 25, 4)])
    assert found == ["b_: row in cuda_work.py, no kernel"]


def test_rows_of_work_say_why_they_exceed():
    assert all(row.why for row in WORK if row.most)
    assert len({row.kernel for row in WORK}) == len(WORK)


USAGE = """
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN6cotnet12spill_kernelILi64EEEvPKfPfi:
  REG:32 STACK:1176 SHARED:0 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN6cotnet11wide_kernelEPK6float4PS0_i:
  REG:14 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
\t.target\tsm_90
\t.section\t.text._ZN6cotnet12spill_kernelILi64EEEvPKfPfi,"ax",@progbits
_ZN6cotnet12spill_kernelILi64EEEvPKfPfi:
.text._ZN6cotnet12spill_kernelILi64EEEvPKfPfi:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0100*/                   STL [R1+0x204], R8 ;
        /*02a0*/              @!P0 LDG.E.U16.CONSTANT R28, desc[UR4][R28.64] ;
        /*02b0*/               @P1 STG.E.64 desc[UR4][R28.64], R2 ;
        /*02c0*/                   NOP;
\t.section\t.text._ZN6cotnet11wide_kernelEPK6float4PS0_i,"ax",@progbits
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R11], desc[UR4][R2.64] ;
        /*0030*/         @!UP0 UBLKCP.S.G [UR4], [UR8], UR6 ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
"""


def test_output_of_the_tools_is_understood():
    kernels = cuda_gate.merge(cuda_gate.parse_usage(USAGE), cuda_gate.parse_code(CODE))
    found = {kernel.name: kernel for kernel in kernels}
    names = cuda_gate.demangled(list(found))
    assert set(names.values()) == {"cotnet::spill_kernel<64>", "cotnet::wide_kernel"}
    spilling = found["_ZN6cotnet12spill_kernelILi64EEEvPKfPfi"]
    assert (spilling.arch, spilling.registers, spilling.stack) == (90, 32, 1176)
    assert (spilling.loads, spilling.stores) == ({2: 1}, {8: 1})
    assert spilling.instructions == 4
    wide = found["_ZN6cotnet11wide_kernelEPK6float4PS0_i"]
    assert (wide.registers, wide.stack, wide.bulk) == (14, 0, 1)
    assert wide.loads == {16: 2, 4: 1} and not wide.stores


def test_tables():
    kernels = [kernel(arch=80), kernel("a_kernel<double>", registers=90), kernel("b", stack=8)]
    lines = cuda_gate.summary(kernels).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["a_kernel", "2", "40-90", "0", "0-0", "4-4"]
    assert lines[2].split() == ["b", "1", "40-40", "8", "0-0", "4-4"]
    assert len(cuda_gate.table(kernels).splitlines()) == 3


SOURCE = """
extern "C" __global__ void good_kernel(const float4* x, float4* y) {
  float4 a = x[threadIdx.x];
  a.x += a.y;
  y[threadIdx.x] = a;
}
extern "C" __global__ void narrow_kernel(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];
}
// More values at once than the 32 registers that 2048 threads leave to each.
extern "C" __global__ void __launch_bounds__(1024, 2) spill_kernel(const float* x, float* y) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i * 7) % 64] + a[(i + 1) % 64];
  __syncthreads();
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = a[i];
}
"""


def have_tools() -> bool:
    try:
        cuda_gate.find_tool("cuobjdump"), cuda_gate.find_tool("nvdisasm")
    except SystemExit:
        return False
    return shutil.which("nvcc") is not None


@pytest.mark.skipif(not have_tools(), reason="needs nvcc, cuobjdump and nvdisasm")
def test_compiled_kernels(tmp_path):
    (tmp_path / "bad.cu").write_text(SOURCE)
    archs = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    command = ["nvcc", "-O3", *archs, "-c", "bad.cu", "-o", "bad.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    kernels = cuda_gate.read_library(tmp_path / "bad.o")
    assert {(k.name, k.arch) for k in kernels} == {
        (name, arch)
        for name in ("good_kernel", "narrow_kernel", "spill_kernel")
        for arch in (80, 90)
    }
    complaints = judge(kernels, [Budget("_kernel", 64, "", wide_loads=1, wide_stores=1)])
    assert not [line for line in complaints if line.startswith("good_kernel")]
    assert sum("narrow_kernel" in line for line in complaints) == 4  # loads and stores, twice
    spills = [line for line in complaints if "bytes of registers in memory" in line]
    assert len(spills) == 2 and all(line.startswith("spill_kernel") for line in spills)
