"""The ten files of a data folder, as one table that the reader, the validator, the generator and the README share.

Shape letters: N videos, M background videos (extra training data of weak mode), T segments, H x W grid of visual
cells, C visual channels, A audio features. `Annotations.txt` is the eleventh file. It is optional, and the label files
can be built from it.
"""

from dataclasses import dataclass
from typing import Literal

ANNOTATIONS = "Annotations.txt"


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """One HDF5 file with one dataset."""

    name: str
    key: str
    """Name of the dataset in the file."""
    shape: tuple[str | int, ...]
    """Shape letters as above; "R" is the number of rows of a split, which differs between files; numbers are exact."""
    published_shape: tuple[int, ...]
    dtype: str
    """Dtype of the published file."""
    kind: Literal["features", "labels", "order"]
    """Allowed dtypes. features: float64/32/16; labels: one-hot, any real or integer dtype; order: integers."""
    weak_only: bool = False
    """Whether only weak mode needs the file."""
    derivable: bool = False
    """Whether a missing file is built: from Annotations.txt, or (labels_noisy.h5) because every row is background."""
    content: str

    @property
    def shape_text(self) -> str:
        """The shape in letters, for example `(N, T, 29)`."""
        return f"({', '.join(map(str, self.shape))}{',' if len(self.shape) == 1 else ''})"

    @property
    def published_text(self) -> str:
        """The published shape, for example `4143 x 10 x 29`."""
        return " x ".join(map(str, self.published_shape))


VISUAL = FileSpec(
    name="visual_feature.h5",
    key="avadataset",
    shape=("N", "T", "H", "W", "C"),
    published_shape=(4143, 10, 7, 7, 512),
    dtype="float64",
    kind="features",
    content="VGG-19 pool5 maps, >= 0, mean of the second's frames",
)
AUDIO = FileSpec(
    name="audio_feature.h5",
    key="avadataset",
    shape=("N", "T", "A"),
    published_shape=(4143, 10, 128),
    dtype="float64",
    kind="features",
    content="VGGish embedding of each second",
)
LABELS = FileSpec(
    name="labels.h5",
    key="avadataset",
    shape=("N", "T", 29),
    published_shape=(4143, 10, 29),
    dtype="float32",
    kind="labels",
    derivable=True,
    content="one-hot segment labels, background = 28",
)
MIL_LABELS = FileSpec(
    name="mil_labels.h5",
    key="avadataset",
    shape=("N", 29),
    published_shape=(4143, 29),
    dtype="float32",
    kind="labels",
    weak_only=True,
    derivable=True,
    content="one-hot video label: the event category, never background",
)
TRAIN_ORDER = FileSpec(
    name="train_order.h5",
    key="order",
    shape=("R",),
    published_shape=(3339,),
    dtype="int64",
    kind="order",
    content="row numbers of the training videos",
)
VAL_ORDER = FileSpec(
    name="val_order.h5",
    key="order",
    shape=("R",),
    published_shape=(402,),
    dtype="int64",
    kind="order",
    content="row numbers of the validation videos",
)
TEST_ORDER = FileSpec(
    name="test_order.h5",
    key="order",
    shape=("R",),
    published_shape=(402,),
    dtype="int64",
    kind="order",
    content="row numbers of the test videos",
)
VISUAL_NOISY = FileSpec(
    name="visual_feature_noisy.h5",
    key="avadataset",
    shape=("M", "T", "H", "W", "C"),
    published_shape=(178, 10, 7, 7, 512),
    dtype="float64",
    kind="features",
    weak_only=True,
    content="visual maps of the background videos",
)
AUDIO_NOISY = FileSpec(
    name="audio_feature_noisy.h5",
    key="avadataset",
    shape=("M", "T", "A"),
    published_shape=(178, 10, 128),
    dtype="float64",
    kind="features",
    weak_only=True,
    content="audio embeddings of the background videos",
)
LABELS_NOISY = FileSpec(
    name="labels_noisy.h5",
    key="avadataset",
    shape=("M", 29),
    published_shape=(178, 29),
    dtype="float32",
    kind="labels",
    weak_only=True,
    derivable=True,
    content="one-hot labels of the background videos: all background",
)

FILES: tuple[FileSpec, ...] = (
    VISUAL,
    AUDIO,
    LABELS,
    MIL_LABELS,
    TRAIN_ORDER,
    VAL_ORDER,
    TEST_ORDER,
    VISUAL_NOISY,
    AUDIO_NOISY,
    LABELS_NOISY,
)
ORDERS: dict[str, FileSpec] = {"train": TRAIN_ORDER, "val": VAL_ORDER, "test": TEST_ORDER}


def markdown_table() -> str:
    """Return the ten files as the Markdown table of README.md."""
    lines = [
        "| file | key | shape | published as | needed | content |",
        "|---|---|---|---|---|---|",
    ]
    for spec in FILES:
        needed = "weak mode" if spec.weak_only else "always"
        if spec.derivable:
            needed += ", or built"
        published = f"{spec.published_text}, {spec.dtype}"
        lines.append(f"| `{spec.name}` | `{spec.key}` | {spec.shape_text} | {published} | {needed} | {spec.content} |")
    return "\n".join(lines) + "\n"
