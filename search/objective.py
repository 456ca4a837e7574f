"""One trial: sample the settings, start a child run in MLflow, train, report the val accuracy of each epoch."""

import contextlib
import gc
import logging
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import optuna
import sqlalchemy.exc
import torch

from cmran import tracking
from cmran.config import Device, RunConfig
from cmran.data.device_cache import DeviceCacheSlot
from cmran.errors import BusyError, CmranError, StorageError, TrackingError
from cmran.training.run_dir import CHECKPOINTS, EpochRecord
from cmran.training.trainer import fit
from cmran.utils.files import file_lock, remove_unfinished
from cmran.utils.signals import defer_signals
from cmran.utils.uris import redact
from search.space import suggest
from search.study import best_trial, is_dead, lost_reason, queue_retry, trial_slots

log = logging.getLogger(__name__)


class TrialFailed(Exception):
    """The trial failed because of its own settings. The search continues."""


class SlotTaken(Exception):
    """Another worker took the last trial slot at the same moment. The search continues."""


class TrialLost(Exception):
    """Another process requeued, ended or removed the trial. The search continues with the next one."""


class RunDirBusy(Exception):
    """Another process trains in the trial's run directory, so the trial is requeued. The search continues."""


class TimeBudgetExceeded(Exception):
    """The time limit of the search is reached. The trial is requeued for the next search."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Objective function of the study: trains one trial and returns its best val accuracy in %.

    The study, the MLflow run and the run directory of a trial stay consistent, however it ends:
        complete     run FINISHED
        pruned       run KILLED, tag cmran.pruned_at_epoch
        failed       run FAILED, tag cmran.failure and user attribute `failure`: its settings are the cause (out of
                     memory, a loss that is not finite, any other error of the training); the search continues
        interrupted  run KILLED or FAILED, user attribute `interrupted`: stopped from outside (interrupt, time limit,
                     failure of the tracking server, study storage or disk); the retry continues after its last epoch
        lost         run KILLED, tag cmran.interrupted: another process has ended the trial; the result here is dropped
    """

    study: optuna.Study
    data: Path
    fingerprint: str
    """Fingerprint of the data folder."""
    base: RunConfig
    """Settings that the trials vary."""
    trial_slots: int
    """Number of trials that the study runs in total."""
    out: Path
    """Directory that contains the run directories of the trials."""
    parent_run_id: str
    """MLflow run of the search, the parent of the trials' runs."""
    worker: Mapping[str, Any]
    """Record of this worker (`search.study.worker_record`)."""
    device_cache: DeviceCacheSlot
    """Device cache that the trials share."""
    device: Device = "auto"
    deadline: float | None = None
    """End of the search in seconds of `time.monotonic`."""

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial.

        Returns:
            The best val accuracy in %.

        Raises:
            optuna.TrialPruned: the pruner stopped the trial.
            TrialFailed, TrialLost, RunDirBusy, SlotTaken: the search continues with another trial.
            Exception: any other exception ends the search.
        """
        with self._raise_if_lost(trial):
            trial.set_user_attr("worker", dict(self.worker))
            counted = {slot.number for slot in trial_slots(self.study.get_trials(deepcopy=False))[: self.trial_slots]}
            if trial.number not in counted:
                trial.set_user_attr("interrupted", "another worker took the last trial slot")
                raise SlotTaken
            try:
                return self._run(trial)
            except (optuna.TrialPruned, TrialFailed, TrialLost):
                raise
            except BaseException as error:
                with defer_signals():
                    if lost_reason(self.study, trial.number, trial._trial_id) is None:
                        queue_retry(self.study, trial.number, _reason(error))
                if isinstance(error, BusyError):
                    raise RunDirBusy(str(error)) from error
                raise
            finally:
                _free_memory()

    @contextlib.contextmanager
    def _raise_if_lost(self, trial: optuna.Trial, run: tracking.Run | None = None) -> Iterator[None]:
        """Convert any error of a trial that no longer belongs to this worker to TrialLost, and tag `run`.

        The state of the trial decides, not the kind of error: Optuna raises several kinds, and a directory that another
        worker cleans up causes more.
        """
        try:
            yield
        except TrialLost:
            raise
        except Exception as error:
            reason = lost_reason(self.study, trial.number, trial._trial_id)
            if reason is None:
                raise
            if run is not None:
                # If the tracking store fails, too, closing the run logs it.
                with contextlib.suppress(TrackingError):
                    run.set_tags({"cmran.interrupted": reason})
            raise TrialLost(reason) from error

    def _run(self, trial: optuna.Trial) -> float:
        run_dir, run_id = self._run_dir_of(trial)
        trial.set_user_attr("folder", run_dir.name)
        mode = self.base.model.mode
        with (
            tracking.start_run(
                experiment=tracking.experiment_of(mode),
                name=run_dir.name,
                parent_run_id=self.parent_run_id,
                run_id=run_id,
                tags={
                    "cmran.mode": mode,
                    "cmran.job": "trial",
                    "cmran.study": self.study.study_name,
                    "cmran.trial": trial.number,
                },
                system_metrics=False,
                killed_by=(optuna.TrialPruned, TimeBudgetExceeded, TrialLost, BusyError),
            ) as run,
            self._raise_if_lost(trial, run),
        ):
            return self._tracked(trial, run, run_dir, resumed=run_id is not None)

    def _tracked(self, trial: optuna.Trial, run: tracking.Run, run_dir: Path, *, resumed: bool) -> float:
        trial.set_user_attr("run_id", run.run_id)
        run.log_dataset(self.data, self.fingerprint, "training")
        try:
            return self._train(trial, run, run_dir, resumed=resumed)
        except optuna.TrialPruned:
            epoch = self.study.trials[trial.number].last_step
            trial.set_user_attr("pruned_at_epoch", epoch)
            run.set_tags({"cmran.pruned_at_epoch": epoch})
            raise
        except Exception as error:
            reason = _reason(error)
            if is_external(error):
                if not isinstance(error, TrackingError):
                    run.set_tags({"cmran.interrupted": reason})
                raise
            trial.set_user_attr("failure", reason)
            run.set_tags({"cmran.failure": reason})
            if not isinstance(error, CmranError):
                run.log_text(traceback.format_exc(), "traceback.txt")
            raise TrialFailed(reason) from error

    def _train(self, trial: optuna.Trial, run: tracking.Run, run_dir: Path, *, resumed: bool) -> float:
        config = suggest(trial, self.base)
        run.log_params(config)
        run.log_params(trial.params, "trial.")
        logged = tracking.logged_epochs(run.run_id) if resumed else 0
        reported: set[int] = set()

        def report(record: EpochRecord) -> None:
            if record.epoch > logged:
                run.log_epoch(record)
            if record.val is not None:
                trial.report(record.val["accuracy"], record.epoch)
            reported.add(record.epoch)

        def on_start(history: list[EpochRecord]) -> str:
            # A worker that died may have trained epochs that it did not report, and a retry is a new trial for Optuna.
            with defer_signals():
                for record in history:
                    report(record)
            return run.run_id

        def on_epoch(record: EpochRecord) -> None:
            # An interrupt within a transaction would leave the study's database locked.
            with defer_signals():
                report(record)
                last = record.epoch == config.train.epochs or record.out_of_patience(config.train)
                prune = not last and record.val is not None and trial.should_prune()
            if last:
                # The trial is already trained to completion: keep its result, even after the deadline.
                return
            if prune:
                raise optuna.TrialPruned(f"below the median after epoch {record.epoch}")
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise TimeBudgetExceeded(f"the time limit of the search was reached after epoch {record.epoch}")

        result = fit(
            self.data,
            config,
            run_dir,
            device=self.device,
            device_cache=self.device_cache,
            resume=True,
            evaluate_test=False,
            on_start=on_start,
            on_epoch=on_epoch,
        )
        # `fit` calls neither function if the worker died after the last epoch.
        for record in result.epochs:
            if record.epoch not in reported:
                report(record)
        value = float(result.val["accuracy"])
        run.log_metrics(
            tracking.numbers(result.val, "best.val.") | {"best.epoch": float(result.best_epoch)}, step=result.best_epoch
        )
        trial.set_user_attr("best_epoch", result.best_epoch)
        return value

    def _run_dir_of(self, trial: optuna.Trial) -> tuple[Path, str | None]:
        """Run directory and MLflow run of the trial: those of the interrupted trial if usable, or new ones."""
        new = self.out / f"trial-{trial.number:04d}"
        previous = trial.user_attrs.get("previous")
        if previous is None:
            return new, None
        name, run_id = previous.get("folder"), previous.get("run_id")
        if not is_trial_dir(name):
            log.warning("trial %d: %r is not a trial directory: the trial restarts in %s", trial.number, name, new)
            return new, None
        run_dir = self.out / name
        known = run_id is not None and tracking.run_exists(run_id)
        if (previous.get("worker_stopped") or is_dead(previous.get("worker", {}))) and run_dir.is_dir():
            if _is_free(run_dir):
                return run_dir, run_id if known else None
            log.info("trial %d: another process trains in %s: the trial restarts in %s", trial.number, run_dir, new)
            return new, None
        if run_id is not None and known and tracking.run_info(run_id).status == "RUNNING":
            # The worker is on another machine, or may be alive: its heartbeat has stopped, but its files are not ours.
            left = tracking.open_run(run_id)
            left.set_tags({"cmran.interrupted": f"its worker died; {new.name} replaces it"})
            left.finish("FAILED")
        return new, None


def is_trial_dir(name: object) -> TypeGuard[str]:
    """Whether `name`, read from a study's storage, names a run directory of a trial; no other is changed."""
    return isinstance(name, str) and re.fullmatch("trial-[0-9]{4,}", name) is not None


def _is_free(run_dir: Path) -> bool:
    """Whether no process trains in `run_dir` (the lock of cmran.training.trainer.fit)."""
    try:
        with file_lock(run_dir / ".lock", busy="busy"):
            return True
    except BusyError:
        return False


def is_external(error: BaseException) -> bool:
    """Whether the cause is outside the trial's settings, so that the next trial would fail, too."""
    if isinstance(error, CmranError):
        # A disk error may also arrive as the cause of another CmranError.
        return isinstance(error, StorageError) or isinstance(error.__cause__, OSError)
    external = (TimeBudgetExceeded, OSError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
    return not isinstance(error, Exception) or isinstance(error, external)


def tidy(study: optuna.Study, out: Path) -> None:
    """Remove the checkpoints of finished trials from `out`, except the weights of the best one."""
    trials = study.get_trials(deepcopy=False)
    best = best_trial(trials)
    kept = {best.user_attrs.get("folder")} if best else set()
    running = {
        attributes.get("folder")
        for trial in trials
        if not trial.state.is_finished()
        for attributes in (trial.user_attrs, trial.user_attrs.get("previous", {}))
    }
    # A trial that another worker ends in the meantime is not finished in `trials`, so the next best is never removed.
    for trial in trials:
        name = trial.user_attrs.get("folder")
        if not is_trial_dir(name) or name in running:
            continue
        patterns = ["last.pt"] if name in kept else ["last.pt", "best.pt", "model_epoch_*.pth.tar"]
        for path in (path for pattern in patterns for path in (out / name).glob(pattern)):
            path.unlink(missing_ok=True)
        remove_unfinished(out / name, *CHECKPOINTS)


def _reason(error: BaseException) -> str:
    """`error` in one line."""
    text = redact(" ".join(str(error).split()))
    if isinstance(error, CmranError | TimeBudgetExceeded):
        return text
    name = type(error).__name__
    return f"{name}: {text}".rstrip(": ") if isinstance(error, Exception) else f"the search was stopped ({name})"


def _free_memory() -> None:
    # GPU memory that this trial used must not make the next one fail. Main memory is freed without help.
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
