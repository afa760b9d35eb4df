"""Patching of whole models: `patch`, `patched` and `verify`; one adapter a model family."""

from ..models.remote_code import enable_remote_code
from ._edit import Editor
from ._patch import Adapter, Feature, PatchError, PatchHandle, Site, patch, patched
from ._report import PatchReport, Row
from ._verify import VerifyReport, verify
from ._warm import WarmUp, warm_up
from .quantised import QuantisationReport, load_quantised, quantise_experts
from .trainer import WeightedLoss

__all__ = [
    "Adapter",
    "Editor",
    "Feature",
    "PatchError",
    "PatchHandle",
    "PatchReport",
    "QuantisationReport",
    "Row",
    "Site",
    "VerifyReport",
    "WarmUp",
    "WeightedLoss",
    "enable_remote_code",
    "load_quantised",
    "patch",
    "patched",
    "quantise_experts",
    "verify",
    "warm_up",
]
