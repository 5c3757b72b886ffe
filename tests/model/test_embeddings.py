"""Embeddings: what the head reads, of every kind of backbone, and along the dial."""

import pytest
import torch
import zoo
from examples import images, tiny_vit

import tokendial as td


@pytest.mark.parametrize("name", zoo.EVERY)
@torch.no_grad()
def test_the_head_turns_embeddings_into_the_logits(name):
    vit, size = zoo.backbone(name, square=False)
    model = td.wrap(vit, reduce=td.ToMe(r=2)).eval()
    inputs = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    for degree in (0, 2):
        model.set_degree(degree)
        embeddings, logits = model.embeddings(inputs), model(inputs)
        assert embeddings.ndim == 2
        heads = model.anatomy.heads
        if len(heads) == 1:
            torch.testing.assert_close(heads[0](embeddings), logits)
        elif not heads:
            torch.testing.assert_close(embeddings, logits)
    assert not any(head._forward_hooks for head in model.anatomy.heads)


@torch.no_grad()
def test_embeddings_of_timm_are_its_features_before_the_head():
    vit = tiny_vit()
    inputs = images(2)
    expected = vit.forward_head(vit.forward_features(inputs), pre_logits=True)
    torch.testing.assert_close(td.wrap(vit).embeddings(inputs), expected)


@torch.no_grad()
def test_two_heads_are_averaged():
    vit, size = zoo.backbone("deit distilled")
    inputs = torch.randn(2, 3, *size)
    x = vit.forward_features(inputs)
    torch.testing.assert_close(td.wrap(vit).embeddings(inputs), (x[:, 0] + x[:, 1]) / 2)


@torch.no_grad()
def test_a_decoder_leaves_the_embeddings_of_the_backbone():
    vit = tiny_vit(num_classes=0)
    decoded = td.wrap(vit, decode=td.LinearDecoder(num_classes=2)).eval()
    torch.testing.assert_close(decoded.embeddings(images(2)), vit(images(2)))


@torch.no_grad()
def test_a_video_model_has_one_embedding_per_clip():
    vit = td.video_vit(tiny_vit(), frames=2, num_classes=5)
    model = td.wrap(vit).eval()
    clips = torch.randn(3, 2, 3, 32, 32)
    embeddings = model.embeddings(clips)
    torch.testing.assert_close(vit.head.head(embeddings), model(clips))


def test_a_model_that_does_not_pool_raises_and_keeps_no_hook():
    model = td.wrap(tiny_vit(num_classes=0, global_pool=""))
    with pytest.raises(ValueError, match="embeddings need a model that pools its tokens"):
        model.embeddings(images(1))
    assert not any(head._forward_hooks for head in model.anatomy.heads)
