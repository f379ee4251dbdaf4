"""Pictures of a comparison: held-out NLL over the steps, and what the target language costs the source.

Everything is told apart without colour: methods by marker, grey and filling, sample sizes by the line.
"""

import math
import textwrap
from pathlib import Path

from engine.files import InputError
from evals.comparison import SOURCE, TARGET, Result, by_row, mean_and_error

MARKERS = "os^DvPX*"
LINES = ("-", "--", ":", "-.")
GREYS = ("0.0", "0.5", "0.25", "0.65")
CORNERS = ((1, 1), (-1, -1), (1, -1), (-1, 1))      # of a point, where its sample size stands
NARROWEST, EDGE = 4, 2      # points (of 100) kept free around what the trade-off shows; beyond 0 and 100
PANEL = 3.4                 # inches
PANELS_ACROSS = 4
LEGEND_SIZE = 8             # points
LABEL_WIDTH = 60            # characters of a legend's line
TITLE_SIZE, TITLE_WIDTH = 9, 44
POINTS_PER_INCH = 72
TRADED = ("correct", "chrF", "in language")     # figures of which the first that every row has is drawn


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

def values_of(rows: dict[tuple, list[Result]]) -> tuple[list[str], list[str], list[str]]:
    """The languages, sample sizes and methods of the rows."""
    return tuple(list(dict.fromkeys(column)) for column in zip(*rows))


def style(i: int) -> dict:
    """Marker, filling and grey of the i-th method; later ones are smaller, so that all show where points
    coincide."""
    grey = GREYS[i % len(GREYS)]
    hollow = (i + i // len(MARKERS)) % 2
    return {"marker": MARKERS[i % len(MARKERS)], "color": grey,
            "markerfacecolor": "white" if hollow else grey, "markersize": max(8 - 1.5 * i, 4)}


def panels(plt, across: int, count: int):
    """A figure of `count` panels, `across` of them in a row, and its axes in order."""
    down = math.ceil(count / across)
    figure, axes = plt.subplots(down, across, figsize=(PANEL * 1.3 * across, PANEL * down),
                                layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def set_title(axis, text: str) -> None:
    axis.set_title(textwrap.fill(text, TITLE_WIDTH), fontsize=TITLE_SIZE)


def add_legend(figure, axes, title: str) -> None:
    """Every label once, below the panels: wrapped, in as many columns as fit, on room added for it."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    labels = [textwrap.fill(label, LABEL_WIDTH) for label in handles]
    lines = [line for label in labels for line in label.split("\n")]
    column = (max(map(len, lines)) + 10) * 0.6 * LEGEND_SIZE / POINTS_PER_INCH      # inches, with its handle
    columns = max(1, min(len(labels), int(figure.get_figwidth() / column)))
    figure.set_figwidth(max(figure.get_figwidth(), column))
    tallest = max(label.count("\n") + 1 for label in labels)
    rows = math.ceil(len(labels) / columns) * tallest + 2
    figure.set_figheight(figure.get_figheight() + rows * 1.4 * LEGEND_SIZE / POINTS_PER_INCH)
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns, fontsize=LEGEND_SIZE,
                  handlelength=4, title=title, title_fontsize=LEGEND_SIZE)


# ------------------------------------------------------------------------------------------- learning curves

def mean_curve(group: list[Result], place: str) -> tuple[list[int], list[float]]:
    """Steps that all seeds validated, and the mean held-out NLL there."""
    curves = [result.curves.get(place, {}) for result in group]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def plot_curves(results: list[Result], path: Path) -> bool:
    """Held-out NLL over steps, two panels for each language; False without validation lines."""
    rows = {row: group for row, group in by_row(results).items()
            if any(result.curves.get(TARGET) for result in group)}
    if not rows:
        return False
    plt, (languages, sizes, methods) = import_pyplot(), values_of(rows)
    places = [(language, place) for language in languages for place in (TARGET, SOURCE)]
    figure, axes = panels(plt, 2 if len(languages) <= 2 else PANELS_ACROSS, len(places))
    for axis, (language, place) in zip(axes, places):
        for row, group in rows.items():
            if row[0] == language:
                draw_curve(axis, mean_curve(group, place), sizes.index(row[1]), methods.index(row[2]),
                           f"{row[2]}, {row[1]} samples")
        axis.set(xlabel="optimiser step", ylabel="NLL (nats per token)")
        set_title(axis, f"{language}: held out, {place} language")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    add_legend(figure, axes, "mean over seeds")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw_curve(axis, curve: tuple[list, list], size: int, method: int, label: str) -> None:
    """The curve of the `method`-th method trained on the `size`-th number of samples."""
    axis.plot(*curve, linestyle=LINES[size % len(LINES)], **style(method), label=label)


# ------------------------------------------------------------------------------------------------- trade-off

def plot_tradeoff(results: list[Result], path: Path) -> bool:
    """A figure of the answers in the source language against that in the target language: a panel for each
    language, a line for each method over its sample sizes, standard errors over seeds, or over questions with
    one seed; False when there are no answers."""
    rows = {row: group for row, group in by_row(results).items()
            if any(result.samples for result in group) and row[1] != "-"}
    traded = next((title for title in TRADED if rows and have_both(rows, title)), None)
    if traded is None:
        return False
    plt, (languages, sizes, methods) = import_pyplot(), values_of(rows)
    figure, axes = panels(plt, min(len(languages), PANELS_ACROSS), len(languages))
    for axis, language in zip(axes, languages):
        for i, method in enumerate(methods):
            points = {}
            for row, group in rows.items():
                if (row[0], row[2]) == (language, method):
                    points[row[1]] = [mean_of(group, f"{place} {traded}") for place in (SOURCE, TARGET)]
            if points:
                draw_points(axis, i, method, points, numbered=len(sizes) > 1)
        axis.set(xlabel=f"{traded}, source language", ylabel=f"{traded}, target language")
        set_title(axis, f"{language}, {', '.join(sizes)} samples")
        axis.grid(alpha=0.3)
        axis.set_xlim(with_room(*axis.get_xlim()))
        axis.set_ylim(with_room(*axis.get_ylim()))
    add_legend(figure, axes, "± standard error")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def have_both(rows: dict[tuple, list[Result]], title: str) -> bool:
    """Whether every result has the figure of both languages."""
    wanted = {f"{SOURCE} {title}", f"{TARGET} {title}"}
    return all(wanted <= result.figures.keys() for group in rows.values() for result in group)


def mean_of(group: list[Result], name: str) -> tuple[float, float]:
    """A figure's mean over seeds and its standard error; with one seed over questions."""
    mean, error = mean_and_error([result.figures[name].value for result in group])
    return mean, (group[0].figures[name].error if len(group) == 1 else error) or 0


def with_room(low: float, high: float) -> tuple[float, float]:
    """Limits around what is drawn: a tenth of a point is no difference to look at."""
    room = max(0.1 * (high - low), NARROWEST)
    return max(low - room, -EDGE), min(high + room, 100 + EDGE)


def draw_points(axis, i: int, method: str, points: dict[str, list[tuple]], numbered: bool) -> None:
    """The i-th method's line. points: {samples: [(mean, error) of the source, of the target language]}.
    Every method writes its sample sizes into another corner of its points,
    so that those of two methods do not cover each other."""
    source, target = zip(*points.values())
    (x, x_error), (y, y_error) = zip(*source), zip(*target)
    axis.errorbar(x, y, xerr=x_error, yerr=y_error, linewidth=1, capsize=2, label=method, **style(i),
                  linestyle=LINES[i % len(LINES)] if method != "base" else "none")
    if not numbered or method == "base":
        return
    sizes = {}
    for size, *place in zip(points, x, y):
        sizes.setdefault(tuple(place), []).append(size)
    right, up = CORNERS[i % len(CORNERS)]
    for place, found in sizes.items():
        axis.annotate(", ".join(found), place, textcoords="offset points", xytext=(7 * right, 7 * up),
                      fontsize=8, ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")
