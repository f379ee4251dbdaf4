"""progress.py: what a redirected log shows of long work."""

import io
import sys
import time

from engine import progress


def test_a_log_gets_a_line_for_each_redraw_and_none_twice():
    stream = io.StringIO()
    lines = progress.LogLines(stream)
    for text in ("\rwork:   0%", "\rwork:  50%", "\r          \r", "\rwork:  50%", "\n", "\rwork: 100%\n"):
        lines.write(text)
    assert stream.getvalue() == "work:   0%\nwork:  50%\nwork: 100%\n"


def test_slow_work_shows_in_a_log_and_quick_work_does_not(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in progress.progress(range(3), desc="quick"):
        pass
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    for _ in progress.progress(range(3), desc="slow"):
        pass
    shown = sys.stderr.getvalue()
    assert "slow" in shown and "3/3" in shown and "\r" not in shown


def test_a_log_shows_work_whose_pieces_take_long_and_only_the_newest_of_two_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with progress.progress(total=1, desc="outer"):
        time.sleep(0.3)
        before = sys.stderr.getvalue()
        with progress.progress(total=1, desc="inner"):
            time.sleep(0.3)
        inside = sys.stderr.getvalue()[len(before):]
        time.sleep(1.1)
        after = sys.stderr.getvalue()[len(before) + len(inside):]
    assert "outer:   0%" in after and "inner" not in after
    assert "outer:   0%" in before and "inner:   0%" in inside and "outer" not in inside
    assert not progress.LogBar.running


def test_only_the_first_rank_shows_a_bar(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert progress.progress(range(3)).disable
