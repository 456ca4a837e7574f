"""Read and write checkpoints: those of this project, and the published ones.

Files of this project (`save`, `load`) hold the state of a training as plain values and tensors. Published checkpoints
(`import_published`, `export_published`) are state dicts that the released code of the paper loads.
"""

import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmran.config import Mode, ModelConfig, RunConfig, parse
from cmran.errors import CheckpointError
from cmran.model.network import CMRAN
from cmran.utils.files import atomic_write

FORMAT = 2
"""Version of the checkpoint files of this project. Other versions are rejected."""

_UNUSED_SEED = 0
"""Seed of the values that are written for the unused weights of the published network."""

_CLASS_HEAD = "localize_module.event_classifier.weight"

# Name of each module in the published network. Below these, attention and layer parts keep their names.
_PUBLISHED_NAMES = {
    "visual_fc": "v_fc",
    "attention.visual_channel": "spatial_channel_att.affine_video_1",
    "attention.audio_channel": "spatial_channel_att.affine_audio_1",
    "attention.bottleneck": "spatial_channel_att.affine_bottleneck",
    "attention.gate": "spatial_channel_att.affine_v_c_att",
    "attention.visual_spatial": "spatial_channel_att.affine_video_2",
    "attention.audio_spatial": "spatial_channel_att.affine_audio_2",
    "attention.score": "spatial_channel_att.affine_v_s_att",
    "visual_temporal.project": "video_encoder.affine_matrix",
    "audio_temporal.project": "audio_encoder.affine_matrix",
    "visual_temporal.layers": "video_encoder.encoder.layers",
    "audio_temporal.layers": "audio_encoder.encoder.layers",
    "visual_relation.project": "video_decoder.affine_matrix",
    "audio_relation.project": "audio_decoder.affine_matrix",
    "visual_relation.layer": "video_decoder.decoder.layers.0",
    "audio_relation.layer": "audio_decoder.decoder.layers.0",
    "interaction.attention": "AVInter.video_multihead",
    "interaction.norm": "AVInter.norm1",
    "event_head": "localize_module.classifier",
    "class_head": "localize_module.event_classifier",
}


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: The file to write or replace.
        state: Tensors and plain values, which `torch.load(..., weights_only=True)` accepts.

    Raises:
        StorageError: The file cannot be written; an existing file is unchanged.
    """
    # Serialized in memory first, so that a full disk is reported by the system's own error and not by one of torch.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project to the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, not of this project, or of another format version.
    """
    state = _unpickle(path)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of this project", "name another file")
    if (found := state["format"]) != FORMAT:
        raise CheckpointError(
            f"{path}: found checkpoint format {found}, expected {FORMAT}: another version of cmran wrote it",
            "train again, or use that version",
        )
    return state


def load_model(path: Path, mode: Mode | None = None) -> tuple[CMRAN, dict[str, Any]]:
    """Load the network of a checkpoint.

    Args:
        path: A best.pt or last.pt, a run directory (its best.pt is read), or a published `.pth.tar`.
        mode: The expected mode. None: that of the file; for a published checkpoint it follows from the weights.

    Returns:
        The network, in evaluation mode and on the CPU, and the other content of the file: the keys of last.pt or
        best.pt, or {"mode": ...} for a published checkpoint.

    Raises:
        CheckpointError: The file is missing, damaged or of another mode, or its weights do not fit its settings.
    """
    if path.is_dir():
        path = path / "best.pt"
    if path.name.endswith(".pth.tar"):
        model = import_published(path, mode)
        return model.eval(), {"mode": model.config.mode}
    state = load(path)
    config = parse(RunConfig, state["config"], str(path), CheckpointError)
    if mode is not None and config.model.mode != mode:
        raise CheckpointError(f"{path}: found mode {config.model.mode}, expected mode {mode}")
    model = CMRAN(config.model)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: the weights do not fit the settings: {' '.join(str(error).split())}") from None
    return model.eval(), state


def published_name(epoch: int, accuracy: float) -> str:
    """Return the published file name; `accuracy` is in %. The published code names both modes "Supervised"."""
    return f"model_epoch_{epoch}_top1_{accuracy:.3f}_task_Supervised_best_model.pth.tar"


def export_published(model: CMRAN) -> dict[str, Tensor]:
    """Convert the weights of a network into a published checkpoint, which the published code loads strictly.

    The published network has weights on which no output depends. They get the initial values of their layers (torch's
    defaults), drawn from a fixed seed: they are the same in every file, and torch's random numbers are not affected.
    They are omitted for an ablation. With other sizes than the published ones, all keys exist in these sizes. With the
    published sizes, `import_published` reads the result.

    Args:
        model: The network.

    Returns:
        Tensors on the CPU in the dtype of the model, by the published keys with the prefix `module.`. Empty if the
        published code would compute something else with the weights: see `reason_not_published`.
    """
    return published_state(model.state_dict(), model.config)


def published_state(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert the state dict of a `CMRAN(config)`: see `export_published`."""
    if _other_heads(config):
        return {}
    found = {_published_key(key): value.detach().cpu() for key, value in weights.items()}
    if not config.ablations:
        dtype = next(iter(found.values())).dtype
        unused = _unused_weights(config.width, config.feedforward, config.visual_features)
        found |= {key: value.to(dtype, copy=True) for key, value in unused.items()}
    return {f"module.{key}": value for key, value in found.items()}


def reason_not_published(config: ModelConfig) -> str | None:
    """Explain why the published code cannot load the weights of such a network. None: it can."""
    if config.ablations:
        names = ", ".join(config.ablations)
        return f"model_epoch_*.pth.tar does not load in the published code, which has no {names}"
    if _other_heads(config):
        return (
            "no model_epoch_*.pth.tar is written: the published code would load it but use another number of attention"
            " heads"
        )
    return None


def _other_heads(config: ModelConfig) -> bool:
    """Whether the weights have the published sizes but another number of heads, which the sizes do not show."""
    published = ModelConfig(mode=config.mode)
    heads = (config.heads, config.effective_interaction_heads)
    return config.width == published.width and heads != (published.heads, published.effective_interaction_heads)


def import_published(
    source: Mapping[str, Tensor] | Path | str, mode: Mode | None = None, dtype: torch.dtype = torch.float32
) -> CMRAN:
    """Load the network of a published checkpoint. Only tensors are unpickled.

    Args:
        source: A state dict or the path of a `.pth.tar`; keys with or without the prefix `module.`. The weights on
            which no output depends are dropped; they may be absent, but only all together.
        mode: The expected mode. None: 28 classes mean full mode, 29 weak mode.
        dtype: Of the network. Published weights are float64; float32 rounds them.

    Returns:
        The network, in evaluation mode.

    Raises:
        CheckpointError: The message names every key that is missing, unknown, duplicated, of another shape or not
            finite.
    """
    where = "state dict"
    if not isinstance(source, Mapping):
        where, source = str(source), _unpickle(Path(source))
    if not isinstance(source, Mapping):
        raise CheckpointError(f"{where}: expected a state dict, found {type(source).__name__}")
    found = {str(key).removeprefix("module."): value for key, value in source.items()}
    duplicated = [key for key in found if key in source and f"module.{key}" in source]

    mode = mode or _mode_of(found, where)
    model = CMRAN(ModelConfig(mode=mode))
    used = {_published_key(key): (key, value) for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, (_, value) in used.items()}
    unused = _unused_shapes(model.config.width, model.config.feedforward, model.config.visual_features)
    if unused.keys() & found.keys():
        shapes |= unused

    problems = [f"missing {key}" for key in shapes if key not in found]
    problems += [f"unknown {key}" for key in found if key not in shapes]
    problems += [f"{key} is duplicated, with and without the prefix module." for key in duplicated]
    for key, shape in shapes.items():
        value = found.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{key} is {kind}, expected a floating-point tensor")
        elif tuple(value.shape) != shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {shape}")
        elif value.layout != torch.strided or value.is_meta:
            problems.append(f"{key} is a sparse or meta tensor, expected a dense one")
        elif key in used and not torch.isfinite(value.to(dtype)).all():
            problems.append(f"{key} contains NaN, infinities or values beyond {str(dtype).removeprefix('torch.')}")
    if problems:
        raise CheckpointError(f"{where}: not a published CMRAN checkpoint of mode {mode}: {'; '.join(problems)}")

    model = model.to(dtype)
    model.load_state_dict({ours: found[key] for key, (ours, _) in used.items()})
    return model.eval()


def _mode_of(found: Mapping[str, Tensor], where: str) -> Mode:
    """Return the mode of a published state dict, whose keys have no `module.`."""
    head = found.get(_CLASS_HEAD)
    classes = tuple(head.shape)[:1] if isinstance(head, Tensor) else None
    if classes == (28,):
        return "full"
    if classes == (29,):
        return "weak"
    what = "no such key" if classes is None else f"shape {tuple(found[_CLASS_HEAD].shape)}"
    raise CheckpointError(
        f"{where}: not a published CMRAN checkpoint: {_CLASS_HEAD} should have 28 (full mode) or 29 rows (weak mode),"
        f" found {what}"
    )


def _published_key(key: str) -> str:
    """Translate a key of our state dict."""
    for ours, theirs in _PUBLISHED_NAMES.items():
        if key.startswith(ours + "."):
            rest = key[len(ours) + 1 :]
            if "_temporal.layers" in ours:
                return f"{theirs}.{rest.replace('.attention.', '.self_attn.')}"
            if "_relation.layer" in ours:
                return f"{theirs}.{re.sub('^attention[.]', 'multihead_attn.', rest)}"
            return f"{theirs}.{rest}"
    raise KeyError(key)


def _unused_shapes(D: int, hidden: int, C: int) -> dict[str, tuple[int, ...]]:
    """Return key and shape of the published weights on which no output depends.

    D: width, hidden: width of the feed-forward networks, C: visual channels.
    """
    attention = {
        "in_proj_weight": (3 * D, D),
        "in_proj_bias": (3 * D,),
        "out_proj.weight": (D, D),
        "out_proj.bias": (D,),
    }
    rest: dict[str, tuple[int, ...]] = {
        "linear1.weight": (hidden, D),
        "linear1.bias": (hidden,),
        "linear2.weight": (D, hidden),
        "linear2.bias": (D,),
        "norm1.weight": (D,),
        "norm1.bias": (D,),
        "norm2.weight": (D,),
        "norm2.bias": (D,),
    }
    unused: dict[str, tuple[int, ...]] = {}
    for stream in ("video", "audio"):
        unused |= {f"{stream}_encoder.encoder_layer.self_attn.{key}": shape for key, shape in attention.items()}
        unused |= {f"{stream}_encoder.encoder_layer.{key}": shape for key, shape in rest.items()}
        template = f"{stream}_decoder.decoder_layer"
        unused |= {f"{template}.self_attn.{key}": shape for key, shape in attention.items()}
        unused |= {f"{template}.multihead_attn.{key}": shape for key, shape in attention.items()}
        unused |= {f"{template}.{key}": shape for key, shape in rest.items()}
        unused |= {f"{stream}_decoder.decoder.layers.0.self_attn.{key}": shape for key, shape in attention.items()}
    guided = "spatial_channel_att.affine_video_guided"
    unused |= {f"{guided}_1.weight": (64, C), f"{guided}_1.bias": (64,)}
    unused |= {f"{guided}_2.weight": (128, 64), f"{guided}_2.bias": (128,)}
    return unused


# Cached because a training writes them after each best epoch.
@lru_cache(maxsize=1)
def _unused_weights(D: int, hidden: int, C: int) -> dict[str, Tensor]:
    """Draw the initial values of `_unused_shapes`, float32, from a separate generator."""
    generator = torch.Generator().manual_seed(_UNUSED_SEED)
    shapes = _unused_shapes(D, hidden, C)
    values = {}
    for key, shape in shapes.items():
        if ".norm" in key:
            values[key] = torch.full(shape, 1.0 if key.endswith(".weight") else 0.0)
        elif key.endswith(("in_proj_bias", "out_proj.bias")):
            values[key] = torch.zeros(shape)
        elif key.endswith("in_proj_weight"):
            # As torch.nn.MultiheadAttention does.
            values[key] = torch.nn.init.xavier_uniform_(torch.empty(shape), generator=generator)
        else:
            # As torch.nn.Linear does: weight and bias are uniform within 1 / sqrt(inputs).
            bound = shapes[key.replace(".bias", ".weight")][1] ** -0.5
            values[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return values


def _unpickle(path: Path) -> Any:
    """Read the tensors and plain values of a file written by torch."""
    try:
        # torch itself does not verify the checksums of the archive.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise CheckpointError(f"{path}: damaged, or saved without checksums: the one of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not os.path.exists(path):
            raise CheckpointError(
                f"no checkpoint at {path}", "name a best.pt, a run directory or a published .pth.tar"
            ) from None
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        # torch also raises this for a pickle that contains more than tensors. Its advice to trust the file is cut off.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise CheckpointError(f"{path}: rejected: it contains more than tensors, or is damaged ({reason})") from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        IndexError,
        TypeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or not a checkpoint: {reason}") from None
