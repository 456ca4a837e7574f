"""One trial: settings from the space, a child run in MLflow, training with val alone, a report each epoch."""

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
from cmran.errors import BusyError, CmranError
from cmran.training.run_dir import CHECKPOINTS, EpochRecord
from cmran.training.trainer import fit
from cmran.utils.files import file_lock, remove_unfinished
from cmran.utils.signals import defer_signals
from cmran.utils.uris import redact
from search.space import suggest
from search.study import best_trial, is_dead, lost, queue_retry, trial_slots

log = logging.getLogger(__name__)


class TrialFailed(Exception):
    """The trial's own settings made it fail; the search goes on."""


class Surplus(Exception):
    """Another worker took the last place in the same moment; the search goes on."""


class TrialLost(Exception):
    """The trial was taken over, ended or removed by another process; the search goes on with the next one."""


class FolderBusy(Exception):
    """Another process trains in the trial's folder: the trial is queued again; the search goes on."""


class OutOfTime(Exception):
    """The search's time is over; the trial waits for a resume."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What Optuna calls for each trial; returns the best val accuracy in %.

    However a trial ends, its study, its MLflow run and its folder tell the same story:
        complete   run FINISHED
        pruned     run KILLED, tag cmran.pruned_at_epoch
        failed     run FAILED, tag cmran.failure and user attribute `failure`: by its settings (out of memory, a loss
                   that is not finite, any error of the training); the search goes on
        abandoned  run KILLED or FAILED, user attribute `abandoned`: stopped from outside (interrupt, time limit, a
                   tracking server, study storage or disk that failed); the retry goes on from its last epoch
        lost       run KILLED, tag cmran.abandoned: another process has ended the trial, whose result here is dropped
    """

    study: optuna.Study
    data: Path
    fingerprint: str
    base: RunConfig
    trial_slots: int
    # Trials that the study shall have.
    out: Path
    # Each trial gets a folder in here.
    parent_run_id: str
    worker: Mapping[str, Any]
    device_cache: DeviceCacheSlot
    device: Device = "auto"
    deadline: float | None = None
    # On the clock of time.monotonic.

    def __call__(self, trial: optuna.Trial) -> float:
        """Run `trial`. Raises TrialPruned; TrialFailed, TrialLost, FolderBusy or Surplus where the search goes on.

        All else ends the search.
        """
        with self._own(trial):
            trial.set_user_attr("worker", dict(self.worker))
            counted = {place.number for place in trial_slots(self.study.get_trials(deepcopy=False))[: self.trial_slots]}
            if trial.number not in counted:
                trial.set_user_attr("abandoned", "another worker took the last place")
                raise Surplus
            try:
                return self._run(trial)
            except (optuna.TrialPruned, TrialFailed, TrialLost):
                raise
            except BaseException as error:
                with defer_signals():
                    if lost(self.study, trial.number, trial._trial_id) is None:
                        queue_retry(self.study, trial.number, _reason(error))
                if isinstance(error, BusyError):
                    raise FolderBusy(str(error)) from error
                raise
            finally:
                _free_memory()

    @contextlib.contextmanager
    def _own(self, trial: optuna.Trial, run: tracking.Run | None = None) -> Iterator[None]:
        """Any error of a trial that is no longer this worker's becomes TrialLost, and `run` says why.

        The state of the trial decides, not the error: Optuna raises several, and a folder that another worker tidies
        gives still others.
        """
        try:
            yield
        except TrialLost:
            raise
        except Exception as error:
            why = lost(self.study, trial.number, trial._trial_id)
            if why is None:
                raise
            if run is not None:
                # Where the tracking store fails, too, the end of the run logs it.
                with contextlib.suppress(tracking.TrackingError):
                    run.set_tags({"cmran.abandoned": why})
            raise TrialLost(why) from error

    def _run(self, trial: optuna.Trial) -> float:
        folder, run_id = self._folder_of(trial)
        trial.set_user_attr("folder", folder.name)
        mode = self.base.model.mode
        with (
            tracking.start_run(
                experiment=tracking.experiment_of(mode),
                name=folder.name,
                parent_run_id=self.parent_run_id,
                run_id=run_id,
                tags={
                    "cmran.mode": mode,
                    "cmran.job": "trial",
                    "cmran.study": self.study.study_name,
                    "cmran.trial": trial.number,
                },
                system_metrics=False,
                killed_by=(optuna.TrialPruned, OutOfTime, TrialLost, BusyError),
            ) as run,
            self._own(trial, run),
        ):
            return self._tracked(trial, run, folder, resumed=run_id is not None)

    def _tracked(self, trial: optuna.Trial, run: tracking.Run, folder: Path, *, resumed: bool) -> float:
        trial.set_user_attr("run_id", run.run_id)
        run.log_dataset(self.data, self.fingerprint, "training")
        try:
            return self._train(trial, run, folder, resumed=resumed)
        except optuna.TrialPruned:
            epoch = self.study.trials[trial.number].last_step
            trial.set_user_attr("pruned_at_epoch", epoch)
            run.set_tags({"cmran.pruned_at_epoch": epoch})
            raise
        except Exception as error:
            reason = _reason(error)
            if is_from_outside(error):
                if not isinstance(error, tracking.TrackingError):
                    run.set_tags({"cmran.abandoned": reason})
                raise
            trial.set_user_attr("failure", reason)
            run.set_tags({"cmran.failure": reason})
            if not isinstance(error, CmranError):
                run.log_text(traceback.format_exc(), "traceback.txt")
            raise TrialFailed(reason) from error

    def _train(self, trial: optuna.Trial, run: tracking.Run, folder: Path, *, resumed: bool) -> float:
        config = suggest(trial, self.base)
        run.log_params(config)
        run.log_params(trial.params, "trial.")
        logged = tracking.logged_epochs(run.run_id) if resumed else 0
        reported: set[int] = set()

        def tell(record: EpochRecord) -> None:
            if record.epoch > logged:
                run.log_epoch(record)
            if record.val is not None:
                trial.report(record.val["accuracy"], record.epoch)
            reported.add(record.epoch)

        def on_start(history: list[EpochRecord]) -> str:
            # A worker that died may have told less than it trained, and the retry is a new trial to Optuna.
            with defer_signals():
                for record in history:
                    tell(record)
            return run.run_id

        def on_epoch(record: EpochRecord) -> None:
            # An interrupt within a transaction would leave the study's database locked.
            with defer_signals():
                tell(record)
                last = record.epoch == config.train.epochs or record.out_of_patience(config.train)
                prune = not last and record.val is not None and trial.should_prune()
            if last:
                # It is paid for: keep its result.
                return
            if prune:
                raise optuna.TrialPruned(f"below the median after epoch {record.epoch}")
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise OutOfTime(f"the search's time was over after epoch {record.epoch}")

        result = fit(
            self.data,
            config,
            folder,
            device=self.device,
            device_cache=self.device_cache,
            resume=True,
            evaluate_test=False,
            on_start=on_start,
            on_epoch=on_epoch,
        )
        # Nothing of this where the worker died after the last epoch.
        for record in result.epochs:
            if record.epoch not in reported:
                tell(record)
        value = float(result.val["accuracy"])
        run.log_metrics(
            tracking.numbers(result.val, "best.val.") | {"best.epoch": float(result.best_epoch)}, step=result.best_epoch
        )
        trial.set_user_attr("best_epoch", result.best_epoch)
        return value

    def _folder_of(self, trial: optuna.Trial) -> tuple[Path, str | None]:
        """Folder and MLflow run of the trial: those that a dead worker left, where they are at hand, or new ones."""
        new = self.out / f"trial-{trial.number:04d}"
        previous = trial.user_attrs.get("previous")
        if previous is None:
            return new, None
        name, run_id = previous.get("folder"), previous.get("run_id")
        if not is_trial_folder(name):
            log.warning("trial %d: %r is no trial's folder: it begins anew", trial.number, name)
            return new, None
        folder = self.out / name
        known = run_id is not None and tracking.run_exists(run_id)
        if (previous.get("released") or is_dead(previous.get("worker", {}))) and folder.is_dir():
            if _is_free(folder):
                return folder, run_id if known else None
            log.info("trial %d: another process trains in %s: it begins anew in %s", trial.number, folder, new)
            return new, None
        if run_id is not None and known and tracking.run_info(run_id).status == "RUNNING":
            # On another machine, or not known to be dead: its heartbeat has stopped, its files are not ours to touch.
            left = tracking.open_run(run_id)
            left.set_tags({"cmran.abandoned": f"its worker died; {new.name} takes its place"})
            left.finish("FAILED")
        return new, None


def is_trial_folder(name: object) -> TypeGuard[str]:
    """Whether `name`, read from a study's storage, is that of a trial's folder: nothing else is written or removed."""
    return isinstance(name, str) and re.fullmatch("trial-[0-9]{4,}", name) is not None


def _is_free(folder: Path) -> bool:
    """Whether no process trains in `folder` (the lock of cmran.training.trainer.fit)."""
    try:
        with file_lock(folder / ".lock", busy="busy"):
            return True
    except BusyError:
        return False


def is_from_outside(error: BaseException) -> bool:
    """Whether the next trial would meet the same: no fault of the trial's settings."""
    if isinstance(error, CmranError):
        # A full disk or a folder that cannot be written reaches us as a CmranError, too.
        return isinstance(error, tracking.TrackingError | BusyError) or isinstance(error.__cause__, OSError)
    outside = (OutOfTime, OSError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
    return not isinstance(error, Exception) or isinstance(error, outside)


def tidy(study: optuna.Study, out: Path) -> None:
    """Remove from `out` the checkpoints of the trials that have ended, except the weights of the best one."""
    trials = study.get_trials(deepcopy=False)
    best = best_trial(trials)
    kept = {best.user_attrs.get("folder")} if best else set()
    running = {
        attributes.get("folder")
        for trial in trials
        if not trial.state.is_finished()
        for attributes in (trial.user_attrs, trial.user_attrs.get("previous", {}))
    }
    # A trial that another worker ends meanwhile is not finished in `trials`, so the next best is never touched.
    for trial in trials:
        name = trial.user_attrs.get("folder")
        if not is_trial_folder(name) or name in running:
            continue
        patterns = ["last.pt"] if name in kept else ["last.pt", "best.pt", "model_epoch_*.pth.tar"]
        for path in (path for pattern in patterns for path in (out / name).glob(pattern)):
            path.unlink(missing_ok=True)
        remove_unfinished(out / name, *CHECKPOINTS)


def _reason(error: BaseException) -> str:
    """`error` in one line."""
    text = redact(" ".join(str(error).split()))
    if isinstance(error, CmranError | OutOfTime):
        return text
    name = type(error).__name__
    return f"{name}: {text}".rstrip(": ") if isinstance(error, Exception) else f"the search was stopped ({name})"


def _free_memory() -> None:
    # What a trial held on the GPU must not make the next one fail. Main memory comes back by itself.
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
