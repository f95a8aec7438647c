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
from benchmarks.machine import Row

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#56B4E9", "#009E73", "#D55E00")
FLOOR = "an empty autograd.Function"


def where(row: Row) -> str:
    """Return machine and versions, as any row of a run has them."""
    host = f", {row['host']}" if row.get("host") else ""
    versions = f"torch {row['torch']}, Triton {row['triton']}, Python {row['python']}"
    return f"{row['machine']}{host}, {row['threads']} CPU thread, {versions}, {row['date']}"


def pivot(corner: str, cells: Iterable[tuple[str, str, str]]) -> str:
    """Return a table of cells, each of which comes after the names of its line and of its column."""
    lines: dict[str, dict[str, str]] = {}
    for line, column, cell in cells:
        lines.setdefault(line, {})[column] = cell
    names = sorted({name: 0 for line in lines.values() for name in line}, key=lambda name: name.startswith("ours"))
    head = [f"`{name.removeprefix('usual, ')}=True`" if name == "usual, log_target" else name for name in names]
    return markdown.table([corner, *head], ([name, *(line.get(n, "-") for n in names)] for name, line in lines.items()))


def problem(row: Row) -> str:
    return f"{row['n']} × {row['classes']}{', small KL' if row['logits'] == 'small KL' else ''}"


def digits(value: float) -> str:
    """Return two digits; NaN stands out."""
    if math.isnan(value):
        return "**NaN**"
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 or value >= 1000 else f"{value:.2g}"


def microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


# Speed.


def timed(rows: Iterable[Row], *left_out: str, kinds: Sequence[str] = ("independent",)) -> list[Row]:
    """Return the float32 rows that have a time, of these kinds of logits, without the contenders that are left out."""
    chosen = (row for row in rows if row["contender"] not in left_out and row.get("us_50"))
    return [row for row in chosen if row["dtype"] == "float32" and row["logits"] in kinds]


def fastest(rows: Sequence[Row], column: str, best: Callable[..., float]) -> str:
    """Return a table of times, or of how many times faster contenders are. The best of each problem is bold."""
    cells = []
    for row in rows:
        ratio = column == "times_faster_50" and row["contender"] != "usual"
        text = f"{row[column]:.2f}x" if ratio else f"{microseconds(row['us_50'])} µs"
        bold = row[column] == best(one[column] for one in rows if problem(one) == problem(row))
        cells.append((problem(row), row["contender"], f"**{text}**" if bold else text))
    return pivot("N × C", cells)


def scatter(rows: Sequence[Row]) -> str:
    """Return the machine, the number of rounds, and how far ratios scatter."""
    numbers = sorted({row["rounds"] for row in rows})
    counted = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    away = max(abs(row[f"times_faster_{q}"] / row["times_faster_50"] - 1) for row in rows for q in (20, 80))
    return (
        f"{where(rows[0])}; medians of {counted} rounds, the 20 and 80 % quantiles of ratios at most {away:.0%} away.\n"
    )


def readme_speed(rows: Sequence[Row]) -> str:
    chosen = timed(rows, "copy")
    return f"{fastest(chosen, 'times_faster_50', max)}\n{scatter(chosen)}"


def readme_gpu(rows: Sequence[Row]) -> str:
    """Return the times on a GPU of the contenders that a user chooses between."""
    names = ("usual", "usual, log_target", "usual, compiled", "ours")
    chosen = [row for row in timed(rows) if row["contender"] in names]
    return f"{fastest(chosen, 'us_50', min)}\n{where(chosen[0])}.\n" if chosen else ""


def cpu_speed(rows: Sequence[Row]) -> str:
    chosen = timed(rows, "copy") + timed(rows, "copy", kinds=["small KL"])
    return f"{fastest(chosen, 'times_faster_50', max)}\n{memory(rows)}\n{scatter(chosen)}"


def memory(rows: Sequence[Row]) -> str:
    shown = timed(rows, "copy", FLOOR)
    cells = ((row["contender"], problem(row), f"{row['peak_elements']:.1f}") for row in shown)
    return pivot("peak memory, elements per logit position", cells)


def gpu_speed(rows: Sequence[Row]) -> str:
    """Return the times on a GPU, with the share of a copy's speed that each reaches."""
    shown = [row for row in rows if row.get("us_50") or row.get("note")]
    copies = {(problem(row), row["dtype"]): row["us_50"] for row in shown if row["contender"] == "copy"}
    cells = []
    for row in shown if copies else ():
        line = problem(row), row["dtype"]
        cell = f"failed: {row['note']}" if row.get("note") else microseconds(row["us_50"])
        cell += f" ({copies[line] / row['us_50']:.0%})" if row["us_50"] and row["contender"] != "copy" else ""
        if row["contender"] != FLOOR:
            cells.append((", ".join(line), row["contender"], cell))
    return f"{pivot('N × C', cells)}\nµs (share of the copy's speed). {where(rows[0])}.\n" if cells else ""


def host(rows: Sequence[Row]) -> str:
    """Return the host's CPU time, its share of the usual expression's, and launches."""
    counted = [row for row in rows if row.get("launches")]
    usual = {problem(row): row["host_us"] for row in counted if row["contender"] == "usual"}
    cells = []
    for row in counted:
        time, share = row["host_us"], row["host_us"] / usual.get(problem(row), math.nan)
        cells.append((row["contender"], problem(row), f"{microseconds(time)} µs ({share:.2f}), {row['launches']}"))
    real = "" if timed(rows) else " Measured without a GPU, with CUDA calls that do nothing."
    text = f"\nCPU time (share of the usual expression's), launches.{real} {where(rows[0])}.\n"
    return pivot("forward and backward", cells) + text if cells else ""


# Accuracy, training steps, compiled kernels.


def accuracy(rows: Sequence[Row]) -> str:
    shown, cells = [row for row in rows if row["case"] != "sweep"], []
    for row in shown:
        cell = f"{100 * row['value']:.2g} %" if row["measure"] == "KL, negative" else digits(row["value"])
        cells.append((f"{row['case']}: {row['measure']}", row["contender"], cell))
    tiny = {f"; the median small KL is {row['true_kl']:.1e}" for row in shown if row.get("true_kl")}
    setting = f"{rows[0]['rows']} rows of {rows[0]['classes']} classes{''.join(tiny)}"
    return f"{pivot('error', cells)}\n{setting}. {where(rows[0])}.\n"


def step(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        spread = f"{row['ratio_20']:.2f} - {row['ratio_80']:.2f}"
        lines.append([row["contender"], f"{row['s_50']:.3g}", f"**{row['ratio_50']:.2f}** ({spread})"])
    table = markdown.table(["", "seconds", "times a PGD-AT step (20 - 80 %)"], lines)
    setting = "{arch}, batch {batch}, PGD-{attack_steps}, medians of {rounds} rounds".format(**rows[0])
    return f"{table}\n{setting}. {where(rows[0])}.\n"


def kernels(rows: Sequence[Row]) -> str:
    """Return the traffic of one step, and the worst of all kernels of each architecture and number of classes."""
    names = {"loss": "no gradient", "backward": "and backward, if the upstream gradient is not 1"}
    worst = ("registers", "spills", "local_bytes", "narrow_accesses", "shared_bytes", "instructions")
    cells = []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        classes, call = f"C = {row['classes']}", row["call"]
        if row["kernel"]:
            groups.setdefault(f"{row['architecture']}, {classes}", []).append(row)
        of_table = row["architecture"] in ("any", rows[0]["architecture"]) and row["dtype"] == "float32"
        if of_table and call != "backward by rows":
            cell = f"{row['launches']}, {row['moves']:.1f}, {microseconds(row['h100_us'])} µs"
            cells.append((names.get(call, call), classes, cell))
    corner = f"launches, element moves per logit position, time at 3.0 TB/s (float32, N = {rows[0]['rows']})"
    lines = []
    for name, group in groups.items():
        warps = min((row["warps_on_sm"] for row in group if row["warps_on_sm"]), default="-")
        lines.append([name, *(max(row[column] for row in group) for column in worst), warps])
    head = ["worst of all calls and dtypes", *(name.replace("_", " ") for name in worst), "warps on an SM"]
    versions = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, {rows[0]['date']}"
    return f"{pivot(corner, cells)}\n{markdown.table(head, lines)}\n{versions}.\n"


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
        for name, colour, marker in zip(
            dict.fromkeys(row["contender"] for row in sweep), COLOURS, "osD^vPX*", strict=False
        ):
            own = [row for row in sweep if row["contender"] == name]
            kl = [row["true_kl"] for row in own]
            error = [max(row["value"], 1e-9) for row in own]  # a log axis has no zero
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
