"""A trained network as an ONNX model, and the proof that both say the same.

Shape letters as in cmran.model: B videos, T segments, H x W grid, C visual channels, A audio features, K class logits.
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


_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Exportable(nn.Module):
    """The network with its prediction rule: what the ONNX model computes."""

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
    """Write `model` as a self-contained float32 ONNX file: any batch size, `segments` and `grid` (H, W) fixed.

    Inputs visual (B, T, H, W, C) and audio (B, T, A), float32; outputs event_logits (B, T) and class_logits (B, K),
    float32, and segments (B, T), int64. A network that leaves one modality out takes both inputs all the same.

    The file's metadata say what `ModelMetadata` lists, cmran_version, model_config (JSON), and all of `metadata`
    (run_id, git_commit, fingerprint, ...). No path of this machine goes into it; equal weights and metadata give equal
    bytes under the same versions. `model` itself is left as it is.

    Raises ValueError where `metadata` contradicts the model; CmranError where the file cannot be written.
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
            raise ValueError(f"metadata {key}: {value!r} contradicts the model, which says {strings[key]!r}")

    exportable = Exportable(_frozen_copy(model)).eval()
    # A batch of one would be frozen into the graph.
    example = (torch.zeros(2, *own.visual_shape), torch.zeros(2, *own.audio_shape))
    batch = torch.export.Dim("batch")
    with _quiet(), torch.no_grad():
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


def _frozen_copy(model: CMRAN) -> CMRAN:
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of packages it does not need and of optimisations it leaves out."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
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
    """Write `proto` atomically with `strings` as its only metadata; equal models give equal bytes."""
    strip(proto)
    for key, value in sorted(strings.items()):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    with atomic_write(path) as file:
        file.write(proto.SerializeToString(deterministic=True))
    return path


def strip(proto: "ModelProto") -> None:
    """Take out all metadata of a model and of its parts: stack traces and scopes tell of this machine."""
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
