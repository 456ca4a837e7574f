"""`synth`: generate a synthetic dataset."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cmran.config import Frozen, Seed
from flows.jobs.common import MarkdownResult

Count = Annotated[int, Field(ge=1, le=10_000_000)]


class SynthParameters(Frozen):
    """Generate a synthetic dataset in the published format, with a non-trivial audio-visual task."""

    out: Path = Field(description="Folder to create; an existing one must be empty.")
    videos: Count | None = Field(
        None, description="Number of videos. Default: 600, or every video of the annotations if they are given."
    )
    background_videos: Count | None = Field(
        None, description="Number of background-only videos (weak mode). Default: the proportion of the real dataset."
    )
    annotations: Path | None = Field(None, description="Annotations.txt with the real labels.")
    orders: Path | None = Field(None, description="Folder with the real order files of train, val and test.")
    dtype: Literal["float64", "float32", "float16"] = Field(
        "float64", description="Number format of the features; float64 as published."
    )
    seed: Seed = Field(0, description="Random seed of all values.")
    segments: Annotated[int, Field(ge=1, le=1000)] = Field(10, description="Seconds per video.")
    grid: Annotated[int, Field(ge=1, le=64)] = Field(7, description="Cells along each side of a visual map.")
    visual_features: Annotated[int, Field(ge=1, le=8192)] = Field(512, description="Channels per cell of a visual map.")
    audio_features: Annotated[int, Field(ge=1, le=8192)] = Field(128, description="Channels of an audio embedding.")


@dataclass(frozen=True, kw_only=True)
class SynthResult(MarkdownResult):
    """A generated dataset."""

    out: Path
    videos: int
    background_videos: int
    bytes: int
    seconds: float
    ok: bool = True

    def markdown(self) -> str:
        """Return one line."""
        return (
            f"Generated {self.out}: {self.videos} videos, {self.background_videos} background videos, "
            f"{self.bytes / 1e6:.0f} MB, in {self.seconds:.1f} s."
        )


def run(parameters: SynthParameters, *, run_id: str | None = None) -> SynthResult:
    """Generate a dataset in the published format."""
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
            active_run = tracking.open_run(run_id)
            active_run.log_params(parameters)
            active_run.log_dataset(out, folder.fingerprint, "synthetic")
    return result
