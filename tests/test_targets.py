"""The table of GPUs."""

import pytest

from ivl_kernels._targets import NVIDIA, TARGETS, limits


@pytest.mark.parametrize("capability, table", [(87, 86), (101, 100), (103, 100), (121, 120)])
def test_a_member_of_a_family_has_its_nearest_older_members_limits(capability, table):
    assert capability not in TARGETS
    assert limits(capability) == TARGETS[table]


@pytest.mark.parametrize("capability", TARGETS)
def test_a_gpu_has_its_own_limits(capability):
    assert limits(capability) == TARGETS[capability]


@pytest.mark.parametrize("capability", [75, 110, 200])
def test_others_have_limits_that_every_gpu_meets(capability):
    assert limits(capability).shared == min(TARGETS[c].shared for c in NVIDIA)
