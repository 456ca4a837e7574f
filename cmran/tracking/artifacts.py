"""Where the artifacts of a SQLite database are, also after its folder was moved, copied or mounted at another path.

MLflow records artifact locations as absolute paths. Its own repository for local files would look for them where they
were, and would make the old path again for new ones. The repository here is used instead, in this process alone: the
database is left as it is.
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

ROOT = "mlruns"
"""Name of the folder of artifacts beside a database."""

_database: Path | None = None
# The SQLite file in use; None for a server, which knows itself where its artifacts are.
_reported: set[tuple[Path, Path]] = set()


def find_beside(database: Path | None) -> None:
    """From now on look for artifacts of `database` beside it where they are not at their recorded location."""
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
    found = located(artifact_uri)
    # As a URI: MLflow would decode percent signs of a plain path.
    uri = artifact_uri if found is None else found.as_uri()
    kind: Any = importlib.import_module("mlflow.store.artifact.local_artifact_repo").LocalArtifactRepository
    repository: ArtifactRepository = kind(uri, tracking_uri, registry_uri)
    return repository


def local_path(location: str) -> Path | None:
    """The path of a recorded artifact location, a `file:` URI or a plain path; None for any other."""
    if location.startswith("file:"):
        path = Path(url2pathname(urlsplit(location).path))
    elif "://" not in location:
        path = Path(location)
    else:
        return None
    return path if path.is_absolute() else None


def located(location: str) -> Path | None:
    """Where the artifacts of a recorded location are, or shall be; None where that is not on this machine's disk.

    Where the database lies elsewhere than it did, its artifacts are those beside it. That is logged once.
    """
    path = local_path(location)
    if path is None or _database is None:
        return path
    root = _root_of(path)
    beside = _database.parent / ROOT
    if root is None or _same(root, beside):
        return path
    found = beside / path.relative_to(root)
    if not _is_moved(path, root, found, beside, _database):
        return path
    if (root, beside) not in _reported:
        _reported.add((root, beside))
        log.info(
            "%s was moved or copied: its artifacts are read and written in %s, not in %s, which it names",
            _database,
            beside,
            root,
        )
    return found


def _is_moved(path: Path, root: Path, found: Path, beside: Path, database: Path) -> bool:
    """Whether `found` beside the database is meant, and not the recorded `path` under `root`."""
    # The original is still there: this database is a copy of it.
    original = root.parent / database.name
    copied = original.exists() and not _same(original, database)
    if found.exists():
        return copied or not path.exists()
    if path.exists():
        return False
    # Neither is there: it will be written.
    return copied or (not root.exists() and (beside.exists() or not root.parent.exists()))


def _root_of(path: Path) -> Path | None:
    """The folder of artifacts that `path` lies in."""
    for parent in path.parents:
        if parent.name == ROOT:
            return parent
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other
