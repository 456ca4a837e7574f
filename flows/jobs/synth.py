"""What each job takes: one frozen record a job, every field described and bounded.

From these come the forms in Prefect's UI, the options of the `cmran` command and the checks of both.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cmran.config import (
    Frozen,
    Seed,
)
from flows.jobs.common import MarkdownResult

Count = Annotated[int, Field(ge=1, le=10_000_000)]


class SynthParameters(Frozen):
    """Make a folder in the published format, with made features that hold a real problem."""

    out: Path = Field(description="Folder to make; it must not exist or be empty.")
    videos: Count | None = Field(
        None, description="Number of videos. Default: 600, or all of the annotations' where these are given."
    )
    background_videos: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Number of background-only videos (weak mode). Default: in proportion to the real folder."
    )
    annotations: Path | None = Field(None, description="Annotations.txt of the real labels.")
    orders: Path | None = Field(None, description="Folder of the real train, val and test order files.")
    dtype: Literal["float64", "float32", "float16"] = Field(
        "float64", description="Number format of the features; float64 as published."
    )
    seed: Seed = Field(0, description="Decides every number made.")
    segments: Annotated[int, Field(ge=1, le=1000)] = Field(10, description="Seconds a video.")
    grid: Annotated[int, Field(ge=1, le=64)] = Field(7, description="Cells along each side of a visual map.")
    visual_features: Annotated[int, Field(ge=1, le=8192)] = Field(512, description="Channels of a visual cell.")
    audio_features: Annotated[int, Field(ge=1, le=8192)] = Field(128, description="Width of an audio embedding.")


@dataclass(frozen=True, kw_only=True)
class SynthResult(MarkdownResult):
    """A folder made."""

    out: Path
    videos: int
    background_videos: int
    bytes: int
    seconds: float
    ok: bool = True

    def markdown(self) -> str:
        """One line."""
        return (
            f"Made {self.out}: {self.videos} videos, {self.background_videos} background videos, "
            f"{self.bytes / 1e6:.0f} MB, in {self.seconds:.1f} s."
        )


def synth_job(parameters: SynthParameters, *, run_id: str | None = None) -> SynthResult:
    """Make a folder in the published format."""
    from cmran import tracking
    from cmran.data.dataset import open_folder
    from cmran.data.synthetic import synthesize

    started = time.monotonic()
    out = synthesize(**dict(parameters))
    with open_folder(out, mode="weak") as folder:
        result = SynthResult(
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
