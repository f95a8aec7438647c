"""The pages show what the CSVs hold: benchmarks/report.py writes every number of their tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from benchmarks import machine, markdown, report
from benchmarks.report import Row

WHERE = machine.environment("cpu")


def speed_row(contender: str, us: float, **more: object) -> Row:
    faster = {f"times_faster_{q}": 100 / us for q in (20, 50, 80)}
    return {
        "n": 2, "classes": 1000, "dtype": "float32", "logits": "independent", "contender": contender, "us_50": us,
        **faster, "rounds": 30, "peak_elements": 8.5, "host_us": "", "launches": "", "note": "", **WHERE, **more,
    }  # fmt: skip


def gpu_rows() -> list[Row]:
    return [
        speed_row("usual", 100, host_us=400, launches=41),
        speed_row("ours", 20, host_us=200, launches=3),
        speed_row("copy", 10, peak_elements="", host_us=7),
        speed_row("usual, compiled", 50, classes=21841, dtype="bfloat16"),
        speed_row("copy", 25, classes=21841, dtype="bfloat16", peak_elements=""),
        speed_row("ours", 1, classes=32000, us_50="", peak_elements="", note="OutOfMemoryError: full"),
    ]


@pytest.mark.parametrize("page", report.PAGES)
def test_the_pages_show_what_the_csvs_hold(page: str) -> None:
    """A passage without its markers, or a number that somebody typed, would be refused or overwritten."""
    text = (machine.ROOT / page).read_text()
    assert text == report.updated(page, text, machine.RESULTS), "python -m benchmarks.report writes them"
    for name in report.PAGES[page]:
        assert text == report.updated(page, markdown.replaced(text, name, ""), machine.RESULTS)
        with pytest.raises(ValueError, match=f"the markers <!-- begin: {name} -->"):
            report.updated(page, text.replace(f"<!-- begin: {name} -->", ""), machine.RESULTS)


def test_the_fastest_is_bold_and_the_largest_scatter_told() -> None:
    rows = [speed_row("usual", 100), speed_row("a", 50), speed_row("usual, log_target", 80), speed_row("copy", 1)]
    table = report.readme_speed(rows)
    assert table.startswith("| N × C | usual | a | `log_target=True` |\n")
    assert "| 2 × 1000 | 100 µs | **2.00x** | 1.25x |" in table
    table = report.readme_speed([speed_row("usual", 100), speed_row("a", 200, times_faster_20=0.4)])
    assert "| 2 × 1000 | **100 µs** | 0.50x |" in table
    assert "medians of 30 rounds, the 20 and 80 % quantiles of ratios at most 20% away" in table


def test_a_gpus_tables_have_the_share_of_the_copy_and_name_what_failed() -> None:
    text = report.gpu_speed(gpu_rows())
    assert text.startswith("| N × C | usual | copy | usual, compiled | ours |\n")
    assert "| 2 × 1000, float32 | 100 (10%) | 10 | - | 20 (50%) |" in text
    assert "| 2 × 21841, bfloat16 | - | 25 | 50 (50%) | - |" in text
    assert "| 2 × 32000, float32 | - | - | - | failed: OutOfMemoryError: full |" in text
    assert "| ours | 200 µs (0.50), 3 |" in report.host(gpu_rows())


def test_a_stand_in_of_a_gpu_has_no_times_on_the_device() -> None:
    rows = [{name: value for name, value in row.items() if not name.startswith("us_")} for row in gpu_rows()]
    assert report.gpu_speed(rows) == ""
    assert "Measured without a GPU" in report.host(rows)
    assert "Measured without a GPU" not in report.host(gpu_rows())


def test_numbers_have_two_digits_and_nan_stands_out() -> None:
    assert [*map(report.digits, (float("nan"), 0, 0.00123, 0.0412, 33.4, 1234))] == [
        "**NaN**", "0", "1.2e-03", "0.041", "33", "1.2e+03",
    ]  # fmt: skip


def test_a_devices_report_and_picture(tmp_path: Path) -> None:
    """tests/benchmarks/test_main.py has the report of parts that were stopped."""
    rows = machine.read(machine.RESULTS / "accuracy-cpu.csv")
    machine.write(tmp_path / "accuracy-a.csv", rows, "cpu")
    machine.write(tmp_path / "speed-a.csv", gpu_rows(), "cpu")
    text = report.of_device(tmp_path, "a")
    assert text.startswith("![accuracy-a](accuracy-a.png)\n\n## Time and memory")
    assert "| usual | 8.5 |" in text
    assert "| small KL: KL, worst |" in text
    assert "A training step" not in text
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < picture.stat().st_size < 200_000


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    machine.write(tmp_path / "new" / "a.csv", [{"a": 1.23456, "b": "x, y"}, {"c": 2}], "cpu")
    first, second = machine.read(tmp_path / "new" / "a.csv")
    assert (first["a"], first["b"], first["c"]) == (1.235, "x, y", "")
    assert (second["a"], second["b"], second["c"]) == ("", "", 2)
    assert first["torch"] == second["torch"] == torch.__version__


def test_a_passage_is_replaced_as_it_is_and_a_cell_may_hold_a_bar() -> None:
    once = markdown.replaced("a <!-- begin: loss --> old <!-- end: loss --> b", "loss", "| \\1 |\n")
    assert once == "a <!-- begin: loss -->\n\n| \\1 |\n\n<!-- end: loss --> b"
    assert markdown.replaced(once, "loss", "| \\1 |\n") == once
    assert markdown.table(["a|b", "c"], [[1, "d"]]) == "| a\\|b | c |\n| --- | --- |\n| 1 | d |\n"
