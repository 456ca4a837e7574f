"""`seeds`: train with several seeds and report mean and spread."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cmran.config import Mode, RunConfig, Seed, first_difference, parse
from cmran.errors import CheckpointError, ConfigError, DataError
from cmran.utils.files import read_json, write_json
from flows.jobs import train
from flows.jobs.common import (
    PARENT_HELP,
    SELECTED_ON_TEST,
    SELECTION_HELP,
    MarkdownResult,
    RunId,
    SingleModeParameters,
    data_folder,
    marked,
    mlflow_run,
    paragraphs,
    require_fields,
    resolve_config,
    resumed_config,
    split_commas,
    table,
)
from flows.jobs.train import TrainParameters

if TYPE_CHECKING:
    from cmran.training.run_dir import FitResult

log = logging.getLogger(__name__)

SEEDS_FILE = "settings.json"
"""File in the output folder with the settings of the first start."""

_SPREAD = ("accuracy", "accuracy_leak_free", "event_f1", "mean_iou", "background_recall")
"""Scores that are reported with mean and spread."""

Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=100), BeforeValidator(split_commas)]


class SeedsParameters(SingleModeParameters):
    """Train once per seed and report mean and spread."""

    seeds: Seeds | None = Field(None, description="Seeds, separated by commas: 456,457,458.")
    out: Path = Field(description="Output folder: one run directory per seed, and seeds.json.")
    report: Path | None = Field(None, description="JSON file for the scores, in addition to OUT/seeds.json.")
    selection_split: Literal["val", "test"] | None = Field(None, description=SELECTION_HELP)
    resume: bool = Field(
        False,
        description="Keep the finished seeds in OUT and train the others. OUT alone is enough; other options must "
        "match, except that seeds can be added.",
    )
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)

    @model_validator(mode="before")
    @classmethod
    def _check_needed(cls, values: Any) -> Any:
        return require_fields(values, "data", "mode", "seeds")

    short = (*SingleModeParameters.short, "selection_split")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError("each seed can be given once")
        return self


@dataclass(frozen=True, kw_only=True)
class SeedsResult(MarkdownResult):
    """The scores of the same training with several seeds."""

    mode: Mode
    out: Path
    seeds: tuple[int, ...]
    spread: dict[str, dict[str, dict[str, float | int | None]]]
    """Split -> score -> mean, std, min, max and n."""
    by_seed: dict[str, dict[str, float | None]]
    """Seed -> split -> accuracy in percent."""
    selected_on_test: bool
    run_id: str
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "mode": self.mode,
            "seeds": list(self.seeds),
            "selection_split": "test" if self.selected_on_test else "val",
            "spread": self.spread,
            "by_seed": self.by_seed,
            "run_id": self.run_id,
        }

    def markdown(self) -> str:
        """Return mean and spread, then the scores of each seed."""
        test = "test, selected on test" if self.selected_on_test else "test"
        rows = [
            (test if split == "test" else split, score, *(_digits(found[key]) for key in ("mean", "std", "min", "max")))
            for split, scores in self.spread.items()
            for score, found in scores.items()
        ]
        lines = [
            f"# {len(self.seeds)} seeds, {self.mode}: {self.out}",
            *([SELECTED_ON_TEST] if self.selected_on_test else []),
            table(("split", "score", "mean", "std", "min", "max"), rows),
            table(
                ("seed", "val accuracy %", f"{test} accuracy %"),
                ((seed, values["val"], values["test"]) for seed, values in self.by_seed.items()),
            ),
            f"MLflow run {self.run_id}",
        ]
        return paragraphs(lines)


def _digits(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def run(parameters: SeedsParameters, *, run_id: str | None = None) -> SeedsResult:
    """Train once per seed, each in a child of one MLflow run, and report mean and spread."""
    from cmran import tracking
    from cmran.data.device_cache import DeviceCacheSlot
    from cmran.evaluation.metrics import mean_and_spread

    parameters, config = _resolve(parameters)
    assert parameters.mode is not None
    assert parameters.seeds is not None
    with (
        DeviceCacheSlot() as device_cache,
        mlflow_run("seeds", parameters.out.name, parameters.mode, parameters.parent_run_id, run_id) as active_run,
    ):
        active_run.log_params(config)
        active_run.set_tags({"cmran.seeds": parameters.seeds, "cmran.selection_split": config.train.selection_split})
        fits: dict[int, FitResult] = {}
        for count, seed in enumerate(parameters.seeds, 1):
            log.info("seed %d (%d of %d)", seed, count, len(parameters.seeds))
            training = TrainParameters(
                data=parameters.data,
                mode=parameters.mode,
                out=parameters.out / f"seed-{seed}",
                device=parameters.device,
                resume=parameters.resume,
                parent_run_id=active_run.run_id,
            )
            own = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
            fits[seed] = train.train_run(training, own, None, device_cache=device_cache).fit
        spread: dict[str, dict[str, dict[str, float | int | None]]] = {}
        for split in ("val", "test"):
            for key in _SPREAD:
                values = [(getattr(fit, split) or {}).get(key) for fit in fits.values()]
                known = [value for value in values if value is not None]
                if len(known) == len(fits):
                    spread.setdefault(split, {})[key] = mean_and_spread(known)
        result = SeedsResult(
            mode=parameters.mode,
            out=parameters.out,
            seeds=parameters.seeds,
            spread=spread,
            by_seed={
                str(seed): {"val": fit.val["accuracy"], "test": fit.test["accuracy"] if fit.test else None}
                for seed, fit in fits.items()
            },
            selected_on_test=config.train.selection_split == "test",
            run_id=active_run.run_id,
        )
        for path in (parameters.out / "seeds.json", parameters.report):
            if path is not None:
                write_json(path, result.to_dict())
        for split, scores in spread.items():
            active_run.log_metrics(tracking.numbers(scores, f"{marked(split, config.train.selection_split)}."))
        active_run.log_artifact(parameters.out / "seeds.json")
        active_run.log_text(result.markdown(), "seeds.md")
    return result


def _resolve(parameters: SeedsParameters) -> tuple[SeedsParameters, RunConfig]:
    """Return the parameters, completed from a resumed folder, and the settings that all seeds share.

    Raises:
        CmranError: There is nothing to resume, or what was given differs from what is recorded.
    """
    from cmran.data.fingerprint import folder_fingerprint

    out, path = parameters.out, parameters.out / SEEDS_FILE
    recorded: dict[str, Any] | None = None
    if parameters.resume:
        with contextlib.suppress(FileNotFoundError):
            advice = "start again in another folder"
            recorded = read_json(path, advice, "config", "data", "fingerprint", "device", "seeds")
    if recorded is None:
        if parameters.data is None or parameters.mode is None or parameters.seeds is None:
            raise CheckpointError(f"{out}: contains no runs to resume", "give `data`, `mode` and `seeds` to start some")
        if not parameters.resume and any(out.glob("seed-*/last.pt")):
            raise CheckpointError(
                f"{out} already contains runs", "continue them with `resume=True`, or use another folder"
            )
        config = resolve_config(parameters)
    else:
        started = parse(RunConfig, recorded["config"], f"{path}: config")
        config = resumed_config(parameters, out, started)
        if (difference := first_difference(started, config)) is not None:
            key, before, now = difference
            raise ConfigError(
                f"{out}: its runs have {key} {before}, now it is {now}",
                "omit it (they keep their settings), or use another folder",
            )
        seeds = tuple(parameters.seeds or recorded["seeds"])
        if missing := [seed for seed in recorded["seeds"] if seed not in seeds]:
            raise ConfigError(
                f"{out}: was started with seed {missing[0]}, which was not given now",
                "seeds can be added, but not removed; use another folder",
            )
        completed = {
            "data": data_folder(out, parameters.data, Path(recorded["data"])),
            "mode": started.model.mode,
            "seeds": seeds,
            "device": recorded["device"] if parameters.device == "auto" else parameters.device,
        }
        parameters = SeedsParameters(**(dict(parameters) | completed))
    assert parameters.data is not None
    if not parameters.data.is_dir():
        raise DataError(f"{parameters.data}: no such folder", "pass a folder of features as `data`")
    fingerprint = folder_fingerprint(parameters.data)
    if recorded is not None and recorded["fingerprint"] != fingerprint:
        raise DataError(
            f"{out}: its runs used data with fingerprint {recorded['fingerprint']}, {parameters.data} has "
            f"{fingerprint}",
            "resume with the same data, or use another folder",
        )
    settings = {
        "config": config.model_dump(mode="json"),
        "data": str(parameters.data.resolve()),
        "fingerprint": fingerprint,
        "device": parameters.device,
        "seeds": list(parameters.seeds or ()),
    }
    write_json(path, settings)
    return parameters, config
