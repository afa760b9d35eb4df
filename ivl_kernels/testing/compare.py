"""The accuracy rule: a kernel may be at most twice as far from the truth as plain torch in the same dtype.

The truth is the reference computed in float64. Both the largest and the root-mean-square error are held to the rule,
each with a floor, since plain torch is sometimes exact by luck: two units in the last place of the largest value for
the largest error, half a unit of the root-mean-square value for the other. Of one number the two are the same, and the
limit of the largest holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FACTOR = 2.0


@dataclass(frozen=True)
class ErrorReport:
    """Errors of a result and of plain torch against the truth; `limit_*` is what the rule allows."""

    max_error: float
    rms_error: float
    limit_max: float
    limit_rms: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.max_error <= self.limit_max and self.rms_error <= self.limit_rms

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "TOO FAR" if self.finite else "NOT FINITE"
        return (
            f"{verdict}: max error {self.max_error:.3e} (limit {self.limit_max:.3e}), "
            f"rms {self.rms_error:.3e} (limit {self.limit_rms:.3e})"
        )


def error_report(
    got: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor, factor: float = FACTOR
) -> ErrorReport:
    """Compare `got` with `truth` (float64), allowing `factor` times the error of `same_dtype` (plain torch)."""
    if got.numel() == 0:
        return ErrorReport(0.0, 0.0, 0.0, 0.0, True)
    truth = truth.double()
    eps = torch.finfo(got.dtype).eps
    finite_truth = torch.isfinite(truth)
    finite = bool(torch.isfinite(got)[finite_truth].all())
    scale_max, scale_rms = float(truth[finite_truth].abs().amax()), float(truth[finite_truth].square().mean().sqrt())
    error = (got.double() - truth)[finite_truth].abs()
    base = (same_dtype.double() - truth)[finite_truth].abs()
    limit_max = factor * float(base.amax()) + 2 * eps * scale_max
    limit_rms = factor * float(base.square().mean().sqrt()) + 0.5 * eps * scale_rms
    return ErrorReport(
        float(error.amax()),
        float(error.square().mean().sqrt()),
        limit_max,
        limit_rms if got.numel() > 1 else limit_max,
        finite,
    )


def assert_accurate(
    got: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor, what: str = "result", factor: float = FACTOR
) -> None:
    """Raise AssertionError unless `got` has the shape and dtype of `same_dtype` and obeys the accuracy rule."""
    assert got.shape == same_dtype.shape == truth.shape, (
        f"{what}: shape {list(got.shape)}, plain torch {list(same_dtype.shape)}, truth {list(truth.shape)}"
    )
    assert got.dtype == same_dtype.dtype, f"{what}: dtype {got.dtype}, plain torch {same_dtype.dtype}"
    report = error_report(got, truth, same_dtype, factor)
    assert report.passed, f"{what}: {report}"
