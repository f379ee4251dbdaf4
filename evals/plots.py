"""Pictures of a comparison: held-out NLL over the steps, and what the target language costs the source.

Everything is told apart without colour: methods by marker, grey and filling, sample sizes by the line.
"""

import itertools
import math
import statistics
import textwrap
from pathlib import Path

from engine.files import InputError
from evals.comparison import SOURCE, TARGET, Result, Rows, by_row, over_seeds

MARKERS = "os^DvPX*"
LINES = ("-", "--", ":", "-.")
GREYS = ("0.0", "0.5", "0.25", "0.65")
CORNERS = ("left", "bottom"), ("right", "top"), ("left", "top"), ("right", "bottom")    # of a label at its point
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


def plot(results: list[Result], directory) -> list[Path]:
    """learning.png and tradeoff.png in `directory`, as far as the results have something to draw."""
    plt, directory = import_pyplot(), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    trained = [result for result in results if result.curves.get(TARGET)]
    answered = [result for result in results if result.size != "-" and result.samples]
    traded = [title for title in TRADED if all(has_both(result, title) for result in answered)]
    figures = {}
    if trained:
        figures["learning.png"] = draw_curves(plt, by_row(trained))
    if answered and traded:
        figures["tradeoff.png"] = draw_tradeoff(plt, by_row(answered), traded[0])
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


def panels(plt, across: int, titles: list[str], x: str, y: str):
    """A figure with a panel for each title, `across` of them in a row, and its axes in order."""
    down = math.ceil(len(titles) / across)
    size = WIDTH * across, HEIGHT * down
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis, title in itertools.zip_longest(axes.flat, titles):
        axis.set_visible(title is not None)
        axis.set(xlabel=x, ylabel=y)
        axis.set_title(textwrap.fill(title or "", TITLE_WIDTH), fontsize=TITLE_SIZE)
        axis.grid(alpha=0.3)
    return figure, axes.flat


def add_legend(figure, across: int, title: str) -> None:
    """Every label once, below the panels, on room added for it."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(textwrap.fill(label, LABEL_WIDTH), handle)
    rows = math.ceil(len(handles) / across)
    lines = 2 + rows * max(label.count("\n") + 1 for label in handles)      # with the title, and the frame
    figure.set_figheight(figure.get_figheight() + lines * LINE)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=across, title=title,
        fontsize=LABEL_SIZE, title_fontsize=LABEL_SIZE, handlelength=4)


# ------------------------------------------------------------------------------------------- learning curves

def mean_curve(group: list[Result], place: str) -> tuple[list[int], list[float]]:
    """Steps that all seeds validated, and the mean held-out NLL there."""
    curves = [result.curves.get(place, {}) for result in group]
    steps = sorted(set.intersection(*map(set, curves)))
    means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
    return steps, means


def draw_curves(plt, rows: Rows):
    """Held-out NLL over steps, two panels for each language."""
    languages, sizes, methods = values_of(rows)
    places = list(itertools.product(languages, (TARGET, SOURCE)))
    across = 2 if len(languages) <= 2 else PANELS_ACROSS
    titles = [f"{language}: held out, {place} language" for language, place in places]
    figure, axes = panels(plt, across, titles, "optimiser step", "NLL (nats per token)")
    for (language, place), axis in zip(places, axes):
        for (own, size, method), group in rows.items():
            if own == language:
                line = LINES[sizes.index(size) % len(LINES)]
                axis.plot(*mean_curve(group, place), **style(methods.index(method)), linestyle=line,
                          label=f"{method}, {size} samples")
        axis.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure, across, "mean over seeds")
    return figure


# ------------------------------------------------------------------------------------------------- trade-off

def draw_tradeoff(plt, rows: Rows, traded: str):
    """A figure of the answers in the source language against that in the target language: a panel for each
    language, a line for each method over its sample sizes; standard errors over seeds, or over questions with
    one seed."""
    languages, sizes, methods = values_of(rows)
    across = min(len(languages), PANELS_ACROSS)
    titles = [f"{language}, {', '.join(sizes)} samples" for language in languages]
    figure, axes = panels(plt, across, titles, f"{traded}, source language", f"{traded}, target language")
    for language, axis in zip(languages, axes):
        for i, method in enumerate(methods):
            groups = {size: rows[language, size, method] for size in sizes if (language, size, method) in rows}
            if groups:
                draw_points(axis, i, method, groups, traded)
        axis.margins(0.15)
    add_legend(figure, across, "± standard error")
    return figure


def draw_points(axis, i: int, method: str, groups: dict[str, list[Result]], traded: str) -> None:
    """The i-th method's line through its {samples: results over seeds}, with the numbers of samples. Methods
    write them into different corners of their points."""
    values, errors = {}, {}
    for place in (SOURCE, TARGET):
        found = [over_seeds(f"{place} {traded}", group) for group in groups.values()]
        values[place] = [figure["value"] for figure in found]
        errors[place] = [figure["stderr"] or 0 for figure in found]
    x, y = values.values()
    axis.errorbar(
        x, y, xerr=errors[SOURCE], yerr=errors[TARGET], label=method, **style(i),
        linestyle="none" if method == "base" else LINES[i % len(LINES)], linewidth=1, capsize=2)
    if len(groups) == 1 or method == "base":
        return
    horizontal, vertical = CORNERS[i % len(CORNERS)]
    for size, *point in zip(groups, x, y):
        axis.annotate(f" {size} ", point, ha=horizontal, va=vertical, fontsize=LABEL_SIZE)
