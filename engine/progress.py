"""Progress bars: on a terminal tqdm's, in a redirected log a line now and then. No rank but the first shows one."""

import os
import sys

from tqdm import tqdm

LINE_EVERY = 3.0    # seconds between two lines of a log; work that ends sooner leaves none


class LogLines:
    """A stream for tqdm whose every redraw is a line of its own, unless it says what the last one said."""

    def __init__(self, stream):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self.last:
            self.stream.write(text + "\n")
            self.last = text

    def flush(self) -> None:
        self.stream.flush()


def progress(iterable=None, **options) -> tqdm:
    """A tqdm bar on standard error with tqdm's own options."""
    options["disable"] = options.get("disable", False) or os.environ.get("RANK", "0") != "0"
    if not sys.stderr.isatty():
        options |= {"file": LogLines(sys.stderr), "ncols": 100, "mininterval": LINE_EVERY,
                    "maxinterval": LINE_EVERY, "delay": LINE_EVERY, "position": 0}
    return tqdm(iterable, **options)
