"""Flags: numbers that are checked where they are typed, and a parser whose errors are one line.

    add("--top-p", type=share, default=1.0, help="...")

NaN and infinity are never numbers here. Each function is an argparse `type`: it takes the text and returns
the number, or raises argparse's error with the text and what was expected.
"""

import argparse
import math
import sys

LARGEST_COUNT = 2 ** 31 - 1      # what 32-bit sizes hold
LARGEST_SEED = 2 ** 63 - 1       # what torch.Generator takes
SMALLEST_SHARE = 1e-6            # below it, float32 sums of probabilities are noise
SMALLEST_TEMPERATURE = 1e-3      # below it, logits / temperature may overflow

REQUIRED = object()              # the default of a flag that has none


def positive_int(text: str) -> int:
    return check(text, int, lambda x: 1 <= x <= LARGEST_COUNT, "a whole number of 1 or more")


def count(text: str) -> int:
    return check(text, int, lambda x: 0 <= x <= LARGEST_COUNT, "a whole number of 0 or more")


def seed(text: str) -> int:
    return check(text, int, lambda x: 0 <= x <= LARGEST_SEED, "a whole number from 0 to 2^63 - 1")


def positive(text: str) -> float:
    return check(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def not_negative(text: str) -> float:
    return check(text, float, lambda x: 0 <= x < math.inf, "a number of 0 or more")


def fraction(text: str) -> float:
    return check(text, float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def share(text: str) -> float:
    """A fraction that is not nothing: --top-p."""
    return check(text, float, lambda x: SMALLEST_SHARE <= x <= 1, f"a number from {SMALLEST_SHARE:f} to 1")


def temperature(text: str) -> float:
    return check(text, float, lambda x: x == 0 or SMALLEST_TEMPERATURE <= x < math.inf,
                 f"0 (greedy) or a number of {SMALLEST_TEMPERATURE} or more")


def check(text: str, kind: type, good, wanted: str):
    """The number in the text; argparse.ArgumentTypeError unless it is one and good(number)."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: {wanted} was expected")
    return value


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
        super().__init__(**{"formatter_class": Help} | options)

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
            section.add_argument(name, action="store_true", help=text)
        elif kind is list:
            section.add_argument(name, action="append", default=default, help=text)
        elif isinstance(kind, list):
            section.add_argument(name, choices=kind, default=default, help=text)
        else:
            section.add_argument(name, type=kind, default=None if default is REQUIRED else default,
                                 required=default is REQUIRED, help=text)
    return add
