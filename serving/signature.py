"""The interface of an exported model: its inputs, its outputs and its metadata.

Shape letters: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
"""

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from cmran.categories import BACKGROUND
from cmran.config import Frozen, Mode, Variant, parse
from cmran.errors import ExportError

INPUTS = ("visual", "audio")
"""Visual maps (B, T, H, W, C) and audio embeddings (B, T, A), float32."""
OUTPUTS = ("event_logits", "class_logits", "segments")
"""Event logits (B, T) and class logits (B, K), float32; segment labels (B, T), int64."""

_TEXT_KEYS = ("mode", "variant")
"""Metadata that are stored as plain text, not as JSON."""


class ModelMetadata(Frozen):
    """The metadata of an ONNX file on which predictions depend."""

    mode: Mode
    """Supervised ("full") or weakly supervised ("weak")."""
    categories: tuple[str, ...] = Field(min_length=BACKGROUND, max_length=BACKGROUND)
    """Names of the labels 0 to 27. Label 28 is background."""
    visual_features: int = Field(ge=1)
    """C, channels of a visual cell."""
    audio_features: int = Field(ge=1)
    """A, width of an audio embedding."""
    segments: int = Field(ge=1)
    """T, segments of a video."""
    grid: tuple[int, int]
    """(H, W), visual cells of a segment."""
    variant: Variant = "float32"
    """Number format of the weights and the matrix products. Inputs and outputs are float32 in every variant."""

    @property
    def classes(self) -> int:
        """K, the width of the class logits. Only weak mode has a logit for background."""
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
        """Return the metadata as ONNX stores them: strings. Values that are not text become JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.model_dump().items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], where: str) -> Self:
        """Parse the metadata of an ONNX file.

        Args:
            strings: The metadata as ONNX stores them. Other keys are ignored.
            where: Name of the file, for error messages.

        Raises:
            ExportError: A key is missing, or its value is not JSON.
            CmranError: A value is out of range.
        """
        missing = [key for key, field in cls.model_fields.items() if field.is_required() and key not in strings]
        if missing:
            raise ExportError(
                f"{where}: not a model exported by this project: its metadata lacks {', '.join(missing)}",
                hint="export it with `cmran export`",
            )
        values: dict[str, Any] = {}
        for key in cls.model_fields.keys() & strings.keys():
            try:
                values[key] = strings[key] if key in _TEXT_KEYS else json.loads(strings[key])
            except (ValueError, RecursionError):
                raise ExportError(f"{where}: metadata {key}: expected JSON, found {strings[key][:80]!r}") from None
        return parse(cls, values, f"{where}: metadata")
