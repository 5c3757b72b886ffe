"""Protected patches stay tokens of their own, whatever the method and the mask."""

import pytest
import timm
import torch
from examples import images, perturbed, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_models import WHOLE, whole_model
from zoo import backbone

import tokendial as td

METHODS = {
    "tome": td.ToMe(r=12),
    "tome stride": td.ToMe(r=30, stride=4),
    "tome random": td.ToMe(r=12, matching="random"),
    "tome similarity": td.ToMe(r=12, sizes="similarity"),
    "learnt_metric": td.LearntMetric(r=12, dim=8),
    "pyra": td.PYRA(r=12),
    "pitome": td.PiToMe(r=12),
    "pitome ratio": td.PiToMe(keep_ratio=0.7, first_layers=0),
    "evit": td.EViT(keep_rate=0.4, layers=(1, 2, 3)),
    "evit drop": td.EViT(r=20, rest="drop", score="shift"),
    "evit shift": td.EViT(r=20, score="shift"),
    "evit mean": td.EViT(r=20, score="mean"),
    "evit argmax": td.EViT(keep_rate=0.2, layers=(1, 3), rest="argmax"),
    "prune_merge": td.PruneMerge(r=20),
    "prune_merge mean": td.PruneMerge(r=20, score="mean"),
    "prune_merge shift": td.PruneMerge(r=20, score="shift"),
    "ffn_merge": td.FFNMerge(r=16),
    "dynamicvit": td.DynamicViT(keep_rate=0.3, layers=(2, 3)),
    "dyt": td.DyT(target_ratio=0.3),
    "dyt topk": td.DyT(target_ratio=0.3, selection="topk"),
    "dar": td.DAR(target_ratio=0.3),
    "dar topk": td.DAR(target_ratio=0.3, selection="topk"),
}
MODELS = {name: td.wrap(tiny_vit(), reduce=method).eval() for name, method in METHODS.items()}
PLAIN = td.wrap(tiny_vit()).eval()


def masks(count=2):
    """Any masks of 8 x 8 patches: few, many, none, all; different ones in a batch."""
    share = st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.97, 1.0])
    return st.tuples(st.integers(0, 999), *[share] * count).map(
        lambda drawn: torch.stack(
            [
                torch.rand(8, 8, generator=torch.Generator().manual_seed(drawn[0] + n)) < part
                for n, part in enumerate(drawn[1:])
            ]
        )
    )


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(METHODS)), mask=masks(), shared=st.booleans())
@torch.no_grad()
def test_protected_patches_stay_tokens_of_their_own(name, mask, shared):
    model, mask = MODELS[name], mask[0] if shared else mask
    each = (mask.expand(2, -1, -1) if shared else mask).flatten(1)
    (first, *_) = PLAIN.steps(images())
    with model.protecting(mask):
        steps = list(model.steps(images(), track=True, dropped="own"))
    for number, step in enumerate(steps):
        tokens = step.tokens
        for image in range(2):
            origin = tokens.origin[image]
            held = origin[1:][each[image]]
            assert (held >= 0).all()
            counts = origin[origin >= 0].bincount(minlength=tokens.x.shape[1])
            assert (counts[held] == 1).all()
            if tokens.size is not None:
                assert (tokens.size[image, held] == 1).all()
            if tokens.selected is not None:
                assert (tokens.selected[image, held] == 1).all()
            if number == 0:  # attention saw all tokens, and the FFN sees each token alone
                protected = tokens.x[image, held]
                torch.testing.assert_close(
                    protected, first.tokens.x[image, 1:][each[image]], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_mask_of_nothing_changes_nothing_and_one_of_all_leaves_the_whole_model(name):
    model = MODELS[name]
    expected = model(images())
    with model.protecting(torch.zeros(8, 8, dtype=torch.bool)):
        torch.testing.assert_close(model(images()), expected)
    with model.protecting(torch.ones(2, 8, 8, dtype=torch.bool)):
        torch.testing.assert_close(model(images()), PLAIN(images()), atol=1e-5, rtol=1e-5)
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize(
    "name", ["dinov3", "hf dinov3", "naflex rope mixed", "hf yolos mid positions"]
)
@torch.no_grad()
def test_positions_that_blocks_read_follow_the_patches(name):
    vit, size = backbone(name)
    whole = td.wrap(vit).eval()
    model = td.wrap(vit, reduce=td.ToMe(r=3)).eval()
    pictures = images(2, *size)
    rows, columns = whole.feature_map(pictures).shape[2:]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    with model.protecting(mask):
        torch.testing.assert_close(model(pictures), whole(pictures), atol=1e-4, rtol=1e-4)
    mask[0] = False
    with model.protecting(mask):
        found = model.feature_map(pictures)
    assert found.shape == whole.feature_map(pictures).shape
    assert not torch.equal(found, whole.feature_map(pictures))


@torch.no_grad()
def test_as_many_patches_are_protected_in_each_image():
    """The image with fewer gets some more, so that all have the same number of tokens."""
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, :6] = True
    mask[1, 7, 7] = True
    model = MODELS["tome"]
    with model.protecting(mask):
        (first, *_) = model.steps(images(), track=True)
    assert first.tokens.num_protected == 48
    assert first.tokens.x.shape[1] == 65 - 8  # half of the sixteen that are left


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@torch.no_grad()
def test_patches_are_protected_beside_adapters_that_read_the_grid(selection):
    reduce = td.DAR(target_ratio=0.3, selection=selection)
    model = td.wrap(tiny_vit(), reduce=reduce, adapt=td.DARAdapter()).eval()
    model.set_degree(0)
    whole = model(images())
    model.set_degree(model.degrees[-1])
    mask = td.patches_in_boxes([[(0, 0, 8, 32)], []], (32, 32), (8, 8))
    with model.protecting(mask):
        steps = list(model.steps(images(), track=True))
    patches = steps[-1].tokens.selected[:, 1:].reshape(2, 8, 8)
    assert (patches[0, :, :2] == 1).all()
    assert (patches[1] == 0).any()
    with model.protecting(torch.ones(8, 8, dtype=torch.bool)):
        torch.testing.assert_close(model(images()), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [td.DynamicViT(keep_rate=0.3, layers=(2,)), td.DyT(), td.DAR()])
def test_patches_are_protected_in_training(method):
    model = td.wrap(tiny_vit(), reduce=method).train()
    mask = torch.rand(2, 8, 8) < 0.5
    with model.protecting(mask):
        tokens = list(model.steps(images(), track=True))[-1].tokens
    seen = tokens.selected if tokens.policy is None else tokens.policy
    held = tokens.origin[:, 1:][mask.flatten(1)]
    image = torch.arange(2).repeat_interleave(mask.sum((1, 2)))
    assert (seen[image, held] == 1).all()
    assert (seen == 0).any()


@torch.no_grad()
def test_a_mask_protects_the_same_patches_in_each_time_step_of_a_clip():
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = timm.create_model("videomae_small_patch16_224", frames=4, num_classes=3, **sizes)
    model = td.wrap(perturbed(vit), reduce=td.ToMe(r=20)).eval()
    clips = torch.randn(2, *model.anatomy.input_shape, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2:5] = True
    reduced = model(clips)
    with model.protecting(mask):
        once = model(clips)
    with model.protecting(torch.cat([mask, mask])):
        torch.testing.assert_close(model(clips), once, atol=0, rtol=0)
    assert not torch.equal(once, reduced)
    message = r"must have 4 x 6 patches \(rows x columns\), got 6 x 4"
    with model.protecting(mask.T), pytest.raises(ValueError, match=message):
        model(clips)


def test_attached_dials_protect_too():
    for name in ("CLIP", "DINOv2 features", "timm ViT", "open_clip"):
        model, pictures = whole_model(name)
        with torch.no_grad():
            whole = WHOLE[name].answer(model, pictures)
            with td.attach(model, td.ToMe(r=6)) as dial:
                reduced = WHOLE[name].answer(model, pictures)
                patches = dial.towers[0]._dial.shape.num_patches
                with dial.protecting(torch.ones(1, patches, dtype=torch.bool)):
                    protected = WHOLE[name].answer(model, pictures)
                again = WHOLE[name].answer(model, pictures)
        for one, other, cut, same in zip(protected, whole, reduced, again, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
            assert torch.equal(cut, same)
        assert any((a - b).abs().max() > 1e-4 for a, b in zip(reduced, whole, strict=True))


def test_boxes_become_the_patches_that_they_touch():
    boxes = [[(0, 0, 8, 8)], [(7, 0, 9, 4), (31, 31, 32, 32)], []]
    mask = td.patches_in_boxes(boxes, (32, 32), (8, 8))
    assert mask.sum(dim=(1, 2)).tolist() == [4, 3, 0]
    assert mask[1].nonzero().tolist() == [[0, 1], [0, 2], [7, 7]]
    whole = td.patches_in_boxes([[(-5, -5, 99, 99)]], (32, 32), (8, 8))
    assert whole.all()
    with pytest.raises(ValueError, match=r"inside of 32 x 32 pixels, got \(40, 0, 50, 9\)"):
        td.patches_in_boxes([[(40, 0, 50, 9)]], (32, 32), (8, 8))


@pytest.mark.parametrize(
    ("method", "adapt", "mask", "message"),
    [
        (td.ToMe(), None, torch.ones(8, 8), r"must be a bool tensor .* got torch.float32 \[8, 8\]"),
        (td.ToMe(), None, [[True]], "must be a bool tensor .* got list"),
        (td.ToMe(), None, torch.ones(64, dtype=torch.bool), r"got torch.bool \[64\]"),
        (td.ToMe(), None, torch.ones(9, 9, dtype=torch.bool), r"must have 8 x 8 patches .* 9 x 9"),
        (
            td.ToMe(),
            None,
            torch.ones(4, 16, dtype=torch.bool),
            r"must have 8 x 8 patches .* 4 x 16",
        ),
        (td.ToMe(), None, torch.ones(3, 8, 8, dtype=torch.bool), r"2 images, got \[3, 64\]"),
        (
            td.FrameByFrame(reduce=td.ToMe(r=4)),
            None,
            torch.ones(8, 8, dtype=torch.bool),
            "FrameByFrame cannot protect patches; use the method that it runs alone",
        ),
        (
            td.FFNMerge(r=16, step=16),
            td.ConvPass(dim=4),
            torch.ones(8, 8, dtype=torch.bool),
            "ConvPass needs the grid of patches",
        ),
    ],
)
def test_mistakes_are_named(method, adapt, mask, message):
    model = td.wrap(tiny_vit(), reduce=method, adapt=adapt).eval()
    with pytest.raises(ValueError, match=message), model.protecting(mask):
        model(images())


def test_windowed_encoders_cannot_protect():
    model, _ = whole_model("timm SAM")
    mask = torch.ones(8, 8, dtype=torch.bool)
    with (
        td.attach(model, td.FFNMerge(r=16, step=16)) as dial,
        pytest.raises(ValueError, match="cannot protect patches: its windows need"),
        dial.protecting(mask),
    ):
        pass
