"""The model registry: registering an exported model as a version with lineage, its aliases, and finding its file.

The alias `champion` names the best version on val, `challenger` the latest version that is not champion.
"""

import hashlib
import importlib.metadata
import logging
import math
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from cmran.config import Variant
from cmran.errors import CacheError, ConfigError, ExportError, TrackingError
from cmran.tracking.artifacts import locate_artifacts
from cmran.tracking.runs import Run, as_text, existing_run, experiment_of
from cmran.tracking.store import (
    REGISTRY_VARIABLE,
    TRACKING_VARIABLE,
    connected_client,
    mlflow_module,
    one_line,
    registry_uri,
    stores_text,
    tracking_errors,
    tracking_uri,
)
from cmran.utils.files import cache_dir, cache_lock, log_once, sha256_file
from cmran.utils.uris import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER = "champion", "challenger"

ALIAS_ATTEMPTS = 4
"""Attempts to set an alias before its failure is raised."""

_INPUTS = ("visual", "audio")
_OUTPUTS = ("event_logits", "class_logits", "segments")

_VARIANT_FOLDER = "extra_files"
"""Folder of the precision variants inside a stored model, as MLflow names it: int8.onnx and float16.onnx."""

_NOT_CHAMPION = "not_champion"
"""Tag of a version: the reason why it must not become champion, whatever its accuracy."""

_STATE = "release_state"
"""Tag of a version: "pending" until its release has selected the champion, then "settled"."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    """Name of the registered model."""
    number: int
    """Version number, from 1."""
    run_id: str | None
    """Run that trained it."""
    tags: dict[str, str]
    """All tags."""
    aliases: tuple[str, ...]
    """All aliases, sorted."""

    @property
    def uri(self) -> str:
        """MLflow's URI of the version."""
        return f"models:/{self.name}/{self.number}"

    @property
    def settled(self) -> bool:
        """Whether its release finished, which includes the selection of the champion."""
        return self.tags.get(_STATE) == "settled"

    @property
    def val_accuracy(self) -> float | None:
        """Segment accuracy on val in %; None if it is unknown or its epoch was selected on another split."""
        if self.tags.get("selection_split") != "val":
            return None
        try:
            value = float(self.tags["val_accuracy"])
        except (KeyError, ValueError):
            return None
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Registered:
    """The result of `register_release`."""

    name: str
    """Name of the registered model."""
    version: int
    """Number of the new version."""
    alias: Literal["champion", "challenger"]
    """Alias of the new version."""
    reason: str
    """Why it has this alias, as a text for users."""
    champion: int | None
    """Version that is champion now; None if there is none."""
    previous_champion: int | None
    """Version that was champion before; None if there was none."""

    @property
    def uri(self) -> str:
        """MLflow's URI of the version."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class ResolvedModel:
    """An ONNX file on this machine and its origin. Name, version and run are None for a plain file."""

    path: Path
    """The ONNX file."""
    digest: str
    """SHA-256 of the file, hexadecimal."""
    name: str | None = None
    """Name of the registered model."""
    version: int | None = None
    """Version number."""
    run_id: str | None = None
    """Run that trained it."""
    variant: Variant = "float32"
    """Precision variant of a stored model. For a plain file, its own metadata is decisive."""
    variants: Mapping[Variant, Path] = field(default_factory=dict)
    """Files of the other precision variants of the stored model, which passed the parity check at its release."""
    variant_digests: Mapping[Variant, str] = field(default_factory=dict)
    """Their SHA-256 according to the version's tags."""

    def with_variant(self, variant: Variant) -> Self:
        """Return the same model in another precision variant.

        Raises:
            ExportError: The model has no such variant, or its file is damaged.
        """
        if variant == self.variant:
            return self
        where = f"models:/{self.name}/{self.version}" if self.name else str(self.path)
        if variant not in self.variants and variant not in self.variant_digests:
            raise ExportError(
                f"{where}: has no variant {variant}: it has {_joined([self.variant, *self.variants])}",
                "a release includes only the variants that passed the parity check",
            )
        path = self.variants.get(variant)
        digest = sha256_file(path) if path is not None else ""
        if path is None or self.variant_digests.get(variant, digest) != digest:
            raise ExportError(
                f"{where}: its variant {variant} was changed, damaged or removed", "release the run again"
            )
        return replace(self, path=path, digest=digest, variant=variant)


def register_release(
    *,
    onnx_path: Path,
    run_id: str,
    mode: str,
    val_accuracy: float | None,
    fingerprint: str,
    selection_split: str = "val",
    not_champion: str | None = None,
    tags: Mapping[str, object] | None = None,
    variants: Mapping[Variant, Path] | None = None,
) -> Registered:
    """Store an exported model with a finished run and register it as a new version of `cmran-{mode}`.

    The stored model is read back and compared with the file before the version is created. The version becomes champion
    if there is no champion, or if its accuracy on val is higher than the champion's on the same data; otherwise it
    becomes challenger. If two releases run at the same time, the better one ends as champion.

    Args:
        onnx_path: The exported model.
        run_id: Run that trained it.
        mode: `full` or `weak`.
        val_accuracy: Segment accuracy on val in %. A version without it never becomes champion.
        fingerprint: Fingerprint of the data on which the accuracy was measured.
        selection_split: Split on which the epoch was selected. Only val allows a version to become champion.
        not_champion: Reason why the version must not become champion; it also becomes a tag.
        tags: Further tags of the version, such as test_accuracy, parity_max_abs_difference, study or recipe. None is
            left out.
        variants: ONNX files of the same model in other precisions, which the caller has checked. They are stored beside
            the model and compared as well; `resolve_model` finds them.

    Raises:
        ConfigError: The run is unknown.
        ExportError: `onnx_path` is not a model that was exported by this project.
        TrackingError: The store fails, or returns another model than it received.
    """
    client = connected_client(registry=True, create=True)
    name = experiment_of(mode)
    with tracking_errors(f"look up run {run_id}"):
        run = existing_run(client, run_id)
    digests = {variant: sha256_file(path) for variant, path in (variants or {}).items()}
    model_id, digest = _store_onnx(client, onnx_path, run, variants or {}, digests)
    own_tags = {
        "mode": mode,
        "val_accuracy": val_accuracy,
        "fingerprint": fingerprint,
        "selection_split": selection_split,
        _NOT_CHAMPION: not_champion,
        "run_id": run_id,
        "onnx_sha256": digest,
        **{_digest_tag(variant): variant_digest for variant, variant_digest in digests.items()},
        _STATE: "pending",
    }
    texts = {key: as_text(value) for key, value in {**(tags or {}), **own_tags}.items() if value is not None}
    with tracking_errors(f"register {name}"), cache_lock(_registry_lock(name)):
        return _add_version(client, name, model_id, run_id, texts)


def registered_versions(name: str) -> list[Version]:
    """Return all versions of a registered model, oldest first; an unknown model has none."""
    client = connected_client(registry=True)
    with tracking_errors(f"list the versions of {name}"):
        return _versions(client, name)


def resolve_model(uri: str) -> ResolvedModel:
    """Return the ONNX file of a model, which is downloaded to the cache if it is on another machine.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID/model`, or the path of an .onnx file.

    Raises:
        ConfigError: There is no such file, run, model, alias or version; the message lists what exists.
        ExportError: The stored file is damaged, or not an ONNX model.
        TrackingError: The tracking store or the registry fails.
    """
    if not uri.startswith(("models:", "runs:")):
        path = Path(uri)
        if not path.is_file():
            raise ConfigError(
                f"model {uri!r}: no such file",
                "give an .onnx file, models:/cmran-full@champion or models:/cmran-full/VERSION",
            )
        return ResolvedModel(path=path, digest=sha256_file(path))
    client = connected_client(registry=uri.startswith("models:"))
    with tracking_errors(f"find {uri}"):
        version, source, location, run_id = _find_model(client, uri)
    with tracking_errors(f"download {uri}"):
        path = _local_onnx(source, location, version)
    digest = sha256_file(path)
    variants = {
        name: file for name in get_args(Variant) if (file := path.parent / _VARIANT_FOLDER / f"{name}.onnx").is_file()
    }
    if version is None:
        return ResolvedModel(path=path, digest=digest, run_id=run_id, variants=variants)
    expected = version.tags.get("onnx_sha256", digest)
    if expected != digest:
        raise ExportError(
            f"{version.uri}: {path} has sha256 {digest[:12]}..., expected {expected[:12]}...: "
            "the stored file was changed or damaged",
            "release the run again",
        )
    return ResolvedModel(
        path=path,
        digest=digest,
        name=version.name,
        version=version.number,
        run_id=version.run_id,
        variants=variants,
        variant_digests={
            name: version.tags[_digest_tag(name)] for name in get_args(Variant) if _digest_tag(name) in version.tags
        },
    )


def _digest_tag(variant: Variant) -> str:
    return f"{variant}_sha256"


def _store_onnx(
    client: "MlflowClient", path: Path, run: Run, variants: Mapping[Variant, Path], digests: Mapping[Variant, str]
) -> tuple[str, str]:
    """Log the file as an MLflow model of the run, read it back and compare. Return the model's id and SHA-256."""
    import onnx

    # MLflow accepts parsed ONNX models only, and log_model can empty the one that it gets.
    signature, proto = _signature(_parsed_onnx(path)), _parsed_onnx(path)
    with tracking_errors(f"store {path.name}"), tempfile.TemporaryDirectory(prefix="cmran-") as staged:
        for variant, file in variants.items():
            shutil.copyfile(file, Path(staged) / f"{variant}.onnx")
        # If log_model created the model, it would be in the experiment of the process instead of the run's.
        model_id = str(client.create_logged_model(run.experiment_id, name="model", source_run_id=run.run_id).model_id)
        mlflow_module("mlflow.onnx").log_model(
            proto,
            model_id=model_id,
            run_id=run.run_id,
            signature=signature,
            pip_requirements=_requirements(),
            save_as_external_data=False,
            extra_files=[str(file) for file in sorted(Path(staged).iterdir())] or None,
        )
    with tracking_errors(f"read {path.name} back"), tempfile.TemporaryDirectory(prefix="cmran-") as folder:
        # As a user loads it, including ONNX's own checks.
        stored = mlflow_module("mlflow.onnx").load_model(f"models:/{model_id}", dst_path=folder)
        file = _onnx_of(Path(folder), f"models:/{model_id}")
        digest = sha256_file(file)
        differing = [
            f"variant {variant}"
            for variant, expected in digests.items()
            if not (copy := file.parent / _VARIANT_FOLDER / f"{variant}.onnx").is_file()
            or sha256_file(copy) != expected
        ]
    sent = _parsed_onnx(path)
    if stored.SerializeToString(deterministic=True) != sent.SerializeToString(deterministic=True):
        expected, found = (
            {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in m.graph.initializer} for m in (sent, stored)
        )
        weights = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        differing.insert(0, f"weights {', '.join(weights[:3])}" if weights else "the graph")
    if differing:
        with tracking_errors(f"mark {path.name} as failed"):
            client.finalize_logged_model(model_id, "FAILED")
        raise TrackingError(
            f"{stores_text()} returned another model than {path} ({', '.join(differing)} differ): not registered"
        )
    return model_id, digest


def _parsed_onnx(path: Path) -> Any:
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:
        # The exception belongs to protobuf's parser and differs between its versions.
        raise ExportError(
            f"{path}: not readable as an ONNX model ({one_line(error)})", "export the run again"
        ) from error
    found = [entry.name for entry in model.graph.input], [entry.name for entry in model.graph.output]
    if (sorted(found[0]), sorted(found[1])) != (sorted(_INPUTS), sorted(_OUTPUTS)):
        raise ExportError(
            f"{path}: has the inputs {found[0]} and outputs {found[1]}, expected {list(_INPUTS)} and {list(_OUTPUTS)}",
            "give a file that was written by `cmran export`",
        )
    return model


def _signature(model: Any) -> Any:
    """Return the MLflow signature with the names, types and shapes of the inputs and outputs; -1 for a free size.

    It is derived from the graph, because MLflow would store an example input as JSON of tens of megabytes.
    """
    import onnx

    types = mlflow_module("mlflow.types")

    def schema(entries: Any) -> Any:
        specs = []
        for entry in entries:
            tensor = entry.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
            specs.append(types.TensorSpec(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape, entry.name))
        return types.Schema(specs)

    return mlflow_module("mlflow.models").ModelSignature(
        inputs=schema(model.graph.input), outputs=schema(model.graph.output)
    )


def _requirements() -> list[str]:
    """Return the pinned packages for serving the model.

    MLflow's own list contains onnxruntime beside onnxruntime-gpu, which breaks CUDA.
    """
    packages = ("mlflow", "onnx", "onnxruntime-gpu", "numpy")
    # Package indexes do not know a local version part such as +cpu.
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages]


def _registry_lock(name: str) -> str:
    key = hashlib.sha256(f"{registry_uri() or tracking_uri()}|{name}".encode()).hexdigest()[:16]
    return f"{name}-{key}.lock"


def _add_version(client: "MlflowClient", name: str, model_id: str, run_id: str, tags: dict[str, str]) -> Registered:
    """Create a version, and set the alias `champion` or `challenger`."""
    mlflow = mlflow_module()
    try:
        client.create_registered_model(name, description="CMRAN, audio-visual event localization (ONNX)")
    except mlflow.exceptions.MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    before = _versions(client, name)
    previous = _version_with_alias(before, CHAMPION)
    # The alias of a version whose release is finished was decided, or changed by a person: it is not decided again.
    finished = {version.number for version in before if version.tags.get(_STATE) != "pending"}
    created = client.create_model_version(name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id)
    number = int(created.version)

    # The caller's lock excludes releases on this machine only. A release on another machine may set the alias between
    # the read and the write, so read again after each write. All releases apply the same rule to the same versions, and
    # the last one to write sees all of them.
    while True:
        versions = _versions(client, name)
        champion = _version_with_alias(versions, CHAMPION)
        best = _select_champion(champion, [version for version in versions if version.number not in finished])
        if best is None or best is champion:
            break
        _set_alias(client, name, CHAMPION, best.number)

    alias: Literal["champion", "challenger"]
    if champion is not None and champion.number == number:
        if CHALLENGER in champion.aliases:
            client.delete_registered_model_alias(name, CHALLENGER)
        alias, reason = "champion", _promotion_reason(champion, previous)
    else:
        _set_alias(client, name, CHALLENGER, number)
        own = next(version for version in versions if version.number == number)
        alias, reason = "challenger", _objection(own, champion) or ""
    client.set_model_version_tag(name, str(number), _STATE, "settled")
    log.info("%s version %d is %s: %s", name, number, alias, reason)
    return Registered(
        name=name,
        version=number,
        alias=alias,
        reason=reason,
        champion=None if champion is None else champion.number,
        previous_champion=None if previous is None else previous.number,
    )


def _set_alias(client: "MlflowClient", name: str, alias: str, number: int) -> None:
    """Set an alias, with retries.

    MLflow first looks for the alias and then inserts or updates it, so the second of two concurrent calls can violate
    the unique key of the database. A retry finds the alias and updates it.
    """
    for attempt in range(ALIAS_ATTEMPTS):
        try:
            client.set_registered_model_alias(name, alias, str(number))
            break
        except mlflow_module().exceptions.MlflowException:
            if attempt + 1 == ALIAS_ATTEMPTS:
                raise
            time.sleep(random.uniform(0.05, 0.2))


def _select_champion(champion: Version | None, candidates: list[Version]) -> Version | None:
    """Return the best of the champion and the candidates. A tie goes to the lower version number."""
    for version in sorted(candidates, key=lambda version: version.number):
        if _objection(version, champion) is None:
            champion = version
    return champion


def _objection(version: Version, champion: Version | None) -> str | None:
    """Return why `version` does not replace `champion`; None if it does."""
    accuracy, split = version.val_accuracy, version.tags.get("selection_split", "unknown")
    if split == "unknown":
        return "its selection split is unknown"
    if split != "val":
        return f"its epoch was selected on the {split} split"
    if accuracy is None:
        return "it has no accuracy on val"
    if _NOT_CHAMPION in version.tags:
        return version.tags[_NOT_CHAMPION]
    if champion is None:
        return None
    own_data, its_data = version.tags.get("fingerprint", "unknown"), champion.tags.get("fingerprint", "unknown")
    if own_data != its_data:
        return (
            f"champion version {champion.number} was evaluated on other data (fingerprint {its_data[:8]}, "
            f"here {own_data[:8]})"
        )
    best = champion.val_accuracy
    if best is not None and accuracy <= best:
        return f"val accuracy {accuracy:.3f} is not above {best:.3f} of champion version {champion.number}"
    return None


def _promotion_reason(champion: Version, previous: Version | None) -> str:
    if previous is None:
        return f"val accuracy {champion.val_accuracy:.3f}, and there was no champion"
    if previous.val_accuracy is None:
        return f"the previous champion, version {previous.number}, has no accuracy on val"
    return f"val accuracy {champion.val_accuracy:.3f} is above {previous.val_accuracy:.3f} of version {previous.number}"


def _version_with_alias(versions: list[Version], alias: str) -> Version | None:
    return next((version for version in versions if alias in version.aliases), None)


def _versions(client: "MlflowClient", name: str) -> list[Version]:
    """Return all versions with their aliases, oldest first."""
    try:
        model = client.get_registered_model(name)
    except mlflow_module().exceptions.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return []
        raise
    aliases: dict[int, list[str]] = {}
    for alias, number in model.aliases.items():
        # The number is an int from a database and a str from a server.
        aliases.setdefault(int(number), []).append(alias)
    found: list[Version] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
        for entry in page:
            number = int(entry.version)
            own = tuple(sorted(aliases.get(number, [])))
            found.append(Version(name, number, entry.run_id or None, dict(entry.tags), own))
        token = page.token
        if not token:
            return sorted(found, key=lambda version: version.number)


def _find_model(client: "MlflowClient", uri: str) -> tuple[Version | None, str, str, str | None]:
    """Return the version (None for `runs:/`), an exact URI to download, its storage location and the run."""
    if match := re.fullmatch(r"runs:/+([^/]+)/(.+)", uri):
        run_id, name = match.groups()
        existing_run(client, run_id)
        outputs = client.get_run(run_id).outputs
        stored = [client.get_logged_model(entry.model_id) for entry in (outputs.model_outputs if outputs else [])]
        named = [model for model in stored if model.name == name]
        if not named:
            raise ConfigError(
                f"{uri}: run {run_id} has no model {name!r}: it has {_joined(sorted({m.name for m in stored}))}"
            )
        newest = max(named, key=lambda model: int(model.creation_timestamp))
        return None, f"models:/{newest.model_id}", str(newest.artifact_location), run_id

    match = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise ConfigError(
            f"model {uri!r}: expected models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model or an .onnx file"
        )
    name, alias, number = match.groups()
    versions = _versions(client, name)
    if not versions:
        names = [model.name for model in client.search_registered_models(max_results=20)]
        raise ConfigError(
            f"{uri}: no versions of {name!r} at {redact(registry_uri() or tracking_uri())}: there are {_joined(names)}",
            f"release a run first, or correct {TRACKING_VARIABLE if registry_uri() is None else REGISTRY_VARIABLE}",
        )
    for version in versions:
        if version.number == int(number or -1) or alias in version.aliases:
            location = str(client.get_model_version_download_uri(name, str(version.number)))
            return version, version.uri, location, version.run_id
    aliases = [f"{alias} -> {version.number}" for version in versions for alias in version.aliases]
    raise ConfigError(
        f"{uri}: no such {'alias' if alias else 'version'}: {name} has the aliases {_joined(aliases)} "
        f"and the versions {_joined([str(version.number) for version in versions])}"
    )


def _joined(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _local_onnx(uri: str, location: str, version: Version | None) -> Path:
    """Return the stored model's ONNX file: the file itself if it is on this machine, otherwise a cached download.

    A cached download that does not have the digests of `version` is downloaded again.
    """
    download = mlflow_module("mlflow.artifacts").download_artifacts
    if (local := locate_artifacts(location)) is not None:
        if not local.exists():
            raise ExportError(
                f"{uri}: its files are missing: the tracking database expects them in {local}",
                "put them back there or beside the database, or release the run again",
            )
        return _onnx_of(Path(download(uri)), uri)
    key = hashlib.sha256(f"{registry_uri() or tracking_uri()}|{uri}|{location}".encode()).hexdigest()[:16]
    folder = _download_folder() / key
    with cache_lock(f"model-{key}.lock"):
        if folder.is_dir() and version is not None and not _is_intact(folder, uri, version):
            log.warning("%s differs from the released %s: downloading it again", folder, version.uri)
            shutil.rmtree(folder)
        if not folder.is_dir():
            # Download to a temporary name, so that the folder is complete once it has its own name.
            with tempfile.TemporaryDirectory(prefix=f".{key}.", dir=folder.parent) as partial:
                download(uri, dst_path=partial)
                os.replace(partial, folder)
                Path(partial).mkdir()
    return _onnx_of(folder, uri)


def _download_folder() -> Path:
    """Return the folder of downloaded models: in the cache, or temporary if the cache cannot be written."""
    try:
        folder = cache_dir() / "models"
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (CacheError, OSError) as error:
        log_once(logging.INFO, f"downloading models to a temporary folder, because there is no cache: {error}")
        return Path(_temporary_downloads().name)


@cache
def _temporary_downloads() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cmran-models-")


def _is_intact(folder: Path, uri: str, version: Version) -> bool:
    """Return whether a downloaded model has the digests that were recorded at its release."""
    try:
        path = _onnx_of(folder, uri)
        files = {"onnx_sha256": path}
        files |= {
            _digest_tag(variant): path.parent / _VARIANT_FOLDER / f"{variant}.onnx" for variant in get_args(Variant)
        }
        return all(sha256_file(file) == version.tags[tag] for tag, file in files.items() if tag in version.tags)
    except Exception:
        # A damaged description raises errors of the file system, YAML or MLflow.
        return False


def _onnx_of(folder: Path, uri: str) -> Path:
    """Return the ONNX file inside a downloaded MLflow model."""
    description = next(iter(sorted(folder.rglob("MLmodel"))), None)
    if description is None:
        raise ExportError(
            f"{uri}: {folder} contains no MLmodel file: the stored model is missing or damaged", "release the run again"
        )
    flavor = mlflow_module("mlflow.models").Model.load(str(description)).flavors.get("onnx")
    if flavor is None:
        raise ExportError(f"{uri}: is not an ONNX model", "give a model that was released by `cmran release`")
    path = description.parent / str(flavor["data"])
    if not path.is_file():
        raise ExportError(f"{uri}: {path} is missing: the stored model is damaged", "release the run again")
    return path
