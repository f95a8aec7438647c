"""The tables and pictures of the pages, made of the CSVs, so that no number in the documentation is typed.

    python -m benchmarks.report          (--help explains the options)

Rewrites the passages of README.md, docs/benchmarks.md and docs/kernels.md between ``<!-- begin: NAME -->`` and
``<!-- end: NAME -->``, and draws speed-<device>.png and accuracy-<device>.png beside the CSVs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import machine, markdown

Row = dict[str, str]
Key = Callable[[Row], str]
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#999999", "#F0E442")
FLOOR = "an empty autograd.Function"


def distinct(rows: Iterable[Row], *names: str) -> list[tuple[str, ...]]:
    """Return the combinations of these columns, in order, without repetition."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def where(rows: Sequence[Row]) -> str:
    """Return machine and versions, of rows of one run."""
    row = rows[0]
    host = f", {row['host']}" if row.get("host") else ""
    threads = f"{row['threads']} CPU thread{'s' if row['threads'] != '1' else ''}"
    versions = f"torch {row['torch']}, Triton {row['triton']}, Python {row['python']}"
    return f"{row['machine']}{host}, {threads}, {versions}, {row['date']}"


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


# Speed.


def timed(rows: Iterable[Row], **of: str) -> list[Row]:
    """Return the rows that have a time, and these values in these columns."""
    return [row for row in rows if row.get("us_50") and all(row[name] == value for name, value in of.items())]


def without(rows: Iterable[Row], *names: str) -> list[Row]:
    return [row for row in rows if row["contender"] not in names]


def microseconds(text: str) -> str:
    return f"{float(text):.0f}" if float(text) >= 10 else f"{float(text):.1f}"


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
    chosen = without(timed(rows, logits="independent", dtype="float32"), "copy")
    return f"{pivot('N × C', chosen, problem, contender, faster)}\n{scatter(chosen)}"


def readme_gpu(rows: Sequence[Row]) -> str:
    """Return the times on a GPU of the contenders that a user chooses between, float32 only."""
    names = ("usual", "usual, log_target", "usual, compiled", "ours")
    chosen = [row for row in timed(rows, dtype="float32") if row["contender"] in names]

    def cell(row: Row, line: dict[str, Row]) -> str:
        text = f"{microseconds(row['us_50'])} µs"
        return f"**{text}**" if row is min(line.values(), key=lambda one: float(one["us_50"])) else text

    return f"{pivot('N × C', chosen, problem, contender, cell)}\n{where(chosen)}.\n" if chosen else ""


def cpu_speed(rows: Sequence[Row]) -> str:
    chosen = sorted(without(timed(rows, dtype="float32"), "copy"), key=lambda row: row["logits"])
    speed, ordinary = pivot("N × C", chosen, problem, contender, faster), timed(chosen, logits="independent")
    corner = "peak memory, elements per logit position"
    memory = pivot(corner, ordinary, contender, problem, lambda row, _: f"{float(row['peak_elements']):.1f}")
    return f"{speed}\n{memory}\n{scatter(chosen)}"


def gpu_speed(rows: Sequence[Row]) -> str:
    """Return the times on a GPU, with the share of a copy's speed that each reaches."""

    def cell(row: Row, line: dict[str, Row]) -> str:
        if row.get("note"):
            return f"failed: {row['note']}"
        share = float(line["copy"]["us_50"]) / float(row["us_50"])
        return microseconds(row["us_50"]) + ("" if row is line["copy"] else f" ({share:.0%})")

    if not timed(rows):
        return ""
    shown = [row for row in without(rows, FLOOR) if row["us_50"] or row.get("note")]
    table = pivot("N × C", shown, lambda row: f"{problem(row)}, {row['dtype']}", contender, cell)
    return f"{table}\nµs (share of the copy's speed). {where(rows)}.\n"


def host(rows: Sequence[Row]) -> str:
    """Return the host's CPU time, its share of the usual expression's, and launches."""
    rows = [row for row in rows if row["dtype"] == "float32"]
    usual = {problem(row): float(row["host_us"]) for row in rows if row["contender"] == "usual" and row["host_us"]}

    def cell(row: Row, _: dict[str, Row]) -> str:
        share = float(row["host_us"]) / usual.get(problem(row), math.nan)
        return f"{microseconds(row['host_us'])} µs ({share:.2f}), {row['launches']}"

    counted = [row for row in rows if row.get("launches")]
    real = "" if timed(rows) else " Measured without a GPU, with CUDA calls that do nothing."
    text = f"\nCPU time (share of the usual expression's), launches.{real} {where(rows)}.\n"
    return pivot("forward and backward", counted, contender, problem, cell) + text if counted else ""


# Accuracy, training steps, compiled kernels.


def number(text: str) -> str:
    """Return two digits; NaN stands out."""
    value = float(text)
    if math.isnan(value):
        return "**NaN**"
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 or value >= 1000 else f"{value:.2g}"


def accuracy(rows: Sequence[Row]) -> str:
    def cell(row: Row, _: dict[str, Row]) -> str:
        return f"{100 * float(row['value']):.2g} %" if row["measure"] == "KL, negative" else number(row["value"])

    shown = [row for row in rows if row["case"] != "sweep"]
    text = pivot("error", shown, lambda row: f"{row['case']}: {row['measure']}", contender, cell)
    tiny = "".join(
        f"; the median small KL is {value:.1e}" for value in {float(row.get("true_kl") or 0) for row in shown} - {0.0}
    )
    return f"{text}\n{rows[0]['rows']} rows of {rows[0]['classes']} classes{tiny}. {where(rows)}.\n"


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
    names = {
        "loss": "no gradient",
        "training": "training",
        "backward": "and backward, if the upstream gradient is not 1",
    }
    chosen = [
        row for row in rows if row["dtype"] == "float32" and row["architecture"] in ("any", rows[0]["architecture"])
    ]
    chosen = [row for row in chosen if row["call"] != "backward by rows"]

    def cell(row: Row, _: dict[str, Row]) -> str:
        return f"{row['launches']}, {float(row['moves']):.1f}, {microseconds(row['h100_us'])} µs"

    by_call = pivot(
        f"launches, element moves per logit position, time at 3.0 TB/s (float32, N = {rows[0]['rows']})",
        chosen, lambda row: names.get(row["call"], row["call"]), lambda row: f"C = {row['classes']}", cell,
    )  # fmt: skip
    worst = ("registers", "spills", "local_bytes", "narrow_accesses", "shared_bytes", "instructions")
    lines = []
    for target, c in distinct((row for row in rows if row["kernel"]), "architecture", "classes"):
        same = [row for row in rows if (row["architecture"], row["classes"]) == (target, c)]
        warps = min((int(row["warps_on_sm"]) for row in same if row["warps_on_sm"]), default="-")
        lines.append([f"{target}, C = {c}", *(max(int(row[name]) for row in same) for name in worst), warps])
    head = ["worst of all calls and dtypes", *(name.replace("_", " ") for name in worst), "warps on an SM"]
    versions = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, {rows[0]['date']}"
    return f"{by_call}\n{markdown.table(head, lines)}\n{versions}.\n"


# Pictures.


def styles(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return colour, marker and line of each contender. Ours are solid lines."""
    return {
        name: {"color": colour, "marker": marker, "linestyle": "-" if name.startswith("ours") else "--"}
        for name, colour, marker in zip(names, COLOURS, "osD^vPX*p", strict=False)
    }


def canvas(title: str, height: float, panels: Sequence[int] = (1,)) -> tuple[Figure, Sequence[Axes]]:
    options = {"gridspec_kw": {"height_ratios": panels}, "figsize": (7, height), "layout": "constrained"}
    figure, axes = plt.subplots(len(panels), squeeze=False, **options)
    axes[0, 0].set_title(title, loc="left", fontsize=11)
    for one in axes[:, 0]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[:, 0]


def speed_picture(rows: Sequence[Row]) -> Figure:
    """Draw the time of each problem above, peak memory below."""
    chosen = without(timed(rows, logits="independent", dtype="float32"), FLOOR)
    names = [name for (name,) in distinct(chosen, "contender")]
    figure, (above, below) = canvas(f"Forward and backward, float32, {chosen[0]['machine']}", 7.5, (2, 1))
    for name, look in styles(names).items():
        own = [row for row in chosen if row["contender"] == name]
        look = {"color": "0.6", "linestyle": ":"} if name == "copy" else look
        label = "a copy of as few bytes as possible" if name == "copy" else name
        above.plot([problem(row) for row in own], [float(row["us_50"]) for row in own], label=label, **look)
    above.set(yscale="log", xlabel="N × C", ylabel="µs")
    shape = next((problem(row) for row in chosen if row["classes"] == "1000"), problem(chosen[0]))
    bars = [row for row in without(chosen, "copy") if problem(row) == shape][::-1]
    colours = [styles(names)[row["contender"]]["color"] for row in bars]
    drawn = below.barh([row["contender"] for row in bars], [float(row["peak_elements"]) for row in bars], color=colours)
    below.bar_label(drawn, fmt="%.1f", padding=3)
    below.axvline(2, color="0.4", linestyle=":")
    below.set(xlabel=f"peak memory at {shape}, elements per logit position (dotted: the two gradients)")
    above.legend(frameon=False, fontsize=8)
    above.grid(alpha=0.3)
    return figure


def accuracy_picture(rows: Sequence[Row]) -> Figure:
    """Draw the relative error of the KL against the KL itself."""
    sweep = [row for row in rows if (row["case"], row["measure"]) == ("sweep", "KL, median")]
    figure, (axes,) = canvas("Error of a KL against the KL itself (float32, logits at 30 ± 5)", 4.4)
    for name, look in styles([name for (name,) in distinct(sweep, "contender")]).items():
        own = [row for row in sweep if row["contender"] == name]
        errors = [max(float(row["value"]), 1e-9) for row in own]  # a log axis has no zero
        axes.plot([float(row["true_kl"]) for row in own], errors, label=name, markersize=5, **look)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.text(0.99, 1.3, "as large as the KL itself", transform=axes.get_yaxis_transform(), ha="right", color="0.4")
    axes.set(xscale="log", yscale="log", xlabel="true KL, nats (median row)", ylabel="relative error (median row)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    return figure


PICTURES: dict[str, Callable[[Sequence[Row]], Figure]] = {"speed": speed_picture, "accuracy": accuracy_picture}


def draw(folder: Path, device: str = "*") -> list[Path]:
    """Draw the pictures of a device's CSVs, and return their paths."""
    drawn = []
    for name, picture in PICTURES.items():
        for path in sorted(folder.glob(f"{name}-{device}.csv")):
            rows = machine.read(path)
            # There are no times of a GPU that computes nothing, and no sweep if the time was up.
            if timed(rows) if name == "speed" else any(row["case"] == "sweep" for row in rows):
                figure = picture(rows)
                figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
                plt.close(figure)
                drawn.append(path.with_suffix(".png"))
    return drawn


# Pages.

Table = Callable[[Sequence[Row]], str]
GPU = "speed-[!c]*.csv"  # all devices but cpu
# By page, the passage between the markers of each name: the CSVs that it is made of, and how.
PAGES: dict[str, dict[str, tuple[str, Table]]] = {
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
        ("speed", "Time on the device, and what the host pays", (gpu_speed, host)),
        ("accuracy", "Errors against float64", (accuracy,)),
        ("step", "A training step", (step,)),
    ):
        if (path := folder / f"{name}-{device}.csv").exists():
            parts.append("\n".join([f"## {title}\n", *(table(machine.read(path)) for table in tables)]))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="the CSVs' folder (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=machine.ROOT, help="the pages' folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    for path in draw(args.results):
        print(f"drew {path}")
    for page in PAGES:
        path = args.root / page
        path.write_text(updated(page, path.read_text(), args.results))
        print(f"rewrote the tables of {path}")


if __name__ == "__main__":
    main()
