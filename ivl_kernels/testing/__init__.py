"""What tests and benchmarks share: model shapes, the accuracy rule, poison."""

from .catalogue import MODELS, ModelShape
from .compare import assert_accurate, error_report
from .poison import poisoned

__all__ = ["MODELS", "ModelShape", "assert_accurate", "error_report", "poisoned"]
