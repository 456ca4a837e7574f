"""Checkpoints: ours, and the published ones (read, and written so that the published code loads them)."""

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
from cmran.errors import CmranError
from cmran.model.network import CMRAN
from cmran.utils.files import atomic_write

FORMAT = 1
"""Version of our checkpoint files."""


_DEAD_SEED = 0
"""Of the initial values of the dead weights that we write."""


_CLASS_HEAD = "localize_module.event_classifier.weight"


# Our module -> the published one. Attention and layer parts keep their names below these.
_RENAMED = {
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
    """Write `state` atomically; it must load with `torch.load(..., weights_only=True)`.

    Raises CmranError where it cannot be written; the old file then stands untouched.
    """
    # Through memory: writing to a full disk then fails with the system's own reason, not torch's.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU. Raises CmranError where it is missing, damaged or not one of ours."""
    state = _unpickle(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CmranError(f"{path} is not a checkpoint of this project (format {FORMAT}): retrain, or name another file")
    return state


def load_model(path: Path, mode: Mode | None = None) -> tuple[CMRAN, dict[str, Any]]:
    """The network of a checkpoint, in evaluation mode, and what else the file says.

    `path`: best.pt or last.pt, a run's folder (its best.pt), or a published `.pth.tar`, whose mode its weights tell.
    Our files give the keys of `training`; a published one {"mode": ...} alone.

    Raises CmranError: no such file, damaged, another mode than asked for, weights that do not fit.
    """
    if path.is_dir():
        path = path / "best.pt"
    if path.name.endswith(".pth.tar"):
        model = import_published(path, mode)
        return model.eval(), {"mode": model.config.mode}
    state = load(path)
    config = parse(RunConfig, state["config"], str(path))
    if mode is not None and config.model.mode != mode:
        raise CmranError(f"{path} is of mode {config.model.mode}, but mode {mode} was asked for")
    model = CMRAN(config.model)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        raise CmranError(f"{path}: weights do not fit its settings: {' '.join(str(error).split())}") from None
    return model.eval(), state


def published_name(epoch: int, accuracy: float) -> str:
    """File name of a published checkpoint; `accuracy` in %. The published code names both modes "Supervised"."""
    return f"model_epoch_{epoch}_top1_{accuracy:.3f}_task_Supervised_best_model.pth.tar"


def export_published(model: CMRAN) -> dict[str, Tensor]:
    """A published checkpoint of the model: all its keys (prefix `module.`), which the published code loads strictly.

    The published dead weights, on which no output depends, get the initial values of their layers (torch's defaults),
    drawn from a fixed seed: they are the same in every file and leave torch's random numbers alone. Tensors have the
    model's dtype and lie on the CPU; the published float64 network widens them as it loads them.

    Where `not_published` gives a reason, the dead weights are left out (an ablation) or the result is empty (heads).
    With other sizes than the published ones all keys are there in these sizes. With the published sizes
    `import_published` reads the result back.
    """
    return published_state(model.state_dict(), model.config)


def published_state(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`export_published` of the state dict of a `CMRAN(config)`."""
    if _other_heads(config):
        return {}
    found = {_published_key(key): value.detach().cpu() for key, value in weights.items()}
    if not config.ablations:
        dtype = next(iter(found.values())).dtype
        dead = _dead_weights(config.width, config.feedforward, config.visual_features)
        found |= {key: value.to(dtype, copy=True) for key, value in dead.items()}
    return {f"module.{key}": value for key, value in found.items()}


def not_published(config: ModelConfig) -> str | None:
    """Why the published code cannot load what this network learns, whatever its sizes; None where it can."""
    if config.ablations:
        names = ", ".join(config.ablations)
        return f"model_epoch_*.pth.tar does not load in the published code, which has no {names}"
    if _other_heads(config):
        return (
            "no model_epoch_*.pth.tar is written: the published code would load it, but compute with other numbers of"
            " attention heads"
        )
    return None


def _other_heads(config: ModelConfig) -> bool:
    """Whether the weights have the published sizes, which do not show that the heads are others."""
    published = ModelConfig(mode=config.mode)
    heads = (config.heads, config.effective_interaction_heads)
    return config.width == published.width and heads != (published.heads, published.effective_interaction_heads)


def import_published(
    source: Mapping[str, Tensor] | Path | str, mode: Mode | None = None, dtype: torch.dtype = torch.float32
) -> CMRAN:
    """The network with the weights of a published checkpoint, in evaluation mode.

    `source`: a state dict or the path of a `.pth.tar`, keys with or without `module.`. Only tensors are unpickled.
    `mode`: None takes the one that the weights tell: 28 classes are full mode, 29 weak mode.
    `dtype`: of the network; published weights are float64, and float32 rounds them.
    The published dead weight, on which no output depends, is dropped; it may be absent as a whole.

    Raises CmranError naming every key that is missing, unknown, given twice, of another shape or not finite.
    """
    where = "state dict"
    if not isinstance(source, Mapping):
        where, source = str(source), _unpickle(Path(source))
    if not isinstance(source, Mapping):
        raise CmranError(f"{where}: expected a state dict, found {type(source).__name__}")
    found = {str(key).removeprefix("module."): value for key, value in source.items()}
    twice = [key for key in found if key in source and f"module.{key}" in source]

    mode = mode or _mode_of(found, where)
    model = CMRAN(ModelConfig(mode=mode))
    live = {_published_key(key): (key, value) for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, (_, value) in live.items()}
    dead = _dead_shapes(model.config.width, model.config.feedforward, model.config.visual_features)
    if dead.keys() & found.keys():
        shapes |= dead

    problems = [f"missing {key}" for key in shapes if key not in found]
    problems += [f"unknown {key}" for key in found if key not in shapes]
    problems += [f"{key} is there twice, with and without the prefix module." for key in twice]
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
            problems.append(f"{key} is a sparse or meta tensor, expected its values one by one")
        elif key in live and not torch.isfinite(value.to(dtype)).all():
            problems.append(f"{key} holds NaN, infinities or values beyond {str(dtype).removeprefix('torch.')}")
    if problems:
        raise CmranError(f"{where}: not a published CMRAN checkpoint of mode {mode}: {'; '.join(problems)}")

    model = model.to(dtype)
    model.load_state_dict({ours: found[key] for key, (ours, _) in live.items()})
    return model.eval()


def _mode_of(found: Mapping[str, Tensor], where: str) -> Mode:
    """The mode of a published state dict, keys without `module.`."""
    head = found.get(_CLASS_HEAD)
    classes = tuple(head.shape)[:1] if isinstance(head, Tensor) else None
    if classes == (28,):
        return "full"
    if classes == (29,):
        return "weak"
    what = "no such key" if classes is None else f"shape {tuple(found[_CLASS_HEAD].shape)}"
    raise CmranError(
        f"{where}: not a published CMRAN checkpoint: {_CLASS_HEAD} should have 28 (full mode) or 29 rows (weak mode),"
        f" found {what}"
    )


def _published_key(key: str) -> str:
    for ours, theirs in _RENAMED.items():
        if key.startswith(ours + "."):
            rest = key[len(ours) + 1 :]
            if "_temporal.layers" in ours:
                return f"{theirs}.{rest.replace('.attention.', '.self_attn.')}"
            if "_relation.layer" in ours:
                return f"{theirs}.{re.sub('^attention[.]', 'multihead_attn.', rest)}"
            return f"{theirs}.{rest}"
    raise KeyError(key)


def _dead_shapes(D: int, hidden: int, C: int) -> dict[str, tuple[int, ...]]:
    """Key and shape of the weights in a published checkpoint that no output depends on.

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
    dead: dict[str, tuple[int, ...]] = {}
    for stream in ("video", "audio"):
        dead |= {f"{stream}_encoder.encoder_layer.self_attn.{key}": shape for key, shape in attention.items()}
        dead |= {f"{stream}_encoder.encoder_layer.{key}": shape for key, shape in rest.items()}
        template = f"{stream}_decoder.decoder_layer"
        dead |= {f"{template}.self_attn.{key}": shape for key, shape in attention.items()}
        dead |= {f"{template}.multihead_attn.{key}": shape for key, shape in attention.items()}
        dead |= {f"{template}.{key}": shape for key, shape in rest.items()}
        dead |= {f"{stream}_decoder.decoder.layers.0.self_attn.{key}": shape for key, shape in attention.items()}
    guided = "spatial_channel_att.affine_video_guided"
    dead |= {f"{guided}_1.weight": (64, C), f"{guided}_1.bias": (64,)}
    dead |= {f"{guided}_2.weight": (128, 64), f"{guided}_2.bias": (128,)}
    return dead


# The values of one size are kept: a run writes them after each best epoch.
@lru_cache(maxsize=1)
def _dead_weights(D: int, hidden: int, C: int) -> dict[str, Tensor]:
    """Initial values of `_dead_shapes`, float32, from a generator of their own."""
    generator = torch.Generator().manual_seed(_DEAD_SEED)
    shapes = _dead_shapes(D, hidden, C)
    values = {}
    for key, shape in shapes.items():
        if ".norm" in key:
            values[key] = torch.full(shape, 1.0 if key.endswith(".weight") else 0.0)
        elif key.endswith(("in_proj_bias", "out_proj.bias")):
            values[key] = torch.zeros(shape)
        elif key.endswith("in_proj_weight"):
            # As torch.nn.MultiheadAttention: Xavier.
            values[key] = torch.nn.init.xavier_uniform_(torch.empty(shape), generator=generator)
        else:
            # As torch.nn.Linear: uniform within 1 / sqrt(inputs), the bias too.
            bound = shapes[key.replace(".bias", ".weight")][1] ** -0.5
            values[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return values


def _unpickle(path: Path) -> Any:
    try:
        # Torch itself does not look at the checksums of the archive.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise CmranError(f"{path}: damaged, or saved without checksums: that of {damaged} in it is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not os.path.exists(path):
            raise CmranError(f"no checkpoint at {path}: name a best.pt, a run's folder or a .pth.tar") from None
        raise CmranError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        # torch raises this for a pickle that asks for more than tensors, too; its advice to trust it is not ours.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise CmranError(f"{path}: refused: it holds more than tensors, or is damaged ({reason})") from None
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
        raise CmranError(f"{path}: damaged or not a checkpoint: {reason}") from None
