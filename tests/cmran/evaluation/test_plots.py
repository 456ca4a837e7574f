"""Plots and tables: complete files, the required texts, no global state."""

import csv
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmran.categories import BACKGROUND, CATEGORIES, LABELS
from cmran.errors import CmranError
from cmran.evaluation.metrics import Evaluation, evaluate
from cmran.evaluation.plots import CATEGORY_COLORS, _save, confusion_png, curves_png, timeline_png, timeline_rows
from cmran.evaluation.tables import per_category_csv, per_category_markdown, per_category_table, scores_table


@pytest.fixture(scope="module")
def scores() -> Evaluation:
    """Scores of 60 synthetic videos; the last three categories do not occur."""
    random = np.random.default_rng(0)
    true = np.where(random.random((60, 10)) < 0.2, BACKGROUND, random.integers(0, 25, (60, 1)))
    pred = np.where(random.random((60, 1)) < 0.3, random.integers(0, 29, (60, 1)), true)
    return evaluate(pred, true, leak_free=np.arange(60) > 3, train_labels=true)


def _epochs(accuracies: list[float], split: str = "val") -> list[dict[str, Any]]:
    return [
        {"epoch": i, "lr": 5e-4, "train_loss": 1 / i, "train_accuracy": None, "val": {"accuracy": 50.0}, "test": None}
        | {split: {"accuracy": accuracy}}
        for i, accuracy in enumerate(accuracies, 1)
    ]


def _size(path: Path) -> tuple[int, int]:
    """Return width and height of a PNG file; check that it is complete."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the figures that the test saves."""
    from matplotlib.text import Text

    texts: list[str] = []
    save = _save

    def spy(figure: Any, path: Path) -> None:
        save(figure, path)
        texts.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr("cmran.evaluation.plots._save", spy)
    return texts


def test_confusion_names_every_label(scores: Evaluation, tmp_path: Path, drawn: list[str]) -> None:
    confusion_png(scores, tmp_path / "confusion.png", title="Confusion on val")
    width, height = _size(tmp_path / "confusion.png")
    assert min(width, height) > 1000
    assert set(LABELS) <= set(drawn)
    assert f"Church bell  ({scores.per_category[0].segments})" in drawn
    assert any(text.startswith("Confusion on val\nsegment accuracy") for text in drawn)
    assert not any("selected on test" in text for text in drawn)


def test_scores_can_be_a_dictionary(scores: Evaluation, tmp_path: Path) -> None:
    confusion_png(scores, tmp_path / "a.png")
    confusion_png(scores.to_dict(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert per_category_table(scores) == per_category_table(scores.to_dict())


def test_curves_mark_the_first_best_epoch(tmp_path: Path, drawn: list[str]) -> None:
    curves_png(_epochs([40.0, 70.0, 70.0, 60.0]), tmp_path / "c.png", baselines={"always_background": 17.8})
    assert _size(tmp_path / "c.png")[0] > 900
    assert "best on val: 70.00 % (epoch 2)" in drawn
    assert "always background" in drawn
    assert not any("test" in text for text in drawn)


def test_curves_selected_on_test_say_so(tmp_path: Path, drawn: list[str]) -> None:
    curves_png(_epochs([30.0, 20.0], "test"), tmp_path / "c.png", title="run", selection_split="test")
    assert "run - epoch selected on test" in drawn
    assert "best on test: 30.00 % (epoch 1)" in drawn


def test_curves_connect_the_evaluated_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    lines: dict[tuple[str, str], list[float]] = {}
    plot = Axes.plot

    def recorded(self: Axes, x: Any, y: Any, **style: Any) -> Any:
        lines[style.get("label", ""), "loss" if np.max(y) < 10 else "accuracy"] = list(np.atleast_1d(x))
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", recorded)
    epochs = _epochs([40.0, 50.0, 70.0, 60.0])
    for epoch in epochs:
        epoch["val"] = epoch["val"] | {"loss": 2.0} if epoch["epoch"] in (2, 4) else None
    curves_png(epochs, tmp_path / "c.png")
    assert lines["val", "accuracy"] == lines["val", "loss"] == [2, 4]
    assert lines["train", "loss"] == [1, 2, 3, 4]


def test_curves_of_one_epoch_and_of_many(tmp_path: Path) -> None:
    curves_png(_epochs([40.0]), tmp_path / "one.png")
    curves_png(_epochs([40.0] * 200), tmp_path / "many.png")
    assert _size(tmp_path / "one.png") == _size(tmp_path / "many.png")


def test_curves_reject_missing_epochs_or_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no epoch to draw"):
        curves_png([], tmp_path / "c.png")
    with pytest.raises(ValueError, match="selection split 'test'"):
        curves_png(_epochs([1.0]), tmp_path / "c.png", selection_split="test")


def test_timeline(tmp_path: Path, drawn: list[str]) -> None:
    true = np.full((3, 10), BACKGROUND)
    true[0] = 0
    true[1, 2:5] = 3
    pred = true.copy()
    pred[0, :2] = 19
    titles = ["row 4\n-Owu1H-JG9w", "row 5\na$b$c", "row 6"]
    timeline_png(pred, true, titles, tmp_path / "t.png", selection_split="test")
    assert _size(tmp_path / "t.png")[0] > 1000
    assert set(titles) <= set(drawn)
    assert {"8/10", "10/10", "Church bell", "Fixed-wing aircraft, airplane", "Baby cry, infant cry"} <= set(drawn)
    assert "Bark" not in drawn
    assert any("epoch selected on test" in text for text in drawn)
    # Church bell: the true bar, the predicted one, the legend.
    assert drawn.count("Church bell") == 3


def test_a_name_longer_than_its_bar_is_in_the_legend_only(tmp_path: Path, drawn: list[str]) -> None:
    true = np.full((1, 10), BACKGROUND)
    true[0, 0] = 3
    timeline_png(true, true, ["row 0"], tmp_path / "t.png")
    assert drawn.count("Fixed-wing aircraft, airplane") == 1


def test_timeline_rejects_invalid_arguments(tmp_path: Path) -> None:
    labels = np.zeros((13, 10), np.int64)
    with pytest.raises(ValueError, match="1 to 12 videos"):
        timeline_png(labels, labels, ["x"] * 13, tmp_path / "t.png")
    with pytest.raises(ValueError, match="n titles"):
        timeline_png(labels[:2], labels[:2], ["x"], tmp_path / "t.png")
    assert list(tmp_path.iterdir()) == []


def test_timeline_rows_are_evenly_spread() -> None:
    assert timeline_rows(402).tolist() == [0, 36, 73, 109, 146, 182, 219, 255, 292, 328, 365, 401]
    assert timeline_rows(3).tolist() == [0, 1, 2]
    assert timeline_rows(1).tolist() == [0]


def test_csv_has_full_precision_and_empty_fields(scores: Evaluation, tmp_path: Path) -> None:
    per_category_csv(scores, tmp_path / "t.csv", selection_split="test")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["category"] for line in lines] == list(LABELS)
    assert {line["selected_on"] for line in lines} == {"test"}
    for line, expected in zip(lines, scores.per_category, strict=True):
        assert int(line["segments"]) == expected.segments
        assert (None if line["recall"] == "" else float(line["recall"])) == expected.recall
    assert lines[-2]["recall"] == ""  # Mandolin does not occur


def test_markdown_table(scores: Evaluation, tmp_path: Path) -> None:
    per_category_markdown(scores, tmp_path / "t.md")
    lines = (tmp_path / "t.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(LABELS)
    assert {line.count("|") for line in lines} == {10}
    assert lines[-2].startswith("| Mandolin | 0 | 0 | 0 | - |")
    assert [cell.strip() for cell in lines[-1].split("|")][5] == "-", "the background has no accuracy"
    assert per_category_table(scores, selection_split="test").startswith("**epoch selected on test")


def test_scores_table_includes_the_baselines(scores: Evaluation) -> None:
    table = scores_table(scores)
    assert f"| segment accuracy | {scores.accuracy:.2f} % (95 %:" in table
    assert "56 leak-free videos" in table
    assert f"| baseline: always background | {scores.baselines.always_background:.2f} % |" in table
    assert "| event / background AUC | - |" in table
    assert "selected on test" not in table
    assert "selected on test" in scores_table(scores, selection_split="test")
    assert "selection split unknown" in scores_table(scores, selection_split="unknown")


def test_each_category_has_its_own_color() -> None:
    assert len(set(CATEGORY_COLORS)) == len(CATEGORIES)


def test_threads_can_draw_at_the_same_time(scores: Evaluation, tmp_path: Path) -> None:
    def draw(i: int) -> bytes:
        path = tmp_path / f"{i}.png"
        curves_png(_epochs([10.0, 20.0]), path)
        return path.read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(draw, range(8)))) == 1


def test_a_failed_write_keeps_the_old_plot(scores: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "c.png"
    path.write_bytes(b"the old one")

    def torn(self: Figure, file: Any, **_: Any) -> None:
        file.write(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(CmranError, match=r"cannot write .*c\.png: No space left"):
        confusion_png(scores, path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_no_pyplot_and_matplotlib_only_when_drawing() -> None:
    code = (
        "import sys, pathlib, tempfile, cmran.evaluation.plots as f\n"
        "assert 'matplotlib' not in sys.modules\n"
        "e = [{'epoch': 1, 'lr': 1e-3, 'train_loss': 1.0, 'val': {'accuracy': 50.0}}]\n"
        "f.curves_png(e, pathlib.Path(tempfile.mkdtemp()) / 'c.png')\n"
        "assert 'matplotlib' in sys.modules\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
