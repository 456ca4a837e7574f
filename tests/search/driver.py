"""A search in a separate process: python -m tests.search.driver DATA OUT TRIALS EPOCHS EPOCH_S real|fake STUDY."""

import json
import logging
import os
import sys
from pathlib import Path

from search import objective, report, study, worker
from tests.cmran.tiny import tiny_config
from tests.search.fake import FakeFit


def slow(fit, epoch_s):
    """The real training, slowed down so that a test can interrupt it between two epochs."""
    import time

    def call(*arguments, on_epoch, **options):
        def wait(record):
            on_epoch(record)
            time.sleep(epoch_s)

        return fit(*arguments, on_epoch=wait, **options)

    return call


def main() -> None:
    data, out, trials, epochs, epoch_s, kind, name = sys.argv[1:]
    logging.basicConfig(level="INFO", format="%(message)s")
    objective.fit = FakeFit(epoch_s=float(epoch_s)) if kind == "fake" else slow(objective.fit, float(epoch_s))
    # Time after which a worker whose heartbeat has stopped counts as dead.
    study.HEARTBEAT_S = int(os.environ.get("TEST_HEARTBEAT_S", study.HEARTBEAT_S))
    study.GRACE_S = int(os.environ.get("TEST_GRACE_S", study.GRACE_S))
    report._draw = lambda *arguments: None
    result = worker.search(
        Path(data),
        mode="full",
        trials=int(trials),
        base=tiny_config(epochs=int(epochs)),
        study=name,
        out=Path(out),
        device="cpu",
    )
    print(json.dumps({"counts": result.counts, "run_id": result.run_id, "best": result.best_trial}))


if __name__ == "__main__":
    main()
