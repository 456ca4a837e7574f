"""A fake training that takes no time: a formula gives its accuracy, and its checkpoints are small files."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmran.config import RunConfig
from cmran.data.device_cache import DeviceCacheSlot
from cmran.training.run_dir import EpochRecord, FitResult
from cmran.utils.files import write_json


def quality(config: RunConfig) -> float:
    """Accuracy in % that a training with these settings approaches."""
    return 80 - 10 * abs(math.log10(config.train.lr / 2e-3)) - 30 * abs(config.model.dropout - 0.2)


def accuracy(config: RunConfig, epoch: int) -> float:
    return quality(config) * (1 - math.exp(-epoch))


class FakeFit:
    """Replacement for cmran.training.trainer.fit. `before(out, config, epoch)` may raise or wait before an epoch."""

    def __init__(self, before: Callable[[Path, RunConfig, int], None] | None = None, epoch_s: float = 0.0) -> None:
        self.before, self.epoch_s = before, epoch_s
        # Directory and number of finished epochs for each call.
        self.calls: list[tuple[str, int]] = []

    def __call__(
        self,
        data: Path,
        config: RunConfig,
        out: Path,
        *,
        device: str,
        resume: bool,
        evaluate_test: bool,
        device_cache: DeviceCacheSlot,
        on_start: Callable[[list[EpochRecord]], Any],
        on_epoch: Callable[[EpochRecord], None],
    ) -> FitResult:
        assert not evaluate_test
        out.mkdir(parents=True, exist_ok=True)
        path = out / "last.pt"
        history = [EpochRecord(**record) for record in json.loads(path.read_text())] if path.exists() else []
        self.calls.append((out.name, len(history)))
        with (out / "epochs.log").open("a") as log:
            on_start(list(history))
            for epoch in range(len(history) + 1, config.train.epochs + 1):
                if self.before is not None:
                    self.before(out, config, epoch)
                time.sleep(self.epoch_s)
                history.append(_record(config, epoch))
                write_json(path, [asdict(record) for record in history])
                (out / "best.pt").write_text(str(epoch))
                (out / f"model_epoch_{epoch}_best_model.pth.tar").write_text("")
                log.write(f"{epoch}\n")
                log.flush()
                on_epoch(history[-1])
        return FitResult(
            run_dir=out,
            config=config,
            fingerprint="",
            best_epoch=config.train.epochs,
            val={"accuracy": history[-1].val["accuracy"]},
            test=None,
            epochs=history,
            seconds=0.0,
        )


def _record(config: RunConfig, epoch: int) -> EpochRecord:
    value = accuracy(config, epoch)
    return EpochRecord(
        epoch=epoch,
        lr=config.train.lr,
        train_loss=1.0 / epoch,
        train_accuracy=value,
        grad_norm=1.0,
        val={"accuracy": value},
        test=None,
        seconds=0.0,
        best_epoch=epoch,
        best_accuracy=value,
    )
