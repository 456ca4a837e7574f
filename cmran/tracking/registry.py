"""The registry: an exported model as a version with lineage, the aliases, and the way back to a file."""

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
from cmran.errors import CacheError, CmranError, TrackingError
from cmran.tracking.artifacts import located
from cmran.tracking.runs import Run, as_text, experiment_of, known_run
from cmran.tracking.store import (
    REGISTRY_VARIABLE,
    TRACKING_VARIABLE,
    connected_client,
    mlflow_module,
    one_line,
    registry_uri,
    stores,
    tracking_errors,
    tracking_uri,
)
from cmran.utils.files import cache_dir, cache_lock, log_once
from cmran.utils.uris import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER = "champion", "challenger"

ALIAS_ATTEMPTS = 4
"""How often an alias is set before a failure counts."""

_INPUTS = ("visual", "audio")
_OUTPUTS = ("event_logits", "class_logits", "segments")

_VARIANTS = "extra_files"
# Folder inside a stored model, as MLflow names it: the variants int8.onnx and float16.onnx.

_NOT_CHAMPION = "not_champion"
# Tag of a version: why it must not become champion, whatever its accuracy.

_STATE = "release_state"
# Tag of a version: "pending" until its release has settled who is champion, then "settled".


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    number: int
    run_id: str | None
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def uri(self) -> str:
        """The address that MLflow loads it by."""
        return f"models:/{self.name}/{self.number}"

    @property
    def settled(self) -> bool:
        """Whether its release has got as far as saying who is champion."""
        return self.tags.get(_STATE) == "settled"

    @property
    def val_accuracy(self) -> float | None:
        """Segment accuracy on val in %; None if it has none, or if its epoch was selected on another split."""
        if self.tags.get("selection_split") != "val":
            return None
        try:
            value = float(self.tags["val_accuracy"])
        except (KeyError, ValueError):
            return None
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Registered:
    """What `register_release` did."""

    name: str
    version: int
    alias: Literal["champion", "challenger"]
    reason: str
    # Why it has this alias, for people.
    champion: int | None
    # Version that is champion now; None if there is none.
    previous_champion: int | None
    # Version that was champion before; None if there was none.

    @property
    def uri(self) -> str:
        """The address that MLflow loads it by."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class ResolvedModel:
    """An ONNX file on this machine and where it comes from. Name, version and run are None for a plain file."""

    path: Path
    digest: str
    # sha256 of the file, hex.
    name: str | None = None
    version: int | None = None
    run_id: str | None = None
    variant: Variant = "float32"
    # Of a stored model; a plain file says itself which it is.
    variants: Mapping[Variant, Path] = field(default_factory=dict)
    # The stored model's other variants, each proven when it was released.
    variant_digests: Mapping[Variant, str] = field(default_factory=dict)
    # sha256 of these as the version tells them.

    def take(self, variant: Variant) -> Self:
        """The same model in another of its variants. Raises CmranError where it has none such, or a damaged one."""
        if variant == self.variant:
            return self
        where = f"models:/{self.name}/{self.version}" if self.name else str(self.path)
        if variant not in self.variants and variant not in self.variant_digests:
            raise CmranError(
                f"{where}: has no variant {variant}: it has {_listed([self.variant, *self.variants])}; one that was "
                "not proven, or refused, when the run was released is not there"
            )
        path = self.variants.get(variant)
        digest = _sha256(path) if path is not None else ""
        if path is None or self.variant_digests.get(variant, digest) != digest:
            raise CmranError(
                f"{where}: its variant {variant} was changed, damaged or removed since: release the run again"
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
    """Store an exported model with the finished run `run_id` and make it a new version of `cmran-{mode}`.

    The stored model is read back and compared with the file before the version is made. The version becomes champion if
    there is none, or if its accuracy on val is higher than the champion's on the same data (`fingerprint`); otherwise
    it is the challenger. One whose epoch was not selected on val, without an accuracy on val, or with a reason in
    `not_champion` (which becomes a tag of the version) never becomes champion. Two releases at once end with one
    champion, the better one.

    `tags` are added to the version's own (None left out): test_accuracy, parity_max_abs_difference, study, recipe, ...
    `variants`: ONNX files of the same model in other number formats, proven by the caller; they are stored beside it,
    compared too, and found again by `resolve_model`.

    Raises CmranError: no ONNX model of ours at `onnx_path`, unknown run. TrackingError: the store fails, or gives back
    another model than it got.
    """
    client = connected_client(registry=True, create=True)
    name = experiment_of(mode)
    with tracking_errors(f"look up run {run_id}"):
        run = known_run(client, run_id)
    digests = {variant: _sha256(path) for variant, path in (variants or {}).items()}
    model_id, digest = _store_onnx(client, onnx_path, run, variants or {}, digests)
    own = {
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
    texts = {key: as_text(value) for key, value in {**(tags or {}), **own}.items() if value is not None}
    with tracking_errors(f"register {name}"), cache_lock(_registry_lock(name)):
        return _add_version(client, name, model_id, run_id, texts)


def registered_versions(name: str) -> list[Version]:
    """All versions of a registered model, oldest first; empty if there is no such model."""
    client = connected_client(registry=True)
    with tracking_errors(f"list the versions of {name}"):
        return _versions(client, name)


def resolve_model(address: str) -> ResolvedModel:
    """The ONNX file behind `address`, downloaded to the cache if it lies elsewhere.

    `address`: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID/model`, or the path of an .onnx file.

    Raises CmranError: no such file, model, alias or version (it lists what there is), a damaged file, no ONNX model.
    """
    if not address.startswith(("models:", "runs:")):
        path = Path(address)
        if not path.is_file():
            raise CmranError(
                f"model {address!r}: no such file: give an .onnx file, models:/cmran-full@champion or "
                "models:/cmran-full/VERSION"
            )
        return ResolvedModel(path=path, digest=_sha256(path))
    client = connected_client(registry=address.startswith("models:"))
    with tracking_errors(f"find {address}"):
        version, source, location, run_id = _find_model(client, address)
    with tracking_errors(f"download {address}"):
        path = _local_onnx(source, location, version)
    digest = _sha256(path)
    variants = {
        name: file for name in get_args(Variant) if (file := path.parent / _VARIANTS / f"{name}.onnx").is_file()
    }
    if version is None:
        return ResolvedModel(path=path, digest=digest, run_id=run_id, variants=variants)
    if version.tags.get("onnx_sha256", digest) != digest:
        raise CmranError(
            f"{version.uri}: {path} has sha256 {digest[:12]}..., expected {version.tags['onnx_sha256'][:12]}...: "
            "the stored file was changed or damaged; release the run again"
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
    """Log the file as an MLflow model of the run, read it back, compare. Returns the model's id and the sha256."""
    # MLflow takes ONNX models as parsed objects only.
    import onnx

    # Parsed anew at each call: MLflow's log_model can empty the object that it gets.
    signature, proto = _signature(_parsed_onnx(path)), _parsed_onnx(path)
    with tracking_errors(f"store {path.name}"), tempfile.TemporaryDirectory(prefix="cmran-") as staged:
        for variant, file in variants.items():
            shutil.copyfile(file, Path(staged) / f"{variant}.onnx")
        # Made here and not by log_model, which would put it into the experiment of the process, not of the run.
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
        # The way a user loads it, ONNX's own checks included.
        stored = mlflow_module("mlflow.onnx").load_model(f"models:/{model_id}", dst_path=folder)
        file = _onnx_of(Path(folder), f"models:/{model_id}")
        digest = _sha256(file)
        lost = [
            variant
            for variant, expected in digests.items()
            if not (kept := file.parent / _VARIANTS / f"{variant}.onnx").is_file() or _sha256(kept) != expected
        ]
    sent = _parsed_onnx(path)
    same = stored.SerializeToString(deterministic=True) == sent.SerializeToString(deterministic=True)
    if lost or not same:
        given, got = (
            {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in m.graph.initializer} for m in (sent, stored)
        )
        wrong = sorted(key for key in given.keys() | got.keys() if given.get(key) != got.get(key))
        with tracking_errors(f"mark {path.name} as failed"):
            client.finalize_logged_model(model_id, "FAILED")
        what = f"weights {', '.join(wrong[:3])}" if wrong else "the graph" if not same else f"variant {', '.join(lost)}"
        raise TrackingError(f"{stores()} gave back another model than {path} ({what} differ): not registered")
    return model_id, digest


def _parsed_onnx(path: Path) -> Any:
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:
        # The parser's exception belongs to protobuf and differs between its versions.
        raise CmranError(f"{path}: not readable as an ONNX model ({one_line(error)}): export the run again") from error
    found = [entry.name for entry in model.graph.input], [entry.name for entry in model.graph.output]
    if (sorted(found[0]), sorted(found[1])) != (sorted(_INPUTS), sorted(_OUTPUTS)):
        raise CmranError(
            f"{path}: has the inputs {found[0]} and outputs {found[1]}, expected {list(_INPUTS)} and {list(_OUTPUTS)}: "
            "give a file made by `cmran export`"
        )
    return model


def _signature(model: Any) -> Any:
    """MLflow signature with the names, types and shapes of the file's inputs and outputs; -1 where a size is free.

    Written from the graph and not inferred from an example, which would be stored as JSON of tens of megabytes.
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
    """Pins for serving the model. MLflow's own list names onnxruntime beside onnxruntime-gpu, which breaks CUDA."""
    packages = ("mlflow", "onnx", "onnxruntime-gpu", "numpy")
    # A local part such as +cpu is known to no package index.
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages]


def _registry_lock(name: str) -> str:
    key = hashlib.sha256(f"{registry_uri() or tracking_uri()}|{name}".encode()).hexdigest()[:16]
    return f"{name}-{key}.lock"


def _add_version(client: "MlflowClient", name: str, model_id: str, run_id: str, tags: dict[str, str]) -> Registered:
    mlflow = mlflow_module()
    try:
        client.create_registered_model(name, description="CMRAN, audio-visual event localization (ONNX)")
    except mlflow.exceptions.MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    before = _versions(client, name)
    previous = _holder(before, CHAMPION)
    # Versions whose release is over: their alias was decided, or moved by a person since; it is not decided again.
    over = {version.number for version in before if version.tags.get(_STATE) != "pending"}
    made = client.create_model_version(name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id)
    number = int(made.version)

    # The lock keeps out releases on this machine. A release on another machine may move the alias between our look
    # and our write; so look again after each write. Every release picks by the same rule from the same versions, and
    # the last to write sees all of them.
    while True:
        versions = _versions(client, name)
        champion = _holder(versions, CHAMPION)
        best, reasons = _elect(champion, [version for version in versions if version.number not in over])
        if best is champion or best is None:
            break
        _set_alias(client, name, CHAMPION, best.number)

    if champion is not None and champion.number == number:
        if CHALLENGER in champion.aliases:
            client.delete_registered_model_alias(name, CHALLENGER)
        alias, reason = CHAMPION, _won(champion, previous)
    else:
        _set_alias(client, name, CHALLENGER, number)
        alias, reason = CHALLENGER, reasons.get(number, "another release at the same time was better on val")
    client.set_model_version_tag(name, str(number), _STATE, "settled")
    log.info("%s version %d is %s: %s", name, number, alias, reason)
    return Registered(
        name=name,
        version=number,
        alias="champion" if alias == CHAMPION else "challenger",
        reason=reason,
        champion=None if champion is None else champion.number,
        previous_champion=None if previous is None else previous.number,
    )


def _set_alias(client: "MlflowClient", name: str, alias: str, number: int) -> None:
    # MLflow looks whether the alias exists and then inserts or updates it: of two at the same time the second can fail
    # on the database's unique key. Once more, it finds the alias and updates it.
    for attempt in range(ALIAS_ATTEMPTS):
        try:
            client.set_registered_model_alias(name, alias, str(number))
            break
        except mlflow_module().exceptions.MlflowException:
            if attempt + 1 == ALIAS_ATTEMPTS:
                raise
            time.sleep(random.uniform(0.05, 0.2))


def _elect(champion: Version | None, candidates: list[Version]) -> tuple[Version | None, dict[int, str]]:
    """Who is to be champion, and for each candidate that is not, why. The order of arrival decides a tie."""
    best, reasons = champion, dict[int, str]()
    for version in sorted(candidates, key=lambda version: version.number):
        if champion is not None and version.number == champion.number:
            continue
        mine = version.val_accuracy
        if mine is None and version.tags.get("selection_split") != "val":
            split = version.tags.get("selection_split", "unknown")
            reasons[version.number] = (
                "its selection split is unknown"
                if split == "unknown"
                else f"its epoch was selected on the {split} split"
            )
        elif mine is None:
            reasons[version.number] = "it has no accuracy on val"
        elif _NOT_CHAMPION in version.tags:
            reasons[version.number] = version.tags[_NOT_CHAMPION]
        elif best is None:
            best = version
        elif best.tags.get("fingerprint") != version.tags.get("fingerprint"):
            reasons[version.number] = (
                f"champion version {best.number} was measured on other data (fingerprint "
                f"{best.tags.get('fingerprint', 'unknown')[:8]}, here {version.tags.get('fingerprint', 'unknown')[:8]})"
            )
        elif best.val_accuracy is None or mine > best.val_accuracy:
            best = version
        else:
            reasons[version.number] = (
                f"val accuracy {mine:.3f} is not above {best.val_accuracy:.3f} of champion version {best.number}"
            )
    return best, reasons


def _won(champion: Version, previous: Version | None) -> str:
    if previous is None:
        return f"val accuracy {champion.val_accuracy:.3f}, and there was no champion"
    if previous.val_accuracy is None:
        return f"champion version {previous.number} has no accuracy on val"
    return f"val accuracy {champion.val_accuracy:.3f} is above {previous.val_accuracy:.3f} of version {previous.number}"


def _holder(versions: list[Version], alias: str) -> Version | None:
    return next((version for version in versions if alias in version.aliases), None)


def _versions(client: "MlflowClient", name: str) -> list[Version]:
    """Versions with their aliases, oldest first."""
    model = _registered_model(client, name)
    if model is None:
        return []
    aliases: dict[int, list[str]] = {}
    for alias, number in model.aliases.items():
        # int from a database, str from a server.
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


def _registered_model(client: "MlflowClient", name: str) -> Any:
    try:
        return client.get_registered_model(name)
    except mlflow_module().exceptions.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _find_model(client: "MlflowClient", address: str) -> tuple[Version | None, str, str, str | None]:
    """The version (None for `runs:/`), an exact address to download, where that is stored, the run."""
    if match := re.fullmatch(r"runs:/+([^/]+)/(.+)", address):
        run_id, name = match.groups()
        known_run(client, run_id)
        outputs = client.get_run(run_id).outputs
        stored = [client.get_logged_model(entry.model_id) for entry in (outputs.model_outputs if outputs else [])]
        named = [model for model in stored if model.name == name]
        if not named:
            raise CmranError(
                f"{address}: run {run_id} holds no model {name!r}: it has {_listed(sorted({m.name for m in stored}))}"
            )
        newest = max(named, key=lambda model: int(model.creation_timestamp))
        return None, f"models:/{newest.model_id}", str(newest.artifact_location), run_id

    match = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+))", address)
    if match is None:
        raise CmranError(
            f"model {address!r}: expected models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID/model or an .onnx file"
        )
    name, alias, number = match.groups()
    versions = _versions(client, name)
    if not versions:
        names = [model.name for model in client.search_registered_models(max_results=20)]
        raise CmranError(
            f"{address}: no versions of {name!r} at {redact(registry_uri() or tracking_uri())}: there are "
            f"{_listed(names)}; release a run first, or correct "
            f"{TRACKING_VARIABLE if registry_uri() is None else REGISTRY_VARIABLE}"
        )
    for version in versions:
        if version.number == int(number or -1) or alias in version.aliases:
            location = str(client.get_model_version_download_uri(name, str(version.number)))
            return version, version.uri, location, version.run_id
    aliases = [f"{alias} -> {version.number}" for version in versions for alias in version.aliases]
    raise CmranError(
        f"{address}: no such {'alias' if alias else 'version'}: {name} has the aliases {_listed(aliases)} "
        f"and the versions {_listed([str(version.number) for version in versions])}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _local_onnx(address: str, location: str, version: Version | None) -> Path:
    """The stored model's ONNX file: in place where the store is this machine's disk, else downloaded once.

    What was downloaded before and is not what `version` tells is downloaded again.
    """
    download = mlflow_module("mlflow.artifacts").download_artifacts
    if (folder_here := located(location)) is not None:
        if not folder_here.exists():
            raise CmranError(
                f"{address}: its files are not in {folder_here}, where the tracking database has them: "
                f"put them back there or beside the database, or release the run again"
            )
        return _onnx_of(Path(download(address)), address)
    key = hashlib.sha256(f"{registry_uri() or tracking_uri()}|{address}|{location}".encode()).hexdigest()[:16]
    folder = _downloads() / key
    with cache_lock(f"model-{key}.lock"):
        if folder.is_dir() and version is not None and not _is_whole(folder, address, version):
            log.warning("%s is not what was released as %s: it is downloaded again", folder, version.uri)
            shutil.rmtree(folder)
        if not folder.is_dir():
            # Under its name only when it is whole.
            with tempfile.TemporaryDirectory(prefix=f".{key}.", dir=folder.parent) as partial:
                download(address, dst_path=partial)
                os.replace(partial, folder)
                Path(partial).mkdir()
    return _onnx_of(folder, address)


def _downloads() -> Path:
    """Folder of the downloaded models: in the cache or, where that cannot be written, one until this process ends."""
    try:
        folder = cache_dir() / "models"
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (CacheError, OSError) as error:
        log_once(logging.INFO, f"models are downloaded to a temporary folder, since there is no cache: {error}")
        return Path(_temporary_downloads().name)


@cache
def _temporary_downloads() -> "tempfile.TemporaryDirectory[str]":
    # Removed with the process.
    return tempfile.TemporaryDirectory(prefix="cmran-models-")


def _is_whole(folder: Path, address: str, version: Version) -> bool:
    """Whether a downloaded model has the digests that were noted at its release."""
    try:
        path = _onnx_of(folder, address)
        files = {"onnx_sha256": path}
        files |= {_digest_tag(variant): path.parent / _VARIANTS / f"{variant}.onnx" for variant in get_args(Variant)}
        return all(_sha256(file) == version.tags[tag] for tag, file in files.items() if tag in version.tags)
    except Exception:
        # A damaged description: the file system, YAML and MLflow each have errors of their own.
        return False


def _onnx_of(folder: Path, address: str) -> Path:
    """The ONNX file inside a downloaded MLflow model."""
    description = next(iter(sorted(folder.rglob("MLmodel"))), None)
    if description is None:
        raise CmranError(
            f"{address}: {folder} holds no MLmodel file: the stored model is gone or damaged; release again"
        )
    flavor = mlflow_module("mlflow.models").Model.load(str(description)).flavors.get("onnx")
    if flavor is None:
        raise CmranError(f"{address}: is no ONNX model: give one that was released by `cmran release`")
    path = description.parent / str(flavor["data"])
    if not path.is_file():
        raise CmranError(f"{address}: {path} is missing: the stored model is damaged; release the run again")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
