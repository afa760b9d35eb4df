"""Traffic and instructions of the compiled GPU kernels against the committed baseline and against Liger-Kernel."""

import json

import pytest

from bench import inspect as tool

MARGIN = 0.05
# One backend of each op, the quick ones; `make inspect` does all.
QUICK = ["place_rows", "pack_tokens", "v2pe_rope", "moe_routing", "moe_dispatch"]


@pytest.fixture(scope="module")
def baseline():
    return {row["name"]: row for row in json.loads(tool.BASELINE.read_text())}


@pytest.mark.parametrize("name", QUICK)
def test_no_worse_than_the_baseline(name, baseline):
    make, backends = tool.SUBJECTS[name]
    job = make(False)
    rows = tool.counters(job, backends[0])
    new = {"name": name, "who": {backends[0]: {"total": tool.totals(rows, job)}}, "machine": {}}
    assert tool.check([new], [baseline[name]], MARGIN) == []
    assert all(row["shared_races"] == 0 for row in rows)


def test_check_finds_what_got_worse(baseline):
    row = baseline["moe_routing"]
    worse = json.loads(json.dumps(row))
    worse["who"]["cuda"]["total"]["sectors"] *= 2
    worse["machine"]["triton"][0]["spills"] += 8
    assert tool.check([row], [row], MARGIN) == []
    assert len(tool.check([worse], [row], MARGIN)) == 2


@pytest.mark.parametrize("name", ["v2pe_rope", "moe_experts"])
def test_no_more_than_liger(name, baseline):
    """As recorded in the baseline, same shape and dtype."""
    ours, liger = (baseline[name]["who"][who]["total"] for who in ("triton", "liger"))
    assert ours["requested_bytes"] <= liger["requested_bytes"]
    # Our rotary computes the angles that Liger's reads: a twentieth more instructions for a third fewer bytes.
    assert ours["instructions"] <= liger["instructions"] * (1.06 if name == "v2pe_rope" else 1)


# Bytes, by kernel and target: should be none.
KNOWN_SPILLS = {("moe_gate_up_kernel", 80): 48}


def test_nothing_else_spills(baseline):
    entries = [e for row in baseline.values() for rows in row["machine"].values() for e in rows]
    assert entries
    for e in entries:
        assert e["spills"] <= KNOWN_SPILLS.get((e["kernel"], e["target"]), 0), e["kernel"]
    for e in entries:
        if "widths" in e and e["target"] != "gfx942" and "rows" in e["kernel"]:
            assert "ld16" in e["widths"], e["kernel"]


def test_widths():
    ptx = "ld.global.v4.b32 {a}, [b];\nst.global.b16 [c], d;\n"
    ptx += "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
    assert tool.access_widths(ptx) == {"ld16": 2, "st2": 1}
    assert tool.occupancy(80, 128, 64, 0) == 0.5
