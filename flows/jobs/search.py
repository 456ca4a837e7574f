"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cmran.config import (
    Mode,
    RunConfig,
    Seed,
    as_sections,
    file_settings,
    load_config,
)
from flows.jobs.common import (
    DATA_HELP,
    MODE_HELP,
    PARENT_HELP,
    MarkdownResult,
    RunId,
    Seconds,
    SingleModeParameters,
    StudyName,
    Trials,
    config_of,
    paragraphs,
    table,
)

if TYPE_CHECKING:
    from search.worker import SearchResult


class SearchParameters(SingleModeParameters):
    """Search for better settings with Optuna; trial 0 is the recipe itself."""

    data: Path = Field(description=DATA_HELP)
    mode: Mode = Field(description=MODE_HELP)
    trials: Trials = Field(
        20, description="Trials that the study shall have in the end; the same search again does what is left."
    )
    timeout_s: Seconds | None = Field(
        None, description="Start no trial after so many seconds; the running one ends with its epoch."
    )
    study: StudyName | None = Field(
        None, description="Name of the study; an existing one goes on. Default: named after mode and data."
    )
    seed: Seed = Field(0, description="Of the sampler.")
    out: Path | None = Field(None, description="Folder for trials, tables and best.yaml. Default: runs/STUDY.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class SearchJobResult(MarkdownResult):
    """A search."""

    mode: Mode
    search: "SearchResult"
    ok: bool = True

    def markdown(self) -> str:
        """Trials and best settings."""
        from search.report import train_command

        search = self.search
        counts = ", ".join(f"{count} {state.lower()}" for state, count in search.counts.items() if count)
        params = table(("setting", "best"), ((key, _plain(value)) for key, value in search.best_params.items()))
        lines = [
            f"# Search, {self.mode}: study {search.study}",
            f"{search.n_trials} trials ({counts}); best: trial {search.best_trial}, {search.best_value:.2f} % on val",
            params,
            f"MLflow run {search.run_id}",
            f"Train with it: {train_command(self.mode, search.best_config.recipe, str(search.best_file))}",
        ]
        return paragraphs(lines)


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def search_job(parameters: SearchParameters, *, run_id: str | None = None) -> SearchJobResult:
    """Search for better settings. A study that exists keeps the settings that are not given."""
    config = config_of(parameters)
    from cmran import tracking

    tracking.connect()
    from search.study import open_storage

    # At once, as the tracking store: the search itself asks it only after it has read the data.
    open_storage()
    from cmran.data.fingerprint import folder_fingerprint
    from search.study import known_base
    from search.worker import default_study, search

    study, mode = parameters.study, parameters.mode
    study = study or default_study(mode, folder_fingerprint(parameters.data))
    there = known_base(study)
    # Of another mode or recipe: the search says so.
    if there is not None and there.model.mode == mode and parameters.recipe in (None, there.recipe):
        config = config_of(parameters, there)
    found = search(
        parameters.data,
        mode=mode,
        trials=parameters.trials,
        out=parameters.out or Path("runs") / study,
        timeout_s=parameters.timeout_s,
        study=study,
        base=config,
        # Options of the search, such as the epochs of a trial, are no settings of a training.
        given=_kept_settings(parameters, there),
        device=parameters.device,
        # A search has a run of its own, which outlives this command; under an adopted run it hangs.
        parent_run_id=run_id or parameters.parent_run_id,
        seed=parameters.seed,
    )
    result = SearchJobResult(mode=mode, search=found)
    if run_id is not None:
        run = tracking.open_run(run_id)
        run.set_tags(
            {"cmran.job": "search", "cmran.mode": mode, "cmran.study": study, "cmran.search_run": found.run_id}
        )
        run.log_metrics({"best.val.accuracy": found.best_value, "trials": float(found.n_trials)})
        run.log_artifact(found.best_file)
        run.log_text(result.markdown(), "search.md")
    return result


def _kept_settings(parameters: SearchParameters, there: RunConfig | None) -> dict[str, dict[str, Any]]:
    """What best.yaml holds besides the searched settings: those of the file and --set, or of the study `there`."""
    kept: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    if parameters.config is not None:
        kept = file_settings(parameters.mode, parameters.config)
    elif there is not None:
        recipe = load_config(there.model.mode, there.recipe).model_dump(mode="json")
        for section, values in there.model_dump(mode="json", exclude={"recipe"}).items():
            kept[section] = {key: value for key, value in values.items() if value != recipe[section][key]}
        kept["train"].pop("precision", None)
        kept["train"].pop("epochs", None)
    given = {key: value for key, value in (parameters.settings or {}).items() if key != "train.epochs"}
    return {section: values | as_sections(given).get(section, {}) for section, values in kept.items()}
