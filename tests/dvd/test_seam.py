"""A model in two halves against the whole one: the same tokens."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import ivl_kernels
from ivl_kernels.dvd import FeatureCache, LanguageSide, MessageError, VisionSide, VisualFeatures, content_key
from ivl_kernels.testing import poisoned
from tests.dvd.halves import GREEDY, KINDS, inputs_of, model_of, requests_of, sides, whole
from tests.integrations.test_remote_code import save

pytestmark = pytest.mark.filterwarnings("ignore:ps_version", "ignore:None of the inputs have requires_grad")
TILES = [((2,),), ((7,),), ((3, 4),), ((),), ((2,), (1, 2), (4,))]


def split(vision, language, batch, tiles, **options):
    features = vision.encode(requests_of(batch, tiles))
    features = [VisualFeatures.from_bytes(f.to_bytes(), language.limits) for f in features]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return language.generate(ids, features, mask, **GREEDY, **options), features


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_whole_models(kind, dtype, tiles):
    model = model_of(kind).to(dtype)
    batch = inputs_of(model, tiles, dtype=dtype)
    vision, language = sides(kind, dtype)
    with poisoned():
        got, features = split(vision, language, batch, tiles)
    assert torch.equal(got, whole(model, batch))
    assert [f.tiles for f in features] == [tuple(row) for row in tiles]
    if kind.endswith("flash") and tiles == ((3, 4),):
        assert len(set(features[0].tokens)) == 2, "the case must have tiles of both kinds"


@pytest.mark.parametrize("kind", ["native", "native flash", "hub flash"])
def test_v2pe(kind):
    tiles = ((3, 2),)
    model = model_of(kind)
    batch = inputs_of(model, tiles)
    vision, language = sides(kind, v2pe="1/16")
    got, features = split(vision, language, batch, tiles)
    assert torch.equal(got, whole(model, batch, v2pe="1/16"))
    assert not torch.equal(got, split(*sides(kind), batch, tiles)[0]), "the case must depend on the positions"
    other = split(vision, language, batch, tiles, v2pe_delta="1/2")[0]
    assert torch.equal(other, whole(model, batch, v2pe="1/16", v2pe_delta="1/2"))


def test_a_row_without_images_beside_one_with():
    model = model_of("native flash")
    tiles = ((2,), (), (3,))
    batch = inputs_of(model, tiles)
    vision, language = sides("native flash")
    encoded = vision.encode(requests_of(batch, tiles))
    features = [encoded[0], None, encoded[2]]
    got = language.generate(batch["input_ids"], features, batch["attention_mask"], **GREEDY)
    assert torch.equal(got, whole(model, batch))


def test_text_never_touches_vision(monkeypatch):
    vision, language = sides("native")
    monkeypatch.setattr(vision.model.model.vision_tower, "forward", None)
    (features,) = vision.encode([[]])
    assert features.rows.numel() == 0 and features.tokens == () and features.images() == []
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(language.generate(ids, **GREEDY), language.generate(ids, features, **GREEDY))


@pytest.mark.parametrize("kind", ["native flash", "hub flash"])
def test_routing_does_not_depend_on_neighbours(kind):
    vision, _ = sides(kind)
    batch = inputs_of(vision.model, ((3,), (5,), (1, 2)))
    requests = requests_of(batch, ((3,), (5,), (1, 2)))
    together = vision.encode(requests)
    for i, request in enumerate(requests):
        (alone,) = vision.encode([request])
        assert alone.tokens == together[i].tokens
        torch.testing.assert_close(alone.rows, together[i].rows, rtol=1e-4, atol=1e-5)
    assert [len(image) for image in together[2].images()] == [
        sum(together[2].tokens[:1]), sum(together[2].tokens[1:])
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["native", "native flash"])
def test_one_pass_and_one_call_a_ratio(kind, monkeypatch):
    vision, _ = sides(kind)
    tower, calls = vision.model.model.vision_tower, []
    tower.register_forward_pre_hook(lambda m, a, k: calls.append(len(k["pixel_values"])), with_kwargs=True)
    batch = inputs_of(vision.model, ((3,), (5,)))
    vision.encode(requests_of(batch, ((3,), (5,))))
    assert calls == [8]


class TestCache:
    def both(self, kind):
        vision, language = sides(kind)
        return VisionSide(vision.model, cache=FeatureCache()), language

    @pytest.mark.parametrize("kind", ["native", "native flash"])
    def test_answers_are_those_without(self, kind):
        cached, _ = self.both(kind)
        plain = VisionSide(cached.model)
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(n, 3, 64, 64, generator=generator) for n in (1, 3, 2, 5)]
        keys = [content_key(bytes([i]), max_tiles=12) for i in range(4)]
        for picked in ([0], [1, 2], [0, 3], [3], [2, 1], [0, 1, 2, 3], [1]):
            (got,) = cached.encode([[images[i] for i in picked]], keys=[[keys[i] for i in picked]])
            (want,) = plain.encode([[images[i] for i in picked]])
            assert got.tokens == want.tokens and got.tiles == want.tiles
            torch.testing.assert_close(got.rows, want.rows, rtol=1e-4, atol=1e-5)
        assert cached.cache.hits > 0

    def test_flash_keeps_no_decisions(self):
        """Beside another image a tile may be compressed that was not before: then it is encoded again, once."""
        cached, _ = self.both("native flash")
        generator = torch.Generator().manual_seed(1)
        images = [torch.randn(4, 3, 64, 64, generator=generator) for _ in range(4)]
        tokens = [cached.encode([[image]], keys=[[str(i)]])[0].tokens for i, image in enumerate(images)]
        (got,) = cached.encode([images], keys=[list("0123")])
        assert got.tokens != tuple(t for each in tokens for t in each), "the case must change a decision"
        before = cached.cache.misses
        cached.encode([images], keys=[list("0123")])
        assert cached.cache.misses == before

    def test_a_plain_hit_needs_no_tower(self, monkeypatch):
        cached, _ = self.both("native")
        image = torch.randn(2, 3, 64, 64)
        (first,) = cached.encode([[image]], keys=[["a"]])
        monkeypatch.setattr(cached.model.model.vision_tower, "forward", None)
        (again,) = cached.encode([[image]], keys=[["a"]])
        assert torch.equal(first.rows, again.rows) and cached.cache.hits == 1

    def test_stays_within_its_limit(self):
        cached, _ = self.both("native")
        cached.cache.limit = 3 * 16 * 48 * 4
        for i in range(5):
            cached.encode([[torch.randn(1, 3, 64, 64)]], keys=[[str(i)]])
        assert len(cached.cache) == 3 and cached.cache.bytes == cached.cache.limit and cached.cache.get("0") is None
        cached.encode([[torch.randn(4, 3, 64, 64)]], keys=[["large"]])
        assert cached.cache.get("large") is None and len(cached.cache) == 3
        cached.cache.clear()
        assert cached.cache.bytes == 0

    def test_key_of_another_tiling(self):
        cached, _ = self.both("native")
        cached.encode([[torch.randn(2, 3, 64, 64)]], keys=[["a"]])
        with pytest.raises(ValueError, match=r"keys\[0\]\[0\]: got a key of 2 tiles for an image of 3"):
            cached.encode([[torch.randn(3, 3, 64, 64)]], keys=[["a"]])
        assert content_key(b"x", max_tiles=12) != content_key(b"x", max_tiles=6) != content_key(b"y", max_tiles=6)


class TestFingerprint:
    def test_dtype_does_not_matter_weights_and_thresholds_do(self):
        base = VisionSide(model_of("native flash")).fingerprint
        assert VisionSide(model_of("native flash").bfloat16()).fingerprint == base
        assert LanguageSide(model_of("native flash")).fingerprint == base
        assert VisionSide(model_of("native flash", thresholds=(0.4, 0.0))).fingerprint != base
        assert VisionSide(model_of("native flash", seed=3)).fingerprint != base
        changed = model_of("native flash")
        with torch.no_grad():
            changed.flash.mlp2[7].bias[0] += 1
        assert VisionSide(changed).fingerprint != base
        assert VisionSide(model_of("native")).fingerprint != base

    def test_another_checkpoint_is_an_error(self):
        _, language = sides("native")
        other = VisionSide(model_of("native", seed=5))
        batch = inputs_of(other.model, ((2,),))
        (features,) = other.encode(requests_of(batch, ((2,),)))
        with pytest.raises(MessageError, match="expected .*another checkpoint") as caught:
            VisualFeatures.from_bytes(features.to_bytes(), language.limits)
        assert caught.value.reason == "fingerprint"
        with pytest.raises(MessageError, match="weights and rules"):
            language.generate(batch["input_ids"], features, **GREEDY)
        anything = LanguageSide(language.model, fingerprint=None)
        anything.generate(batch["input_ids"], features, **GREEDY)


class TestFromPretrained:
    def folder(self, kind, tmp_path):
        if kind.startswith("native"):
            model = model_of(kind)
            model.save_pretrained(tmp_path)
            return model
        flash = {"flash": (0.5, 0.0)} if kind.endswith("flash") else {}
        return save(tmp_path, **flash)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["native", "native flash", "hub", "hub flash"])
    def test_each_side_has_its_own(self, kind, dtype, tmp_path):
        model = self.folder(kind, tmp_path).to(dtype)
        tiles = ((2, 3),)
        batch = inputs_of(model, tiles, dtype=dtype)
        trust = dict(trust_remote_code=True)
        vision = VisionSide.from_pretrained(tmp_path, dtype=dtype, **trust)
        language = LanguageSide.from_pretrained(tmp_path, dtype=dtype, token_id=290, **trust)
        if not kind.startswith("native"):
            language.model.language_model.generation_config.eos_token_id = None
        assert vision.fingerprint == language.fingerprint == VisionSide(model).fingerprint
        halves = [sum(p.numel() for p in side.model.parameters()) for side in (vision, language)]
        assert sum(halves) == sum(p.numel() for p in model.parameters())
        assert not [n for n, p in vision.model.named_parameters() if p.device.type == "meta" or "language" in n]
        assert not [n for n, _ in language.model.named_parameters() if "vision" in n or "mlp" in n.split(".")[0]]
        ivl_kernels.patch(vision.model)
        ivl_kernels.patch(language.model)
        got, _ = split(vision, language, batch, tiles)
        assert torch.equal(got, whole(model, batch))

    def test_only_its_own_tensors_are_read(self, tmp_path):
        """The vision side of a checkpoint in two files whose other one is not there."""
        self.folder("native flash", tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        os.remove(tmp_path / "model.safetensors")
        mine = {k: v for k, v in tensors.items() if "language_model" not in k and "lm_head" not in k}
        save_file(mine, tmp_path / "a.safetensors", {"format": "pt"})
        index = {key: "a.safetensors" if key in mine else "b.safetensors" for key in tensors}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        vision = VisionSide.from_pretrained(tmp_path)
        assert vision.flash and vision.fingerprint == VisionSide(model_of("native flash")).fingerprint

    def test_what_does_not_fit(self, tmp_path):
        self.folder("native", tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        name = next(k for k in tensors if k.endswith("cls_token"))
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="cls_token is missing"):
            VisionSide.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="neither model.safetensors nor"):
            VisionSide.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        for side in (VisionSide, LanguageSide):
            with pytest.raises(ValueError, match="model_type 'bert'"):
                side.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            LanguageSide.from_pretrained(tmp_path)


class TestWrongInput:
    def test_no_internvl(self):
        for side in (VisionSide, LanguageSide):
            with pytest.raises(TypeError, match="got Linear, expected an InternVL"):
                side(torch.nn.Linear(2, 2))

    def test_images(self):
        vision, _ = sides("native")
        with pytest.raises(
            ValueError, match=r"requests\[0\]\[1\]: got shape \[2, 3, 32, 32\], expected \[t, 3, 64, 64\]"
        ):
            vision.encode([[torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 32, 32)]])
        with pytest.raises(ValueError, match="names: got 2, expected 1"):
            vision.encode([[]], names=["a", "b"])
        with pytest.raises(ValueError, match="keys: expected one an image"):
            vision.encode([[torch.zeros(1, 3, 64, 64)]], keys=[[]])

    def test_features_that_do_not_fit(self):
        vision, language = sides("native")
        batch = inputs_of(vision.model, ((2,), (3,)))
        features = vision.encode(requests_of(batch, ((2,), (3,))))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with pytest.raises(ValueError, match="features: got 1, expected 2"):
            language.inputs(ids, features[:1], mask)
        with pytest.raises(ValueError, match="got 32 placeholders in row 0, expected 48"):
            language.inputs(ids, features[::-1], mask)  # together they would fit
        with pytest.raises(ValueError, match="got 32 placeholders in row 0, expected 0"):
            language.inputs(ids, None, mask)
        wrong = VisualFeatures(torch.zeros(32, 12), (16, 16), (2,), fingerprint=language.fingerprint)
        with pytest.raises(MessageError, match="got 12 wide, expected 48"):
            language.inputs(ids[:1], wrong)
        odd = VisualFeatures(torch.zeros(18, 48), (16, 2), (2,), fingerprint=language.fingerprint)
        with pytest.raises(MessageError, match="got a tile of 2"):
            language.inputs(ids[:1], odd)
