"""Report of a study: tables, figures and a config file with the best settings."""

import csv
import io
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from cmran.config import RunConfig
from cmran.utils.files import atomic_write, write_json, write_text
from cmran.utils.markdown import markdown_table
from search.space import best_settings, describe, distributions
from search.study import best_trial, trial_slots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}

FILES = ("trials.csv", "trials.md", "study.json", "best.yaml", "history.png", "slices.png", "importances.png")

MIN_TRIALS = 4
"""Minimum number of complete trials for parameter importances."""

DPI = 110
INK, MUTED, GRID = "#222222", "#666666", "#dddddd"
# Colors of Okabe and Ito, distinguishable with any color vision.
BLUE, ORANGE = "#0072b2", "#d55e00"


def write(study: optuna.Study, base: RunConfig, out: Path, given: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Write the files of `FILES` into `out`, except those for which there are too few complete trials.

    best.yaml and the figures need one complete trial, importances.png needs `MIN_TRIALS`. best.yaml names the recipe
    and contains the searched settings and `given`. It contains nothing that concerns only the trials, such as their
    number of epochs.

    Args:
        study: The study.
        base: The settings that the study searches around.
        out: Output directory.
        given: Other settings for best.yaml, {"model": {...}, "train": {...}}.

    Returns:
        The files of the report that exist in `out`.
    """
    everything = study.get_trials(deepcopy=False)
    trials = trial_slots(everything)
    best = best_trial(trials)
    shares, missing = importances(study)
    names = list(distributions(base))
    write_text(out / "trials.csv", _csv(trials, names))
    write_text(out / "trials.md", _markdown(study.study_name, everything, names, base, shares, missing))
    write_json(
        out / "study.json",
        {
            "study": study.study_name,
            **{key: study.user_attrs[key] for key in ("mode", "fingerprint", "recipe", "epochs")},
            "best": None if best is None else {"trial": best.number, "val_accuracy": best.value, "params": best.params},
            "importances": shares or None,
            "importances_missing": missing,
        },
    )
    if best is not None:
        head = (
            f"# Best settings of study {study.study_name}: trial {best.number}, val accuracy {best.value:.2f} %.\n"
            "# All other settings come from the recipe, including the number of epochs unless it is set below.\n"
            "# Values of lr_milestones between 0 and 1 are shares of the number of epochs.\n"
            f"# Train with this file: {train_command(base.model.mode, base.recipe, 'THIS_FILE')}\n"
        )
        settings = {"mode": base.model.mode, "recipe": base.recipe, **best_settings(best.params, given)}
        write_text(out / "best.yaml", head + yaml.safe_dump(settings, sort_keys=False))
        _draw(trials, best, base, shares, out)
    return [out / name for name in FILES if (out / name).is_file()]


def train_command(mode: str, recipe: str, config: str) -> str:
    """The command that trains with the settings in the file `config`."""
    recipe_option = "" if recipe == f"published-{mode}" else f" --recipe {recipe}"
    return f"cmran train DATA --mode {mode}{recipe_option} --config {shlex.quote(config)} --out RUN_DIR"


def importances(study: optuna.Study) -> tuple[dict[str, float], str | None]:
    """Importance of each parameter for reaching the best trials (PED-ANOVA).

    Returns:
        The shares, which add up to 1, largest first, and None; or an empty dictionary and the reason.
    """
    complete = [trial for trial in trial_slots(study.get_trials(deepcopy=False)) if trial.state == TrialState.COMPLETE]
    if len(complete) < MIN_TRIALS:
        return {}, f"{len(complete)} complete trials, {MIN_TRIALS} are needed"
    if len({trial.value for trial in complete}) == 1:
        return {}, "all complete trials have the same accuracy"
    found = optuna.importance.PedAnovaImportanceEvaluator().evaluate(study)
    total = sum(found.values())
    if not total > 0:
        return {}, "no parameter is important"
    return {name: value / total for name, value in found.items()}, None


def outcome(trial: FrozenTrial) -> str:
    """How a trial ended, and the reason if it was pruned, interrupted or failed."""
    if reason := trial.user_attrs.get("interrupted"):
        return f"interrupted: {reason}"
    match trial.state:
        case TrialState.PRUNED:
            return f"pruned after epoch {trial.user_attrs.get('pruned_at_epoch')}"
        case TrialState.FAIL:
            return f"failed: {trial.user_attrs.get('failure', 'its worker died')}"
        case state:
            return STATES[state]


# --- tables -----------------------------------------------------------------------------------------------------------


def _csv(trials: Iterable[FrozenTrial], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "val_accuracy", "best_epoch", "seconds", *names, "run_id", "outcome"])
    for trial in trials:
        writer.writerow(
            [
                trial.number,
                STATES[trial.state],
                "" if trial.value is None else f"{trial.value:.4f}",
                trial.user_attrs.get("best_epoch", ""),
                f"{trial.duration.total_seconds():.1f}" if trial.duration else "",
                *(trial.params.get(name, "") for name in names),
                trial.user_attrs.get("run_id", ""),
                outcome(trial),
            ]
        )
    return text.getvalue()


def _markdown(
    name: str,
    everything: Sequence[FrozenTrial],
    names: Sequence[str],
    base: RunConfig,
    shares: Mapping[str, float],
    missing: str | None,
) -> str:
    trials = trial_slots(everything)
    best = best_trial(trials)
    # Complete trials first, each group by accuracy.
    ranked = sorted(trials, key=lambda trial: (trial.state != TrialState.COMPLETE, -(trial.value or 0), trial.number))
    rows = [
        [
            f"**{trial.number}**" if trial is best else trial.number,
            "" if trial.value is None else f"{trial.value:.2f}",
            outcome(trial),
            *(_short(trial.params.get(key, "")) for key in names),
        ]
        for trial in ranked
    ]
    parts = [f"# Study {name}"]
    if best is not None:
        parts += [f"Best: trial {best.number} with {best.value:.2f} % on val."]
    parts += [markdown_table(["trial", "val %", "outcome", *names], rows), "## Importance"]
    if shares:
        complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
        parts += [f"From {complete} complete trials (PED-ANOVA). With fewer than a few dozen, take it as a hint."]
        parts += [markdown_table(["parameter", "share"], shares.items(), digits=2)]
    else:
        parts += [f"Not available: {missing}."]
    parts += ["## Space", markdown_table(["parameter", "values"], describe(base).items())]
    slots = {trial.number for trial in trials}
    if interrupted := [trial for trial in everything if trial.number not in slots]:
        parts += ["## Interrupted", "These trials are not counted above; each was continued as a new trial."]
        parts += [markdown_table(["trial", "reason"], [[trial.number, outcome(trial)] for trial in interrupted])]
    return "\n\n".join(parts) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- figures ----------------------------------------------------------------------------------------------------------
# Not `optuna.visualization.matplotlib`: it changes the global style through pyplot, which is not safe in threads, and
# shows neither pruned and failed trials nor the best one in the slices.


def _draw(
    trials: Sequence[FrozenTrial], best: FrozenTrial, base: RunConfig, shares: Mapping[str, float], out: Path
) -> None:
    _draw_history(trials, best, out / "history.png")
    _draw_slices(trials, best, base, out / "slices.png")
    if shares:
        _draw_importances(shares, out / "importances.png")


def _draw_history(trials: Sequence[FrozenTrial], best: FrozenTrial, path: Path) -> None:
    """Accuracy of each trial in order, and the best so far."""
    figure = _figure(9.0, 5.0)
    axes = _axes(figure.add_subplot(), "val accuracy, %")
    axes.set_xlabel("trial", color=INK)
    highest, numbers, line = -math.inf, [], []
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            highest = max(highest, trial.value or 0.0)
            numbers.append(trial.number)
            line.append(highest)
    axes.step(numbers, line, where="post", color=ORANGE, linewidth=1.8, label="best so far")
    _plot_points(axes, trials, lambda trial: trial.number)
    # Failed trials have no accuracy and are drawn at the lower edge.
    if failed := [trial.number for trial in trials if trial.state == TrialState.FAIL]:
        edge = axes.get_xaxis_transform()
        axes.plot(failed, [0.02] * len(failed), "x", color=INK, transform=edge, label="failed", zorder=3)
    axes.set_title(f"Best: trial {best.number} with {best.value:.2f} %", loc="left", color=INK, fontsize=12)
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _save(figure, path)


def _draw_slices(trials: Sequence[FrozenTrial], best: FrozenTrial, base: RunConfig, path: Path) -> None:
    """Accuracy against each parameter."""
    space = distributions(base)
    columns = 5
    rows = math.ceil(len(space) / columns)
    figure = _figure(3.0 * columns, 2.9 * rows)
    for index, (name, distribution) in enumerate(space.items()):
        axes = _axes(figure.add_subplot(rows, columns, index + 1), "val accuracy, %" if index % columns == 0 else "")
        if isinstance(distribution, CategoricalDistribution):
            labels = [_short(choice) for choice in distribution.choices]
            axes.set_xticks(range(len(labels)), labels)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        elif isinstance(distribution, IntDistribution):
            axes.locator_params(axis="x", integer=True)
        elif isinstance(distribution, FloatDistribution) and distribution.log:
            axes.set_xscale("log")
        x_of = _x_of(name, distribution)
        _plot_points(axes, [trial for trial in trials if name in trial.params], x_of)
        axes.plot(
            x_of(best), best.value or 0.0, "o", markersize=11, fillstyle="none", color=ORANGE, label="best", zorder=4
        )
        axes.set_title(name, loc="left", fontsize=10, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False)
    _save(figure, path)


def _draw_importances(shares: Mapping[str, float], path: Path) -> None:
    """Bars, the largest share at the top."""
    figure = _figure(7.0, 1.2 + 0.36 * len(shares))
    axes = _axes(figure.add_subplot(), "")
    names = list(shares)[::-1]
    bars = axes.barh(names, [shares[name] for name in names], color=BLUE, height=0.62, zorder=2)
    axes.bar_label(bars, fmt="{:.2f}", padding=4, color=INK, fontsize=9)
    axes.set_xlim(0, 1.12 * max(shares.values()))
    axes.grid(visible=False, axis="y")
    axes.set_title("Parameter importance (PED-ANOVA)", loc="left", fontsize=11, color=INK)
    _save(figure, path)


def _x_of(name: str, distribution: optuna.distributions.BaseDistribution) -> Callable[[FrozenTrial], float]:
    """Function from a trial to the x position of its parameter: the index of a choice, or the value itself."""
    return lambda trial: (
        distribution.to_internal_repr(trial.params[name])
        if isinstance(distribution, CategoricalDistribution)
        else trial.params[name]
    )


def _plot_points(axes: "Axes", trials: Sequence[FrozenTrial], x_of: Callable[[FrozenTrial], float]) -> None:
    for state, label, marker, color in (
        (TrialState.COMPLETE, "complete", "o", BLUE),
        (TrialState.PRUNED, "pruned (at its last epoch)", "v", MUTED),
    ):
        shown = [trial for trial in trials if trial.state == state and trial.value is not None]
        if shown:
            x, y = [x_of(trial) for trial in shown], [trial.value or 0.0 for trial in shown]
            axes.plot(x, y, marker, color=color, markersize=6, alpha=0.8, label=label, zorder=3)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _axes(axes: "Axes", ylabel: str) -> "Axes":
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    return axes


def _save(figure: "Figure", path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
