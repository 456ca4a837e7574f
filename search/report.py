"""What a study leaves for people: tables, pictures and the best settings as a file."""

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

MIN_TRIALS = 4
"""Complete trials with which the importances begin to mean something."""

DPI = 110
INK, MUTED, GRID = "#222222", "#666666", "#dddddd"
# Okabe and Ito's colors: told apart with any color vision.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"


def write(study: optuna.Study, base: RunConfig, out: Path, given: Mapping[str, Mapping[str, Any]]) -> None:
    """Write trials.csv, trials.md, study.json, history.png, slices.png, importances.png and best.yaml into `out`.

    What there is nothing to show for yet is left out: importances with fewer than 4 complete trials (trials.md says
    so), pictures and best.yaml with none.

    best.yaml names the recipe and holds the searched settings and `given`, what else the user has set beside the
    recipe. What concerns the trials alone, such as their number of epochs, is not in it.
    """
    everything = study.get_trials(deepcopy=False)
    trials = trial_slots(everything)
    best = best_trial(trials)
    found, without = importances(study)
    names = list(distributions(base))
    write_text(out / "trials.csv", _csv(trials, names))
    write_text(out / "trials.md", _markdown(study.study_name, everything, names, base, found, without))
    write_json(
        out / "study.json",
        {
            "study": study.study_name,
            **{key: study.user_attrs[key] for key in ("mode", "fingerprint", "recipe", "epochs")},
            "best": None if best is None else {"trial": best.number, "val_accuracy": best.value, "params": best.params},
            "importances": found or None,
            "importances_missing": without,
        },
    )
    if best is None:
        return
    mode = base.model.mode
    head = (
        f"# Best settings of study {study.study_name}: trial {best.number}, val accuracy {best.value:.2f} %.\n"
        "# What is not here comes from the recipe, the number of epochs too unless it is set below; lr_milestones\n"
        "# between 0 and 1 are shares of it.\n"
        f"# Train with them: {train_command(mode, base.recipe, 'THIS_FILE')}\n"
    )
    settings = {"mode": mode, "recipe": base.recipe, **best_settings(best.params, given)}
    write_text(out / "best.yaml", head + yaml.safe_dump(settings, sort_keys=False))
    _draw(trials, best, base, found, out)


def train_command(mode: str, recipe: str, config: str) -> str:
    """The command that trains with the settings in the file `config`."""
    named = "" if recipe == f"published-{mode}" else f" --recipe {recipe}"
    return f"cmran train DATA --mode {mode}{named} --config {shlex.quote(config)} --out RUN_DIR"


def files(out: Path) -> list[Path]:
    """The files of `write` that are there."""
    names = (
        "trials.csv",
        "trials.md",
        "study.json",
        "best.yaml",
        "history.png",
        "slices.png",
        "importances.png",
    )
    return [out / name for name in names if (out / name).is_file()]


def importances(study: optuna.Study) -> tuple[dict[str, float], str | None]:
    """Share of each parameter in what sets the best trials apart (PED-ANOVA), largest first; else why there is none."""
    complete = [trial for trial in trial_slots(study.get_trials(deepcopy=False)) if trial.state == TrialState.COMPLETE]
    if len(complete) < MIN_TRIALS:
        return {}, f"{len(complete)} complete trials, {MIN_TRIALS} are needed"
    if len({trial.value for trial in complete}) == 1:
        return {}, "all complete trials have the same accuracy"
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = evaluator.evaluate(study)
    total = sum(found.values())
    if not total > 0:
        return {}, "no parameter stands out"
    return {name: value / total for name, value in found.items()}, None


def outcome(trial: FrozenTrial) -> str:
    """How a trial ended, in words, with the reason where it did not end well."""
    if reason := trial.user_attrs.get("abandoned"):
        return f"abandoned: {reason}"
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
    found: Mapping[str, float],
    without: str | None,
) -> str:
    trials = trial_slots(everything)
    best = best_trial(trials)
    # The best first, then by what they reached; those without a number last.
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
    lines = [f"# Study {name}", ""]
    if best is not None and best.value is not None:
        lines += [f"Best: trial {best.number} with {best.value:.2f} % on val.", ""]
    lines += [_table(["trial", "val %", "outcome", *names], rows), ""]
    lines += ["## Importance", ""]
    complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
    if found:
        lines += [
            f"From {complete} complete trials (PED-ANOVA): with fewer than some dozens a hint, not a finding.",
            "",
        ]
        lines += [_table(["parameter", "share"], [[key, f"{value:.2f}"] for key, value in found.items()]), ""]
    else:
        lines += [f"Not known: {without}.", ""]
    lines += ["## Space", "", _table(["parameter", "values"], describe(base).items()), ""]
    kept = {trial.number for trial in trials}
    if abandoned := [trial for trial in everything if trial.number not in kept]:
        lines += ["## Abandoned", "", "Not counted above; each went on as a new trial.", ""]
        lines += [_table(["trial", "reason"], [[trial.number, outcome(trial)] for trial in abandoned]), ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- pictures (Figure objects alone, no pyplot: nothing global, so any thread may draw) -------------------------------


def _draw(
    trials: Sequence[FrozenTrial], best: FrozenTrial, base: RunConfig, found: Mapping[str, float], out: Path
) -> None:
    _history_png(trials, best, out / "history.png")
    _slices_png(trials, best, base, out / "slices.png")
    if found:
        _importances_png(found, out / "importances.png")


def _history_png(trials: Sequence[FrozenTrial], best: FrozenTrial, path: Path) -> None:
    """Accuracy of each trial in order, and the best so far."""
    figure = _figure(9.0, 5.0)
    axes = _axes(figure, figure.add_subplot(), "val accuracy, %")
    axes.set_xlabel("trial", color=INK)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    highest, line = -math.inf, []
    for trial in complete:
        highest = max(highest, trial.value or 0.0)
        line.append(highest)
    axes.step(
        [trial.number for trial in complete], line, where="post", color=ORANGE, linewidth=1.8, label="best so far"
    )
    _points(axes, trials, lambda trial: trial.number)
    # Failed trials have no accuracy: they stand at the foot.
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    if failed:
        axes.plot(
            failed, [0.02] * len(failed), "x", color=INK, transform=axes.get_xaxis_transform(), label="failed", zorder=3
        )
    axes.set_title(f"Best: trial {best.number} with {best.value:.2f} %", loc="left", color=INK, fontsize=12)
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _save(figure, path)


def _slices_png(trials: Sequence[FrozenTrial], best: FrozenTrial, base: RunConfig, path: Path) -> None:
    """Accuracy against each parameter."""
    space = distributions(base)
    columns = 5
    rows = math.ceil(len(space) / columns)
    figure = _figure(3.0 * columns, 2.9 * rows)
    for index, (name, found) in enumerate(space.items()):
        axes = _axes(
            figure, figure.add_subplot(rows, columns, index + 1), "val accuracy, %" if index % columns == 0 else ""
        )
        shown = [trial for trial in trials if name in trial.params]
        if isinstance(found, CategoricalDistribution):
            choices = list(found.choices)
            axes.set_xticks(range(len(choices)), [_short(choice) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
            place: Callable[[FrozenTrial], float] = _place(name, choices)
        else:
            place = _place(name)
            if isinstance(found, IntDistribution):
                axes.locator_params(axis="x", integer=True)
            elif isinstance(found, FloatDistribution) and found.log:
                axes.set_xscale("log")
        _points(axes, shown, place)
        x, y = place(best), best.value or 0.0
        axes.plot(x, y, "o", markersize=11, fillstyle="none", color=ORANGE, label="best", zorder=4)
        axes.set_title(name, loc="left", fontsize=10, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False)
    _save(figure, path)


def _importances_png(found: Mapping[str, float], path: Path) -> None:
    """Bars, the largest share at the top."""
    figure = _figure(7.0, 1.2 + 0.36 * len(found))
    axes = _axes(figure, figure.add_subplot(), "")
    names = list(found)[::-1]
    bars = axes.barh(names, [found[name] for name in names], color=BLUE, height=0.62, zorder=2)
    axes.bar_label(bars, fmt="{:.2f}", padding=4, color=INK, fontsize=9)
    axes.set_xlim(0, 1.12 * max(found.values()))
    axes.grid(visible=False, axis="y")
    axes.set_title("Share in what sets the best trials apart (PED-ANOVA)", loc="left", fontsize=11, color=INK)
    _save(figure, path)


def _place(name: str, choices: Sequence[Any] | None = None) -> Callable[[FrozenTrial], float]:
    return lambda trial: choices.index(trial.params[name]) if choices is not None else trial.params[name]


def _points(axes: "Axes", trials: Sequence[FrozenTrial], place: Callable[[FrozenTrial], float]) -> None:
    for state, label, marker, color in (
        (TrialState.COMPLETE, "complete", "o", BLUE),
        (TrialState.PRUNED, "pruned (at its last epoch)", "v", MUTED),
    ):
        shown = [trial for trial in trials if trial.state == state and trial.value is not None]
        if shown:
            axes.plot(
                [place(trial) for trial in shown],
                [trial.value or 0.0 for trial in shown],
                marker,
                color=color,
                markersize=6,
                alpha=0.8,
                label=label,
                zorder=3,
            )


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _axes(figure: "Figure", axes: "Axes", ylabel: str) -> "Axes":
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    return axes


def _save(figure: "Figure", path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
