"""Patching of whole models: `patch`, `patched` and `verify`; one adapter a model family."""

from ._patch import Adapter, Editor, Feature, PatchError, PatchHandle, PatchReport, Row, Site, patch, patched
from ._remote_code import enable_remote_code
from ._verify import VerifyReport, verify

__all__ = [
    "Adapter",
    "Editor",
    "Feature",
    "PatchError",
    "PatchHandle",
    "PatchReport",
    "Row",
    "Site",
    "VerifyReport",
    "enable_remote_code",
    "patch",
    "patched",
    "verify",
]
