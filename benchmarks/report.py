"""The tables and pictures of the pages, made of the CSVs, so that no number in the documentation is typed.

    python -m benchmarks.report          (--help explains the options)

Rewrites the passages of README.md, docs/benchmarks.md and docs/kernels.md between ``<!-- begin: NAME -->`` and
``<!-- end: NAME -->``, and draws speed-<device>.png and accuracy-<device>.png beside the CSVs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import machine, markdown

Row = dict[str, str]
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#999999")
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


# Speed.


def timed(rows: Iterable[Row], **of: str) -> list[Row]:
    """Return the rows that have a time, and these values in these columns."""
    return [row for row in rows if row.get("us_50") and all(row[name] == value for name, value in of.items())]


def problems(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Return the rows by problem, as its name is shown, and by contender."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        small = ", small KL" if row["logits"] == "small KL" else ""
        found.setdefault(f"{row['n']} × {row['classes']}{small}", {})[row["contender"]] = row
    return found


def contenders(rows: Sequence[Row], *without: str) -> list[str]:
    return [name for (name,) in distinct(rows, "contender") if name not in ("copy", *without)]


def microseconds(row: Row | None, column: str = "us_50") -> str:
    value = float((row or {}).get(column) or "nan")
    return "-" if math.isnan(value) else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def speed_table(rows: Sequence[Row]) -> str:
    """Return the time of the usual expression, and how many times faster the others are. The fastest is bold."""
    names = contenders(rows)
    lines = []
    for problem, here in problems(rows).items():
        fastest = max((name for name in names if name in here), key=lambda name: float(here[name]["times_faster_50"]))
        cells = [f"{float(here[name]['times_faster_50']):.2f}x" if name in here else "-" for name in names[1:]]
        shown = dict(zip(names, [microseconds(here["usual"]), *cells], strict=True))
        lines.append([problem, *(f"**{cell}**" if name == fastest else cell for name, cell in shown.items())])
    head = ["`log_target=True`" if name == "usual, log_target" else name for name in names[1:]]
    return markdown.table(["N × C", "usual, µs", *head], lines)


def readme_speed(rows: Sequence[Row]) -> str:
    chosen = timed(rows, logits="independent", dtype="float32")
    return f"{speed_table(chosen)}\n{where(chosen)}; {rounds(chosen)}.\n"


def rounds(rows: Sequence[Row]) -> str:
    """Return the number of rounds, and how far ratios scatter."""
    numbers = sorted({int(row["rounds"]) for row in rows})
    away = [
        abs(float(row[f"times_faster_{q}"]) / float(row["times_faster_50"]) - 1)
        for row in rows
        for q in (20, 80)
        if row["contender"] != "copy"
    ]
    counted = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    return f"medians of {counted} rounds, the 20 and 80 % quantiles of ratios at most {max(away):.0%} away"


def cpu_speed(rows: Sequence[Row]) -> str:
    chosen = sorted(timed(rows, dtype="float32"), key=lambda row: row["logits"])
    memory = memory_table(timed(chosen, logits="independent"))
    return f"{speed_table(chosen)}\n{memory}\n{where(chosen)}; {rounds(chosen)}.\n"


def memory_table(rows: Sequence[Row]) -> str:
    shapes = problems(rows)
    lines = [
        [name, *(f"{float(here[name]['peak_elements']):.1f}" if name in here else "-" for here in shapes.values())]
        for name in contenders(rows, FLOOR)
    ]
    return markdown.table(["peak memory, elements per logit position", *shapes], lines)


def gpu_speed(rows: Sequence[Row]) -> str:
    """Return times on a GPU, with the share of a copy's speed that each reaches."""
    text = ""
    for (dtype,) in distinct(timed(rows), "dtype"):
        here = timed(rows, dtype=dtype)
        names, lines = contenders(here, FLOOR), []
        for problem, of in problems(here).items():
            copy = float(of["copy"]["us_50"])
            reached = [f" ({copy / float(of[name]['us_50']):.0%})" if name in of else "" for name in names]
            cells = [microseconds(of.get(name)) + share for name, share in zip(names, reached, strict=True)]
            lines.append([problem, microseconds(of["copy"]), *cells])
        text += f"{dtype}, µs (share of the copy's speed):\n\n{markdown.table(['N × C', 'copy', *names], lines)}\n"
    failed = [
        f"- {row['n']} × {row['classes']}, {row['dtype']}, {row['contender']}: {row['note']}"
        for row in rows
        if row.get("note")
    ]
    notes = "\n".join(["Failed:", "", *failed, "", ""]) if failed else ""
    return f"{text}{notes}{where(rows)}.\n" if text else ""


def host(rows: Sequence[Row]) -> str:
    """Return the host's CPU time, its share of the usual expression's, and launches."""
    shapes = problems([row for row in rows if row.get("launches")])
    if not shapes:
        return ""
    lines = []
    for name in contenders(rows):
        found = [(here[name], float(here["usual"]["host_us"])) for here in shapes.values() if name in here]
        if found:
            shares = [float(row["host_us"]) / usual for row, usual in found]
            cells = [
                f"{microseconds(row, 'host_us')} µs ({share:.2f}), {row['launches']}"
                for (row, _), share in zip(found, shares, strict=True)
            ]
            lines.append([name, *cells])
    head = ["forward and backward", *shapes]
    real = "" if timed(rows) else " Measured without a GPU, with CUDA calls that do nothing."
    return (
        f"{markdown.table(head, lines)}\nCPU time (share of the usual expression's), launches.{real} {where(rows)}.\n"
    )


# Accuracy, training steps, compiled kernels.


def number(text: str) -> str:
    """Return two digits; NaN stands out."""
    value = float(text)
    if math.isnan(value):
        return "**NaN**"
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 or value >= 1000 else f"{value:.2g}"


def accuracy(rows: Sequence[Row]) -> str:
    names = contenders(rows)
    lines = []
    for case, measure in distinct((row for row in rows if row["case"] != "sweep"), "case", "measure"):
        here = {row["contender"]: row["value"] for row in rows if (row["case"], row["measure"]) == (case, measure)}
        show = (lambda text: f"{100 * float(text):.2g} %") if measure == "KL, negative" else number
        lines.append([case, measure, *(show(here[name]) if name in here else "-" for name in names)])
    tiny = [float(row["true_kl"]) for row in rows if row["case"] == "small KL"]
    setting = f"{rows[0]['rows']} rows of {rows[0]['classes']} classes"
    setting += f"; the median small KL is {tiny[0]:.1e}" if tiny else ""
    return f"{markdown.table(['logits', 'error of', *names], lines)}\n{setting}. {where(rows)}.\n"


def step(rows: Sequence[Row]) -> str:
    cell = {(row["contender"], row["phase"]): row for row in rows}
    phases = [phase for (phase,) in distinct(rows, "phase") if phase != "forward"]
    lines = []
    for name in contenders(rows, "one forward"):
        seconds = [f"{float(cell[name, p]['s_50']):.3g}" if (name, p) in cell else "-" for p in phases]
        ratio = cell[name, "step"]
        spread = f"{float(ratio['ratio_20']):.2f} - {float(ratio['ratio_80']):.2f}"
        lines.append([name, *seconds, f"**{float(ratio['ratio_50']):.2f}** ({spread})"])
    of = rows[0]
    forward = float(cell["CKTAT", "teacher"]["s_50"]) / float(cell["one forward", "forward"]["s_50"])
    head = ["", *(f"{phase}, s" for phase in phases), "times a PGD-AT step (20 - 80 %)"]
    setting = f"{of['arch']}, batch {of['batch']}, PGD-{of['attack_steps']}, medians of {of['rounds']} rounds"
    teacher = f"The teacher's forward takes {forward:.2f} of one forward of the student in eval mode"
    return f"{markdown.table(head, lines)}\n{teacher}. {setting}. {where(rows)}.\n"


def kernels(rows: Sequence[Row]) -> str:
    """Return the traffic of one step, and the worst of all kernels of each architecture and number of classes."""
    cell = {(row["call"], row["dtype"], row["classes"]): row for row in rows}
    calls, classes = [call for (call,) in distinct(rows, "call")], [c for (c,) in distinct(rows, "classes")]
    names = {
        "loss": "no gradient",
        "training": "training, upstream gradient 1",
        "backward": "and backward, if it is not 1",
    }
    lines = []
    for call in [*names, "recipe", *(call for call in calls if call.startswith("eager"))]:
        here = [cell[call, "float32", c] for c in classes]
        moves = slashed(f"{float(row['moves']):.1f}" for row in here)
        lines.append(
            [
                names.get(call, call),
                slashed(row["launches"] for row in here),
                moves,
                slashed(row["h100_us"] for row in here),
            ]
        )
    of = f"N = {rows[0]['rows']}, C = {' / '.join(classes)}, float32"
    text = markdown.table([of, "launches", "element moves per logit position", "µs at 3.0 TB/s"], lines)
    lines = []
    for target, c in distinct((row for row in rows if row["kernel"]), "architecture", "classes"):
        same = [row for row in rows if (row["architecture"], row["classes"]) == (target, c)]
        most = [
            max(int(row[name]) for row in same)
            for name in ("registers", "spills", "local_bytes", "narrow_accesses", "shared_bytes", "instructions")
        ]
        warps = min((int(row["warps_on_sm"]) for row in same if row["warps_on_sm"]), default="-")
        lines.append([target, c, most[0], warps, *most[1:]])
    head = [
        "worst of all calls and dtypes",
        "C",
        "registers",
        "warps on an SM",
        "spills",
        "local bytes",
        "narrow accesses",
        "shared bytes",
        "instructions",
    ]
    versions = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, {rows[0]['date']}"
    return f"{text}\n{markdown.table(head, lines)}\n{versions}.\n"


def slashed(cells: Iterable[str]) -> str:
    """Return the cells as one; equal ones once."""
    texts = list(cells)
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


# Pictures.


def styles(names: Sequence[str]) -> dict[str, Mapping[str, object]]:
    lines = ["-" if name.startswith("ours") else "--" for name in names]
    return {
        name: {"color": COLOURS[k % len(COLOURS)], "linestyle": line, "marker": "osD^vPX*"[k % 8]}
        for k, (name, line) in enumerate(zip(names, lines, strict=True))
    }


def canvas(title: str, panels: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure, axes = plt.subplots(panels, squeeze=False, figsize=(7, height), layout="constrained")
    axes[0, 0].set_title(title, loc="left", fontsize=11)
    for one in axes[:, 0]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes[:, 0]


def speed_picture(rows: Sequence[Row]) -> Figure:
    """Draw the time of each problem above, peak memory below."""
    chosen = timed(rows, logits="independent", dtype="float32")
    shapes, names = problems(chosen), contenders(chosen, FLOOR)
    figure, (above, below) = canvas(f"Forward and backward, float32, {chosen[0]['machine']}", 2, 7.5)
    for name in (*names, "copy"):
        look = styles(names).get(name, {"color": "0.6", "linestyle": ":"})
        times = [float(here[name]["us_50"]) if name in here else math.nan for here in shapes.values()]
        above.plot([*shapes], times, label="a copy of as few bytes as possible" if name == "copy" else name, **look)
    above.set(yscale="log", xlabel="N × C", ylabel="µs")
    above.legend(frameon=False, fontsize=8)
    above.grid(alpha=0.3)
    shape, here = max(shapes.items(), key=lambda item: item[0].endswith(" 1000"))
    bars = [name for name in names if name in here][::-1]
    peaks = [float(here[name]["peak_elements"]) for name in bars]
    below.bar_label(
        below.barh(bars, peaks, color=[styles(names)[name]["color"] for name in bars]), fmt="%.1f", padding=3
    )
    below.axvline(2, color="0.4", linestyle=":")
    below.set(xlabel=f"peak memory at {shape}, elements per logit position (dotted: the two gradients)")
    return figure


def accuracy_picture(rows: Sequence[Row]) -> Figure:
    """Draw the relative error of the KL against the KL itself."""
    sweep = [row for row in rows if (row["case"], row["measure"]) == ("sweep", "KL, median")]
    figure, (axes,) = canvas("Error of a KL against the KL itself (float32, logits at 30 ± 5)", 1, 4.4)
    for name, look in styles(contenders(sweep)).items():
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
            if name != "speed" or timed(rows):  # no times of a GPU that computes nothing
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
    "README.md": {"speed": ("speed-cpu.csv", readme_speed)},
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
