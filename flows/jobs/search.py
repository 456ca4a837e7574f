"""`search`: search for better settings with Optuna."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cmran.config import Mode, RunConfig, Seed, as_sections, file_settings, load_config
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
    paragraphs,
    resolve_config,
    table,
)

if TYPE_CHECKING:
    from search.worker import SearchResult


class SearchParameters(SingleModeParameters):
    """Search for better settings with Optuna; trial 0 is the recipe itself."""

    data: Path = Field(description=DATA_HELP)
    mode: Mode = Field(description=MODE_HELP)
    trials: Trials = Field(
        20, description="Total number of trials; running the same search again completes the missing ones."
    )
    timeout_s: Seconds | None = Field(
        None, description="Start no trial after this many seconds; the running trial stops after its epoch."
    )
    study: StudyName | None = Field(
        None, description="Name of the study; an existing study is resumed. Default: derived from mode and data."
    )
    seed: Seed = Field(0, description="Random seed of the sampler.")
    out: Path | None = Field(None, description="Output folder for trials, tables and best.yaml. Default: runs/STUDY.")
    parent_run_id: RunId | None = Field(None, description=PARENT_HELP)


@dataclass(frozen=True, kw_only=True)
class SearchJobResult(MarkdownResult):
    """A finished search."""

    mode: Mode
    search: "SearchResult"
    ok: bool = True

    def markdown(self) -> str:
        """Return the number of trials and the best settings."""
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


def run(parameters: SearchParameters, *, run_id: str | None = None) -> SearchJobResult:
    """Search for better settings. An existing study keeps the settings that are not given."""
    config = resolve_config(parameters)
    from cmran import tracking

    tracking.connect()
    from search.study import open_storage

    # Fail early: the search itself opens the storage only after it has read the data.
    open_storage()
    from cmran.data.fingerprint import folder_fingerprint
    from search.study import known_base
    from search.worker import default_study, search

    study, mode = parameters.study, parameters.mode
    study = study or default_study(mode, folder_fingerprint(parameters.data))
    recorded = known_base(study)
    # The search raises an error if the mode or the recipe differs.
    if recorded is not None and recorded.model.mode == mode and parameters.recipe in (None, recorded.recipe):
        config = resolve_config(parameters, recorded)
    found = search(
        parameters.data,
        mode=mode,
        trials=parameters.trials,
        out=parameters.out or Path("runs") / study,
        timeout_s=parameters.timeout_s,
        study=study,
        base=config,
        # Without the options of the search, such as the epochs per trial: they are not settings of a training run.
        given=_kept_settings(parameters, recorded),
        device=parameters.device,
        # A search has its own MLflow run, which outlives this command. An adopted run becomes its parent.
        parent_run_id=run_id or parameters.parent_run_id,
        seed=parameters.seed,
    )
    result = SearchJobResult(mode=mode, search=found)
    if run_id is not None:
        active_run = tracking.open_run(run_id)
        active_run.set_tags(
            {"cmran.job": "search", "cmran.mode": mode, "cmran.study": study, "cmran.search_run": found.run_id}
        )
        active_run.log_metrics({"best.val.accuracy": found.best_value, "trials": float(found.n_trials)})
        active_run.log_artifact(found.best_file)
        active_run.log_text(result.markdown(), "search.md")
    return result


def _kept_settings(parameters: SearchParameters, recorded: RunConfig | None) -> dict[str, dict[str, Any]]:
    """Return the settings that best.yaml holds besides the searched ones: of file and `settings`, or of the study."""
    kept: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    if parameters.config is not None:
        kept = file_settings(parameters.mode, parameters.config)
    elif recorded is not None:
        recipe = load_config(recorded.model.mode, recorded.recipe).model_dump(mode="json")
        for section, values in recorded.model_dump(mode="json", exclude={"recipe"}).items():
            kept[section] = {key: value for key, value in values.items() if value != recipe[section][key]}
        kept["train"].pop("precision", None)
        kept["train"].pop("epochs", None)
    given = {key: value for key, value in (parameters.settings or {}).items() if key != "train.epochs"}
    return {section: values | as_sections(given).get(section, {}) for section, values in kept.items()}
