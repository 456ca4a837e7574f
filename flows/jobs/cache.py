"""`pack` and `cache`: fill, list and clear the cache of float16 features."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cmran.config import Frozen, Mode
from cmran.errors import CacheError
from flows.jobs.common import DATA_HELP, MarkdownResult, paragraphs, table

if TYPE_CHECKING:
    from cmran.data.feature_cache import CacheEntry


class PackParameters(Frozen):
    """Write the features of a folder to the feature cache, so that training reads a quarter of the bytes."""

    data: Path = Field(description=DATA_HELP)
    mode: Mode = Field("full", description="weak: the background videos are packed too.")


class CacheParameters(Frozen):
    """List or clear the feature cache."""

    clear: str | None = Field(
        None,
        pattern="^(all|[0-9a-f]{32})$",
        description="Remove the packs of the data folder with this fingerprint; without a value, all packs.",
    )
    limit_gib: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None,
        description="Keep at most this many GiB from now on; the least recently used packs are removed. Initially 20.",
    )


@dataclass(frozen=True, kw_only=True)
class CacheResult(MarkdownResult):
    """The content of the feature cache."""

    packs: tuple["CacheEntry", ...]
    removed: tuple["CacheEntry", ...]
    limit_bytes: int
    ok: bool = True

    def markdown(self) -> str:
        """Return one row per pack, and their total size."""
        rows = [
            (
                pack.fingerprint,
                pack.source,
                f"{pack.size / 2**30:.2f}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(pack.last_use)),
                pack.state,
            )
            for pack in self.packs
        ]
        sizes = [sum(pack.size for pack in packs) / 2**30 for packs in (self.packs, self.removed)]
        parts = [table(("fingerprint", "packed from", "GiB", "last use", "state"), rows)] if rows else []
        if self.removed:
            parts.append(f"Removed: {len(self.removed)}, {sizes[1]:.2f} GiB.")
        parts.append(f"Packs: {len(rows)}, {sizes[0]:.2f} GiB; at most {self.limit_bytes / 2**30:.0f} GiB are kept.")
        return paragraphs(parts)


def run_pack(parameters: PackParameters, *, run_id: str | None = None) -> CacheResult:
    """Pack the features of a folder. Raises CacheError if there is no space or no cache folder."""
    from cmran.data.dataset import open_folder
    from cmran.data.feature_cache import cache_folder, cache_limit, list_caches

    cache_folder()
    weak = parameters.mode == "weak"
    with open_folder(parameters.data, mode=parameters.mode, need_labels=weak, features="float16") as folder:
        uncached, fingerprint = folder.use_feature_cache(build=True, required=True), folder.fingerprint
    if uncached:
        raise CacheError(f"{', '.join(uncached)}: not cached (see the warning above); the raw file is still usable")
    packs = [entry for entry in list_caches() if entry.fingerprint == fingerprint]
    return CacheResult(packs=tuple(packs), removed=(), limit_bytes=cache_limit())


def run(parameters: CacheParameters, *, run_id: str | None = None) -> CacheResult:
    """List or remove packs."""
    from cmran.data.feature_cache import cache_limit, clear_caches, list_caches, set_cache_limit

    removed = []
    if parameters.limit_gib is not None:
        removed += set_cache_limit(parameters.limit_gib << 30)
    if parameters.clear is not None:
        removed += clear_caches(None if parameters.clear == "all" else parameters.clear)[0]
    return CacheResult(packs=tuple(list_caches()), removed=tuple(removed), limit_bytes=cache_limit())
