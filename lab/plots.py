"""Pictures of differences, and of figures by the number of training rows."""

import importlib.util
import math
import statistics
import textwrap
from pathlib import Path

from evals.plots import import_pyplot

# panels: (0 target or 1 source language, figure)
PANELS = ((0, "usable"), (0, "confused"), (0, "chrf each"), (0, "bits"),
          (1, "usable"), (1, "kept"), (1, "chrf each"), (1, "bits"))
SIDES = ("target", "source")
ACROSS = 4
LABEL_WIDTH = 34                        # letters
TICKS = 4                               # of an axis at most, and one: their labels must not meet
WIDTH, LABELS, ROW = 2.4, 3.0, 0.5      # inches: of a panel, of the labels, of a comparison
STYLES = ((0, (1, 4)), "-", ":", "-.", "--")            # of lines: a method has one in all pictures
BETTER = {1: "right of the line is better", -1: "left of the line is better", 0: "a change, no merit or harm"}
LEGEND = "hollow: a tie; a square: one seed; line: 95 % interval; ticks: each seed"


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def has_panels(compared: list) -> bool:
    """Whether there is a difference to draw: questions may have been too few for all of them."""
    return any(name in one.told[side] for one in compared for side, name in PANELS)


def plot_differences(compared: list, path: Path) -> None:
    """A dot for each difference, its interval, its seeds. compared: report.Comparison, from the top."""
    plt = import_pyplot()
    shown = []
    for side, name in PANELS:
        told = [one.told[side].get(name) for one in compared]
        if any(told):
            shown.append((SIDES[side], told))
    down = math.ceil(len(shown) / ACROSS)
    size = LABELS + WIDTH * ACROSS, down * (1 + ROW * len(compared))
    figure, axes = plt.subplots(down, ACROSS, figsize=size, sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    for axis, (side, told) in zip(axes.flat, shown):
        draw_panel(axis, told, side)
    labels = [textwrap.fill(one.label, LABEL_WIDTH) for one in compared]
    axes[0, 0].set_yticks(range(len(labels)), labels)
    for axis in axes[:, 0]:
        axis.tick_params("y", labelsize=8)
    axes[0, 0].set_ylim(len(labels) - 0.5, -0.5)                # the table's order, from the top
    figure.supxlabel(LEGEND, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(axis, told: list, side: str) -> None:
    axis.axvline(0, color="0.6", linewidth=1)
    for place, found in enumerate(told):
        if found is None:
            continue
        filling = "1" if found.verdict == "a tie" else "0"
        axis.hlines(place, found.low, found.high, color="0.3")
        mark = "o" if len(found.seeds) > 1 else "s"
        axis.plot(found.value, place, mark, color="0", markerfacecolor=filling)
        for seed in found.seeds:
            axis.plot(seed, place + 0.25, "|", color="0.4")
        title = f"{found.figure.title}, {side} language"
        axis.set_title(f"{title}\n({BETTER[found.figure.better]})", fontsize=9)
    axis.margins(x=0.1)
    axis.locator_params("x", nbins=TICKS)
    axis.grid(axis="x", alpha=0.3)


def plot_curves(told: dict, methods: tuple, path: Path) -> None:
    """A panel for each figure, a line for each method: the mean over seeds by rows, each seed a dot. told:
    report.Curves. methods: all that may be in it, each with its own kind of line."""
    assert len(methods) <= len(STYLES), f"{len(methods)} methods, {len(STYLES)} kinds of lines"
    plt = import_pyplot()
    down = math.ceil(len(told) / ACROSS)
    figure, axes = plt.subplots(down, ACROSS, figsize=(3 * ACROSS, 2.6 * down), squeeze=False)
    figure.set_layout_engine("constrained")
    for axis in axes.flat[len(told):]:
        axis.set_visible(False)
    for axis, ((side, title), drawn) in zip(axes.flat, told.items()):
        sizes = sorted(set().union(*drawn.values()))
        for i, method in enumerate(methods):
            by_rows = drawn.get(method, {})
            rows = sorted(by_rows)
            means = [statistics.fmean(by_rows[size]) for size in rows]
            look = {"color": f"C{i}", "linestyle": STYLES[i], "marker": "x" if len(rows) == 1 else None}
            if rows:
                axis.plot(rows, means, label=method, **look)
            for size in rows:
                axis.plot([size] * len(by_rows[size]), by_rows[size], ".", color=f"C{i}", alpha=0.5)
        axis.set_xscale("log")
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.set_title(f"{title}, {SIDES[side]} language", fontsize=9)
        axis.grid(alpha=0.3)
    lines = {}                                          # {method: one of its lines}
    for axis in axes.flat[:len(told)]:
        lines |= {label: line for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines), fontsize=9)
    figure.supxlabel("training rows", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
