"""Names beside the points that they name, where points stand close together."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox


def beside_points(figure: Figure, ink: str, line: str) -> None:
    """Every errorbar's label beside its point, inside its panel and on nothing else, where that can be."""
    figure.draw_without_rendering()  # lays the panels out; the labels are placed in the final ones
    figure.set_layout_engine("none")
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        bars = [bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)]
        lines = [collection.get_segments()[0] for bar in bars for collection in bar.lines[2]]
        taken = [Bbox(axes.transData.transform(line)).padded(2) for line in lines]
        points = [bar.lines[0].get_xydata()[0] for bar in bars]
        taken += [Bbox([axes.transData.transform(point)] * 2).padded(6) for point in points]
        for bar, point in zip(bars, points, strict=True):
            label = axes.annotate(
                str(bar.get_label()), point, (0, 0), textcoords="offset points", size=9, color=ink,
                ha="center", va="center", arrowprops={"arrowstyle": "-", "color": line, "lw": 0.6, "shrinkB": 4},
            )  # fmt: skip
            size, (x, y) = label.get_window_extent(renderer), axes.transData.transform(point)
            centered = Bbox.from_bounds(x - size.width / 2, y - size.height / 2, size.width, size.height)
            boxes = {place: centered.translated(*place) for place in _places(size.width, size.height)}
            best = min(boxes, key=lambda place: (_lost(boxes[place], taken, axes.bbox), math.hypot(*place)))
            label.set_position((72 / figure.dpi * best[0], 72 / figure.dpi * best[1]))
            taken.append(boxes[best])


def _places(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Offsets in pixels of a label's middle from its point: ever wider ellipses around it, beginning at the right."""
    for gap, angle in product((10, 20, 34, 50, 70, 95, 125, 160), range(0, 360, 15)):
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        yield across * (gap + width / 2), up * (gap + height / 2)


def _lost(box: Bbox, taken: Sequence[Bbox], panel: Bbox) -> float:
    """Square pixels of a box that are on another one or out of the panel."""

    def common(a: Bbox, b: Bbox) -> float:
        both = Bbox.intersection(a, b)
        return both.width * both.height if both else 0.0

    return round(sum(common(box, other) for other in taken) + box.width * box.height - common(box, panel), 3)
