"""The patching framework, with adapters of a toy model."""

import copy
import gc
import io
import pickle
import types
import weakref

import pytest
import torch
from torch import nn

from ivl_kernels.integrations import Adapter, Feature, PatchError, Site, _patch, patch, patched
from ivl_kernels.integrations._edit import note
from ivl_kernels.integrations._patch import PatchWarning
from ivl_kernels.models import upstream


class Config:
    implementation = "eager"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, scale=1.0):
        return self.linear(x) * scale


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Toy(), Toy()

    def forward(self, x):
        return self.one(x) + self.two(x)


def add(amount):
    def forward(inner, self, x, scale=1.0):
        note(self, "last shape", tuple(x.shape))
        return inner(self, x, scale) + amount

    return forward


class AddOne(Adapter):
    features = {"plus": Feature(True, "adds one"), "strength": Feature(1, "how much", parse=float, option=True)}

    def find(self, model, options):
        for path, module in upstream.named_instances(model, "Toy"):
            reason = "" if type(module.linear) is nn.Linear else "linear is not plain"
            yield Site("plus", path, module, "Toy.forward", reason)

    def apply(self, site, edit, options):
        edit.method(site.module, "forward", add(options["strength"]))

    def serving(self, site):
        return "reference"


class Times(Adapter):
    features = {"times": Feature(None, "times ten", parse=float), "config": Feature(False, "sets an attribute")}

    def find(self, model, options):
        for path, module in upstream.named_instances(model, "Toy"):
            if options["times"]:
                yield Site("times", path, module, "Toy.forward")
            yield Site("config", path, module, "Toy.config")

    def apply(self, site, edit, options):
        if site.feature == "config":
            edit.attribute(site.module.config, "implementation", "ivl")
        else:
            factor = options["times"]
            edit.method(site.module, "forward", lambda inner, self, x, **k: inner(self, x, **k) * factor)
            if factor == 666:
                raise RuntimeError("broken adapter")


@pytest.fixture(autouse=True)
def toy_adapters(monkeypatch):
    monkeypatch.setattr(_patch, "adapters", lambda: (AddOne(), Times()))


X = torch.ones(2, 3)


def snapshot(model):
    return [(n, dict(m.__dict__), dict(m._forward_hooks), dict(vars(getattr(m, "config", Config)))) for n, m in
            model.named_modules()]  # fmt: skip


def test_patch_report_undo():
    model = Toy()
    before, expected = snapshot(model), model(X)
    handle = patch(model, strength=2)
    assert torch.equal(model(X), expected + 2)
    assert torch.equal(model(X, scale=3.0), expected * 3 + 2)
    report = handle.report()
    assert [(r.feature, r.state, r.detail) for r in report.rows] == [("plus", "patched", "reference")]
    assert report.notes == {"last shape": "(2, 3)"} and handle.note("last shape") == (2, 3)
    assert "Toy.forward" in str(report) and report.to_dict()["rows"][0]["feature"] == "plus"
    assert [r.state for r in handle.undo().rows] == ["undone"]
    assert snapshot(model) == before
    assert torch.equal(model(X), expected)
    assert [r.state for r in handle.undo().rows] == ["undone"]
    assert [r.state for r in handle.report().rows] == ["undone"]


def test_never_a_class_attribute():
    functions = dict(vars(Toy))
    handle = patch(Toy(), times=3)
    other = Toy()
    assert vars(Toy) == functions and "forward" not in vars(other)
    assert isinstance(vars(handle.model)["forward"], types.MethodType)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_undo_in_any_order(order):
    model = Toy()
    before, plain = snapshot(model), model(X)
    handles = [patch(model, plus=True), patch(model, plus=False, times=10, config=True)]
    assert torch.equal(model(X), (plain + 1) * 10) and model.config.implementation == "ivl"
    handles[order[0]].undo()
    assert torch.equal(model(X), plain * 10 if order[0] == 0 else plain + 1)
    handles[order[1]].undo()
    assert snapshot(model) == before


def test_patch_twice_is_a_no_op():
    model = Toy()
    plain = model(X)
    first = patch(model)
    second = patch(model, strength=5)
    assert [r.state for r in second.report().rows] == ["already patched"]
    assert torch.equal(model(X), plain + 1)
    second.undo()
    assert torch.equal(model(X), plain + 1)
    first.undo()
    assert torch.equal(model(X), plain)


def test_other_wrapper_on_top():
    model = Toy()
    plain = model(X)
    handle = patch(model)
    ours = model.forward
    model.forward = lambda *a, **k: ours(*a, **k) * 100
    assert torch.equal(model(X), (plain + 1) * 100)
    with pytest.warns(PatchWarning, match="has another wrapper on top"):
        report = handle.undo()
    assert report.rows[0].state == "left" and "test_patch" in report.rows[0].detail
    assert torch.equal(model(X), plain * 100)


def test_wrapper_below_is_kept():
    model = Toy()
    plain = model(X)
    original = model.forward
    model.forward = wrapper = lambda *a, **k: original(*a, **k) * 100
    handle = patch(model)
    assert torch.equal(model(X), plain * 100 + 1)
    handle.undo()
    assert model.forward is wrapper


def test_changed_attribute_is_left():
    model = Toy()
    handle = patch(model, config=True)
    model.config.implementation = "mine"
    with pytest.warns(PatchWarning, match="implementation of Config has been changed since"):
        handle.undo()
    assert model.config.implementation == "mine"


class Fails(Adapter):
    """Raises in one of its methods, after it has done what it could."""

    features = {"fails": Feature(True, "always fails")}

    def __init__(self, where, error=AttributeError):
        self.where, self.error = where, error

    def fail(self, where):
        if self.where == where:
            raise self.error("'Func' object has no attribute\n '__code__'")

    def find(self, model, options):
        yield Site("fails", "", model, "forward")
        self.fail("find")

    def apply(self, site, edit, options):
        edit.method(site.module, "forward", add(100))
        edit.attribute(site.module.config, "implementation", "broken")
        self.fail("apply")
        edit.method(site.module, "missing" if self.where == "edit" else "extra_repr", add(100))

    def serving(self, site):
        self.fail("serving")


@pytest.mark.parametrize("where", ["find", "apply", "edit", "serving"])
def test_an_adapter_that_fails_is_a_refused_row(where, monkeypatch):
    """The others go on; what it had changed is taken back; with `strict` it is an error and nothing is patched."""
    model = Toy()
    before, plain = snapshot(model), model(X)
    monkeypatch.setattr(_patch, "adapters", lambda: (AddOne(), Fails(where), Times()))
    with pytest.raises(PatchError, match="model.: fails: AttributeError: "):
        patch(model, strict=True)
    assert snapshot(model) == before
    handle = patch(model, times=10)
    rows = {row.feature: (row.state, row.detail) for row in handle.report().rows}
    assert rows["plus"][0] == rows["times"][0] == "patched" and rows["fails"][0] == "refused"
    assert rows["fails"][1].startswith("AttributeError: 'Func' object has" if where != "edit" else "AttributeError: ")
    assert torch.equal(model(X), (plain + 1) * 10) and model.config.implementation == "eager"
    handle.undo()
    assert snapshot(model) == before


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model = Toy()
    before = snapshot(model)
    monkeypatch.setattr(_patch, "adapters", lambda: (AddOne(), Times(), Fails("apply", KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        patch(model, times=10, config=True)
    assert snapshot(model) == before


def test_a_feature_that_changes_answers_warns_when_it_is_not_there():
    model = Pair()
    with pytest.warns(PatchWarning, match="one: times: RuntimeError: broken adapter"):
        handle = patch(model, times=666)
    assert {(row.module, row.feature): row.state for row in handle.report().rows} == {
        ("one", "plus"): "patched", ("two", "plus"): "patched", ("one", "times"): "refused", ("two", "times"): "refused"
    }  # fmt: skip
    with pytest.raises(PatchError, match="one: times: RuntimeError: broken adapter"):
        patch(model, times=666, strict=True)


def test_a_report_never_raises(monkeypatch):
    """What serves is asked at the report: of a handle whose model has changed since, and of a second patch."""
    adapter = Fails("")
    monkeypatch.setattr(_patch, "adapters", lambda: (AddOne(), adapter))
    model = Pair()
    model.config = Config()
    handle = patch(model)
    adapter.where = "serving"
    second = patch(model)
    del model.two
    for report, state in ((handle.report(), "patched"), (second.report(), "already patched")):
        rows = {(row.module, row.feature): (row.state, row.detail) for row in report.rows}
        assert (
            rows["", "fails"][0] == state and "not known as the module is now (AttributeError" in rows["", "fails"][1]
        )
        assert rows["one", "plus"] == (state, "reference")
        assert rows["two", "plus"] == ("removed", "")
        assert str(report)
    assert [row.state for row in handle.undo().rows] == ["undone"] * 3


def test_strict():
    model = Pair()
    model.two.linear = nn.Identity()
    before = snapshot(model)
    with pytest.raises(PatchError, match="two: plus: linear is not plain"):
        patch(model, strict=True)
    assert snapshot(model) == before
    handle = patch(model)
    assert [(r.module, r.state) for r in handle.report().rows] == [("one", "patched"), ("two", "refused")]
    with pytest.raises(PatchError, match="plus: nothing in this Linear is recognised"):
        patch(nn.Linear(1, 1), strict=True, plus=True)


def test_nothing_recognised_warns():
    with pytest.warns(PatchWarning, match="nothing was patched in this Linear"):
        handle = patch(nn.Linear(1, 1))
    assert [(r.feature, r.state) for r in handle.report().rows] == [("plus", "not found")]


@pytest.mark.parametrize(
    "wrong, message", [(dict(typo=True), "unknown feature 'typo'"), (dict(plus=3), "plus=3, expected True, False")]
)
def test_wrong_features(wrong, message):
    with pytest.raises(TypeError, match=message):
        patch(Toy(), **wrong)
    with pytest.raises(TypeError, match="model: got int"):
        patch(3)


def test_deepcopy_is_independent():
    model = Pair()
    plain = model(X)
    handle = patch(model, config=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.one.linear.weight.zero_(), twin.two.linear.weight.zero_()
        twin.one.linear.bias.zero_(), twin.two.linear.bias.zero_()
    assert torch.equal(twin(X), torch.full((2, 3), 2.0))
    handle.undo()
    assert torch.equal(model(X), plain) and model.one.config.implementation == "eager"
    assert torch.equal(twin(X), torch.full((2, 3), 2.0)) and twin.one.config.implementation == "ivl"
    assert [r.state for r in patch(twin, config=True).report().rows] == ["already patched"] * 4


def test_pickle_loads_unpatched():
    model = Toy()
    plain = model(X)
    patch(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), plain)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), plain)
    patch(loaded)
    assert torch.equal(loaded(X), plain + 1)


def test_keeps_no_model_alive():
    model = Toy()
    handle = patch(model, config=True, times=2)
    model(X)
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_patched_context():
    model = Toy()
    before, plain = snapshot(model), model(X)
    with pytest.raises(ZeroDivisionError), patched(model, times=4) as handle:
        assert torch.equal(model(X), (plain + 1) * 4)
        assert len(handle.report().patched) == 2
        1 / 0  # noqa: B018
    assert snapshot(model) == before


def test_state_dict_and_signature():
    import inspect

    model = Pair()
    keys = list(model.state_dict())
    signature = inspect.signature(model.one.forward)
    patch(model, times=3)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.one.forward) == signature


def test_compile():
    model = Pair()
    patch(model, times=3)
    expected = model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), expected)
