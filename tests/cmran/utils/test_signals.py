"""Interrupts that wait for the end of a block."""

import signal
import sys
import threading
import time
import weakref

import pytest

from cmran.utils.signals import defer_signals, raise_on_term


@pytest.fixture
def taken():
    """Handlers that note what they are called with; the earlier ones come back afterwards."""
    taken = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: taken.append(number))
    yield taken
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_comes_when_the_block_ends(taken, number):
    with defer_signals():
        signal.raise_signal(number)
        assert taken == []
    assert taken == [number]
    signal.raise_signal(number)
    assert taken == [number, number]


def test_the_second_one_goes_through_at_once(taken):
    with defer_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert taken == [signal.SIGINT]


def test_blocks_in_blocks_wait_for_the_outermost(taken):
    with defer_signals():
        with defer_signals():
            signal.raise_signal(signal.SIGTERM)
        assert taken == []
    assert taken == [signal.SIGTERM]


def test_it_comes_after_an_error_too():
    def interrupted():
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("the block's own")

    with pytest.raises(KeyboardInterrupt) as found:
        interrupted()
    assert isinstance(found.value.__context__, ValueError)


def test_no_handler_is_made_where_there_was_none(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with defer_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_are_left_alone():
    handlers = []

    def work():
        with defer_signals():
            handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_a_call_to_mlflow_is_whole_and_its_run_ends_in_order(tracking_db, monkeypatch):
    from mlflow import MlflowClient

    from cmran import tracking

    log_batch = MlflowClient.log_batch

    def interrupted(self, *arguments, metrics=(), **options):
        if metrics:
            signal.raise_signal(signal.SIGINT)
        return log_batch(self, *arguments, metrics=metrics, **options)

    def work():
        with tracking.start_run(experiment="cmran-full", name="train", system_metrics=False) as run:
            ids.append(run.run_id)
            run.log_metrics({"val.accuracy": 50.0})

    ids = []
    monkeypatch.setattr(MlflowClient, "log_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work()
    found = tracking.run_info(ids[0])
    assert (found.status, found.metrics) == ("KILLED", {"val.accuracy": 50.0})


class Referent:
    """Something to refer to weakly."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_python_drops_comes_again(number):
    """An exception in a callback of a weak reference goes nowhere."""

    def wait():
        signal.raise_signal(number)

    def dropped():
        with raise_on_term(SystemExit):
            thing = Referent()
            reference = weakref.ref(thing, lambda _: wait())
            del thing
            assert reference() is None
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        dropped()


def test_term_that_is_repeated_at_once_is_one_request():
    """As `timeout` sends it: what ends in order is not interrupted by the second."""
    ended = []

    def work():
        with raise_on_term(SystemExit):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                ended.append(True)

    # The second block begins with none.
    for _ in range(2):
        with pytest.raises(SystemExit):
            work()
    assert ended == [True, True]


def test_what_else_is_dropped_is_told_as_ever():
    told = []
    hook, sys.unraisablehook = sys.unraisablehook, told.append
    before = signal.getsignal(signal.SIGTERM)
    try:
        with raise_on_term(SystemExit):
            thing = Referent()
            reference = weakref.ref(thing, lambda _: 1 / 0)
            del thing
        assert reference() is None
        assert [dropped.exc_type for dropped in told] == [ZeroDivisionError]
        assert (sys.unraisablehook, signal.getsignal(signal.SIGTERM)) == (told.append, before)
    finally:
        sys.unraisablehook = hook


def test_a_run_that_was_just_made_is_ended_too(tracking_db, monkeypatch):
    from mlflow import MlflowClient

    from cmran import tracking

    create_run, ids = MlflowClient.create_run, []

    def interrupted(self, *arguments, **options):
        run = create_run(self, *arguments, **options)
        ids.append(run.info.run_id)
        signal.raise_signal(signal.SIGINT)
        return run

    monkeypatch.setattr(MlflowClient, "create_run", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.start_run(experiment="cmran-full", name="train", system_metrics=False),
    ):
        pytest.fail("nothing is begun")
    assert tracking.run_info(ids[0]).status == "KILLED"
