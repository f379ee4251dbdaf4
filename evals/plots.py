"""Pictures of a comparison: held-out NLL over the steps, and what the target language costs the source.

Everything is told apart without colour: methods by marker, grey and filling, sample sizes by the line.
"""

import itertools
import math
import statistics
import textwrap
from pathlib import Path

from engine.files import InputError
from evals.comparison import SOURCE, TARGET, Result, Results, Rows, by_row, over_seeds

MARKERS = "os^DvPX*"
LINES = ("-", "--", ":", "-.")
GREYS = ("0.0", "0.5", "0.25", "0.65")
CORNERS = (                         # of a label, that lies at its point
    ("left", "bottom"),
    ("right", "top"),
    ("left", "top"),
    ("right", "bottom"))
WIDTH, HEIGHT = 4.4, 3.4            # of a panel, in inches
PANELS_ACROSS = 4
TITLE_SIZE, TITLE_WIDTH = 9, 44     # points, characters of a line
LABEL_SIZE, LABEL_WIDTH = 8, 44
LINE = 1.4 * LABEL_SIZE / 72        # inches of a line of text
TRADED = ("correct", "chrF", "in language")     # the first that every result has is drawn


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def plot(results: Results, directory) -> list[Path]:
    """learning.png and tradeoff.png in `directory`, as far as the results have something to draw."""
    plt, directory = import_pyplot(), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    trained = [result for result in results if result.curves.get(TARGET)]
    answered = [result for result in results if result.size != "-" and result.samples]
    figures = {}
    if trained:
        figures["learning.png"] = draw_curves(plt, by_row(trained))
    for title in TRADED if answered else ():
        if all(has_both(result, title) for result in answered):
            figures["tradeoff.png"] = draw_tradeoff(plt, by_row(answered), title)
            break
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=130)
        plt.close(figure)
    return [directory / name for name in figures]


def has_both(result: Result, title: str) -> bool:
    """Whether it has the figure of both languages."""
    return {f"{SOURCE} {title}", f"{TARGET} {title}"} <= result.figures.keys()


# ---------------------------------------------------------------------------------------------- common parts

def values_of(rows: Rows) -> list[list[str]]:
    """The languages, sample sizes and methods of the rows."""
    return [list(dict.fromkeys(column)) for column in zip(*rows)]


def style(i: int) -> dict:
    """Marker, filling and grey of the i-th method; later ones are smaller, so that all show where points
    coincide."""
    grey = GREYS[i % len(GREYS)]
    hollow = (i + i // len(MARKERS)) % 2
    return {
        "marker": MARKERS[i % len(MARKERS)],
        "color": grey,
        "markerfacecolor": "white" if hollow else grey,
        "markersize": max(8 - 1.5 * i, 4)}


def panels(plt, titles: dict, x: str, y: str) -> tuple:
    """A figure with a panel for each title, and {key: axis}."""
    across = min(len(titles), PANELS_ACROSS)
    down = math.ceil(len(titles) / across)
    size = WIDTH * across, HEIGHT * down
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(titles):]:
        axis.set_visible(False)
    for axis, title in zip(axes.flat, titles.values()):
        axis.set(xlabel=x, ylabel=y)
        axis.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=TITLE_SIZE)
        axis.grid(alpha=0.3)
    return figure, dict(zip(titles, axes.flat))


def add_legend(figure, title: str) -> None:
    """Every label once, below the panels, on room added for it: as many columns as panels in a row."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(textwrap.fill(label, LABEL_WIDTH), handle)
    columns = round(figure.get_figwidth() / WIDTH)
    rows = math.ceil(len(handles) / columns)
    lines = 2 + rows * max(label.count("\n") + 1 for label in handles)      # with the title, and the frame
    figure.set_figheight(figure.get_figheight() + lines * LINE)
    figure.legend(
        handles.values(), handles,
        loc="outside lower center",
        ncols=columns,
        title=title,
        fontsize=LABEL_SIZE,
        title_fontsize=LABEL_SIZE,
        handlelength=4)


# ------------------------------------------------------------------------------------------- learning curves

def mean_curve(group: Results, place: str) -> tuple[list[int], list[float]]:
    """Steps that all seeds validated, and the mean held-out NLL there."""
    curves = [result.curves.get(place, {}) for result in group]
    steps = sorted(set.intersection(*map(set, curves)))
    means = []
    for step in steps:
        means.append(statistics.fmean(curve[step] for curve in curves))
    return steps, means


def draw_curves(plt, rows: Rows):
    """Held-out NLL over steps, two panels for each language."""
    languages, sizes, methods = values_of(rows)
    titles = {}
    for language, place in itertools.product(languages, (TARGET, SOURCE)):
        titles[language, place] = f"{language}: held out, {place} language"
    figure, axes = panels(plt, titles, "optimiser step", "NLL (nats per token)")
    for (language, size, method), group in rows.items():
        look = style(methods.index(method))
        look["linestyle"] = LINES[sizes.index(size) % len(LINES)]
        look["label"] = f"{method}, {size} samples"
        for place in (TARGET, SOURCE):
            steps, means = mean_curve(group, place)
            axis = axes[language, place]
            axis.plot(steps, means, **look)
            axis.xaxis.get_major_locator().set_params(integer=True)
    several = any(len(group) > 1 for group in rows.values())
    add_legend(figure, "mean over seeds" if several else "one seed")
    return figure


# ------------------------------------------------------------------------------------------------- trade-off

def draw_tradeoff(plt, rows: Rows, traded: str):
    """A figure of the answers in the source language against that in the target language: a panel for each
    language, a line for each method over its sample sizes; standard errors over seeds, or over questions with
    one seed."""
    languages, sizes, methods = values_of(rows)
    titles = {language: f"{language}, {', '.join(sizes)} samples" for language in languages}
    figure, axes = panels(plt, titles, f"{traded}, source language", f"{traded}, target language")
    lines = {}
    for (language, size, method), group in rows.items():
        lines.setdefault((language, method), {})[size] = group
    for (language, method), groups in lines.items():
        draw_points(axes[language], methods.index(method), method, groups, traded)
    for axis in axes.values():
        axis.margins(0.15)
    add_legend(figure, "± standard error")
    return figure


def draw_points(axis, i: int, method: str, groups: dict[str, Results], traded: str) -> None:
    """The i-th method's line through its {samples: results over seeds}, with the numbers of samples. Methods
    write them into different corners of their points."""
    points, errors = [], []
    for place in (SOURCE, TARGET):
        figures = [over_seeds(f"{place} {traded}", group) for group in groups.values()]
        points.append([figure["value"] for figure in figures])
        errors.append([figure["stderr"] or 0 for figure in figures])
    look = style(i) | {
        "linestyle": "none" if method == "base" else LINES[i % len(LINES)],
        "linewidth": 1,
        "capsize": 2,
        "label": method}
    axis.errorbar(*points, *reversed(errors), **look)
    if len(groups) == 1 or method == "base":
        return
    across, along = CORNERS[i % len(CORNERS)]
    for size, *point in zip(groups, *points):
        text = f"  {size}  "
        axis.annotate(text, point, ha=across, va=along, fontsize=LABEL_SIZE)
