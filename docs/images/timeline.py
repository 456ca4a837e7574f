"""Draw timeline.png beside this file: train on synthetic data and show the predictions for some validation videos.

Run `python docs/images/timeline.py`; it takes about two minutes on two CPU cores. The picture is committed.
"""

import sys
import tempfile
from pathlib import Path

import cmran
from cmran.evaluation.plots import timeline_rows

VIDEOS = 5


def draw(work: Path, out: Path, *, videos: int = 540, epochs: int = 8) -> None:
    """Train in the folder `work` and draw the predictions into the file `out`."""
    data = cmran.synthesize(work / "data", videos=videos, dtype="float32")
    config = cmran.load_config("full", "demo", overrides={"train": {"epochs": epochs, "precision": "auto"}})
    cmran.fit(data, config, work / "run", evaluate_test=False)
    model, _ = cmran.load_model(work / "run")
    with cmran.open_folder(data) as folder:
        rows = folder.order("val")
        rows = rows[timeline_rows(len(rows), VIDEOS)]
        cmran.timeline_png(
            cmran.predict(model, folder, rows).segments,
            folder.segment_labels()[rows],
            [f"video {number}" for number in range(1, len(rows) + 1)],
            out,
            title="True and predicted events in synthetic validation videos",
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="cmran-docs-") as scratch:
        draw(Path(scratch), Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "timeline.png")
