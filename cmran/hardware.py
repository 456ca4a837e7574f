"""What the machine can do: which device, which precision. Nothing is replaced silently."""

import logging
from pathlib import Path

import torch

from cmran.config import Device, Precision
from cmran.errors import UserError

log = logging.getLogger(__name__)


def pick_device(device: Device) -> torch.device:
    """The torch device for a choice; "auto" takes a GPU where one works, and says which it took.

    Raises UserError for "cuda" where no CUDA device works.
    """
    works = torch.cuda.is_available()
    if device == "cuda" and not works:
        built = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise UserError(f"device cuda was asked for, but no CUDA device works here{built}: use --device cpu or auto")
    if device == "auto":
        chosen = "cuda" if works else "cpu"
        log.info(
            "device auto: %s", f"cuda, {torch.cuda.get_device_name()}" if works else "cpu, no CUDA device works here"
        )
        return torch.device(chosen)
    return torch.device(device)


def require_precision(precision: Precision, device: torch.device) -> None:
    """Raises UserError for bfloat16 where the device computes it only by emulation."""
    if precision == "bfloat16" and not has_bfloat16(device):
        raise UserError(f"precision bfloat16 was asked for, but this {device.type} has it not in hardware: use float32")


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware on the device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
