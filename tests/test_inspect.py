"""Traffic, instructions and machine code of the GPU kernels against the committed baseline and Liger-Kernel."""

import importlib.metadata
import json

import pytest

from bench.inspect import counters, machine, subjects, tables

MARGIN = 0.05


@pytest.fixture(scope="module")
def baseline():
    return json.loads(tables.BASELINE.read_text())


@pytest.fixture(scope="module")
def counted(baseline):
    return {tuple(row[key] for key in tables.KEYS["counters"]): row for row in baseline["counters"]}


QUICK = [name for name in subjects.SUBJECTS if not name.startswith(("liger", "pixel", "tile"))]


@pytest.mark.skipif(
    not importlib.metadata.version("triton").startswith("3.9."), reason="the baseline is of Triton 3.9's machine code"
)
@pytest.mark.parametrize("name", QUICK)
def test_no_worse_than_the_baseline(name, baseline):
    """The last of an op's shapes, all of its backends, forward and backward; `make inspect` does all shapes."""
    subject = subjects.SUBJECTS[name]
    shape = subject.small[-1] if subject.memory_bound else subject.small[0]
    rows = counters.counted_rows(name, shape, subject.dtypes[0], others=False)
    assert tables.check({"counters": rows}, baseline, MARGIN) == []
    assert all(row["shared_races"] == 0 for row in rows)


@pytest.mark.parametrize(
    "name, target, dtype",
    [
        ("pack_tokens", 86, "bf16"),
        ("place_rows", "gfx942", "fp32"),
        ("moe_routing", 90, "fp32"),
        ("v2pe_rope", 120, "bf16"),
        ("tile_router", 89, "bf16"),
        ("pixel_shuffle_mlp 1/4", 100, "bf16"),
        ("moe_experts", 80, "fp32"),
    ],
)
def test_machine_code_no_worse_than_the_baseline(name, target, dtype, baseline):
    """The first of an op's shapes on one target; `make inspect` does all."""
    shape, models = next(subjects.real_shapes(name, []))
    rows = machine.machine_rows(name, dtype, [(shape, models)], [target], jobs=1)
    key = (*tables.KEYS["machine"], "kernel")
    known = {str([row[k] for k in key]) for row in baseline["machine"]}
    assert rows and {str([row[k] for k in key]) for row in rows} <= known
    assert tables.check({"machine": rows}, baseline, MARGIN) == []


def test_limits(counted):
    """Memory-bound ops at every shape: distinct bytes and sectors, and a least that is one."""
    assert {key[0] for key in counted} == set(subjects.SUBJECTS)
    assert tables.over_the_limits(list(counted.values())) == []
    assert all(row.get("shared_races", 0) == 0 for row in counted.values())


def test_check_finds_what_got_worse(baseline):
    worse = json.loads(json.dumps(baseline))
    next(row for row in worse["counters"] if row["who"] == "cuda")["sector_bytes"] *= 2
    product = next(row for row in worse["machine"] if row["tensor_core_instructions"])
    product["spills"] += 8
    product["tensor_core_instructions"] = 0
    assert tables.check(baseline, baseline, MARGIN) == []
    assert len(tables.check(worse, baseline, MARGIN)) == 3


@pytest.mark.parametrize("op", ["v2pe_rope", "v2pe_rope with norm", "moe_experts"])
def test_no_more_than_liger(op, counted):
    """As recorded in the baseline, same shape and dtype."""
    pairs = [
        (row, counted[(*key[:4], "liger")])
        for key, row in counted.items()
        if key[0] == op and key[4] in OURS and (*key[:4], "liger") in counted
    ]
    assert pairs
    for ours, liger in pairs:
        if (op, ours["dtype"]) == ("moe_experts", "fp32"):
            continue  # three tf32 products for each of theirs, for float32's accuracy
        assert ours["requested_bytes"] <= liger["requested_bytes"], ours["shape"]
        assert ours["unique_bytes"] <= liger["unique_bytes"], ours["shape"]
        # In float32 a program a token, that of few tokens with wide heads, spends more on angles and 64-bit offsets.
        if ours["dtype"] == "bf16" or "InternVL3.5-8B" not in ours["shape"]:
            assert ours["instructions"] <= liger["instructions"], ours["shape"]


def test_gather_sums_read_little_beside_rows(counted):
    """Rows are read once; a token's 2 or 4 bytes of index, weight and offset each cost a sector of 32, from L1."""
    kernels = [item for row in counted.values() if row["op"] == "moe_experts" for item in row["kernels"].items()]
    sums = [
        (name, found) for name, found in kernels if name.startswith("moe_experts_combine") and isinstance(found, dict)
    ]
    assert sums
    for name, found in sums:
        # Most: 1.20 at width 256, where a row is 512 bytes or 1 KB, and 1.19 at 400 bytes, not whole sectors.
        assert found["sector_bytes"] <= 1.21 * found["unique_bytes"], name


OURS = ("cuda", "triton", "ours")


def test_nothing_spills(baseline):
    """On any target, at any width of the catalogue; every op was compiled for all of them."""
    ops = [name for name in subjects.SUBJECTS if not name.startswith("liger")]
    covered = {(row["op"], row["dtype"], row["target"]) for row in baseline["machine"]}
    for name in ops:
        for dtype in subjects.SUBJECTS[name].dtypes:
            cuda_only = subjects.SUBJECTS[name].backends == ("cuda",)
            wanted = set(machine.NVIDIA) if cuda_only else set(machine.TARGETS)
            assert {target for op, kind, target in covered if (op, kind) == (name, dtype)} == wanted, (name, dtype)
    assert [row for row in baseline["machine"] if row["spills"]] == []


def test_shared_memory_fits(baseline):
    from tests.simulator.aot import SHARED_LIMIT

    for row in baseline["machine"]:
        assert row["shared"] <= SHARED_LIMIT[row["target"]], row


PRODUCTS = ("linear", "gate_up", "experts_rows", "down_backward", "weight_grad", "pool", "scores", "weighted_sum")
PRODUCTS += ("router_attend", "router_gate")


def test_products_use_tensor_cores(baseline):
    """And nothing else does: a kernel is either in the list or moves bytes."""
    for row in baseline["machine"]:
        assert bool(row["tensor_core_instructions"]) == any(name in row["kernel"] for name in PRODUCTS), row


def test_16_byte_accesses(baseline):
    """Each kernel that moves rows does so 16 bytes at a time, at all widths of the catalogue."""
    small = ("moe_dispatch", "count_tokens", "list_tokens", "pack_", "moe_routing")  # numbers, a few bytes each
    for row in baseline["machine"]:
        one_token = (row["op"], row["tokens"]) == ("moe_experts", 1)  # tiles so small that a thread has less
        if row["target"] != "gfx942" and not row["kernel"].startswith(small) and not one_token:
            assert "ld16" in row["widths"] or "ldbulk" in row["widths"], row
            # Column sums, a float a thread; the router's last layer has two outputs; two statistics a row, where the
            # product normalises its own operand.
            few = row["kernel"] in ("pixel_shuffle_mlp_norm_parameters_kernel", "tile_router_linear_kernel")
            few |= row["kernel"] == "pixel_shuffle_mlp_norm_kernel" and row["widths"].get("st4") == 2
            assert few or "st16" in row["widths"], row


@pytest.mark.parametrize("target", [90, 100])
def test_bulk_copies_bring_what_prefill_multiplies(target, baseline):
    """All of the products of rows in expert order; of gate and up the weights, on Blackwell the tokens' rows too."""
    rows = [
        row for row in baseline["machine"] if (row["op"], row["tokens"], row["target"]) == ("moe_experts", 4096, target)
    ]
    found = {(row["kernel"], *row["models"]): row for row in rows if row["direction"] == "forward"}
    assert len(found) >= 6
    for (kernel, model), row in found.items():
        if kernel in ("moe_experts_gate_up_kernel", "moe_experts_rows_kernel"):
            by_threads = kernel == "moe_experts_gate_up_kernel" and target == 90
            biased = "GPT-OSS" in model
            assert row["widths"]["ldbulk"] > 0 and ("ld16" in row["widths"]) == by_threads or biased, row
            assert row["shared"] <= 232_448 and row["spills"] == 0


def test_widths():
    ptx = "ld.global.v4.b32 {a}, [b];\nst.global.b16 [c], d;\nld.global.L1::evict_last.v4.b32 {a}, [b];\n"
    ptx += "ld.global.nc.u64 a, [b];\ncp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
    ptx += "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [a], [b, {c, d}], [e];"
    ptx += "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [a, {b, c}], [d];"
    assert machine.access_widths(ptx) == {"ld16": 3, "ld8": 1, "st2": 1, "ldbulk": 1, "stbulk": 1}
    assert machine.occupancy(80, 128, 64, 0) == 0.5 and machine.blocks(80, 128, 64, 0) == 8
    assert machine.blocks(90, 256, 113, 98_304) == 2 and machine.blocks(90, 256, 113, 131_072) == 1


def test_bytes_in_flight():
    two = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]; ld.global.b32 %r5, [%rd2]; "
    assert machine.bytes_in_flight(two + "add.s32 %r6, %r4, %r5;", 1) == 32 * 20
    assert machine.bytes_in_flight(two + "add.s32 %r6, %r3, 1; ld.global.b64 %rd3, [%rd1];", 1) == 32 * 20
    assert machine.bytes_in_flight("ld.global.b64 %rd3, [%rd1]; ld.global.b64 %rd4, [%rd3];", 1) == 32 * 8
    copy = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10; cp.async.commit_group; "
    assert machine.bytes_in_flight(2 * copy + "cp.async.wait_group 1; " + copy, 1) == 32 * 32
    assert machine.bytes_in_flight(copy + "cp.async.wait_group 0; " + copy, 1) == 32 * 16
    bulk = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 49152; "
    assert machine.bytes_in_flight(3 * bulk + "mbarrier.try_wait.parity p, [%r1], %r2; " + bulk, 8) == 3 * 49152 // 8


def test_merge_replaces_rows_of_the_same_name():
    row = {"op": "place_rows", "shape": "s", "dtype": "bf16", "direction": "forward", "who": "cuda"}
    old = {"counters": [{**row, "launches": 3}, {**row, "who": "triton"}], "machine": [], "roofline": []}
    merged = tables.merge(old, {"counters": [{**row, "launches": 2}]})
    assert merged["counters"] == [{**row, "who": "triton"}, {**row, "launches": 2}]


def test_asked_shape():
    shape = subjects.asked_shape("InternVL3.5-30B-A3B,tokens=7,experts=16,tiles=2")
    assert (shape.tokens, shape.tiles, shape.model.experts, shape.model.hidden) == (7, 2, 16, 2048)
    with pytest.raises(SystemExit, match="--shape: got 'GPT-5'"):
        subjects.asked_shape("GPT-5")
