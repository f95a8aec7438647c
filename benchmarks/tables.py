"""Markdown tables of the benchmarks' CSVs, so that no number in the documentation is typed.

python -m benchmarks.tables          (--help explains the options)

Rewrites what README.md has between ``<!-- begin: speed -->`` and ``<!-- end: speed -->``, and likewise in
docs/benchmarks.md for loss and accuracy; and beside each loss-<device>.csv writes all of it, as loss-<device>.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import machine, markdown

Row = dict[str, str]
FORWARD, BOTH = "forward", "forward + backward"


def distinct(rows: Iterable[Row], *names: str) -> list[tuple[str, ...]]:
    """The combinations of these columns, in order, without repetition."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def where(rows: Sequence[Row]) -> str:
    """Machine and versions, of rows of one run."""
    row = rows[0]
    triton = "" if row["triton"] == "none" else f", Triton {row['triton']}"
    threads = f"{row['threads']} CPU thread{'s' if row['threads'] != '1' else ''}"
    return f"{row['machine']}, {threads}, torch {row['torch']}{triton}, Python {row['python']}, {row['date']}"


# The loss.


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("us_50")]


def problem(row: Row) -> tuple[str, ...]:
    return row["n"], row["classes"], row["dtype"], row["logits"]


def contenders(rows: Iterable[Row]) -> list[str]:
    return [name for (name,) in distinct(measured(rows), "contender") if name != "copy"]


def ratio_table(rows: Sequence[Row], spread: bool = False) -> str:
    """A line a problem: the usual expression's median, and how many times faster the others are. Bold: the fastest."""
    names = contenders(rows)
    lines = []
    for of in dict.fromkeys(map(problem, measured(rows))):
        here = {row["contender"]: row for row in measured(rows) if problem(row) == of}
        timed = [name for name in names if name in here]
        fastest = max(timed, key=lambda name: float(here[name]["times_faster_50"]))

        def cell(name: str, here: dict[str, Row] = here, fastest: str = fastest) -> str:
            if name not in here:
                return "-"
            row = here[name]
            text = microseconds(row["us_50"]) if name == "usual" else f"{float(row['times_faster_50']):.2f}x"
            text = f"**{text}**" if name == fastest else text
            if not spread or name == "usual":
                return text
            return f"{text} ({float(row['times_faster_20']):.2f} - {float(row['times_faster_80']):.2f})"

        n, classes, _, logits = of
        lines.append([f"{n} × {classes}", logits, *map(cell, names)])
    return markdown.table(["N × C", "logits", "usual, µs", *(heading(name) for name in names[1:])], lines)


def heading(name: str) -> str:
    return {"usual, one log_softmax": "one `log_softmax`", "usual, log_target": "`log_target=True`"}.get(name, name)


def microseconds(text: str) -> str:
    return f"{float(text):.0f}" if float(text) >= 10 else f"{float(text):.1f}"


def value_table(rows: Sequence[Row], column: str, show: Callable[[str], str]) -> str:
    """A line a problem, a column a contender."""
    names = contenders(rows)
    lines = []
    for of in dict.fromkeys(map(problem, measured(rows))):
        here = {row["contender"]: show(row[column]) for row in measured(rows) if problem(row) == of}
        lines.append([f"{of[0]} × {of[1]}", of[3], *(here.get(name) or "-" for name in names)])
    return markdown.table(["N × C", "logits", *map(heading, names)], lines)


def memory_table(rows: Sequence[Row]) -> str:
    """A line a contender: peak memory and operators of each shape."""
    shapes = distinct(measured(rows), "n", "classes")
    lines = []
    for name in contenders(rows):
        here = {(row["n"], row["classes"]): row for row in measured(rows) if row["contender"] == name}
        peaks = [one_decimal(here[s]["peak_elements"]) if s in here else "-" for s in shapes]
        calls = [here[s]["launches"] or "-" if s in here else "-" for s in shapes]
        lines.append([name, " / ".join(peaks), calls[0] if len({*calls}) == 1 else " / ".join(calls)])
    of = " / ".join(f"{n} × {classes}" for n, classes in shapes)
    return markdown.table([of, "peak memory, elements per logit position", "launches"], lines)


def one_decimal(text: str) -> str:
    return f"{float(text):.1f}" if text else ""


def percent(text: str) -> str:
    return f"{100 * float(text):.2g} %" if text else ""


def rounds(rows: Sequence[Row]) -> str:
    numbers = [int(row["rounds"]) for row in measured(rows)]
    return f"{min(numbers)} - {max(numbers)} rounds" if min(numbers) < max(numbers) else f"{numbers[0]} rounds"


def on_both_kinds(rows: Sequence[Row]) -> list[Row]:
    """The shapes that are measured on both kinds of logits: float32, forward and backward."""
    both = [row for row in rows if row.get("pass") == BOTH and row["dtype"] == "float32"]
    shapes = {(row["n"], row["classes"]) for row in both if row["logits"] == "small KL"}
    return sorted(
        (row for row in both if (row["n"], row["classes"]) in shapes),
        key=lambda row: (row["logits"], int(row["classes"])),
    )


def speed_table(rows: Sequence[Row]) -> str:
    """The README's: ours beside the usual expression, eager and compiled."""
    shown = ("usual", "usual, compiled", "ours", "ours, compiled", "ours, Triton")
    chosen = [r for r in on_both_kinds(rows) if r["logits"] == "independent" and r["contender"] in shown]
    return f"{ratio_table(chosen)}\n{where(rows)}; medians of {rounds(chosen)}.\n"


def loss_tables(rows: Sequence[Row]) -> str:
    chosen = on_both_kinds(rows)
    provenance = f"{where(rows)}; {rows[0]['clock']}, medians of {rounds(chosen)}.\n"
    return "\n".join(
        [ratio_table(chosen), memory_table([r for r in chosen if r["logits"] == "independent"]), provenance]
    )


def loss_report(rows: Sequence[Row], title: str = "#") -> str:
    """All of a CSV: what was skipped too. The title is the headings' level."""
    parts = [f"{title} Time, memory and launches\n", f"{where(rows)}; {rows[0]['clock']}, {rounds(rows)}.\n"]
    for dtype, pass_ in distinct(measured(rows), "dtype", "pass"):
        here = [row for row in rows if row["dtype"] == dtype and row["pass"] == pass_]
        parts.append(f"{title}# {dtype}, {pass_}\n\nTimes faster than the usual expression: medians (20 - 80 %).\n")
        parts.append(ratio_table(here, spread=True))
        parts.append("Share reached of the speed of a copy that moves as few bytes as any implementation must:\n")
        parts.append(value_table(here, "of_copy_speed", percent))
    for dtype, pass_ in distinct(measured(rows), "dtype", "pass"):
        here = [row for row in rows if row["dtype"] == dtype and row["pass"] == pass_]
        parts.append(f"{title}# {dtype}, {pass_}: peak memory in elements per logit position\n")
        parts.append(value_table(here, "peak_elements", one_decimal))
        parts.append(f"{title}# {dtype}, {pass_}: launches\n")
        parts.append(value_table(here, "launches", str))
        parts.append(f"{title}# {dtype}, {pass_}: page faults of one call\n")
        parts.append(value_table(here, "page_faults", str))
    noted = [row for row in rows if row["note"]]
    if noted:
        parts.append(f"{title}# Left out, and notes\n")
        lines = []
        for dtype, contender, note in distinct(noted, "dtype", "contender", "note"):
            same = [row for row in noted if (row["dtype"], row["contender"], row["note"]) == (dtype, contender, note)]
            shapes = ", ".join(f"{n} × {classes}" for n, classes in distinct(same, "n", "classes") if n)
            lines.append([contender or "all", dtype or "all", shapes or "all", note])
        parts.append(markdown.table(["contender", "dtype", "N × C", "note"], lines))
    return "\n".join(parts)


# The host.


def host_table(rows: Sequence[Row]) -> str:
    """A line a contender, a column a shape: CPU time, its share of the usual expression's, launches."""
    shapes = distinct(rows, "n", "classes")
    lines = []
    for (name,) in distinct(rows, "contender"):
        here = {(r["n"], r["classes"]): r for r in rows if r["contender"] == name}
        found = [here[shape] for shape in shapes if shape in here]
        lines.append(
            [name, *(f"{float(r['us_50']):.0f} us ({float(r['of_usual']):.2f}), {r['launches']}" for r in found)]
        )
    head = ["forward and backward", *(f"{n} × {classes}" for n, classes in shapes)]
    real = rows[0]["gpu"] == "real"
    what = "on a GPU" if real else "measured without a GPU, with CUDA calls that do nothing: the host's time alone"
    return (
        f"{markdown.table(head, lines)}\nCPU time (share of the usual expression's), launches; {what}. "
        f"{rows[0]['host']}, {where(rows).split(', ', 1)[1]}; medians of {rows[0]['rounds']} rounds in turns.\n"
    )


# Accuracy.


def number(text: str) -> str:
    """Two digits; NaN stands out."""
    value = float(text)
    if math.isnan(value):
        return "**NaN**"
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 or value >= 1000 else f"{value:.2g}"


def accuracy_table(rows: Sequence[Row]) -> str:
    names = [name for (name,) in distinct(rows, "contender")]
    lines = []
    for case, measure in distinct((row for row in rows if row["case"] != "sweep"), "case", "measure"):
        here = {r["contender"]: r["value"] for r in rows if (r["case"], r["measure"]) == (case, measure)}
        show = percent if measure.endswith("negative") else number
        lines.append([case, measure, *(show(here[name]) if name in here else "-" for name in names)])
    return markdown.table(["logits", "error of", *map(heading, names)], lines)


def accuracy_tables(rows: Sequence[Row]) -> str:
    tiny = float(next(row for row in rows if row["case"] == "small KL")["true_kl"])
    setting = f"{rows[0]['rows']} rows of {rows[0]['classes']} classes; the median small KL is {tiny:.1e}."
    return f"{accuracy_table(rows)}\n{setting} {where(rows)}.\n"


# Files.

# By page, what stands between the markers of each name, and the CSV that it is made of.
PAGES: dict[str, dict[str, tuple[str, Callable[[Sequence[Row]], str]]]] = {
    "README.md": {"speed": ("loss", speed_table)},
    "docs/kernels.md": {"host": ("host", host_table)},
    "docs/benchmarks.md": {"loss": ("loss", loss_tables), "accuracy": ("accuracy", accuracy_tables)},
}


def updated(page: str, text: str, results: Path, device: str = "cpu") -> str:
    """The page's text, with the tables that the CSVs give. Where there is no CSV, the table stays as it is."""
    for name, (csv, table) in PAGES[page].items():
        path = results / ("host.csv" if csv == "host" else f"{csv}-{device}.csv")
        if path.exists():
            text = markdown.replaced(text, name, table(machine.read(path)))
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="the CSVs' folder (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=machine.ROOT, help="the pages' folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    for path in sorted(args.results.glob("loss-*.csv")):
        path.with_suffix(".md").write_text(loss_report(machine.read(path)))
    for page in PAGES:
        path = args.root / page
        path.write_text(updated(page, path.read_text(), args.results))
        print(f"rewrote the tables of {path}")


if __name__ == "__main__":
    main()
