"""Train CMRAN on synthetic data, score it, and predict one video. Takes about half a minute on two CPU cores.

python examples/quickstart.py [FOLDER]      # default: quickstart/ in the current folder
"""

import sys
from pathlib import Path

import cmran


def main(work: Path) -> None:
    """Run every step in the folder `work`."""
    data = cmran.synthesize(work / "data", videos=120, dtype="float32")
    config = cmran.load_config("full", "demo", overrides={"train": {"epochs": 2}})
    cmran.fit(data, config, work / "run", evaluate_test=False)

    model, info = cmran.load_model(work / "run")
    print(f"best epoch {info['epoch']}: {info['val_accuracy']:.1f} % of the val segments are correct")
    with cmran.open_folder(data) as folder:
        print(f"test: {cmran.evaluate(model, folder, 'test').accuracy:.1f} % of the segments are correct")
        row = int(folder.order("test")[0])
        predictions = cmran.predict(model, folder, [row])
        for event in cmran.predicted_events(predictions):
            print(f"row {row}: {cmran.CATEGORIES[event.category]}, {event.start_s:.0f} s to {event.end_s:.0f} s")
        cmran.timeline_png(predictions.segments, folder.segment_labels()[[row]], [f"row {row}"], work / "timeline.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart"))
