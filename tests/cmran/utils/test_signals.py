"""Deferred Ctrl-C and SIGTERM."""

import signal
import sys
import threading
import time
import weakref

import pytest

from cmran.utils.signals import defer_signals, raise_on_term


@pytest.fixture
def received():
    """The signals that a recording handler has received; the earlier handlers are restored afterwards."""
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_handled_when_the_block_ends(received, number):
    with defer_signals():
        signal.raise_signal(number)
        assert received == []
    assert received == [number]
    signal.raise_signal(number)
    assert received == [number, number]


def test_second_signal_is_handled_at_once(received):
    with defer_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]


def test_nested_blocks_defer_to_the_outermost(received):
    with defer_signals():
        with defer_signals():
            signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]


def test_signal_is_handled_after_an_error_in_the_block():
    def interrupted():
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("the block's own")

    with pytest.raises(KeyboardInterrupt) as found:
        interrupted()
    assert isinstance(found.value.__context__, ValueError)


def test_default_handler_is_kept(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with defer_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_are_not_affected():
    handlers = []

    def work():
        with defer_signals():
            handlers.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_interrupted_mlflow_call_completes_and_its_run_ends(tracking_db, monkeypatch):
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
    """A target for a weak reference."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_dropped_signal_is_sent_again(number):
    """Python drops an exception in a callback of a weak reference."""

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


def test_repeated_term_is_one_request():
    """`timeout` sends it twice: the second one does not interrupt the cleanup."""
    ended = []

    def work():
        with raise_on_term(SystemExit):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                ended.append(True)

    # The second block starts without an earlier signal.
    for _ in range(2):
        with pytest.raises(SystemExit):
            work()
    assert ended == [True, True]


def test_other_dropped_exceptions_reach_the_earlier_hook():
    reported = []
    hook, sys.unraisablehook = sys.unraisablehook, reported.append
    before = signal.getsignal(signal.SIGTERM)
    try:
        with raise_on_term(SystemExit):
            thing = Referent()
            reference = weakref.ref(thing, lambda _: 1 / 0)
            del thing
        assert reference() is None
        assert [dropped.exc_type for dropped in reported] == [ZeroDivisionError]
        assert (sys.unraisablehook, signal.getsignal(signal.SIGTERM)) == (reported.append, before)
    finally:
        sys.unraisablehook = hook


def test_run_that_was_just_created_is_ended(tracking_db, monkeypatch):
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
        pytest.fail("the block must not run")
    assert tracking.run_info(ids[0]).status == "KILLED"
