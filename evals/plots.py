"""Pictures of a comparison: held-out NLL over the steps, and what the target language costs the source.

Everything is told apart without colour: methods by marker, grey and filling, sample sizes by the line.
"""

import itertools
import math
import statistics
import textwrap
from pathlib import Path

from engine.files import InputError
from evals.comparison import SOURCE, TARGET, Result, Rows, by_row, mean_and_error

MARKERS = "os^DvPX*"
LINES = ("-", "--", ":", "-.")
GREYS = ("0.0", "0.5", "0.25", "0.65")
# around a point: where its sample size stands, in points, and how it is aligned
CORNERS = (
    (7, 7, "left", "bottom"),
    (-7, -7, "right", "top"),
    (7, -7, "left", "top"),
    (-7, 7, "right", "bottom"))
NARROWEST, EDGE = 4, 2              # points (of 100) kept free around the trade-off; beyond 0 and 100
WIDTH, HEIGHT = 4.4, 3.4            # of a panel, in inches
PANELS_ACROSS = 4
TITLE_SIZE, TITLE_WIDTH = 9, 44     # points, characters of a line
LEGEND_SIZE, LABEL_WIDTH = 8, 60
HANDLE_LETTERS = 10                 # what stands before a label is as wide as these
LETTER = 0.6 * LEGEND_SIZE / 72     # inches of an average letter
LINE = 1.4 * LEGEND_SIZE / 72       # inches of a line of text
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
    import_pyplot()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    drawings = {directory / "learning.png": plot_curves, directory / "tradeoff.png": plot_tradeoff}
    return [path for path, draw in drawings.items() if draw(results, path)]


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


def panels(plt, across: int, count: int):
    """A figure of `count` panels, `across` of them in a row, and its axes in order."""
    down = math.ceil(count / across)
    size = WIDTH * across, HEIGHT * down
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def finish_panel(axis, title: str, x: str, y: str) -> None:
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=TITLE_SIZE)
    axis.grid(alpha=0.3)


def add_legend(figure, axes, title: str) -> None:
    """Every label once, below the panels: wrapped, in as many columns as fit, on room added for it."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    wrapped = [textwrap.wrap(label, LABEL_WIDTH) for label in handles]
    letters = max(len(line) for lines in wrapped for line in lines)
    column = (letters + HANDLE_LETTERS) * LETTER
    columns = int(figure.get_figwidth() / column)
    columns = min(max(columns, 1), len(wrapped))
    rows = math.ceil(len(wrapped) / columns)
    lines = rows * max(map(len, wrapped)) + 2               # of text: the title, and the frame
    figure.set_figwidth(max(figure.get_figwidth(), column))
    figure.set_figheight(figure.get_figheight() + lines * LINE)
    labels = ["\n".join(lines) for lines in wrapped]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns, title=title,
                  fontsize=LEGEND_SIZE, title_fontsize=LEGEND_SIZE, handlelength=4)


def save(plt, figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------- learning curves

def mean_curve(group: list[Result], place: str) -> tuple[list[int], list[float]]:
    """Steps that all seeds validated, and the mean held-out NLL there."""
    curves = [result.curves.get(place, {}) for result in group]
    steps = sorted(set.intersection(*map(set, curves)))
    means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
    return steps, means


def plot_curves(results: list[Result], path: Path) -> bool:
    """Held-out NLL over steps, two panels for each language; False without validation lines."""
    trained = [result for result in results if result.curves.get(TARGET)]
    if not trained:
        return False
    plt = import_pyplot()
    rows = by_row(trained)
    languages, sizes, methods = values_of(rows)
    places = list(itertools.product(languages, (TARGET, SOURCE)))
    across = 2 if len(languages) <= 2 else PANELS_ACROSS
    figure, axes = panels(plt, across, len(places))
    for axis, (language, place) in zip(axes, places):
        for (own, size, method), group in rows.items():
            if own != language:
                continue
            steps, means = mean_curve(group, place)
            line = LINES[sizes.index(size) % len(LINES)]
            axis.plot(steps, means, **style(methods.index(method)), linestyle=line,
                      label=f"{method}, {size} samples")
        finish_panel(axis, f"{language}: held out, {place} language",
                     "optimiser step", "NLL (nats per token)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure, axes, "mean over seeds")
    save(plt, figure, path)
    return True


# ------------------------------------------------------------------------------------------------- trade-off

def plot_tradeoff(results: list[Result], path: Path) -> bool:
    """A figure of the answers in the source language against that in the target language: a panel for each
    language, a line for each method over its sample sizes, standard errors over seeds, or over questions with
    one seed; False when there are no answers."""
    answered = [result for result in results if result.size != "-" and result.samples]
    traded = [title for title in TRADED if all(has_both(result, title) for result in answered)]
    if not answered or not traded:
        return False
    plt = import_pyplot()
    rows = by_row(answered)
    languages, sizes, methods = values_of(rows)
    figure, axes = panels(plt, min(len(languages), PANELS_ACROSS), len(languages))
    for axis, language in zip(axes, languages):
        for i, method in enumerate(methods):
            groups = {size: rows[language, size, method]
                      for size in sizes if (language, size, method) in rows}
            if groups:
                draw_points(axis, i, method, groups, traded[0], numbered=len(sizes) > 1)
        finish_panel(axis, f"{language}, {', '.join(sizes)} samples",
                     f"{traded[0]}, source language", f"{traded[0]}, target language")
        axis.set_xlim(with_room(*axis.get_xlim()))
        axis.set_ylim(with_room(*axis.get_ylim()))
    add_legend(figure, axes, "± standard error")
    save(plt, figure, path)
    return True


def has_both(result: Result, title: str) -> bool:
    """Whether it has the figure of both languages."""
    return {f"{SOURCE} {title}", f"{TARGET} {title}"} <= result.figures.keys()


def means_of(groups: list[list[Result]], name: str) -> tuple[list[float], list[float]]:
    """A figure's means over seeds and their standard errors; with one seed over questions."""
    means, errors = [], []
    for group in groups:
        mean, error = mean_and_error([result.figures[name].value for result in group])
        if error is None:
            error = group[0].figures[name].error or 0
        means.append(mean)
        errors.append(error)
    return means, errors


def with_room(low: float, high: float) -> tuple[float, float]:
    """Limits around what is drawn: a tenth of a point is no difference to look at."""
    room = max(0.1 * (high - low), NARROWEST)
    return max(low - room, -EDGE), min(high + room, 100 + EDGE)


def draw_points(axis, i: int, method: str, groups: dict[str, list[Result]], traded: str,
                numbered: bool) -> None:
    """The i-th method's line through its {samples: results over seeds}. Every method writes its sample sizes
    into another corner of its points, so that those of two methods do not cover each other."""
    x, x_error = means_of(groups.values(), f"{SOURCE} {traded}")
    y, y_error = means_of(groups.values(), f"{TARGET} {traded}")
    line = "none" if method == "base" else LINES[i % len(LINES)]
    axis.errorbar(x, y, xerr=x_error, yerr=y_error, **style(i), linestyle=line, linewidth=1, capsize=2,
                  label=method)
    if not numbered or method == "base":
        return
    sizes = {}
    for size, *place in zip(groups, x, y):
        sizes.setdefault(tuple(place), []).append(size)
    *offset, across, along = CORNERS[i % len(CORNERS)]
    for place, found in sizes.items():
        text = ", ".join(found)
        axis.annotate(text, place, xytext=offset, textcoords="offset points", ha=across, va=along,
                      fontsize=LEGEND_SIZE)
