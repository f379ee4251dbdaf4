"""Progress bars: tqdm's on a terminal, a line now and then in a redirected log; only the first rank's."""

import os
import sys
import threading
import time

from tqdm import tqdm

LINE_EVERY = 3.0    # seconds between two lines of a log; work that ends sooner leaves none


class LogLines:
    """A stream for tqdm whose every redraw is a line of its own, unless it says what the last one said."""

    def __init__(self, stream):
        self.stream = stream
        self.flush = stream.flush
        self.last = ""
        self.written = time.monotonic()

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self.last:
            self.stream.write(text + "\n")
            self.last = text
            self.written = time.monotonic()


class LogBar(tqdm):
    """A bar for a log. It shows itself also while a piece of its work takes long, unless a newer one does."""
    running: list[int] = []          # ids of the bars, oldest first

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.ended = threading.Event()
        if not self.disable:
            self.running.append(id(self))
            threading.Thread(target=self.beat, daemon=True).start()

    def beat(self) -> None:
        while not self.ended.wait(LINE_EVERY / 6):
            late = time.monotonic() - self.fp.written > LINE_EVERY * 5 / 6
            if late and self.running[-1:] == [id(self)]:
                self.refresh()

    def close(self) -> None:
        if id(self) in self.running:
            self.ended.set()
            self.running.remove(id(self))
        super().close()


def progress(iterable=None, **options) -> tqdm:
    """A tqdm bar on standard error with tqdm's own options."""
    if os.environ.get("RANK", "0") != "0":
        options["disable"] = True
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    seconds = dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_EVERY)
    return LogBar(iterable, **options | seconds, file=LogLines(sys.stderr), ncols=100, position=0)
