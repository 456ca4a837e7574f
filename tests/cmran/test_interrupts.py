"""Interrupts that wait for the end of a block."""

import signal
import threading

import pytest

from cmran.interrupts import held_back


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
    with held_back():
        signal.raise_signal(number)
        assert taken == []
    assert taken == [number]
    signal.raise_signal(number)
    assert taken == [number, number]


def test_the_second_one_goes_through_at_once(taken):
    with held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert taken == [signal.SIGINT]


def test_blocks_in_blocks_wait_for_the_outermost(taken):
    with held_back():
        with held_back():
            signal.raise_signal(signal.SIGTERM)
        assert taken == []
    assert taken == [signal.SIGTERM]


def test_it_comes_after_an_error_too():
    def interrupted():
        with held_back():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("the block's own")

    with pytest.raises(KeyboardInterrupt) as found:
        interrupted()
    assert isinstance(found.value.__context__, ValueError)


def test_no_handler_is_made_where_there_was_none(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with held_back():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_are_left_alone():
    handlers = []

    def work():
        with held_back():
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
