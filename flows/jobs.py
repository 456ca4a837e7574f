"""The jobs: what the `cmran` command and the Prefect flows both call. No Prefect in here.

Each takes its parameters and, where `mlflow run` opened a run for the command, that run's id. Heavy imports stand
inside the functions, so that `cmran --help` starts at once.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmran.config import (
    InitRecord,
    RunConfig,
    Variant,
    as_sections,
    file_settings,
    first_difference,
    load_config,
    parse,
)
from cmran.errors import UserError
from cmran.files import read_json, write_json, write_text
from flows import parameters as p
from flows import results as r

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cmran.data.features import FeatureFolder
    from cmran.tracking import ResolvedModel, Run
    from cmran.training import EpochRecord, FitResult
    from flows.models import FoundModel

log = logging.getLogger(__name__)

PROOF_BATCH = 32
"""Val videos at a time in the parity checks, which compare all of them."""

SEEDS_FILE = "settings.json"
"""In the folder of several seeds: what they were started with."""

_SPREAD = ("accuracy", "accuracy_clean", "event_f1", "mean_iou", "background_recall")
"""Scores of which several seeds give mean and spread."""


def validate_job(parameters: p.ValidateParameters, *, run_id: str | None = None) -> r.ValidationResult:
    """Check a folder. The report goes to MLflow where a run is adopted or asked for, or has a parent."""
    from cmran.data.validation import validate

    tracked = _tracked(parameters, run_id)
    report = validate(parameters.data, parameters.mode)
    result = r.ValidationResult(data=parameters.data, mode=parameters.mode, report=report)
    if parameters.report is not None:
        write_text(parameters.report, report.to_json())
    if tracked:
        name = parameters.data.name
        with _run("validate", name, parameters.mode, parameters.parent_run_id, run_id) as run:
            if report.fingerprint:
                run.log_dataset(parameters.data, report.fingerprint, "validation")
            run.log_text(report.to_json(), "validation.json")
            run.log_text(result.markdown(), "validation.md")
            counts = {"errors": len(report.errors), "warnings": len(report.warnings)}
            run.log_metrics({f"validation.{key}": float(value) for key, value in counts.items()})
    return result


def synth_job(parameters: p.SynthParameters, *, run_id: str | None = None) -> r.SynthResult:
    """Make a folder in the published format."""
    from cmran import tracking
    from cmran.data.features import open_folder
    from cmran.data.synthetic import synthesize

    started = time.monotonic()
    out = synthesize(**dict(parameters))
    with open_folder(out, mode="weak") as folder:
        result = r.SynthResult(
            out=out,
            videos=folder.videos,
            background_videos=folder.background_videos,
            bytes=sum(path.stat().st_size for path in out.iterdir()),
            seconds=time.monotonic() - started,
        )
        if run_id is not None:
            run = tracking.open_run(run_id)
            run.log_params(parameters)
            run.log_dataset(out, folder.fingerprint, "made")
    return result


def config_of(
    parameters: p.TrainParameters | p.SeedsParameters | p.SearchParameters, base: RunConfig | None = None
) -> RunConfig:
    """Settings of a training: recipe, or `base` in its place, then the file, then the options that were given."""
    mode = parameters.mode or (base.model.mode if base is not None else None)
    assert mode is not None
    overrides = as_sections(parameters.given_settings())
    return load_config(mode, parameters.recipe, parameters.config, overrides, base=base)


def _config_like(parameters: p.TrainParameters | p.SeedsParameters, there: RunConfig) -> RunConfig:
    """The settings `there` of what is in OUT, and over them what was given.

    Raises UserError for another mode or recipe, and for another number of epochs in the file: a file that was given to
    start a run may be given again, where the run's own number came from an option.
    """
    out = parameters.out
    for name, before, now in (
        ("mode", there.model.mode, parameters.mode),
        ("recipe", there.recipe, parameters.recipe),
    ):
        if now not in (None, before):
            raise UserError(
                f"{out}: the run was made with {name} {before}, now it is {now}: leave it out (a resumed run keeps its"
                " settings), or name another folder"
            )
    config = config_of(parameters, there)
    epochs = config.train.epochs
    if epochs != there.train.epochs and "train.epochs" not in parameters.given_settings():
        raise UserError(
            f"{out}: the run was made with train.epochs {there.train.epochs}, {parameters.config} says {epochs}: leave"
            " the file out (a resumed run keeps its settings), or give the number of epochs as well"
        )
    return config


def _data_of(out: Path, data: Path | None, recorded: Path) -> Path:
    """The data folder that was given, else the recorded one. Raises UserError where that is gone."""
    if data is None and not recorded.is_dir():
        raise UserError(f"{out}: its data folder {recorded} is not there any more: give the folder where it is now")
    return data or recorded


def train_job(parameters: p.TrainParameters, *, run_id: str | None = None) -> r.TrainResult:
    """Train, and keep the run in MLflow.

    The tracking store is asked first: where it cannot be reached nothing is begun. Where it fails on the way the
    training goes on, and what it missed follows with the next epoch that gets through, or after `--resume`.

    With `resume` all that is not given comes from the run in OUT, and what is given must be as it is there.
    """
    begun = None
    if parameters.resume:
        from cmran.training import read_run

        begun = read_run(parameters.out)
    if begun is None:
        if parameters.data is None or parameters.mode is None:
            raise UserError(f"{parameters.out}: holds no run to resume: give data and mode to start one")
        config = config_of(parameters)
    else:
        config = _config_like(parameters, begun.config)
        data = _data_of(parameters.out, parameters.data, begun.data)
        parameters = parameters.model_copy(update={"data": data, "mode": config.model.mode})
    return _train(parameters, config, run_id, known_init=None if begun is None else begun.init)


def _train(
    parameters: p.TrainParameters, config: RunConfig, run_id: str | None, known_init: InitRecord | None = None
) -> r.TrainResult:
    """Train with these settings; data and mode are known. `known_init`: what a resumed run started from."""
    from cmran import tracking

    tracking.connect()
    assert parameters.data is not None
    init = None
    # The same source again says nothing new, and may be gone.
    if parameters.init is not None and (known_init is None or known_init.source != parameters.init):
        from flows.models import initial_weights

        init = initial_weights(parameters.init, config)
    from cmran.training import fit
    from flows.training_log import EpochLog, deliver, training_run

    epochs = EpochLog()
    result: FitResult | None = None
    with contextlib.ExitStack() as stack:

        def begin(history: list["EpochRecord"]) -> str:
            epochs.run = stack.enter_context(training_run(parameters, config, run_id))
            epochs.catch_up(history)
            return epochs.run.run_id

        try:
            result = fit(
                parameters.data,
                config,
                parameters.out,
                device=parameters.device,
                resume=parameters.resume,
                init=init,
                on_start=begin,
                on_epoch=epochs,
            )
            if epochs.run is None:
                # The training was finished before: what did not arrive then is sent now.
                epochs.run = stack.enter_context(training_run(parameters, result.config, run_id))
            deliver(epochs.run, result, parameters)
            stack.close()
        except tracking.TrackingError as error:
            if result is None:
                raise
            raise UserError(
                f"{error}; the training is finished and its result is in {parameters.out}: "
                "the same command with --resume sends it"
            ) from error
    return r.TrainResult(fit=result, run_id=epochs.run.run_id)


def seeds_job(parameters: p.SeedsParameters, *, run_id: str | None = None) -> r.SeedsResult:
    """Train once a seed, each in a run under one parent, and report mean and spread."""
    parameters, config = _begin_seeds(parameters)
    assert parameters.mode is not None
    assert parameters.seeds is not None
    from cmran import tracking
    from cmran.metrics import mean_and_spread

    with _run("seeds", parameters.out.name, parameters.mode, parameters.parent_run_id, run_id) as run:
        run.log_params(config)
        run.set_tags({"cmran.seeds": parameters.seeds, "cmran.selection_split": config.train.selection_split})
        fits: dict[int, FitResult] = {}
        for count, seed in enumerate(parameters.seeds, 1):
            log.info("seed %d (%d of %d)", seed, count, len(parameters.seeds))
            training = p.TrainParameters(
                data=parameters.data,
                mode=parameters.mode,
                out=parameters.out / f"seed-{seed}",
                device=parameters.device,
                resume=parameters.resume,
                parent_run_id=run.run_id,
            )
            own = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
            fits[seed] = _train(training, own, None).fit
        spread: dict[str, dict[str, dict[str, float | int | None]]] = {}
        for split in ("val", "test"):
            for key in _SPREAD:
                values = [(getattr(fit, split) or {}).get(key) for fit in fits.values()]
                known = [value for value in values if value is not None]
                if len(known) == len(fits):
                    spread.setdefault(split, {})[key] = mean_and_spread(known)
        result = r.SeedsResult(
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
            run.log_metrics(tracking.numbers(scores, f"{r.marked(split, config.train.selection_split)}."))
        run.log_artifact(parameters.out / "seeds.json")
        run.log_text(result.markdown(), "seeds.md")
    return result


def _begin_seeds(parameters: p.SeedsParameters) -> tuple[p.SeedsParameters, RunConfig]:
    """The parameters with what the folder knows, where it is continued, and the settings of all seeds but the seed.

    Raises UserError where there is nothing to continue, or what was given differs from what is there.
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
            raise UserError(f"{out}: holds no trainings to resume: give data, mode and seeds to start some")
        if not parameters.resume and any(out.glob("seed-*/last.pt")):
            raise UserError(f"{out} already holds trainings: continue them with --resume, or name another folder")
        config = config_of(parameters)
    else:
        there = parse(RunConfig, found["config"], f"{path}: config")
        config = _config_like(parameters, there)
        if (difference := first_difference(there, config)) is not None:
            key, before, now = difference
            raise UserError(
                f"{out}: its runs were made with {key} {before}, now it is {now}: leave it out (they keep their"
                " settings), or name another folder"
            )
        seeds = tuple(parameters.seeds or found["seeds"])
        if lacking := [seed for seed in found["seeds"] if seed not in seeds]:
            raise UserError(
                f"{out}: was started with seed {lacking[0]}, which is not among those given: seeds can be added, not"
                " left out; name another folder"
            )
        filled = {
            "data": _data_of(out, parameters.data, Path(found["data"])),
            "mode": there.model.mode,
            "seeds": seeds,
            "device": found["device"] if parameters.device == "auto" else parameters.device,
        }
        parameters = p.SeedsParameters(**(dict(parameters) | filled))
    assert parameters.data is not None
    if not parameters.data.is_dir():
        raise UserError(f"{parameters.data}: no such folder: name a folder of features")
    fingerprint = folder_fingerprint(parameters.data)
    if found is not None and found["fingerprint"] != fingerprint:
        raise UserError(
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


def evaluate_job(parameters: p.EvaluateParameters, *, run_id: str | None = None) -> r.EvaluateResult:
    """Score a model on a split."""
    from cmran.data.features import open_folder
    from cmran.data.validation import contradictions
    from cmran.hardware import pick_device, require_precision
    from cmran.training import evaluate_split
    from flows.models import find_model
    from flows.training_log import score_metrics

    tracked = _tracked(parameters, run_id)
    with (
        find_model(parameters.checkpoint, parameters.mode) as found,
        # A model reads what it was trained on; a pack is used, but not made for a split.
        open_folder(parameters.data, mode=found.mode, features=found.features) as folder,
    ):
        found.check_fits(folder)
        folder.use_pack(make=False)
        device, precision = pick_device(parameters.device), parameters.precision or found.precision
        require_precision(precision, device)
        notes = found.notes()
        if found.fingerprint not in (None, folder.fingerprint):
            notes.append(f"The model was trained on other data (`{found.fingerprint}`).")
        for fault in contradictions(parameters.data):
            notes.append(f"**The scores may be wrong**: {fault}.")
            log.warning("the scores may be wrong: %s", fault)
        evaluation, _ = evaluate_split(
            found.model,
            folder,
            parameters.split,
            device=device,
            precision=precision,
            batch_size=parameters.batch_size,
        )
        result = r.EvaluateResult(
            checkpoint=parameters.checkpoint,
            mode=found.mode,
            data=parameters.data,
            fingerprint=folder.fingerprint,
            split=parameters.split,
            selection_split=found.selection_split,
            scores=evaluation.to_dict(),
            notes=tuple(notes),
        )
    if parameters.report is not None:
        write_json(parameters.report, result.to_dict())
    if tracked:
        with _run("evaluate", parameters.split, found.mode, parameters.parent_run_id, run_id) as run:
            run.log_dataset(parameters.data, result.fingerprint, "evaluation")
            run.set_tags({"cmran.checkpoint": parameters.checkpoint, "cmran.training_run": found.run_id})
            run.log_metrics(score_metrics(result.scores, f"{r.marked(result.split, result.selection_split)}."))
            run.log_text(json.dumps(result.to_dict(), indent=2), f"{parameters.split}.json")
            run.log_text(result.markdown(), f"{parameters.split}.md")
    return result


def search_job(parameters: p.SearchParameters, *, run_id: str | None = None) -> r.SearchJobResult:
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
    result = r.SearchJobResult(mode=mode, search=found)
    if run_id is not None:
        run = tracking.open_run(run_id)
        run.set_tags(
            {"cmran.job": "search", "cmran.mode": mode, "cmran.study": study, "cmran.search_run": found.run_id}
        )
        run.log_metrics({"best.val.accuracy": found.best_value, "trials": float(found.n_trials)})
        run.log_artifact(found.best_file)
        run.log_text(result.markdown(), "search.md")
    return result


def _kept_settings(parameters: p.SearchParameters, there: RunConfig | None) -> dict[str, dict[str, Any]]:
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


def export_job(parameters: p.ExportParameters, *, run_id: str | None = None) -> r.ExportResult:
    """Export a model and prove the file. The file takes its name only when the proof has passed."""
    from cmran import tracking
    from flows.models import find_model

    with find_model(parameters.checkpoint, parameters.mode) as found:
        result = _export(found, parameters.out, parameters.data)
        if run_id is not None:
            run = tracking.open_run(run_id)
            run.set_tags({"cmran.job": "export", "cmran.mode": found.mode, "cmran.training_run": found.run_id})
            _log_proof(run, result)
            if result.ok:
                run.log_artifact(parameters.out)
    return result


def release_job(parameters: p.ReleaseParameters, *, run_id: str | None = None) -> r.ReleaseResult:
    """Export, prove and register. Raises UserError where the proof fails: nothing is registered then."""
    import tempfile

    from cmran import tracking
    from flows.models import find_model
    from serving.export import require

    with contextlib.ExitStack() as stack:
        # Before the stores are asked: where there is no such model, no database is made.
        found = stack.enter_context(find_model(parameters.checkpoint, parameters.mode))
        tracking.connect_registry()
        scores = _scores(found, parameters.data)
        # A folder of its own where the file is not kept.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="cmran-"))
        out = parameters.out or Path(scratch) / f"cmran-{found.mode}.onnx"
        export = replace(_export(found, out, parameters.data), kept=parameters.out is not None)
        require(export.proof)
        variants = _variants(found, out, parameters)

        known = found.run_id is not None and tracking.run_exists(found.run_id)
        if known and found.run_id is not None:
            home = tracking.open_run(found.run_id)
        else:
            name = Path(parameters.checkpoint).name
            home = stack.enter_context(_run("release", name, found.mode, parameters.parent_run_id, run_id))
        _log_proof(home, export)
        for made in variants:
            if made.proof is not None:
                home.log_text(made.proof.model_dump_json(indent=2), f"release/proof-{made.variant}.json")
        git = tracking.git_state()
        # A test score of a model that was selected on test is not a test score.
        test = r.marked("test_accuracy", found.selection_split)
        registered = tracking.register_release(
            onnx_path=out,
            run_id=home.run_id,
            mode=found.mode,
            val_accuracy=scores.val,
            fingerprint=scores.fingerprint,
            selection_split=found.selection_split,
            not_champion=scores.not_champion,
            tags={
                test: scores.test,
                "parity_max_abs_difference": export.proof.max_abs_difference,
                "parity_equal_segments": export.proof.equal_segments,
                "parity_val_videos": export.proof.rows,
                "git_commit": None if git is None else git.commit,
                "git_dirty": None if git is None else str(git.dirty).lower(),
                "study": parameters.study,
                "recipe": None if found.config is None else found.config.recipe,
                **{f"init_{key}": value for key, value in found.init_known().items()},
                **{key: value for made in variants for key, value in made.tags().items()},
            },
            variants={made.variant: made.path for made in variants if made.path is not None},
        )
        result = r.ReleaseResult(
            export=export,
            registered=registered,
            run_id=home.run_id,
            val_accuracy=scores.val,
            test_accuracy=scores.test,
            selection_split=found.selection_split,
            variants=variants,
        )
        home.log_text(result.markdown(), "release/release.md")
        if run_id is not None and run_id != home.run_id:
            adopted = tracking.open_run(run_id)
            adopted.set_tags({"cmran.job": "release", "cmran.mode": found.mode, "cmran.version": registered.uri})
            adopted.log_text(result.markdown(), "release.md")
    return result


def predict_job(parameters: p.PredictParameters, *, run_id: str | None = None) -> r.PredictResult:
    """Predict the events of a folder's videos."""
    from cmran import tracking
    from flows.training_log import score_metrics
    from serving.batch import run_batch

    parameters = _as_before(parameters)
    # First: where there is no such model, no database is created.
    model = _in_variant(tracking.resolve_model(parameters.model), parameters)
    tracked = _tracked(parameters, run_id)
    known = {"name": model.name, "version": model.version, "run_id": model.run_id, "digest": model.digest}
    manifest = run_batch(
        model.path,
        parameters.data,
        parameters.out,
        split=parameters.split,
        device=parameters.device,
        batch_size=parameters.batch_size,
        resume=parameters.resume,
        model_info={key: value for key, value in known.items() if value is not None},
    )
    result = r.PredictResult(out=parameters.out, manifest=manifest)
    if tracked:
        name, mode = parameters.out.name, manifest.model["mode"]
        with _run("predict", name, mode, parameters.parent_run_id, run_id) as run:
            run.log_dataset(parameters.data, manifest.job.fingerprint, "inference")
            run.set_tags({"cmran.model": parameters.model, "cmran.model_sha256": model.digest})
            run.set_tags({"cmran.variant": manifest.variant})
            run.log_metrics({"videos": float(manifest.rows), "events": float(manifest.events)})
            run.log_metrics({"seconds": manifest.seconds, "videos_per_s": manifest.videos_per_s})
            for split, scores in (manifest.metrics or {}).items():
                run.log_metrics(score_metrics(scores, f"{r.marked(split, manifest.selection_split)}."))
            run.log_artifact(parameters.out / "manifest.json")
            run.log_text(result.markdown(), "predictions.md")
    return result


def pack_job(parameters: p.PackParameters, *, run_id: str | None = None) -> r.CacheResult:
    """Pack a folder's features. Raises UserError where there is no room or no cache folder."""
    from cmran.data.features import open_folder
    from cmran.data.packing import limit_bytes, list_packs, packs_dir

    packs_dir()
    weak = parameters.mode == "weak"
    with open_folder(parameters.data, mode=parameters.mode, need_labels=weak, features="float16") as folder:
        unpacked, fingerprint = folder.use_pack(make=True, required=True), folder.fingerprint
    if unpacked:
        raise UserError(f"{', '.join(unpacked)}: not packed, for the reason told above; it can be read all the same")
    packs = [pack for pack in list_packs() if pack.fingerprint == fingerprint]
    return r.CacheResult(packs=tuple(packs), removed=(), limit_bytes=limit_bytes())


def cache_job(parameters: p.CacheParameters, *, run_id: str | None = None) -> r.CacheResult:
    """List or remove packs."""
    from cmran.data.packing import clear_packs, limit_bytes, list_packs, set_limit

    removed = []
    if parameters.limit_gib is not None:
        removed += set_limit(parameters.limit_gib << 30)
    if parameters.clear is not None:
        removed += clear_packs(None if parameters.clear == "all" else parameters.clear)[0]
    return r.CacheResult(packs=tuple(list_packs()), removed=tuple(removed), limit_bytes=limit_bytes())


def _export(found: "FoundModel", out: Path, data: Path | None) -> r.ExportResult:
    """Export beside `out`, prove, and only then take the name `out`."""
    from cmran import tracking
    from cmran.data.features import open_folder
    from serving.export import export_onnx, prove

    if out.is_dir():
        raise UserError(f"{out} is a folder: name the ONNX file to write, such as {out / f'cmran-{found.mode}.onnx'}")
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is a device or a pipe, expected the name of an ONNX file: name another")
    notes, segments, grid = found.notes(), found.segments, found.grid
    real: Iterator[tuple[NDArray[Any], NDArray[Any]]] = iter(())
    val_videos = 0
    folder_path, why_not = _proof_data(found, data)
    with contextlib.ExitStack() as stack:
        if folder_path is not None:
            folder = stack.enter_context(open_folder(folder_path, mode=found.mode))
            found.check_fits(folder)
            # A published checkpoint does not tell its own.
            if found.config is not None and (folder.segments, folder.grid) != (segments, grid):
                raise UserError(
                    f"{folder.path}: found {folder.segments} segments and a {folder.grid[0]}x{folder.grid[1]} grid,"
                    f" expected {segments} and {grid[0]}x{grid[1]}, as {found.name} was trained on: name other data"
                )
            segments, grid = folder.segments, folder.grid
            rows = folder.order("val")
            val_videos, real = len(rows), _batches(folder, rows)
            if data is not None and found.fingerprint not in (None, folder.fingerprint):
                notes.append(
                    f"Its val videos are of other data (`{folder.fingerprint}`) than the model was trained on."
                )
        else:
            notes.append(f"**No val video was compared**: {why_not}.")
            log.warning("no val video is compared in the proof: %s", why_not)

        git = tracking.git_state()
        metadata = {
            "fingerprint": found.fingerprint or "unknown",
            "run_id": found.run_id or "unknown",
            "git_commit": "unknown" if git is None else git.commit + ("+changes" if git.dirty else ""),
            "selection_split": found.selection_split,
            **{f"init_{key}": value for key, value in found.init_known().items()},
        }
        unproven = out.with_name(f"{out.name}.unproven")
        log.info("exporting %s", found.name)
        export_onnx(found.model, unproven, segments=segments, grid=grid, metadata=metadata)
        try:
            proof = prove(unproven, found.model, real=real)
        except UserError:
            # The data cannot be read, or are not finite: nothing is known of the file.
            unproven.unlink(missing_ok=True)
            raise
    if proof.passed:
        os.replace(unproven, out)
    return r.ExportResult(
        checkpoint=found.name,
        mode=found.mode,
        out=out if proof.passed else unproven,
        proof=proof,
        val_videos=val_videos,
        notes=tuple(notes),
    )


def _variants(found: "FoundModel", base: Path, parameters: p.ReleaseParameters) -> tuple[r.MadeVariant, ...]:
    """The variants asked for, made beside `base` and proven on val. What is not proven leaves no file."""
    from cmran.data.features import open_folder
    from serving.session import cuda_works
    from serving.variants import make_variant, prove_variant

    choices: dict[str, tuple[Variant, ...]] = {"auto": ("int8", "float16"), "int8": ("int8",), "float16": ("float16",)}
    made: list[r.MadeVariant] = []
    paths = {variant: base.with_name(f"{base.stem}.{variant}.onnx") for variant in choices["auto"]}
    for path in paths.values():
        if path.exists():
            log.info("removed %s, a variant of an earlier release", path)
            path.unlink()
    for variant in choices.get(parameters.variant, ()):
        path, proof, reason = paths[variant], None, ""
        unproven = path.with_name(f"{path.name}.unproven")
        folder_path, why_not = _proof_data(found, parameters.data)
        if folder_path is None:
            reason = f"no val video to prove it on: {why_not}"
        elif variant == "float16" and not cuda_works(base):
            reason = "it is for CUDA, which ONNX Runtime cannot use here: it cannot be proven"
        else:
            log.info("making variant %s", variant)
            try:
                make_variant(base, variant, unproven)
                with open_folder(folder_path, mode=found.mode) as folder:
                    proof = prove_variant(unproven, base, _batches(folder, folder.order("val")))
                if proof.passed:
                    os.replace(unproven, path)
                else:
                    reason = "; ".join(proof.failures)
            except UserError as error:
                reason = str(error)
            finally:
                unproven.unlink(missing_ok=True)
        if reason:
            log.warning("variant %s is LEFT OUT of the release: %s", variant, reason)
        made.append(r.MadeVariant(variant=variant, path=None if reason else path, proof=proof, reason=reason))
    return tuple(made)


def _batches(folder: "FeatureFolder", rows: "NDArray[np.int64]") -> "Iterator[tuple[NDArray[Any], NDArray[Any]]]":
    """Visual and audio of some videos at a time, however many rows there are. Raises UserError: they are not finite."""
    import numpy as np

    from cmran.progress import Progress

    with Progress(len(rows), "parity check", "videos") as bar:
        for start in range(0, len(rows), PROOF_BATCH):
            part = rows[start : start + PROOF_BATCH]
            visual, audio = folder.read_visual(part), folder.read_audio(part)
            # The sums are the quick look.
            if not (np.isfinite(visual.sum()) and np.isfinite(audio.sum())):
                folder.check_finite(part)
            yield visual, audio
            bar.update(len(part))


def _as_before(parameters: p.PredictParameters) -> p.PredictParameters:
    """The parameters with what was not given taken from the job in OUT, where it is resumed."""
    from serving.batch import known_job

    job = known_job(parameters.out) if parameters.resume else None
    if job is None:
        return parameters
    kept = {"split": job.split, "batch_size": job.batch_size, "variant": job.variant}
    given = parameters.model_fields_set
    return parameters.model_copy(update={key: value for key, value in kept.items() if key not in given})


def _in_variant(model: "ResolvedModel", parameters: p.PredictParameters) -> "ResolvedModel":
    """The model in the variant asked for; for auto, which it is and why is told."""
    from serving.session import cuda_works, read_metadata
    from serving.variants import pick_variant

    wanted = parameters.variant
    if not parameters.model.startswith(("models:", "runs:")):
        found = read_metadata(model.path).variant
        # A file named is the file meant.
        if wanted not in (None, "auto", found):
            raise UserError(f"{model.path}: is of variant {found}, not {wanted}: name the file of that variant")
        return replace(model, variant=found)
    if wanted != "auto":
        return model.take(wanted or "float32")
    # Where CUDA is asked for and does not work, the session says so.
    cuda = parameters.device == "cuda" or (parameters.device == "auto" and cuda_works(model.path))
    variant, why = pick_variant({*model.variants, *model.variant_digests}, cuda=cuda)
    log.warning("variant auto: took %s: %s", variant, why)
    return model.take(variant)


def _proof_data(found: "FoundModel", data: Path | None) -> tuple[Path | None, str]:
    """The folder whose val videos the proof compares; None and the reason where there is none."""
    from cmran.data.fingerprint import folder_fingerprint

    if data is not None:
        return data, ""
    if found.data is None:
        return None, "a published checkpoint does not tell its data, and --data was not given"
    if not found.data.is_dir():
        return None, f"its data folder {found.data} is not there any more, and --data was not given"
    if folder_fingerprint(found.data) != found.fingerprint:
        return None, f"the data in {found.data} have changed since, and --data was not given"
    return found.data, ""


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """Val and test accuracy in % and the data that they were measured on."""

    val: float | None
    test: float | None
    fingerprint: str
    baseline: float | None
    """The best accuracy on val in % of a rule that needs no network; None where it is not known."""

    @property
    def not_champion(self) -> str | None:
        """Why a model with these scores must not become champion; None where nothing speaks against it."""
        if self.val is None or not math.isfinite(self.val):
            return "it has no accuracy on val"
        if self.baseline is None:
            return (
                "the trivial baselines on val are not known: finish the training, or give the folder that it was "
                "trained on"
            )
        if self.val <= self.baseline:
            return f"val accuracy {self.val:.3f} is not above {self.baseline:.3f} of the best trivial baseline"
        return None


def _scores(found: "FoundModel", data: Path | None) -> _Scores:
    """What the training measured; a published checkpoint is measured here."""
    from cmran.data.features import open_folder

    if found.fingerprint is not None:
        val, test, baseline = found.val_accuracy, None, None
        if found.metrics is not None:
            val, test = found.metrics["val"]["accuracy"], (found.metrics["test"] or {}).get("accuracy")
            baseline = _best_baseline(found.metrics["val"].get("baselines") or {})
        if baseline is None and (path := data or found.data) is not None and path.is_dir():
            from cmran.metrics import trivial_baselines

            with open_folder(path, mode=found.mode) as folder:
                if folder.fingerprint == found.fingerprint:
                    labels = folder.segment_labels()
                    trivial = trivial_baselines(labels[folder.order("val")], train_labels=labels[folder.order("train")])
                    baseline = _best_baseline(asdict(trivial))
        return _Scores(val=val, test=test, fingerprint=found.fingerprint, baseline=baseline)
    if data is None:
        raise UserError(f"{found.name}: a published checkpoint does not tell its data: give the folder with --data")
    from cmran.hardware import pick_device
    from cmran.training import evaluate_split

    with open_folder(data, mode=found.mode) as folder:
        found.check_fits(folder)
        val_scores, test_scores = (
            evaluate_split(found.model, folder, split, device=pick_device("auto"))[0] for split in ("val", "test")
        )
        return _Scores(
            val=val_scores.accuracy,
            test=test_scores.accuracy,
            fingerprint=folder.fingerprint,
            baseline=_best_baseline(val_scores.to_dict()["baselines"]),
        )


def _best_baseline(baselines: Mapping[str, float | None]) -> float | None:
    """The higher of the two rules that anyone could use, in %; None where neither is known."""
    rules = (baselines.get("always_background"), baselines.get("most_frequent_label"))
    return max((rule for rule in rules if rule is not None), default=None)


def _tracked(parameters: p.ValidateParameters | p.EvaluateParameters | p.PredictParameters, run_id: str | None) -> bool:
    """Whether the job is kept in MLflow. If so the store is asked at once, before any work."""
    from cmran import tracking

    wanted = run_id is not None or parameters.track or parameters.parent_run_id is not None
    if wanted:
        tracking.connect()
        if parameters.parent_run_id is not None:
            tracking.open_run(parameters.parent_run_id)
    return wanted


def _log_proof(run: "Run", result: r.ExportResult) -> None:
    run.log_text(result.proof.model_dump_json(indent=2), "release/proof.json")
    run.log_text(result.markdown(), "release/proof.md")


@contextlib.contextmanager
def _run(job: str, name: str, mode: str, parent_run_id: str | None, run_id: str | None) -> Iterator["Run"]:
    """An MLflow run for a job: the adopted one `run_id`, else a new one in the mode's experiment."""
    from cmran import tracking

    with tracking.start_run(
        experiment=tracking.experiment_of(mode),
        name=f"{job} {name}".strip(),
        parent_run_id=parent_run_id,
        run_id=run_id,
        tags={"cmran.job": job, "cmran.mode": mode},
        system_metrics=False,
    ) as run:
        yield run
