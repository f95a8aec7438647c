"""Every kernel, compiled for GPUs that are absent: nothing spills, and every access is as wide as it can be.

One test per group of variants, which compiles them and checks all, so that pytest-xdist can share them out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import kernels, machine, report
from cktat_loss.kernels import launch
from tests import compiled
from tests.compiled import CALLS, CLASSES, TARGETS, Built, Machine, Variant, unknown

pytestmark = pytest.mark.skipif(launch.interprets(), reason="TRITON_INTERPRET is set: kernels cannot be compiled")

# What an SM must have in flight: 3.0e12 bytes per second over 132 of them, for the 0.7 us that memory takes to answer,
# is 16 KB. 12 warps of 32 threads, each with 16 positions of three logits of 2 bytes, are 36 KB.
WARPS_ON_SM = 12
VGPRS = 128  # four waves on each of an AMD compute unit's SIMDs

# Forward and backward of training, and the forward pass with the most operands.
MAIN, BOTH = ("training", "backward", "recipe"), ("float32", "bfloat16")


def variants(target: str, calls: tuple[str, ...], dtypes: tuple[str, ...], *classes: int, **more: int) -> list[Variant]:
    return [Variant(target, call, dtype, c, **more) for c in classes for call in calls for dtype in dtypes]


LONGEST_ROWS = variants("sm_90", MAIN, BOTH, launch.ROWS_UP_TO)
# Variants that differ from these in one respect alone are compiled where that respect shows: float16 by the gradients
# that wait for the backward pass, bfloat16 by its width, another target by long rows.
GROUPS = {
    **{
        f"sm_90, {c} classes": variants("sm_90", CALLS, ("float32",), c) + variants("sm_90", MAIN, ("bfloat16",), c)
        for c in CLASSES
    },
    "sm_90, float16": variants("sm_90", ("training", "backward"), ("float16",), 1000, 21841),
    "sm_90, the longest rows": LONGEST_ROWS,
    **{f"sm_90, stride {s}": variants("sm_90", MAIN, ("bfloat16",), 1000, row_stride=s) for s in (1016, 1024)},
    "sm_90, few long rows": variants("sm_90", ("training", "recipe"), BOTH, 21841, rows=128),
    "sm_90, one program": variants("sm_90", MAIN, ("float32",), 10, rows=128),
    "sm_90, weights": variants("sm_90", ("training", "backward by rows"), ("float32",), 1000, tensors=True),
    "sm_90, mixed": variants("sm_90", MAIN, ("mixed",), 1000),
    # From 2 GiB on, Triton addresses AMD memory in another way.
    "gfx942, large": variants("gfx942", ("training", "backward"), ("float32",), 1000, 21841, rows=2**20),
    **{
        f"{target}, long rows": variants(target, MAIN, ("float32",), 1000, 21841)
        + variants(target, ("training",), ("bfloat16",), 1000, 21841)
        for target in TARGETS
        if target != "sm_90"
    },
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A pool of compilers, one per core. Workers of pytest-xdist share the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with compiled.compilers(max(1, (os.cpu_count() or 1) // workers)) as processes:
        yield processes


def faults(built: Built) -> list[str]:
    """Return what is wrong with a kernel. Few rows have an SM for each program."""
    code, found = built.machine, []
    if not code.instructions or code.spills or code.local:
        found.append(f"{code.instructions} instructions, {code.spills} spills, {code.local} bytes of local memory")
    if built.variant.target.startswith("gfx"):
        if not 0 < code.registers <= VGPRS:
            found.append(f"{code.registers} registers")
    elif code.warps_on_sm < (code.warps if built.variant.rows <= launch.FEW_ROWS else WARPS_ON_SM):
        found.append(f"{code.warps_on_sm} warps on an SM")
    if built.variant in LONGEST_ROWS and code.warps_on_sm < 2 * code.warps:
        found.append("two of the longest rows do not fit on an SM")
    return found + ([] if built.variant.dtype == "mixed" else built.width_faults())


@pytest.mark.parametrize("group", GROUPS)
def test_no_spills_room_for_other_warps_and_wide_accesses(pool: ProcessPoolExecutor, group: str) -> None:
    if reason := unknown(GROUPS[group][0].target):
        pytest.skip(reason)
    assert {str(one.variant): faults(one) for one in pool.map(compiled.build, GROUPS[group]) if faults(one)} == {}


def test_the_check_sees_what_it_should() -> None:
    """A stride of which the compiler knows nothing would make all accesses narrow, for instance."""
    variant = Variant("sm_90", "training", "float32", 1000, row_stride=1016)
    wide = {"loads": Counter({128: 12}), "stores": Counter({128: 8})}
    code = Machine("rows_kernel", 4, 0, registers=96, instructions=9, **wide)
    good = Built(variant, code, streams=False, readings=1, gradients=2)
    assert faults(good) == []
    for bad, said in (
        ({"loads": Counter({32: 24})}, "loads narrower than 128 bits"),
        ({"stores": Counter({32: 24})}, "stores narrower than 128 bits"),
        ({"stores": Counter()}, "no stores of 128 bits"),
        ({"spills": 1}, "1 spills"),
        ({"local": 8}, "8 bytes of local memory"),
        ({"registers": 168, "warps": 8}, "8 warps on an SM"),
    ):
        assert any(said in fault for fault in faults(replace(good, machine=replace(code, **bad)))), said
    longest = replace(good, variant=LONGEST_ROWS[0], machine=replace(code, warps=16, registers=120))
    assert any("two of the longest rows" in fault for fault in faults(longest))


def test_edges_may_be_narrow_where_rows_are_odd_and_streamed() -> None:
    code = Machine(
        "streaming_kernel", 4, 0, registers=96, instructions=9, loads=Counter({128: 24, 32: 6}), stores=Counter()
    )
    built = Built(Variant("sm_90", "loss", "float32", 21841), code, streams=True, readings=2, gradients=0)
    assert faults(built) == []
    assert faults(replace(built, readings=1)) != [], "each tensor's edges once per reading"
    assert faults(replace(built, variant=built.variant._replace(classes=21840))) != [], "rows of 16 bytes have no edges"


def test_the_table_shows_what_the_machine_code_says(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    rows = [*kernels.measure(variants("sm_90", CALLS, ("float32",), 100), pool)]
    by_call = {row["call"]: row for row in rows}
    moves = {"loss": 3, "training": 5, "backward": 5, "backward by rows": 5, "recipe": 4}
    for call, most in moves.items():
        assert most <= float(by_call[call]["moves"]) < most + 0.1, "row values are few"
        assert float(by_call[call]["h100_us"]) == pytest.approx(by_call[call]["bytes"] / 3.0e6, rel=1e-3)
    assert [by_call[call]["launches"] for call in CALLS] == [2, 2, 1, 1, 2]
    eager = [row for row in rows if row["call"].startswith("eager")]
    assert [row["launches"] for row in eager] == [39, 30]
    assert all(row["bytes"] > 5 * by_call["training"]["bytes"] for row in eager)
    machine.write(tmp_path / "kernels.csv", rows, "cpu")
    text = report.kernels(machine.read(tmp_path / "kernels.csv"))
    assert "| training | 2, 5.0, 2.7 µs |" in text
    worst = max(row["registers"] for row in rows if "registers" in row)
    assert f"| sm_90, C = 100 | {worst} |" in text


def test_the_count_of_operators_is_that_by_hand() -> None:
    x, y = (torch.randn(8, 5, dtype=torch.bfloat16) for _ in range(2))
    with kernels.CountOperators() as counted:
        (x * y).sum()
        x.t().view(5, 8)[0].expand(3, 8)  # views
        x[:1].expand(8, 5) + 1  # what is broadcast is read at its own size
    assert counted.launches == [[(40, 2)] * 3, [(40, 2), (1, 2)], [(5, 2), (40, 2)]]
