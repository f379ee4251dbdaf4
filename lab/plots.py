"""Pictures of differences: a dot, hollow for a tie, its 95 % interval, and a tick for each seed."""

import importlib.util
import textwrap
from pathlib import Path

from evals.plots import import_pyplot

# panels: (0 target or 1 source language, figure)
PANELS = ((0, "language"), (0, "chrf"), (0, "bits"), (1, "kept"), (1, "chrf"), (1, "bits"))
ACROSS = 3
LABEL_WIDTH = 34                    # letters


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_differences(compared: list, path: Path) -> None:
    """compared: report.Comparison, from the top."""
    plt = import_pyplot()
    shown = [(side, name) for side, name in PANELS if all(name in one.told[side] for one in compared)]
    labels = [textwrap.fill(one.label, LABEL_WIDTH) for one in compared]
    down = -(-len(shown) // ACROSS)
    size = 3 + 2.6 * ACROSS, down * (1 + 0.5 * len(labels))
    figure, axes = plt.subplots(down, ACROSS, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    for axis, (side, name) in zip(axes.flat, shown):
        draw_panel(axis, [one.told[side][name] for one in compared], ("target", "source")[side])
    axes[0, 0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0, 0].invert_yaxis()                                   # the table's order, from the top
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(axis, told: list, side: str) -> None:
    figure = told[0].figure
    better = "right" if figure.better > 0 else "left"
    axis.axvline(0, color="0.6", linewidth=1)
    for place, difference in enumerate(told):
        axis.plot([difference.low, difference.high], [place, place], color="0.2", linewidth=1.5)
        filling = "1" if difference.verdict == "a tie" else "0"
        axis.plot(difference.value, place, "o", color="0", markerfacecolor=filling)
        axis.plot(difference.seeds, [place + 0.25] * len(difference.seeds), "|", color="0.4", markersize=7)
    axis.set_title(f"{figure.title}, {side} language\n({better} of the line is better)", fontsize=9)
    axis.margins(x=0.1, y=0.15)
    axis.grid(axis="x", alpha=0.3)

