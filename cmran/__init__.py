"""CMRAN: Cross-Modal Relation-Aware Networks for audio-visual event localization (Xu et al., ACM MM 2020).

The names in `__all__` are the public API. Each is imported on first use, so that `import cmran` is fast and has no side
effects: it reads no file, opens no connection and configures no logging.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmran.api import evaluate as evaluate
    from cmran.api import fit as fit
    from cmran.api import load_model as load_model
    from cmran.api import predict as predict
    from cmran.api import predicted_events as predicted_events
    from cmran.categories import CATEGORIES as CATEGORIES
    from cmran.config import ModelConfig as ModelConfig
    from cmran.config import RunConfig as RunConfig
    from cmran.config import load_config as load_config
    from cmran.data.dataset import open_folder as open_folder
    from cmran.data.synthetic import synthesize as synthesize
    from cmran.errors import CmranError as CmranError
    from cmran.evaluation.plots import timeline_png as timeline_png
    from cmran.model.checkpoints import import_published as import_published
    from cmran.model.losses import compute_loss as compute_loss
    from cmran.model.losses import predict_segments as predict_segments
    from cmran.model.losses import video_scores as video_scores
    from cmran.model.network import CMRAN as CMRAN
    from cmran.model.network import Outputs as Outputs

__version__ = "0.1.0"

_MODULES = {
    "CATEGORIES": "categories",
    "CMRAN": "model.network",
    "CmranError": "errors",
    "ModelConfig": "config",
    "Outputs": "model.network",
    "RunConfig": "config",
    "compute_loss": "model.losses",
    "evaluate": "api",
    "fit": "api",
    "import_published": "model.checkpoints",
    "load_config": "config",
    "load_model": "api",
    "open_folder": "data.dataset",
    "predict": "api",
    "predict_segments": "model.losses",
    "predicted_events": "api",
    "synthesize": "data.synthetic",
    "timeline_png": "evaluation.plots",
    "video_scores": "model.losses",
}
"""The module of each public name."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'cmran' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"cmran.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
