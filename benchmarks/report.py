"""The tables and the picture of the pages, made of the CSVs, so that no number in the documentation is typed.

    python -m benchmarks.report

Rewrites the passages of README.md, docs/benchmarks.md and docs/kernels.md between ``<!-- begin: NAME -->`` and
``<!-- end: NAME -->``, and draws accuracy-<device>.png beside each accuracy-<device>.csv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks import machine, markdown

Row = dict[str, str]
Key = Callable[[Row], str]
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#56B4E9", "#009E73", "#D55E00")
FLOOR = "an empty autograd.Function"


def where(rows: Sequence[Row]) -> str:
    """Return machine and versions, of rows of one run."""
    row = rows[0]
    host = f", {row['host']}" if row.get("host") else ""
    versions = f"torch {row['torch']}, Triton {row['triton']}, Python {row['python']}"
    return f"{row['machine']}{host}, {row['threads']} CPU thread, {versions}, {row['date']}"


def pivot(corner: str, rows: Iterable[Row], line: Key, column: Key, cell: Callable[[Row, dict[str, Row]], str]) -> str:
    """Return a table of rows by line and column. A cell is made of its row and of all rows of its line."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(line(row), {})[column(row)] = row
    names = sorted({name: 0 for here in found.values() for name in here}, key=lambda name: name.startswith("ours"))
    lines = [[label, *(cell(here[n], here) if n in here else "-" for n in names)] for label, here in found.items()]
    head = [f"`{name.removeprefix('usual, ')}=True`" if name == "usual, log_target" else name for name in names]
    return markdown.table([corner, *head], lines)


def contender(row: Row) -> str:
    return row["contender"]


def problem(row: Row) -> str:
    return f"{row['n']} × {row['classes']}{', small KL' if row['logits'] == 'small KL' else ''}"


def number(text: str) -> str:
    """Return two digits; NaN stands out."""
    value = float(text)
    if math.isnan(value):
        return "**NaN**"
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 or value >= 1000 else f"{value:.2g}"


def microseconds(text: str) -> str:
    return f"{float(text):.0f}" if float(text) >= 10 else f"{float(text):.1f}"


# Speed.


def timed(rows: Iterable[Row], *left_out: str, kinds: Sequence[str] = ("independent",)) -> list[Row]:
    """Return the float32 rows that have a time, of these kinds of logits, without the contenders that are left out."""
    chosen = (row for row in rows if row["contender"] not in left_out and row.get("us_50"))
    return [row for row in chosen if row["dtype"] == "float32" and row["logits"] in kinds]


def faster(row: Row, line: dict[str, Row]) -> str:
    """Return how many times faster a contender is, or the time of the usual expression. The fastest is bold."""
    usual = row["contender"] == "usual"
    text = f"{microseconds(row['us_50'])} µs" if usual else f"{float(row['times_faster_50']):.2f}x"
    return f"**{text}**" if row is max(line.values(), key=lambda one: float(one["times_faster_50"])) else text


def scatter(rows: Sequence[Row]) -> str:
    """Return the machine, the number of rounds, and how far ratios scatter."""
    numbers = sorted({int(row["rounds"]) for row in rows})
    counted = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    ratios = [float(row[f"times_faster_{q}"]) / float(row["times_faster_50"]) for row in rows for q in (20, 80)]
    away = max(abs(ratio - 1) for ratio in ratios)
    return f"{where(rows)}; medians of {counted} rounds, the 20 and 80 % quantiles of ratios at most {away:.0%} away.\n"


def readme_speed(rows: Sequence[Row]) -> str:
    chosen = timed(rows, "copy")
    return f"{pivot('N × C', chosen, problem, contender, faster)}\n{scatter(chosen)}"


def readme_gpu(rows: Sequence[Row]) -> str:
    """Return the times on a GPU of the contenders that a user chooses between."""
    names = ("usual", "usual, log_target", "usual, compiled", "ours")
    chosen = [row for row in timed(rows) if row["contender"] in names]

    def cell(row: Row, line: dict[str, Row]) -> str:
        text = f"{microseconds(row['us_50'])} µs"
        return f"**{text}**" if row is min(line.values(), key=lambda one: float(one["us_50"])) else text

    return f"{pivot('N × C', chosen, problem, contender, cell)}\n{where(chosen)}.\n" if chosen else ""


def cpu_speed(rows: Sequence[Row]) -> str:
    chosen = timed(rows, "copy") + timed(rows, "copy", kinds=["small KL"])
    return f"{pivot('N × C', chosen, problem, contender, faster)}\n{memory(rows)}\n{scatter(chosen)}"


def memory(rows: Sequence[Row]) -> str:
    def cell(row: Row, _: dict[str, Row]) -> str:
        return f"{float(row['peak_elements']):.1f}"

    return pivot("peak memory, elements per logit position", timed(rows, "copy", FLOOR), contender, problem, cell)


def gpu_speed(rows: Sequence[Row]) -> str:
    """Return the times on a GPU, with the share of a copy's speed that each reaches."""

    def cell(row: Row, line: dict[str, Row]) -> str:
        if row.get("note"):
            return f"failed: {row['note']}"
        share = float(line["copy"]["us_50"]) / float(row["us_50"])
        return microseconds(row["us_50"]) + ("" if row is line["copy"] else f" ({share:.0%})")

    if not any(row.get("us_50") for row in rows):
        return ""
    shown = [row for row in rows if row["contender"] != FLOOR and (row["us_50"] or row.get("note"))]
    table = pivot("N × C", shown, lambda row: f"{problem(row)}, {row['dtype']}", contender, cell)
    return f"{table}\nµs (share of the copy's speed). {where(rows)}.\n"


def host(rows: Sequence[Row]) -> str:
    """Return the host's CPU time, its share of the usual expression's, and launches."""
    counted = [row for row in rows if row.get("launches")]
    usual = {problem(row): float(row["host_us"]) for row in counted if row["contender"] == "usual"}

    def cell(row: Row, _: dict[str, Row]) -> str:
        share = float(row["host_us"]) / usual.get(problem(row), math.nan)
        return f"{microseconds(row['host_us'])} µs ({share:.2f}), {row['launches']}"

    real = "" if timed(rows) else " Measured without a GPU, with CUDA calls that do nothing."
    text = f"\nCPU time (share of the usual expression's), launches.{real} {where(rows)}.\n"
    return pivot("forward and backward", counted, contender, problem, cell) + text if counted else ""


# Accuracy, training steps, compiled kernels.


def accuracy(rows: Sequence[Row]) -> str:
    def cell(row: Row, _: dict[str, Row]) -> str:
        return f"{100 * float(row['value']):.2g} %" if row["measure"] == "KL, negative" else number(row["value"])

    shown = [row for row in rows if row["case"] != "sweep"]
    text = pivot("error", shown, lambda row: f"{row['case']}: {row['measure']}", contender, cell)
    tiny = {f"; the median small KL is {float(row['true_kl']):.1e}" for row in shown if row.get("true_kl")}
    return f"{text}\n{rows[0]['rows']} rows of {rows[0]['classes']} classes{''.join(tiny)}. {where(rows)}.\n"


def step(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        spread = f"{float(row['ratio_20']):.2f} - {float(row['ratio_80']):.2f}"
        lines.append([row["contender"], f"{float(row['s_50']):.3g}", f"**{float(row['ratio_50']):.2f}** ({spread})"])
    table, of = markdown.table(["", "seconds", "times a PGD-AT step (20 - 80 %)"], lines), rows[0]
    setting = f"{of['arch']}, batch {of['batch']}, PGD-{of['attack_steps']}, medians of {of['rounds']} rounds"
    return f"{table}\n{setting}. {where(rows)}.\n"


def kernels(rows: Sequence[Row]) -> str:
    """Return the traffic of one step, and the worst of all kernels of each architecture and number of classes."""
    names = {"loss": "no gradient", "backward": "and backward, if the upstream gradient is not 1"}
    worst = ("registers", "spills", "local_bytes", "narrow_accesses", "shared_bytes", "instructions")

    def cell(row: Row, _: dict[str, Row]) -> str:
        return f"{row['launches']}, {float(row['moves']):.1f}, {microseconds(row['h100_us'])} µs"

    of_one = [row for row in rows if row["architecture"] in ("any", rows[0]["architecture"])]
    shown = [row for row in of_one if row["dtype"] == "float32" and row["call"] != "backward by rows"]
    corner = f"launches, element moves per logit position, time at 3.0 TB/s (float32, N = {rows[0]['rows']})"
    by_call = pivot(
        corner, shown, lambda row: names.get(row["call"], row["call"]), lambda row: f"C = {row['classes']}", cell
    )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["kernel"]:
            groups.setdefault(f"{row['architecture']}, C = {row['classes']}", []).append(row)
    lines = []
    for name, group in groups.items():
        warps = min((int(row["warps_on_sm"]) for row in group if row["warps_on_sm"]), default="-")
        lines.append([name, *(max(int(row[column]) for row in group) for column in worst), warps])
    head = ["worst of all calls and dtypes", *(name.replace("_", " ") for name in worst), "warps on an SM"]
    versions = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, {rows[0]['date']}"
    return f"{by_call}\n{markdown.table(head, lines)}\n{versions}.\n"


# The picture.


def draw(folder: Path, device: str = "*") -> list[Path]:
    """Draw the relative error of the KL against the KL itself, for the CSVs of a device, and return the paths."""
    drawn = []
    for path in sorted(folder.glob(f"accuracy-{device}.csv")):
        rows = machine.read(path)
        sweep = [row for row in rows if (row["case"], row["measure"]) == ("sweep", "KL, median")]
        if not sweep:
            continue  # the time was up
        figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
        for name, colour, marker in zip(dict.fromkeys(map(contender, sweep)), COLOURS, "osD^vPX*", strict=False):
            own = [row for row in sweep if row["contender"] == name]
            kl = [float(row["true_kl"]) for row in own]
            error = [max(float(row["value"]), 1e-9) for row in own]  # a log axis has no zero
            style = "-" if name.startswith("ours") else "--"
            axes.plot(kl, error, style, color=colour, marker=marker, markersize=5, label=name)
        axes.set_title("Error of a KL against the KL itself (float32, logits at 30 ± 5)", loc="left", fontsize=11)
        axes.axhline(1, color="0.6", linewidth=1)
        axes.text(0.99, 1.3, "as large as the KL itself", transform=axes.get_yaxis_transform(), ha="right", color="0.4")
        axes.set(xscale="log", yscale="log", xlabel="true KL, nats (median row)", ylabel="relative error (median row)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="center right")
        drawn.append(path.with_suffix(".png"))
        figure.savefig(drawn[-1], dpi=110, metadata={"Software": None})
        plt.close(figure)
    return drawn


# Pages.

GPU = "speed-[!c]*.csv"  # all devices but cpu
# By page, the passage between the markers of each name: the CSVs that it is made of, and how.
PAGES: dict[str, dict[str, tuple[str, Callable[[Sequence[Row]], str]]]] = {
    "README.md": {"speed": ("speed-cpu.csv", readme_speed), "speed-gpu": (GPU, readme_gpu)},
    "docs/benchmarks.md": {
        "speed": ("speed-cpu.csv", cpu_speed),
        "gpu": (GPU, gpu_speed),
        "accuracy": ("accuracy-cpu.csv", accuracy),
        "step": ("step-cpu.csv", step),
    },
    "docs/kernels.md": {"host": (GPU, host), "compiled": ("kernels.csv", kernels)},
}


def updated(page: str, text: str, results: Path) -> str:
    """Return the page's text with the tables that the CSVs give. A passage without a CSV stays as it is."""
    for name, (pattern, table) in PAGES[page].items():
        if paths := sorted(results.glob(pattern)):
            text = markdown.replaced(text, name, "\n".join(table(machine.read(path)) for path in paths))
    return text


def of_device(folder: Path, device: str) -> str:
    """Return all tables and pictures of one GPU, as its report shows them."""
    parts = [f"![{path.stem}]({path.name})\n" for path in draw(folder, device)]
    for name, title, tables in (
        ("speed", "Time and memory on the device, and what the host pays", (gpu_speed, memory, host)),
        ("accuracy", "Errors against float64", (accuracy,)),
        ("step", "A training step", (step,)),
    ):
        if (path := folder / f"{name}-{device}.csv").exists():
            parts.append("\n".join([f"## {title}\n", *(table(machine.read(path)) for table in tables)]))
    return "\n".join(parts)


def main() -> None:
    for path in draw(machine.RESULTS):
        print(f"drew {path}")
    for page in PAGES:
        path = machine.ROOT / page
        path.write_text(updated(page, path.read_text(), machine.RESULTS))
        print(f"rewrote the tables of {path}")


if __name__ == "__main__":
    main()
