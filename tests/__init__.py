"""Tests mirror the package; what they share is imported from here (`tests.simulator`, `tests.models`)."""
