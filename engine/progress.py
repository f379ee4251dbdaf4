"""Progress bars: on a terminal tqdm's, in a redirected log a line now and then. No rank but the first shows one."""

import os
import sys
import threading
import time

from tqdm import tqdm

LINE_EVERY = 3.0    # seconds between two lines of a log; work that ends sooner leaves none


class LogLines:
    """A stream for tqdm whose every redraw is a line of its own, unless it says what the last one said."""

    def __init__(self, stream):
        self.stream, self.last, self.written = stream, "", time.monotonic()

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self.last:
            self.stream.write(text + "\n")
            self.last, self.written = text, time.monotonic()

    def flush(self) -> None:
        self.stream.flush()


class LogBar(tqdm):
    """A bar for a log. It also shows itself while one piece of its work takes long, unless a newer bar does."""
    running: list = []                       # of bars, oldest first; told by `is`, tqdm's == compares positions

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.ended = threading.Event()
        if not self.disable:
            self.running.append(self)
            threading.Thread(target=self.beat, daemon=True).start()

    def beat(self) -> None:
        while not self.ended.wait(LINE_EVERY / 6):
            newest = self.running[-1:]
            late = time.monotonic() - self.fp.written > LINE_EVERY * 5 / 6
            if late and newest and newest[0] is self:
                self.refresh()

    def close(self) -> None:
        if not self.disable:
            self.ended.set()
            self.running[:] = [bar for bar in self.running if bar is not self]
        super().close()


def progress(iterable=None, **options) -> tqdm:
    """A tqdm bar on standard error with tqdm's own options."""
    options["disable"] = options.get("disable", False) or os.environ.get("RANK", "0") != "0"
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    options |= {"file": LogLines(sys.stderr), "ncols": 100, "mininterval": LINE_EVERY, "maxinterval": LINE_EVERY,
                "delay": LINE_EVERY, "position": 0}
    return LogBar(iterable, **options)
