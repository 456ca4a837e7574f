"""An exported model in ONNX Runtime: what the file says of itself, and on which device it runs.

Shape letters as in cmran.model: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
"""

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from cmran.categories import BACKGROUND
from cmran.config import Frozen, Mode, Variant, parse
from cmran.errors import CmranError

INPUTS = ("visual", "audio")


OUTPUTS = ("event_logits", "class_logits", "segments")


_PLAIN = ("mode", "variant")
# Metadata that are one word, not JSON.


class ModelMetadata(Frozen):
    """What an exported model says of itself: the metadata of the ONNX file that predictions depend on."""

    mode: Mode
    categories: tuple[str, ...] = Field(min_length=BACKGROUND, max_length=BACKGROUND)
    # Names of the labels 0 to 27; 28 is background.
    visual_features: int = Field(ge=1)
    audio_features: int = Field(ge=1)
    segments: int = Field(ge=1)
    grid: tuple[int, int]
    # H, W.
    variant: Variant = "float32"
    # Number format of the weights and the matrix products; inputs and outputs are float32 in all.

    @property
    def classes(self) -> int:
        """K, the width of the class logits: background has one of its own in weak mode only."""
        return len(self.categories) + (self.mode == "weak")

    @property
    def visual_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C)."""
        return (self.segments, *self.grid, self.visual_features)

    @property
    def audio_shape(self) -> tuple[int, int]:
        """(T, A)."""
        return (self.segments, self.audio_features)

    def to_strings(self) -> dict[str, str]:
        """As ONNX metadata, which holds strings only: all but words as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.model_dump().items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], where: str) -> Self:
        """Parse ONNX metadata. Raises CmranError naming the key that is missing or wrong; `where` names the file."""
        missing = [key for key, field in cls.model_fields.items() if field.is_required() and key not in strings]
        if missing:
            raise CmranError(
                f"{where}: not a model exported by this project: its metadata lacks {', '.join(missing)}: "
                "export it with `cmran export`"
            )
        values: dict[str, Any] = {}
        for key in cls.model_fields.keys() & strings.keys():
            try:
                values[key] = strings[key] if key in _PLAIN else json.loads(strings[key])
            except (ValueError, RecursionError):
                raise CmranError(f"{where}: metadata {key}: expected JSON, found {strings[key][:80]!r}") from None
        return parse(cls, values, f"{where}: metadata")
