"""Progress: a bar on a terminal, lines in a log, and words that are asked for only when they are shown."""

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
def test_a_note_is_asked_for_only_when_it_is_shown(clock, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    asked = []

    def note():
        asked.append(clock.now)
        return f"loss {len(asked)}.5, lr 0.0005"

    with Progress(100, "epoch 1", "videos") as bar:
        if bar._bar is not None:
            # Draws at each update.
            bar._bar.mininterval = bar._bar.miniters = 0
        for _ in range(100):
            clock.now += 0.25
            bar.update(1, note)
    # 25 seconds: once a second on a terminal, else with each line.
    assert asked == ([0.25 + second for second in range(25)] if terminal else [10.0, 20.0])
    shown = capsys.readouterr().err
    if not terminal:
        assert shown.splitlines() == [
            "epoch 1: 40/100 videos, 4 videos/s, 15 s left, loss 1.5, lr 0.0005",
            "epoch 1: 80/100 videos, 4 videos/s, 5 s left, loss 2.5, lr 0.0005",
        ]
    else:
        assert "epoch 1" in shown
        assert "lr 0.0005" in shown


def test_without_a_note(clock, capsys):
    with Progress(2, "scan") as bar:
        clock.now = 11.0
        bar.update()
    assert capsys.readouterr().err == "scan: 1/2 it, 0.0909 it/s, 11 s left\n"
