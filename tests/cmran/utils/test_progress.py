"""Progress: a bar on a terminal, lines in a log, and notes that are computed only when they are shown."""

import sys

import pytest

from cmran.utils import progress
from cmran.utils.progress import Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize("terminal", [False, True])
def test_note_is_computed_only_when_shown(clock, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    computed = []

    def note():
        computed.append(clock.now)
        return f"loss {len(computed)}.5, lr 0.0005"

    with Progress(100, "epoch 1", "videos") as bar:
        if bar._bar is not None:
            # Redraw at each update.
            bar._bar.mininterval = bar._bar.miniters = 0
        for _ in range(100):
            clock.now += 0.25
            bar.update(1, note)
    # In 25 seconds: once a second on a terminal, otherwise with each line.
    assert computed == ([0.25 + second for second in range(25)] if terminal else [10.0, 20.0])
    shown = capsys.readouterr().err
    if not terminal:
        assert shown.splitlines() == [
            "epoch 1: 40/100 videos, 4 videos/s, 15 s left, loss 1.5, lr 0.0005",
            "epoch 1: 80/100 videos, 4 videos/s, 5 s left, loss 2.5, lr 0.0005",
        ]
    else:
        assert "epoch 1" in shown
        assert "lr 0.0005" in shown


def test_progress_without_note(clock, capsys):
    with Progress(2, "scan") as bar:
        clock.now = 11.0
        bar.update()
    assert capsys.readouterr().err == "scan: 1/2 it, 0.0909 it/s, 11 s left\n"
