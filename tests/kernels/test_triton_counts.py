"""Counts of machine code, the model of the time, and the table of ceilings; no GPU is needed."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from linclip_kernels.linear_attention.compiled.ceilings import (
    compare,
    count_case,
    read_table,
)
from linclip_kernels.linear_attention.compiled.counts import (
    KernelCounts,
    LoopCounts,
    count_kernel,
    count_loop,
)
from linclip_kernels.linear_attention.compiled.resources import (
    Case,
    Usage,
    compilation_key,
    training_cases,
)
from linclip_kernels.linear_attention.compiled.sass import Instruction, Loop, find_loops
from linclip_kernels.linear_attention.compiled.time_model import (
    CHIPS,
    LAUNCH_SECONDS,
    predict,
)
from linclip_kernels.linear_attention.compiled.ttgir import LoopPlan, loop_plans
from linclip_kernels.linear_attention.triton_backend.partition import Launch
from linclip_kernels.linear_attention.variant import Variant


def sass(*lines: str) -> str:
    """Write lines as nvdisasm does; "L1:" is a label."""
    return "\n".join(
        f".{line}" if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;"
        for i, line in enumerate(lines)
    )


def opcodes(loop: Loop) -> list[str]:
    return [one.opcode for one in loop.instructions]


def test_nested_loops_are_found_and_their_instructions_told_apart() -> None:
    found = find_loops(
        sass(
            "MOV R1, RZ",
            "L_outer:",
            "LDG.E.128 R4, desc[UR4][R2.64]",
            "@P0 BRA `(.L_skip)",
            "L_inner:",
            "HMMA.16816.F32.BF16 R8, R4, R6, R8",
            "@!P1 BRA `(.L_inner)",
            "L_skip:",
            "STG.E.128 desc[UR4][R2.64], R4",
            "@P2 BRA `(.L_outer)",
            "EXIT",
        )
    )
    assert [loop.depth for loop in found] == [0, 1, 2]
    assert opcodes(found[0]) == ["MOV", "EXIT"]
    assert opcodes(found[1]) == ["LDG.E.128", "BRA", "STG.E.128", "BRA"]
    assert opcodes(found[2]) == ["HMMA.16816.F32.BF16", "BRA"]


def test_slow_paths_are_left_out() -> None:
    """A recomputation after NaN, a loop without products, code for diverged warps."""
    found = find_loops(
        sass(
            "L_main:",
            "HMMA.16816.F32.BF16 R8, R4, R6, R8",
            "FSETP.NEU.AND P3, PT, R82, RZ, PT",
            "VOTE.ANY P2, P3",
            "@!P2 BRA `(.L_finite)",
            "STS [R1], R2",
            "LDG.E R4, desc[UR4][R2.64]",
            "L_finite:",
            "ISETP.NE.AND P4, PT, R5, RZ, PT",
            "@!P4 BRA `(.L_done)",
            "MOV R3, RZ",
            "L_tokens:",
            "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
            "@P5 BRA `(.L_tokens)",
            "L_done:",
            "BRA.DIV UR17, `(.L_diverged)",
            "L_back:",
            "ISETP.NE.AND P6, PT, R6, RZ, PT",
            "@P6 BRA `(.L_small)",
            "STS [R1], R3",
            "L_small:",
            "@P0 BRA `(.L_main)",
            "EXIT",
            "L_diverged:",
            "WARPSYNC.COLLECTIVE R1, `(.L_back)",
            "BRA `(.L_back)",
        )
    )
    once, main = found
    assert opcodes(once) == ["EXIT"]
    body = ["HMMA", "FSETP", "VOTE", "BRA", "ISETP", "BRA", "BRA", "ISETP", "BRA", "STS", "BRA"]
    assert [opcode.split(".")[0] for opcode in opcodes(main)] == body


def test_a_call_of_a_label_leaves_a_loop() -> None:
    """On Ampere the assembler leaves an inner loop so; calls of functions return."""
    found = find_loops(
        sass(
            "L_outer:",
            "LDG.E R4, desc[UR4][R2.64]",
            "L_inner:",
            "HMMA.16816.F32.BF16 R8, R4, R6, R8",
            "CALL.REL.NOINC `($__internal_0_$__cuda_sm70_shflsync_bfly)",
            "@P3 CALL.REL.NOINC `(.L_end)",
            "BRA `(.L_inner)",
            "L_end:",
            "@P0 EXIT",
            "BRA `(.L_outer)",
        )
    )
    assert [loop.depth for loop in found] == [0, 1, 2]
    assert opcodes(found[1]) == ["LDG.E", "EXIT", "BRA"]
    assert opcodes(found[2])[0] == "HMMA.16816.F32.BF16"
    assert len(opcodes(found[2])) == 4


def test_a_wait_for_a_barrier_in_memory_is_no_loop() -> None:
    (_once, main) = find_loops(
        sass(
            "L_main:",
            "UTMALDG.2D [UR8], [UR4]",
            "L_wait:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R2",
            "@!P0 BRA `(.L_wait)",
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24",
            "@P1 BRA `(.L_main)",
            "EXIT",
        )
    )
    expected = ["UTMALDG", "SYNCS", "BRA", "HGMMA", "BRA"]
    assert [opcode.split(".")[0] for opcode in opcodes(main)] == expected


def test_counts_of_a_loop() -> None:
    lines = [
        ("LDGSTS.E.BYPASS.128", "[R1], desc[UR4][R2.64]"),  # 2 KB by 4 warps
        ("LDG.E", "R4, desc[UR4][R2.64]"),  # 512 bytes
        ("STG.E.64", "desc[UR4][R2.64], R4"),  # 1 KB
        ("UTMALDG.2D", "[UR8], [UR4]"),  # 1 KB
        ("BAR.SYNC.DEFER_BLOCKING", "0x0"),
        ("BAR.SYNC.DEFER_BLOCKING", "0x1, 0x80"),
        ("LDSM.16.MT88.4", "R4, [R1]"),
        ("STSM.16.M88.2", "[R1], R4"),
        ("LDS.128", "R4, [R1]"),
        ("STS.U16", "[R1], R4"),
        ("SHFL.BFLY", "PT, R1, R2, 0x1, 0x1f"),
        ("HMMA.16816.F32.BF16", "R8, R4, R6, R8"),
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR20], R24"),
        ("FADD", "R1, R2, R3"),
        ("LDGDEPBAR", ""),
    ]
    counts = count_loop(Loop(1, [Instruction(*line) for line in lines]), "1", 4, copy_bytes=1024)
    assert counts.instructions == len(lines)
    assert counts.bytes == 2048 + 512 + 1024 + 1024
    assert counts.accesses == {128: 1, 32: 1, 64: 1}
    assert counts.groups["bar"] == 2
    assert counts.named_barriers == 1
    assert counts.groups["ldg"] == counts.groups["depbar"] == counts.groups["fp32"] == 1
    assert counts.shared_clocks == 4 + 4 + 2 + 4 + 1 + 1
    assert counts.products == {"hmma": 4 * 16 * 8 * 16, "hgmma": 64 * 128 * 16}
    assert counts.kinds == "hmma+hgmma"
    assert counts.per_kilobyte(counts.instructions) == len(lines) / 4.5


class _Meta(NamedTuple):
    BLOCK_N: int


@triton.jit
def _sum_products(x, y, out, num_tokens, META: tl.constexpr):
    """Sum x^T y over all tokens, in tiles that are loaded ahead."""
    i_d = tl.arange(0, 64)
    total = tl.zeros([64, 64], tl.float32)
    for start in tl.range(0, num_tokens, META.BLOCK_N, num_stages=4):
        i = (start + tl.arange(0, META.BLOCK_N))[:, None] * 64 + i_d[None, :]
        total += tl.dot(tl.trans(tl.load(x + i)), tl.load(y + i))
    tl.store(out + i_d[:, None] * 64 + i_d[None, :], total)


def sum_products(num_tokens: int, block: int = 64) -> Launch:
    x = torch.empty(num_tokens, 64, dtype=torch.bfloat16, device="meta")
    arguments = {"x": x, "y": x, "out": torch.empty(64, 64, device="meta")}
    arguments |= {"num_tokens": num_tokens, "META": _Meta(block)}
    return Launch(_sum_products, (1,), arguments)


@pytest.mark.long
def test_counts_of_a_compiled_kernel() -> None:
    counts = count_kernel(Case(Variant(), 4096), sum_products(4096), 90)
    once, loop = counts.loops
    assert once.loop == "once"
    assert loop.loop == "1"
    assert loop.products == {"hgmma": 64**3}
    assert loop.accesses == {128: 8}  # 2 tiles of 8 KB, 128 threads
    assert loop.bytes == 2 * 64 * 64 * 2
    assert loop.plan.step == 64
    assert not loop.plan.is_while
    assert loop.plan.buffers is not None
    assert loop.plan.buffers >= 3
    assert counts.usage.stack == 0


def test_compilations_are_told_apart() -> None:
    assert compilation_key(sum_products(4096), 90) == compilation_key(sum_products(8192), 90)
    assert compilation_key(sum_products(4096), 90) != compilation_key(sum_products(4097), 90)
    assert compilation_key(sum_products(4096), 90) != compilation_key(sum_products(4096, 32), 90)


def kernel_counts(*loops: LoopCounts, **usage: int) -> KernelCounts:
    values: dict[str, Any] = {"registers": 64, "stack": 0, "shared": 50_000, "num_warps": 4}
    case = Case(Variant(), 4096)
    return KernelCounts(Usage(case, "kernel", 90, **(values | usage)), loops)


def loop_counts(loop: str = "1", instructions: int = 0, **values: Any) -> LoopCounts:
    empty: dict[str, Any] = {"groups": Counter(), "accesses": Counter(), "products": Counter()}
    empty |= {"named_barriers": 0, "bytes": 0, "shared_clocks": 0, "plan": LoopPlan(1, 64)}
    return LoopCounts(loop, instructions, **(empty | values))


def launch_over_tokens(num_tokens: int, programs: int) -> Launch:
    x = torch.empty(1, num_tokens, 1, 64, dtype=torch.bfloat16, device="meta")
    state = torch.empty(programs, 1, 1, 1, device="meta")
    arguments = {"x": (x, x.stride()), "p_state": state, "META": _Meta(64)}
    return Launch(_sum_products, (programs,), arguments)


@pytest.mark.parametrize(
    ("limit", "clocks", "loop"),
    [
        # 100 tiles of each of 132 * 4 programs, of which 4 are on a multiprocessor at once.
        ("issue", 4 * 100 * 1000, loop_counts(instructions=1000)),
        ("issue", 4 * 100 * 8 * 500, loop_counts(groups=Counter(mufu=500))),
        ("matrix", 4 * 100 * 32, loop_counts(products=Counter(hgmma=32 * 2048))),
        ("shared", 4 * 100 * 4 * 500, loop_counts(shared_clocks=500)),
        ("latency", 100 * 750, loop_counts(groups=Counter(ldgsts=1), plan=LoopPlan(None, 64))),
        ("latency", 100 * 750, loop_counts(groups=Counter(ldgsts=1))),
        (
            "latency",
            100 * (60 * 30),
            loop_counts(groups=Counter(bar=60, ldgsts=1), plan=LoopPlan(2, 64)),
        ),
    ],
)
def test_limits_of_the_model(limit: str, clocks: float, loop: LoopCounts) -> None:
    launch = launch_over_tokens(132 * 4 * 6400, 132 * 4)
    chip = CHIPS["H100"]._replace(peak_bytes=1e30)
    found = predict(kernel_counts(loop), launch, chip)
    assert found.limit == limit
    assert found.seconds == pytest.approx(clocks / chip.clock + LAUNCH_SECONDS)
    assert found.programs_per_sm == 4
    assert found.waves == 1


def test_bandwidth_and_waves_of_the_model() -> None:
    tokens, chip = 132 * 4 * 6400, CHIPS["H100"]
    counts = kernel_counts(loop_counts(groups=Counter(bar=50)))
    found = predict(counts, launch_over_tokens(tokens, 132 * 4), chip)
    num_bytes = 2 * 64 * tokens + 4 * 132 * 4
    assert found.bytes == num_bytes
    assert found.limit == "bandwidth"
    assert found.seconds == pytest.approx(num_bytes / (0.92 * 3.35e12) + LAUNCH_SECONDS)
    # One program more than fit at once makes a second wave.
    fast = chip._replace(peak_bytes=1e30)
    found = predict(counts, launch_over_tokens(6400, 132 * 4 + 1), fast)
    assert found.waves == pytest.approx(1 + 1 / 528)
    assert found.seconds == pytest.approx(2 * 50 * 30 / fast.clock + LAUNCH_SECONDS)


@pytest.mark.parametrize(
    ("outer", "inner", "trips"),
    [
        (LoopPlan(1, 64), LoopPlan(1, 64), 10 * 11 / 2),  # up to the tile of the outer loop
        (LoopPlan(1, 128), LoopPlan(1, 64), 10),  # within that tile
        (LoopPlan(is_while=True), LoopPlan(1, None), 10),  # tiles of META.BLOCK_N, once
    ],
)
def test_trips_of_inner_loops(outer: LoopPlan, inner: LoopPlan, trips: float) -> None:
    fast = CHIPS["H100"]._replace(peak_bytes=1e30)
    loops = loop_counts("1", plan=outer), loop_counts("1.1", groups=Counter(bar=1), plan=inner)
    found = predict(kernel_counts(*loops), launch_over_tokens(640, 1), fast)
    assert found.seconds == pytest.approx(30 * trips / fast.clock + LAUNCH_SECONDS)


def test_loops_of_tritons_dialect() -> None:
    found = loop_plans(
        """
        %b = ttg.local_alloc : () -> !ttg.memdesc<3x64x64xbf16, #shared, #smem, mutable>
        %0 = scf.while (%arg0 = %size) : (i32) -> i32 {
          scf.condition(%1) %arg0 : i32
        } do {
          scf.for %i = %c0_i32 to %n step %size : i32 {
            %2 = ttg.memdesc_index %b[%c0_i32] : !ttg.memdesc<3x64x64xbf16>
            %3 = tt.load %p {cache = 1 : i32} : tensor<64x64x!tt.ptr<bf16>>
          }
          scf.yield %4 : i32
        }
        scf.for %i = %c0_i32 to %n step %c1_i32 : i32 {
          %5 = arith.addf %6, %7 : f32
        }
        scf.for %i = %c0_i32 to %n step %c32_i32 : i32 {
          tt.store %p, %8 : tensor<64x64x!tt.ptr<bf16>>
        }
        """,
        num_loops=3,
    )
    assert found == [LoopPlan(is_while=True), LoopPlan(3, None), LoopPlan(None, 32)]
    assert loop_plans("", num_loops=1) == [LoopPlan()]


def test_loops_over_states() -> None:
    fast = CHIPS["H100"]._replace(peak_bytes=1e30)
    parts = torch.empty(24, 2, 5, 5, device="meta")
    launch = Launch(_sum_products, (4, 3), {"p_parts": parts})
    found = predict(
        kernel_counts(loop_counts(groups=Counter(bar=1), plan=LoopPlan(1, 1))), launch, fast
    )
    assert found.seconds == pytest.approx(30 * 24 * 2 / 4 / fast.clock + LAUNCH_SECONDS)


def test_differences_from_the_table_are_named() -> None:
    _version, (row, *_rest) = read_table()
    assert row["registers"]
    assert compare([row], [row]) == []
    for name, change, verdict in (
        ("registers", 1, "worse"),
        ("registers", -1, "better"),
        ("ctas_per_sm", -1, "worse"),
        ("ctas_per_sm", 1, "better"),
    ):
        value = str(int(row[name]) + change)
        (line,) = compare([row | {name: value}], [row])
        assert line.startswith(f"{verdict}: {row['case']}: {row['kernel']}, sm_{row['cc']}: {name}")
        assert f"{name} {value}, in the table" in line
        assert line.endswith(row[name])
    (line,) = compare([row | {"mma": "hmma"}], [row | {"mma": "hgmma"}])
    assert line.startswith("changed")
    (line,) = compare([row], [])
    assert line.startswith("new")


def test_what_ptxas_varies_in_kernels_that_spill_is_no_difference() -> None:
    _version, rows = read_table()
    (kernel, *_rest) = [row for row in rows if row["stack"] not in ("", "0")]
    stack = int(kernel["stack"])
    assert compare([kernel | {"stack": str(stack + 8)}], [kernel]) == []
    (line,) = compare([kernel | {"stack": str(stack + 24)}], [kernel])
    assert line.startswith("worse")
    loop = {**kernel, "stack": "", "loop": "1", "instr_per_kb": "33.5"}
    table = [kernel, loop]
    assert compare([loop | {"instr_per_kb": "33.29"}], table) == []
    (line,) = compare([loop | {"instr_per_kb": "34"}], table)
    assert line.startswith("worse")
    assert len(compare([loop | {"instr_per_kb": "33.54"}], [kernel | {"stack": "0"}, loop])) == 1


def test_the_table_has_every_training_kernel() -> None:
    _version, rows = read_table()
    in_table = {(row["case"], row["cc"]) for row in rows if row["registers"]}
    assert in_table == {(str(case), cc) for case in training_cases() for cc in ("80", "90", "100")}


@pytest.mark.long
def test_counts_are_those_of_the_table() -> None:
    """The short sequences that CLIP trains on; make check-kernels has all."""
    version, table = read_table()
    if version != triton.__version__:
        pytest.skip(f"the table is for triton {version}")
    chosen = [case for case in training_cases() if case.dim == 64 and case.num_tokens < 500]
    assert {case.variant.causal for case in chosen} == {False, True}
    with ProcessPoolExecutor(2) as pool:
        found = [row for rows in pool.map(count_case, chosen, [90] * len(chosen)) for row in rows]
    assert compare(found, table) == []
