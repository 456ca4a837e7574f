"""Export of a trained network to an ONNX file that is self-contained and reproducible.

Shape letters: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import cmran
from cmran.categories import CATEGORIES
from cmran.model.losses import predict_segments
from cmran.model.network import CMRAN, Outputs
from cmran.utils.files import atomic_write
from serving.signature import INPUTS, OUTPUTS, ModelMetadata

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20

_EXPORT_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Exportable(nn.Module):
    """The network with its prediction rule: the function that the ONNX model computes."""

    def __init__(self, model: CMRAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Visual (B, T, H, W, C), audio (B, T, A) -> event logits (B, T), class logits (B, K), labels (B, T)."""
        outputs: Outputs = self.model(visual, audio)
        return outputs.event_logits, outputs.class_logits, predict_segments(outputs)


def export_onnx(
    model: CMRAN, path: Path, *, segments: int, grid: tuple[int, int], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a network as one float32 ONNX file, which accepts any batch size.

    The inputs are visual (B, T, H, W, C) and audio (B, T, A), float32. The outputs are event_logits (B, T) and
    class_logits (B, K), float32, and segments (B, T), int64. A network that ignores one modality has both inputs too.

    The file contains no path of this machine. Equal weights and metadata give equal bytes under the same versions of
    the libraries. `model` is not changed.

    Args:
        model: The network.
        path: The file to write, atomically.
        segments: T, fixed in the file.
        grid: (H, W), fixed in the file.
        metadata: Additional metadata (run_id, git_commit, fingerprint, ...), beside the fields of `ModelMetadata`,
            cmran_version and model_config (JSON).

    Returns:
        `path`.

    Raises:
        ValueError: `metadata` contradicts the model.
        StorageError: The file cannot be written.
    """
    config = model.config
    own = ModelMetadata(
        mode=config.mode,
        categories=CATEGORIES,
        visual_features=config.visual_features,
        audio_features=config.audio_features,
        segments=segments,
        grid=grid,
    )
    strings = {**own.to_strings(), "cmran_version": cmran.__version__, "model_config": config.model_dump_json()}
    for key, value in (metadata or {}).items():
        if strings.setdefault(key, value) != value:
            raise ValueError(f"metadata {key}: {value!r} contradicts the model, which has {strings[key]!r}")

    exportable = Exportable(float32_copy(model)).eval()
    # Two videos, because a batch size of 1 would become a constant of the graph.
    example = (torch.zeros(2, *own.visual_shape), torch.zeros(2, *own.audio_shape))
    batch = torch.export.Dim("batch")
    with quiet(*_EXPORT_LOGGERS), torch.no_grad():
        program = torch.onnx.export(
            exportable,
            example,
            dynamo=True,
            dynamic_shapes={name: {0: batch} for name in INPUTS},
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    proto.graph.name = f"cmran-{config.mode}"
    return write_model(proto, strings, path)


def float32_copy(model: CMRAN) -> CMRAN:
    """Return a copy of the network for inference: on the CPU, in float32, without gradients."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hide the warnings of export tools: they concern optional packages and skipped optimizations, not the user."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def write_model(proto: "ModelProto", strings: Mapping[str, str], path: Path) -> Path:
    """Write `proto` atomically, with `strings` as its only metadata. Equal models give equal bytes."""
    _strip(proto)
    for key, value in sorted(strings.items()):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    with atomic_write(path) as file:
        file.write(proto.SerializeToString(deterministic=True))
    return path


def _strip(proto: "ModelProto") -> None:
    """Remove all metadata of a model and its parts: stack traces and scopes contain paths of this machine."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    graphs = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        parts = [graph, *graph.node, *graph.value_info]
        if graph is proto.graph:
            parts += [*graph.input, *graph.output, *graph.initializer]
        for part in parts:
            del part.metadata_props[:]
            part.doc_string = ""
        for node in graph.node:
            for attribute in node.attribute:
                attribute.doc_string = ""
