"""Every kernel, compiled for GPUs that aren't here: nothing spills, every access is as wide as it can be."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import ahead_of_time, kernels
from benchmarks.ahead_of_time import CALLS, CLASSES, DTYPES, TARGETS, Built, Variant, unknown, width_faults
from benchmarks.eager_cost import Cost, cost
from cktat_loss.kernels import launch

pytestmark = pytest.mark.skipif(launch.interprets(), reason="TRITON_INTERPRET is set: kernels cannot be compiled")

# What an SM must have in flight: 3.0e12 bytes a second over 132 of them, for the 0.7 us that memory takes to answer, is
# 16 KB. 12 warps of 32 threads, each with 16 positions of three logits of 2 bytes, are 36 KB.
WARPS_ON_SM = 12
VGPRS = 128  # four waves on each of an AMD compute unit's SIMDs

# Forward and backward of training, and the forward pass with the most operands.
BOTH_WAYS = ("training", "backward", "recipe")
# float16 differs from bfloat16 in its conversions alone, one target from another in what these calls show of long rows.
PLAIN = [
    Variant(target, call, dtype, c)
    for target in TARGETS
    for c in (CLASSES if target == "sm_90" else CLASSES[2:])
    for call in (CALLS if target == "sm_90" else BOTH_WAYS)
    for dtype in (DTYPES if target == "sm_90" else DTYPES[:2])
]
LONGEST_ROWS = [Variant("sm_90", call, dtype, launch.ROWS_UP_TO) for call in BOTH_WAYS for dtype in DTYPES[:2]]
# From 2 GiB on, Triton addresses AMD memory in another way.
LARGE = [Variant("gfx942", call, "float32", c, rows=2**20) for call in BOTH_WAYS for c in (1000, 21841)]
PADDED = [Variant("sm_90", call, dtype, 1000, row_stride=1024) for call in BOTH_WAYS for dtype in DTYPES[:2]]
SLICED = [Variant("sm_90", call, dtype, 1000, row_stride=1016) for call in BOTH_WAYS for dtype in DTYPES[:2]]
MIXED = [Variant("sm_90", call, "mixed", 1000) for call in CALLS]
SMALL = [Variant("sm_90", call, dtype, 10, rows=128) for call in BOTH_WAYS for dtype in DTYPES[:2]]  # one program
TENSORS = [Variant("sm_90", call, "float32", 1000, tensors=True) for call in CALLS]
WIDE = [*PLAIN, *LONGEST_ROWS, *LARGE, *PADDED, *SLICED, *SMALL, *TENSORS]


@pytest.fixture(autouse=True)
def known_target(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec and (reason := unknown(callspec.params["variant"].target)):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> dict[Variant, Built]:
    """All variants of the tests that run, compiled at once."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    variants = [callspec.params["variant"] for callspec in parameters if callspec and "variant" in callspec.params]
    return ahead_of_time.build_all(
        dict.fromkeys(v for v in variants if isinstance(v, Variant) and not unknown(v.target))
    )


@pytest.mark.parametrize("variant", [*WIDE, *MIXED], ids=str)
def test_no_spills_and_no_local_memory(built: dict[Variant, Built], variant: Variant) -> None:
    machine = built[variant].machine
    assert machine.instructions > 0
    assert (machine.spills, machine.local) == (0, 0), machine


@pytest.mark.parametrize("variant", [*WIDE, *MIXED], ids=str)
def test_registers_leave_room_for_other_warps(built: dict[Variant, Built], variant: Variant) -> None:
    machine = built[variant].machine
    if variant.target.startswith("gfx"):
        assert 0 < machine.registers <= VGPRS, machine
    else:
        assert machine.warps_on_sm >= WARPS_ON_SM, machine


@pytest.mark.parametrize("variant", WIDE, ids=str)
def test_logits_and_gradients_move_at_full_width(built: dict[Variant, Built], variant: Variant) -> None:
    assert width_faults(built[variant]) == []


@pytest.mark.parametrize("variant", SLICED, ids=str)
def test_the_width_check_sees_narrow_accesses(built: dict[Variant, Built], variant: Variant) -> None:
    """What happens to all input where the compiler does not know the stride."""
    good = built[variant]
    assert variant.widest(variant.row_stride, variant.classes) == 128
    for which in ("loads", "stores"):
        narrow = replace(good.machine, **{which: Counter({32: 24})})
        assert any(f"{which} narrower than 128 bits" in fault for fault in width_faults(replace(good, machine=narrow)))


@pytest.mark.parametrize("variant", LONGEST_ROWS, ids=str)
def test_two_of_the_longest_rows_fit_on_an_sm(built: dict[Variant, Built], variant: Variant) -> None:
    machine = built[variant].machine
    assert machine.warps_on_sm >= 2 * machine.warps


def test_the_eager_count_is_the_one_by_hand() -> None:
    rows, classes = 8, 5
    counted = cost(lambda clean, adv, _: (clean * adv).sum(), rows, classes, torch.bfloat16)
    # mul 3, sum 1 and a scalar; backward: a one, and per gradient a scalar, a factor and the result.
    elements = 3 * 40 + (40 + 1) + 1 + 2 * (1 + 40 + 40)
    assert counted == Cost(launches=5, elements=elements, bytes=2 * elements)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    kernels.main(["--out", str(folder), "--targets", "sm_90", "--dtypes", "float32", "--classes", "100"])
    return folder


def test_the_report_has_every_call_and_the_eager_expressions(report: Path) -> None:
    with (report / "kernels.csv").open(newline="") as file:
        rows = {row["call"]: row for row in csv.DictReader(file)}
    assert set(CALLS) < set(rows)
    for call, moves in {"loss": 3, "training": 5, "backward": 5, "backward by rows": 5, "recipe": 4}.items():
        assert moves <= float(rows[call]["moves"]) < moves + 0.1, "row values are few"
        assert float(rows[call]["h100_us"]) == pytest.approx(int(rows[call]["bytes"]) / 3.0e6, rel=1e-3)
    assert [int(rows[call]["launches"]) for call in CALLS] == [2, 2, 1, 1, 2]
    eager = [row for row in rows.values() if row["call"].startswith("eager")]
    assert len(eager) == 3
    assert all(int(row["bytes"]) > 5 * int(rows["training"]["bytes"]) for row in eager)


def test_the_report_shows_what_the_csv_holds(report: Path) -> None:
    text = (report / "kernels.md").read_text()
    with (report / "kernels.csv").open(newline="") as file:
        single = next(row for row in csv.DictReader(file) if row["call"] == "training")
    line = next(line for line in text.splitlines() if line.startswith("| 100 | training | rows_kernel |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:] == [
        single[k] for k in ("warps", "registers", "spills", "shared_bytes", "loads", "stores", "instructions")
    ]
    assert "Nothing here ran on a GPU" in text
