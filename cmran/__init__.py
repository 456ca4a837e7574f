"""CMRAN: Cross-Modal Relation-Aware Networks for audio-visual event localization (Xu et al., ACM MM 2020)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmran.config import ModelConfig as ModelConfig
    from cmran.model.network import CMRAN as CMRAN
    from cmran.model.network import Outputs as Outputs

__version__ = "0.1.0"
__all__ = ["CMRAN", "ModelConfig", "Outputs"]


def __getattr__(name: str) -> Any:
    # torch takes over a second to import: it is loaded when the network is first asked for, not with the package.
    if name == "ModelConfig":
        from cmran.config import ModelConfig

        return ModelConfig
    if name in ("CMRAN", "Outputs"):
        from cmran.model import network

        return getattr(network, name)
    raise AttributeError(f"module 'cmran' has no attribute {name!r}")
