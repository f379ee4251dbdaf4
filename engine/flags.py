"""Flags: numbers that are checked where they are typed, and a parser whose errors are one line.

    add("--top-p", type=share, default=1.0, help="...")

NaN and infinity are never numbers here.
"""

import argparse
import math
import sys
from pathlib import Path

LARGEST = sys.float_info.max
LARGEST_COUNT = 2 ** 31 - 1      # what 32-bit sizes hold
LARGEST_SEED = 2 ** 63 - 1       # what torch.Generator takes
SMALLEST = math.ulp(0.0)         # above 0
SMALLEST_SHARE = 1e-6            # below it, float32 sums of probabilities are noise
SMALLEST_TEMPERATURE = 1e-3      # below it, logits / temperature may overflow

REQUIRED = argparse.SUPPRESS     # the default of a flag that has none


def number(kind: type, least: float, most: float, wanted: str, or_zero: bool = False):
    """An argparse `type`: numbers of a kind from `least` to `most`."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if least <= value <= most or or_zero and value == 0:
            return value
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: {wanted} was expected")
    return read


positive_int = number(int, 1, LARGEST_COUNT, "a whole number of 1 or more")
count = number(int, 0, LARGEST_COUNT, "a whole number of 0 or more")
seed = number(int, 0, LARGEST_SEED, "a whole number from 0 to 2^63 - 1")
positive = number(float, SMALLEST, LARGEST, "a number above 0")
not_negative = number(float, 0, LARGEST, "a number of 0 or more")
fraction = number(float, 0, 1, "a number from 0 to 1")
share = number(float, SMALLEST_SHARE, 1, f"a number from {SMALLEST_SHARE:f} to 1")    # not nothing: --top-p
temperature = number(float, SMALLEST_TEMPERATURE, LARGEST,
                     f"0 (greedy) or a number of {SMALLEST_TEMPERATURE} or more", or_zero=True)


def positives(text: str):
    """An argparse `type`: a number above 0; or several joined by commas, which stay a text for `numbers`."""
    each = [positive(part) for part in text.split(",")]
    return each[0] if len(each) == 1 else ",".join(map(str, each))


def numbers(value) -> list[float]:
    """Those of a flag of `positives`; none of None."""
    return [] if value is None else [float(part) for part in str(value).split(",")]


def directory(text: str) -> Path:
    """An argparse `type`: where a directory is or can be made."""
    if not text:
        raise argparse.ArgumentTypeError("'': a directory was expected")
    path = Path(text)
    nearest = next((place for place in (path, *path.parents) if place.exists()), path)
    if nearest.exists() and not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest} is a file, a directory was expected")
    return path


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One line a flag where it fits, defaults that say something, examples as they were written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)

    def _get_help_string(self, action) -> str:
        if action.default is None or action.default is False or action.default == "":
            return action.help or ""
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with `Help` and errors of one line: what is wrong, and where help is."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def group(parser: argparse.ArgumentParser, title: str):
    """A function that adds a flag to a group of the help: add(name, kind, default, help).

    kind: an argparse type, a list of choices, bool for a switch, or `list` for texts given one by one;
    default REQUIRED: there is none.
    """
    section = parser.add_argument_group(title)

    def add(name: str, kind, default, text: str) -> None:
        if kind is bool:
            how = {"action": "store_true"}
        elif kind is list:
            how = {"action": "append"}
        elif isinstance(kind, list):
            how = {"choices": kind, "metavar": "|".join(kind)}      # argparse's commas would be ambiguous
        else:
            how = {"type": kind}
        section.add_argument(name, default=default, required=default is REQUIRED, help=text, **how)
    return add
