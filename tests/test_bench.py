"""The benchmark runner: a wrong result gets no speed-up, comparisons find regressions."""

import contextlib
import copy
import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch

from bench import against, from_cases, gpu_time, layers, measure, report, whole_model
from bench.measure import Case, Timing, Work
from bench.runner import run, write
from ivl_kernels.testing.cases import Case as OpCase
from ivl_kernels.testing.cases import Cost, Timed


def make_case(name, **variants):
    x = torch.randn(64, 64)
    return Case("toy", name, {}, lambda: Work({k: (lambda f=f: f(x)) for k, f in variants.items()}), bytes=1e4)


def test_wrong_results_get_no_ratio(tmp_path):
    def broken(x):
        raise RuntimeError("no such kernel")

    result = run(
        [
            make_case("good", ours=lambda x: x * 2, eager=lambda x: x + x, wrong=lambda x: x * 3, broken=broken),
            make_case("bad", ours=lambda x: x * 3, eager=lambda x: x + x),
        ],
        quick=True,
    )
    good, bad = result["rows"]
    assert good["ok"] and good["variants"]["eager"]["ratio"] > 0
    assert "differs" in good["variants"]["wrong"]["failed"] and "ratio" not in good["variants"]["wrong"]
    assert good["variants"]["broken"]["failed"] == "RuntimeError: no such kernel"
    assert not bad["ok"] and "ratio" not in bad["variants"]["eager"]
    assert {p.suffix for p in write(result, tmp_path, "toy")} >= {".json", ".csv", ".md"}
    assert "**failed**" in (tmp_path / "toy.md").read_text()


def test_truth_sets_the_tolerance():
    x = torch.randn(64, 64, dtype=torch.float64)

    def make(ours):
        return Work(
            {"ours": lambda: ours(x.bfloat16()), "eager": lambda: x.bfloat16().softmax(-1)},
            truth=lambda: x.bfloat16().double().softmax(-1),
        )

    def case(name, ours):
        return Case("toy", name, {}, lambda: make(ours))

    result = run(
        [
            case("other rounding", lambda x: x.float().softmax(-1).bfloat16()),
            case("coarse", lambda x: x.softmax(-1) * 1.02),
        ],
        quick=True,
    )
    assert [row["ok"] for row in result["rows"]] == [True, False]


def test_compare_finds_regressions():
    result = run([make_case("good", ours=lambda x: x * 2, eager=lambda x: x + x)], quick=True)
    assert report.compare(result, result, 0.1)[1] == []
    slower = copy.deepcopy(result)
    for key in ("ratio", "ratio_q20", "ratio_q80"):
        slower["rows"][0]["variants"]["eager"][key] *= 0.01
    text, regressions = report.compare(result, slower, 0.1)
    assert regressions == ["toy: good vs eager"] and "REGRESSION" in text


def timed(call, **options):
    case = OpCase(
        "toy",
        "squares",
        lambda n: {"x": n.normal(64, 64)},
        call,
        ("x",),
        plain=lambda v: v["x"] * v["x"],
        cost=lambda v: (Cost(2 * v["x"].nbytes), Cost(3 * v["x"].nbytes, flops=7)),
    )
    return from_cases.case(Timed("toy", str(options), case, torch.float32, {}, compile=False, **options))


@pytest.mark.parametrize("training, factor", [(False, 2), (True, 5)])
def test_a_case_becomes_a_row(training, factor):
    rows = run(
        [
            timed(lambda v, backend: v["x"].square(), training=training),
            timed(
                lambda v, backend: v["x"].square() * (1 if backend else 1.01), training=training
            ),  # the truth is right
        ],
        quick=True,
    )["rows"]
    assert [row["ok"] for row in rows] == [True, False]
    assert rows[0]["bytes"] == factor * 64 * 64 * 4 and rows[0]["flops"] == (7 if training else 0)
    assert set(rows[0]["variants"]) == {"ours", "eager"}


def test_what_a_call_changes_is_restored():
    def in_place(v, backend):
        return v["x"].mul_(v["x"].clone())

    rows = run([timed(in_place, exact=True, mutates=("x",)), timed(in_place, exact=True)], quick=True)["rows"]
    assert [row["ok"] for row in rows] == [True, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prefill"],
        ["prefill", "--memory", "living"],
        ["decode", "--past", "40"],
        ["flash", "--tiles", "2"],
        ["training"],
        ["training", "--memory", "living", "--frozen", "--consumed"],
    ],
    ids=" ".join,
)
def test_whole_model(arguments, monkeypatch, capsys):
    """Every part runs, at small sizes, and prints a row of its own."""
    small = dict(vision=64, hidden=32, layers=2, q_heads=4, kv_heads=2, head_dim=16, intermediate=48)
    monkeypatch.setattr(whole_model, "SHAPE", dataclasses.replace(whole_model.SHAPE, **small))
    vision = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    monkeypatch.setattr(whole_model, "VISION", whole_model.VISION | vision)
    monkeypatch.setattr(whole_model, "VOCABULARY", 300)
    whole_model.main([*arguments, "--rounds", "1"])
    row = capsys.readouterr().out.strip().splitlines()[-1]
    assert row.count("|") == 5 and "differ" not in row, row


def test_whole_model_prints_no_time_of_other_answers(monkeypatch):
    monkeypatch.setattr(whole_model, "TOLERANCE", {torch.float32: 1e-4})
    logits = torch.randn(1, 1, 8)
    assert whole_model.differs(logits, logits) == ""
    assert whole_model.differs(logits + 0.1, logits) and whole_model.differs(logits.flip(-1), logits)


def test_peak_of_living_tensors():
    def run():
        a = torch.empty(1000, dtype=torch.float64)
        del a
        torch.empty(500, dtype=torch.float64)

    assert whole_model.peak(run, "living") == pytest.approx(8000, abs=200)


def test_launches_and_bytes_of_operators():
    x = torch.randn(4, 8)
    out = torch.empty(4, 4)
    with layers.Counted() as counted:
        y = x.view(8, 4).t()[:2] + 1.0
        torch.mm(x, x.t(), out=out)
        y.mul_(2.0)
        torch.empty(5)
    assert counted.launches == {"add": 1, "mm": 1, "mul_": 1}
    assert counted.bytes == {"add": 4 * (16 + 16), "mm": 4 * (32 + 32 + 16), "mul_": 4 * (16 + 16)}


def test_a_layer_of_ours_has_fewer_launches(monkeypatch):
    small = dict(vision=64, hidden=64, q_heads=4, kv_heads=2, head_dim=16, intermediate=96)
    monkeypatch.setattr(layers, "SHAPE", dataclasses.replace(whole_model.SHAPE, **small))
    vision = dict(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    monkeypatch.setattr(layers, "VISION", whole_model.VISION | vision)
    found = layers.layers("patched", 20), layers.layers("eager", 20)
    ours, plain = ({k: sum(n for n, _ in cost.values()) for k, cost in each.items()} for each in found)
    assert ours == {k: 14 for k in plain} and all(ours[k] <= plain[k] for k in plain)
    patched = found[0]["language layer, 1 x 20 tokens"]
    assert patched["norm_kernel"][0] == 2 and patched["v2pe_rope_kernel"][0] == patched["mlp_active_kernel"][0] == 1


class FakeSide:
    """Answers as a side does, without a process."""

    def __init__(self, bits, seconds, titles=("op: a", "op: b")):
        self.bits, self.seconds, self.titles = bits, seconds, titles

    def ask(self, kind, *rest):
        if kind == "titles":
            return dict.fromkeys(self.titles, False)
        return (self.bits, self.seconds) if kind == "choose" else self.seconds


def test_against_another_commit():
    sides = [FakeSide("x", 0.2), FakeSide("y", 0.1, ("op: a",))]
    found = dict(against.rows(sides, "", ["float32"], 3, 0.97))
    assert found["op: a, float32"] == {"here": 0.2, "there": 0.1, "ratio": 0.5, "equal": False}
    assert found["op: b, float32"] == "not there"


def test_the_process_of_a_side():
    side = against.Side(against.ROOT)
    try:
        title = next(t for t in side.ask("titles") if t.startswith("moe_routing"))
        assert side.ask("choose", title, "float32", True)[0] == side.ask("choose", title, "float32", True)[0]
        assert side.ask("choose", title, "float32", False)[0] != side.ask("choose", title, "bfloat16", False)[0]
        assert side.ask("sample", 2) > 0
        with pytest.raises(RuntimeError, match="KeyError"):
            side.ask("choose", "no such case", "float32", False)
    finally:
        side.close()


class FakeGpu:
    """torch.cuda, as far as timing asks for it; keeps what was asked for, in order. A call takes 2 ms, a replay 1."""

    def __init__(self):
        self.log, self.capturing, self.now, self.late, self.mode = [], False, 0.0, [], 0

    def __getattr__(self, name):
        return lambda *args: self.log.append((name, *args))

    def Stream(self):
        return self

    current_stream = Stream

    def stream(self, side):
        return contextlib.nullcontext()

    def wait_stream(self, other):
        pass

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.work("replay", 1.0))

    def is_available(self):
        return True

    def get_sync_debug_mode(self):
        return 0

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def set_stream(self, stream):
        self.given_back = True

    device_index, default_generators = 0, [torch.Generator()]

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def Event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: (self.log.append("event"), setattr(event, "at", self.now))
        event.query = lambda: bool(self.late and self.late.pop())
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def work(self, name, ms):
        self.log.append(name)
        self.now += ms

    def call(self, name, waits=""):
        """waits: "seen" by torch or "hidden"."""

        def run():
            if waits == "seen" and self.mode == "warn":
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            if self.capturing and waits:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            self.work(name, 2.0)
            return name

        return run


def test_a_gpu_is_timed_by_replays_and_by_calls_that_find_it_idle():
    gpu = FakeGpu()
    calls = {"ours": gpu.call("ours"), "eager": gpu.call("eager", "seen"), "peer": gpu.call("peer", "hidden")}
    work = Work(calls, reset=lambda: gpu.log.append("reset"), unchecked=("ours",))
    timings = {name: Timing() for name in work.variants}
    one = measure._on_gpu(work, timings, list(calls), gpu, lambda: gpu.log.append("flush"))
    assert timings["eager"].waits.startswith("it waits for the device") and "test_bench.py" in timings["eager"].waits
    assert timings["peer"].waits == "RuntimeError: operation not permitted when stream is capturing"
    assert gpu.mode == 0 and gpu.given_back and not timings["ours"].waits
    assert [gpu.log.count(name) - gpu_time.WARM_UPS for name in calls] == [1, 0, 0]  # what torch sees is not captured
    for name, replayed in (("ours", True), ("eager", False), ("peer", False)):
        del gpu.log[:]
        one(name)
        queued = ["reset", "flush", ("synchronize",), ("_sleep", gpu_time.SLEEPS[0]), "event", "replay", "event"]
        alone = ["reset", "flush", ("synchronize",), name, ("synchronize",)]
        assert gpu.log == ([*queued, ("synchronize",)] if replayed else []) + alone
    assert timings["ours"].times == [1.0] and timings["eager"].times == timings["peer"].times == []
    ticks = iter([1.0, 1.002])
    assert gpu_time.wall_ms(gpu.call("x"), int, int, gpu, lambda: next(ticks)) == pytest.approx(2.0)


def test_a_graph_that_takes_long_to_queue_is_waited_for():
    """Else its time would be the time of queueing."""
    gpu = FakeGpu()
    gpu.late = [False, True]
    assert gpu_time.replay_ms(gpu.CUDAGraph(), int, lambda: gpu.log.append("flush"), gpu) == 1.0
    assert [each[1] for each in gpu.log if each[0] == "_sleep"] == list(gpu_time.SLEEPS[:2])
    assert gpu.log.count("flush") == 2


def test_a_replay_is_checked_before_it_is_timed():
    x, kept = torch.arange(6.0).view(2, 3), torch.empty(2, 3)
    x0 = x.clone()
    writes = [lambda: None, lambda: kept.copy_(x + 2), lambda: kept.copy_(x + 1)]
    for replay, wrong in zip(writes, (True, True, False)):
        kept.copy_(x + 1)  # memory that a call has left may hold the result by chance
        problem = measure._replay_problem(
            Work({"ours": lambda: x + 1}), "ours", SimpleNamespace(kept=kept, replay=replay)
        )
        assert bool(problem) == wrong
    for replay, wrong in ((lambda: None, True), (lambda: x.add_(1), False)):
        work = Work({"ours": lambda: x.add_(1)}, reset=lambda: x.copy_(x0))
        assert bool(measure._replay_problem(work, "ours", SimpleNamespace(kept=x, replay=replay))) == wrong
    work = Work({"ours": lambda: (x + 1, torch.empty(9))}, select=lambda result: result[0])
    graph = SimpleNamespace(kept=(kept, torch.empty(9)), replay=writes[2])
    x.copy_(x0)
    assert not measure._replay_problem(work, "ours", graph)


def test_both_times_of_a_gpu_are_told():
    ours, peer, waiting = (
        measure.Timing(times=[1.0, 1.0], wall=[4.0, 4.0]),
        measure.Timing(times=[2.0, 2.0], wall=[5.0, 5.0]),
        measure.Timing(wall=[8.0, 8.0], waits="it waits for the device (a.py:3)"),
    )
    rows = {name: measure._summary(t, ours) for name, t in (("ours", ours), ("peer", peer), ("loop", waiting))}
    assert report.ours_text(rows["ours"]) == "1 ms (1-1), a call 4 ms"
    assert report.ratio_text(rows["peer"]) == "2.00 (2.00-2.00), a call 1.25"
    assert report.ratio_text(rows["loop"]) == "waits for the GPU, a call 2.00" and "ratio" not in rows["loop"]
    large = measure._summary(measure.Timing(wall=[8.0], waits="OutOfMemoryError: tried to allocate"), ours)
    assert report.ratio_text(large) == "no CUDA graph (OutOfMemoryError), a call 2.00"
    waits = measure._summary(waiting, waiting)
    assert report.ours_text(waits) == "a call 8 ms (8-8), waits for the GPU"
    row = dict(op="toy", name="x", dtype="float32", floor_ms=0.5, bytes=1, flops=1, ok=True, variants=rows)
    environment = dict(device="GPU", threads=1, torch="2", allocator="default", commit="c", date="d")
    result = dict(rows=[row], environment=environment, limits=dict(copy_bytes_per_s=1e9, gemm_flops_per_s={}))
    text = report.markdown(result)
    assert "| x | 1 ms (1-1), a call 4 ms | 2.00 |" in text and "finds the GPU idle" in text
    assert {r["variant"]: r["wall_ratio"] for r in report.csv_rows(result)}["loop"] == 2.0
