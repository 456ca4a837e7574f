"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cmran.config import (
    Mode,
    RunConfig,
    Seed,
    first_difference,
    parse,
)
from cmran.errors import CmranError
from cmran.utils.files import read_json, write_json
from flows.jobs.common import (
    PARENT_HELP,
    SELECTED_ON_TEST,
    MarkdownResult,
    RunId,
    SingleModeParameters,
    config_of,
    data_folder,
    marked,
    mlflow_run,
    paragraphs,
    require_fields,
    resumed_config,
    split_commas,
    table,
)
from flows.jobs.train import TrainParameters, train_run

if TYPE_CHECKING:
    from cmran.training.run_dir import FitResult

Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=100), BeforeValidator(split_commas)]


class SeedsParameters(SingleModeParameters):
    """Train once a seed and report mean and spread."""

    seeds: Seeds | None = Field(None, description="Seeds, separated by commas: 456,457,458.")
    out: Path = Field(description="Folder that gets one run a seed and seeds.json.")
    report: Path | None = Field(None, description="JSON file to write the figures to, besides OUT/seeds.json.")
    selection_split: Literal["val", "test"] | None = Field(
        None, description="Split that picks the best epoch. test is for comparison only and marks every figure."
    )
    resume: bool = Field(
        False,
        description="Keep the finished seeds in OUT and continue with the others. OUT alone is enough; what else is "
        "given must be as before, except that seeds can be added.",
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
            raise ValueError("each seed can be named once")
        return self


@dataclass(frozen=True, kw_only=True)
class SeedsResult(MarkdownResult):
    """The same training under several seeds."""

    mode: Mode
    out: Path
    seeds: tuple[int, ...]
    spread: dict[str, dict[str, dict[str, float | int | None]]]
    # split -> score -> mean, std, min, max, n
    by_seed: dict[str, dict[str, float | None]]
    selected_on_test: bool
    run_id: str
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "mode": self.mode,
            "seeds": list(self.seeds),
            "selection_split": "test" if self.selected_on_test else "val",
            "spread": self.spread,
            "by_seed": self.by_seed,
            "run_id": self.run_id,
        }

    def markdown(self) -> str:
        """Mean and spread, then each seed."""
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


log = logging.getLogger(__name__)


SEEDS_FILE = "settings.json"
"""In the folder of several seeds: what they were started with."""


_SPREAD = ("accuracy", "accuracy_leak_free", "event_f1", "mean_iou", "background_recall")
"""Scores of which several seeds give mean and spread."""


def seeds_job(parameters: SeedsParameters, *, run_id: str | None = None) -> SeedsResult:
    """Train once a seed, each in a run under one parent, and report mean and spread."""
    parameters, config = _begin_seeds(parameters)
    assert parameters.mode is not None
    assert parameters.seeds is not None
    from cmran import tracking
    from cmran.data.device_cache import DeviceCacheSlot
    from cmran.evaluation.metrics import mean_and_spread

    with (
        DeviceCacheSlot() as device_cache,
        mlflow_run("seeds", parameters.out.name, parameters.mode, parameters.parent_run_id, run_id) as run,
    ):
        run.log_params(config)
        run.set_tags({"cmran.seeds": parameters.seeds, "cmran.selection_split": config.train.selection_split})
        fits: dict[int, FitResult] = {}
        for count, seed in enumerate(parameters.seeds, 1):
            log.info("seed %d (%d of %d)", seed, count, len(parameters.seeds))
            training = TrainParameters(
                data=parameters.data,
                mode=parameters.mode,
                out=parameters.out / f"seed-{seed}",
                device=parameters.device,
                resume=parameters.resume,
                parent_run_id=run.run_id,
            )
            own = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
            fits[seed] = train_run(training, own, None, device_cache=device_cache).fit
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
            run_id=run.run_id,
        )
        for path in (parameters.out / "seeds.json", parameters.report):
            if path is not None:
                write_json(path, result.to_dict())
        for split, scores in spread.items():
            run.log_metrics(tracking.numbers(scores, f"{marked(split, config.train.selection_split)}."))
        run.log_artifact(parameters.out / "seeds.json")
        run.log_text(result.markdown(), "seeds.md")
    return result


def _begin_seeds(parameters: SeedsParameters) -> tuple[SeedsParameters, RunConfig]:
    """The parameters with what the folder knows, where it is continued, and the settings of all seeds but the seed.

    Raises CmranError where there is nothing to continue, or what was given differs from what is there.
    """
    from cmran.data.fingerprint import folder_fingerprint

    out, path = parameters.out, parameters.out / SEEDS_FILE
    found: dict[str, Any] | None = None
    if parameters.resume:
        with contextlib.suppress(FileNotFoundError):
            advice = "start again in another folder"
            found = read_json(path, advice, "config", "data", "fingerprint", "device", "seeds")
    if found is None:
        if parameters.data is None or parameters.mode is None or parameters.seeds is None:
            raise CmranError(f"{out}: holds no trainings to resume: give data, mode and seeds to start some")
        if not parameters.resume and any(out.glob("seed-*/last.pt")):
            raise CmranError(f"{out} already holds trainings: continue them with --resume, or name another folder")
        config = config_of(parameters)
    else:
        there = parse(RunConfig, found["config"], f"{path}: config")
        config = resumed_config(parameters, parameters.out, there)
        if (difference := first_difference(there, config)) is not None:
            key, before, now = difference
            raise CmranError(
                f"{out}: its runs were made with {key} {before}, now it is {now}: leave it out (they keep their"
                " settings), or name another folder"
            )
        seeds = tuple(parameters.seeds or found["seeds"])
        if lacking := [seed for seed in found["seeds"] if seed not in seeds]:
            raise CmranError(
                f"{out}: was started with seed {lacking[0]}, which is not among those given: seeds can be added, not"
                " left out; name another folder"
            )
        filled = {
            "data": data_folder(out, parameters.data, Path(found["data"])),
            "mode": there.model.mode,
            "seeds": seeds,
            "device": found["device"] if parameters.device == "auto" else parameters.device,
        }
        parameters = SeedsParameters(**(dict(parameters) | filled))
    assert parameters.data is not None
    if not parameters.data.is_dir():
        raise CmranError(f"{parameters.data}: no such folder: name a folder of features")
    fingerprint = folder_fingerprint(parameters.data)
    if found is not None and found["fingerprint"] != fingerprint:
        raise CmranError(
            f"{out}: its runs were made on data with fingerprint {found['fingerprint']}, {parameters.data} has"
            f" {fingerprint}: resume with the same data, or name another folder"
        )
    begun = {
        "config": config.model_dump(mode="json"),
        "data": str(parameters.data.resolve()),
        "fingerprint": fingerprint,
        "device": parameters.device,
        "seeds": list(parameters.seeds or ()),
    }
    write_json(path, begun)
    return parameters, config
