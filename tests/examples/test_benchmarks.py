"""The benchmarks run, at a tiny size; what they count is right; and the pages show what their CSVs hold."""

import math
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks import accuracy, contenders, loss, machine, markdown, tables
from benchmarks.contenders import BETA, TAU, Contender
from benchmarks.eager_cost import counted
from benchmarks.memory import page_faults, peak_bytes
from benchmarks.timing import CPUClock, quantiles, speedups, take_turns

EAGER = {"usual", "usual, one log_softmax", "usual, log_target", "ours"}
COMPILED = {"usual, compiled", "ours, compiled"}
SHAPES = ("128x10", "4x3")  # the first is one that is measured with a small KL too


# What is counted.


def test_quantiles_by_hand() -> None:
    assert quantiles([5, 1, 4, 2, 3, 6], "s") == {"s_20": 2, "s_50": 3.5, "s_80": 5}
    assert quantiles([10, 0], "s") == {"s_20": 2, "s_50": 5, "s_80": 8}
    assert quantiles([7], "s") == {"s_20": 7, "s_50": 7, "s_80": 7}


def test_speedups_are_taken_round_by_round() -> None:
    assert speedups([2.0, 9.0], [4.0, 3.0]) == [0.5, 3.0]
    with pytest.raises(ValueError, match="zip"):
        speedups([1.0], [1.0, 2.0])


def test_all_take_turns() -> None:
    """Each is called in each round, as often as its time asks, and each is the first one once."""
    order: list[str] = []

    class Fake:
        name = "fake"

        def __call__(self, call, repeats: int) -> float:
            call()
            order.append(f"{call.__name__}{repeats}")
            return {"slow": 0.02, "fast": 0.001}[call.__name__]

    def slow() -> None: ...
    def fast() -> None: ...

    told: list[float] = []
    times, repeats = take_turns({"a": slow, "b": fast}, Fake(), lambda seconds: told.append(seconds) or 3)
    assert repeats == {"a": 1, "b": 5}
    assert told == [pytest.approx(0.02 + 5 * 0.001)]
    assert times == {"a": [0.02] * 3, "b": [0.001] * 3}
    assert order == ["slow1", "fast1", "slow1", "fast5", "fast5", "slow1", "slow1", "fast5"]


def test_the_clock_repeats() -> None:
    calls: list[int] = []
    for threads in (1, 2):
        assert CPUClock(threads)(lambda: calls.append(1), 7) >= 0
    assert len(calls) == 14


def test_memory_and_operators_of_a_known_case() -> None:
    x = torch.randn(64, 1000)

    def three_at_once() -> torch.Tensor:
        return (x + 1) * (x + 2)

    three_at_once()
    assert 3.0 <= peak_bytes(three_at_once) / (4 * x.numel()) < 3.01
    assert counted(three_at_once).launches == 3
    assert counted(lambda: x.t().view(1000, 64)[0]).launches == 0, "views"


def test_page_faults_of_memory_that_is_new() -> None:
    pytest.importorskip("resource", reason="not on Windows")
    one_mapping = bytearray()

    def touch() -> None:
        one_mapping.extend(bytes(1 << 26))

    faults = page_faults(touch)
    assert faults is not None
    assert page_faults(lambda: None) < 10 < faults


# What is compared.


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_contenders_agree(reduction: str) -> None:
    logits = torch.randn(3, 8, 5, dtype=torch.float64).unbind()
    chosen, _ = contenders.choose("cpu", compiling=False)
    assert set(chosen) == EAGER
    expected = contenders.usual(*logits, TAU, BETA, reduction)
    assert expected.shape == (() if reduction == "mean" else (8,))
    for contender in chosen.values():
        torch.testing.assert_close(contender.loss(*logits, TAU, BETA, reduction), expected)


def test_what_cannot_run_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.shutil, "which", lambda name: None)
    chosen, left_out = contenders.choose("cpu")
    assert set(chosen) == EAGER
    assert all("no compiler" in left_out[name] for name in COMPILED)
    assert "interpreter" in left_out["ours, Triton"]
    assert left_out["Liger-Kernel"] == "needs a GPU"


def test_liger_has_no_gradient_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of its interface, since its kernels need a GPU."""

    class StandIn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, log_q, p, reduction, log_target, eps):
            ctx.save_for_backward(p)
            assert (log_target, eps) == (False, 1e-10)
            return torch.nn.functional.kl_div(log_q, p, reduction=reduction)

        @staticmethod
        def backward(ctx, upstream):
            (p,) = ctx.saved_tensors
            return -p * upstream / len(p), None, None, None, None

    for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.kl_div"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["liger_kernel.ops.kl_div"], "LigerKLDivLossFunction", StandIn, raising=False)
    logits = loss.make_logits(loss.Problem("float32", 5, 8, "independent"), "cpu")
    torch.testing.assert_close(contenders.liger(*logits), contenders.usual(*logits))
    torch.testing.assert_close(contenders.liger(*logits, reduction="none"), contenders.usual(*logits, reduction="none"))
    step = loss.calls_of(contenders.liger, logits, Contender(contenders.liger, note="no gradient"))
    d_clean, d_adv = step["forward + backward"]()
    assert d_clean is None
    torch.testing.assert_close(d_adv, torch.autograd.grad(contenders.usual(*logits), logits[1])[0])


def test_small_kl_logits_have_one() -> None:
    near, far = (
        loss.make_logits(loss.Problem("float32", 10, 128, kind), "cpu") for kind in ("small KL", "independent")
    )
    apart = [(clean - adv).std().item() for clean, adv, _ in (near, far)]
    assert apart == pytest.approx([0.01, 4 * math.sqrt(2)], rel=0.1)
    assert all(x.untyped_storage().nbytes() == 4 * 1280 for x in near), "or one would keep the others alive"


# The programs.


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CSVs, pictures and tables of all programs, from problems that take no time."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks import plots

    folder = tmp_path_factory.mktemp("results")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # A real compilation takes half a minute.
        patch.setattr(contenders, "no_compiler", lambda device: "")
        patch.setattr(contenders, "compiled", lambda loss: torch.compile(loss, backend="eager"))
        patch.setattr(loss, "MOST_ROUNDS", loss.FEWEST_ROUNDS)
        few = ["--device", "cpu", "--out", str(folder)]
        loss.main([*few, "--shapes", *SHAPES, "--minutes", "5"])
        accuracy.main([*few, "--rows", "6", "--classes", "7"])
    plots.main(["--results", str(folder)])
    (folder / "docs").mkdir()
    for page, parts in tables.PAGES.items():
        (folder / page).write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in parts))
    tables.main(["--results", str(folder), "--root", str(folder)])
    return folder


def test_loss_measures_all_of_it(results: Path) -> None:
    rows = machine.read(results / "loss-cpu.csv")
    measured = tables.measured(rows)
    keys = [tuple(row[k] for k in ("n", "classes", "dtype", "logits", "pass", "contender")) for row in measured]
    problems = [("128", "10", "independent"), ("128", "10", "small KL"), ("4", "3", "independent")]
    assert sorted(keys) == sorted(
        (n, classes, dtype, logits, pass_, contender)
        for n, classes, logits in problems
        for dtype in loss.DTYPES
        for pass_ in loss.MOVES
        for contender in (EAGER | COMPILED | {"copy"})
    )
    for row in measured:
        assert float(row["us_20"]) <= float(row["us_50"]) <= float(row["us_80"])
        assert int(row["rounds"]) >= loss.FEWEST_ROUNDS
        assert row["torch"] == torch.__version__
        assert row["clock"] == "CPU time"
        moved = (
            loss.MOVES[row["pass"]] * int(row["n"]) * int(row["classes"]) * {"float32": 4, "bfloat16": 2}[row["dtype"]]
        )
        assert float(row["gb_per_s"]) == pytest.approx(moved / float(row["us_50"]) / 1e3, rel=2e-3)
        if row["contender"] == "usual":
            assert row["times_faster_50"] == "1"
            assert row["launches"] == ("17" if row["pass"] == "forward" else "39")
    assert {row["contender"] for row in measured if row["shapes"]} == COMPILED
    assert {row["contender"] for row in rows if row["note"]} == {"ours, Triton", "Liger-Kernel"}


def test_large_problems_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, _ = contenders.choose("cpu", compiling=False)
    problem = loss.Problem("float32", 10, 64, "independent")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "free_bytes", lambda device: 1000)
        ((row,),) = loss.run(chosen, [problem], CPUClock(1), "cpu", minutes=1)
        assert "0.0 GB are free" in row["note"]
    monkeypatch.setattr(loss, "probe", lambda *_: 100.0)
    ((row,),) = loss.run(chosen, [problem], CPUClock(1), "cpu", minutes=1)
    assert "5 rounds take about 3600 s" in row["note"]
    assert loss.too_large(problem, chosen, CPUClock(1), "cpu", share=1e6) == ""
    assert loss.too_large(problem._replace(n=128), chosen, CPUClock(1), "cpu", share=0.0) == "", "one of the criterion"


def test_a_failing_compiler_leaves_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def broken(_: object) -> contenders.Loss:
        def fail(*_: object) -> torch.Tensor:
            raise RuntimeError("no Python.h")

        return fail

    monkeypatch.setattr(contenders, "no_compiler", lambda device: "")
    monkeypatch.setattr(contenders, "compiled", broken)
    chosen, _ = contenders.choose("cpu")
    (rows,) = loss.run(chosen, [loss.Problem("float32", 3, 4, "independent")], CPUClock(1), "cpu", minutes=0.01)
    assert {row["contender"] for row in rows if "us_50" in row} == EAGER | {"copy"}
    assert {row["contender"]: row["note"] for row in rows if "us_50" not in row} == dict.fromkeys(
        COMPILED, "left out, torch.compile failed: RuntimeError"
    )
    assert "no Python.h" in capsys.readouterr().out


def test_accuracy_of_ours(results: Path) -> None:
    rows = machine.read(results / "accuracy-cpu.csv")
    assert {row["contender"] for row in rows} == EAGER | COMPILED
    cases = {"ordinary", "saturated", "masked classes", "bfloat16", "float16", "small KL", "sweep"}
    assert {row["case"] for row in rows} == cases
    for row in rows:
        if row["contender"] == "ours" and row["case"] in ("ordinary", "saturated", "masked classes"):
            assert float(row["value"]) < 2e-5, row
    assert len({row["true_kl"] for row in rows if row["case"] == "sweep"}) == len(accuracy.GAPS)


def test_errors_by_hand() -> None:
    true = accuracy.Result(torch.tensor([2.0, 1e-4]), torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [40.0, 0.0]]))
    actual = accuracy.Result(
        torch.tensor([2.5, 3e-4]), torch.full((2, 2), 0.1), torch.tensor([[0.0, 0.5], [44.0, 0.0]])
    )
    clean = torch.zeros(2, 2)
    found = accuracy.errors(actual, true, (clean, clean, clean), beta=4.0)
    assert found == {"loss": pytest.approx(0.25), "d_clean": pytest.approx(0.1 / 4), "d_adv": pytest.approx(0.1)}
    kl = accuracy.kl_errors(torch.tensor([1.5, -1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))
    assert kl == {"KL, median": 0.5, "KL, worst": 2.0, "KL, negative": pytest.approx(1 / 3)}


def test_pictures(results: Path) -> None:
    for name in ("time", "memory", "error"):
        picture = (results / f"{name}-cpu.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert 5_000 < len(picture) < 200_000


def test_the_driver_runs_all_programs_and_says_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Done:
        returncode = 0

    def stand_in(command: list[str], **_: object) -> Done:
        seen.append(command[2:])
        return Done()

    monkeypatch.setattr(driver.subprocess, "run", stand_in)
    driver.main(["--out", str(tmp_path), "--device", "cpu", "--no-compile", "--minutes", "2"])
    programs = [command[0].removeprefix("benchmarks.") for command in seen]
    step = ["step"] if (machine.ROOT / "benchmarks" / "step.py").exists() else []
    assert programs == ["loss", "accuracy", *step, "plots"], "elsewhere than in its own folder, no README to rewrite"
    assert seen[0][1:] == [
        "--out", str(tmp_path), "--device", "cpu", "--threads", "1", "--minutes", "1.24", "--no-compile",
    ]  # fmt: skip
    Done.returncode = 1
    with pytest.raises(SystemExit):
        driver.main(["--out", str(tmp_path), "--device", "cpu"])


# The tables.


def test_a_cell_may_hold_a_bar() -> None:
    assert markdown.table(["a|b", "c"], [[1, "d"]]) == "| a\\|b | c |\n| --- | --- |\n| 1 | d |\n"


def test_the_tables_are_what_the_csvs_give(results: Path) -> None:
    for page in tables.PAGES:
        text = (results / page).read_text()
        assert text == tables.updated(page, text, results)
    rows = machine.read(results / "loss-cpu.csv")
    report = (results / "loss-cpu.md").read_text()
    for row in tables.measured(rows):
        if row["contender"] == "ours":
            assert f"{float(row['times_faster_50']):.2f}x" in report
    assert "needs a GPU" in report
    assert (results / "docs/benchmarks.md").read_text().count("128 × 10") == 3  # both kinds of logits, and the memory
    assert (results / "README.md").read_text().count("128 × 10") == 1


def test_the_fastest_is_bold() -> None:
    def row(contender: str, faster: float) -> dict[str, str]:
        same = {"n": "2", "classes": "3", "dtype": "float32", "logits": "independent", "us_50": "50"}
        return same | {"contender": contender} | {f"times_faster_{q}": str(faster) for q in (20, 50, 80)}

    assert "| 50 | **1.50x** | 1.25x |" in tables.ratio_table([row("usual", 1), row("a", 1.5), row("b", 1.25)])
    assert "| **50** | 0.50x |" in tables.ratio_table([row("usual", 1), row("a", 0.5)])


def test_a_table_without_its_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="the markers <!-- begin: loss -->"):
        markdown.replaced("text", "loss", "table")
    text = "a <!-- begin: loss --> old <!-- end: loss --> b"
    once = markdown.replaced(text, "loss", "| \\1 |\n")
    assert once == "a <!-- begin: loss -->\n\n| \\1 |\n\n<!-- end: loss --> b"
    assert markdown.replaced(once, "loss", "| \\1 |\n") == once


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_pages_show_what_the_csvs_hold(page: str) -> None:
    """No number in these tables is typed: `python -m benchmarks.tables` writes them."""
    text = (machine.ROOT / page).read_text()
    assert text == tables.updated(page, text, machine.RESULTS)


def test_the_loss_report_shows_what_its_csv_holds() -> None:
    report = machine.RESULTS / "loss-cpu.md"
    assert report.read_text() == tables.loss_report(machine.read(report.with_suffix(".csv")))
