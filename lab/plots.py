"""Pictures of differences: a dot, hollow for a tie, its 95 % interval, and a tick for each seed."""

import importlib.util
import math
import textwrap
from pathlib import Path

from evals.plots import import_pyplot

# panels: (0 target or 1 source language, figure)
PANELS = ((0, "language"), (0, "confused"), (0, "chrf"), (0, "bits"),
          (1, "kept"), (1, "chrf"), (1, "bits"))
SIDES = ("target", "source")
ACROSS = 4
LABEL_WIDTH = 34                        # letters
TICKS = 4                               # of an axis at most, and one: their labels must not meet
WIDTH, LABELS, ROW = 2.4, 3.0, 0.5      # inches: of a panel, of the labels, of a comparison


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_differences(compared: list, path: Path) -> None:
    """compared: report.Comparison, from the top."""
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(axis, told: list, side: str) -> None:
    axis.axvline(0, color="0.6", linewidth=1)
    for place, found in enumerate(told):
        if found is None:
            continue
        filling = "1" if found.verdict == "a tie" else "0"
        axis.hlines(place, found.low, found.high, color="0.3")
        axis.plot(found.value, place, "o", color="0", markerfacecolor=filling)
        for seed in found.seeds:
            axis.plot(seed, place + 0.25, "|", color="0.4")
        better = "right" if found.figure.better > 0 else "left"
        title = f"{found.figure.title}, {side} language"
        axis.set_title(f"{title}\n({better} of the line is better)", fontsize=9)
    axis.margins(x=0.1)
    axis.locator_params("x", nbins=TICKS)
    axis.grid(axis="x", alpha=0.3)
