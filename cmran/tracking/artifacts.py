"""The artifacts of a SQLite tracking database, also after its folder was moved, copied or mounted at another path.

MLflow records absolute artifact locations. Its own repository for local files would look for artifacts at the old path
and recreate it for new ones. In this process, the repository here replaces it; the database is not changed.
"""

import importlib
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

log = logging.getLogger(__name__)

ARTIFACT_FOLDER = "mlruns"
"""Name of the artifact folder beside a database."""

_database: Path | None = None
"""The SQLite file in use; None for a server, which knows the location of its artifacts itself."""
_reported: set[tuple[Path, Path]] = set()


def set_database(database: Path | None) -> None:
    """From now on, locate artifacts relative to `database` if they are not at their recorded location."""
    global _database
    _database = database
    _register()


@cache
def _register() -> None:
    registry = importlib.import_module("mlflow.store.artifact.artifact_repository_registry")
    for scheme in ("", "file"):
        registry._artifact_repository_registry.register(scheme, _repository)


def _repository(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> "ArtifactRepository":
    path = locate_artifacts(artifact_uri)
    # A URI, because MLflow decodes the percent signs of a plain path.
    uri = artifact_uri if path is None else path.as_uri()
    kind: Any = importlib.import_module("mlflow.store.artifact.local_artifact_repo").LocalArtifactRepository
    repository: ArtifactRepository = kind(uri, tracking_uri, registry_uri)
    return repository


def _local_path(location: str) -> Path | None:
    """Return the path of a recorded artifact location, a `file:` URI or a plain path; None for any other."""
    if location.startswith("file:"):
        path = Path(url2pathname(urlsplit(location).path))
    elif "://" not in location:
        path = Path(location)
    else:
        return None
    return path if path.is_absolute() else None


def locate_artifacts(location: str) -> Path | None:
    """Return the local path of a recorded artifact location; None if it is not on a disk of this machine.

    If the database was moved or copied, the artifacts are those beside it. This is logged once.
    """
    path = _local_path(location)
    if path is None or _database is None:
        return path
    root = next((parent for parent in path.parents if parent.name == ARTIFACT_FOLDER), None)
    beside = _database.parent / ARTIFACT_FOLDER
    if root is None or _same(root, beside):
        return path
    relocated = beside / path.relative_to(root)
    if not _is_moved(path, root, relocated, beside, _database):
        return path
    if (root, beside) not in _reported:
        _reported.add((root, beside))
        log.info(
            "%s was moved or copied: its artifacts are read and written in %s instead of the recorded %s",
            _database,
            beside,
            root,
        )
    return relocated


def _is_moved(path: Path, root: Path, relocated: Path, beside: Path, database: Path) -> bool:
    """Return whether to use `relocated` beside the database instead of the recorded `path` under `root`."""
    # If the original database still exists, this one is a copy of it.
    original = root.parent / database.name
    copied = original.exists() and not _same(original, database)
    if relocated.exists():
        return copied or not path.exists()
    if path.exists():
        return False
    # Neither exists: the artifact is about to be written.
    return copied or (not root.exists() and (beside.exists() or not root.parent.exists()))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other
