"""What an InternVL is, read when it is asked."""

from ivl_kernels.models.families import families_in, family_of
from tests.models import chat_model, native_model


def test_everything_is_read_at_the_call():
    model = chat_model("repo")
    family = family_of(model)
    for token in (7, None):
        model.img_context_token_id = token
        assert family.token_id == token
    for version in ("v1", "v2"):
        model.ps_version = version
        assert family.order == version
    model.downsample_ratio = 0.25
    assert family.merge == 4
    model.downsample_ratio = 0.3
    assert family.merge == 0
    assert family.tile_pixels == 64
    model.config.force_image_size = 448
    assert family.tile_pixels == 448
    model.config.force_image_size = None
    assert family.tile_pixels == 64
    ours = native_model("qwen3")
    family = family_of(ours)
    ours.config.image_token_id = 5
    assert family.token_id == 5 and family.text is ours.model.language_model


def test_a_core_inside_a_whole_model_is_not_another_one():
    model = native_model("qwen3")
    assert [path for path, _ in families_in(model)] == [""]
    assert [path for path, _ in families_in(model.model)] == [""]
    assert family_of(model.model.language_model) is None
