import torch
from examples import images, perturbed, tiny_vit

import tokendial as td
from tokendial.tasks.segmentation import MaskTransformer, Segmenter


@torch.no_grad()
def test_masks_follow_the_definition():
    decoder = perturbed(MaskTransformer(48, 5, dim=32, num_heads=2), std=0.2)
    features = torch.randn(2, 48, 3, 4)
    x = decoder.project(features.flatten(2).transpose(1, 2))
    x = torch.cat([x, decoder.classes.expand(2, -1, -1)], dim=1)
    for block in decoder.blocks:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    x = decoder.norm(x)
    patches = x[:, :12] @ decoder.project_patches.weight.T
    classes = x[:, 12:] @ decoder.project_classes.weight.T
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = decoder.mask_norm(torch.einsum("bld,bkd->blk", patches, classes))
    expected = masks.reshape(2, 3, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(decoder(features), expected)


def test_logits_have_the_size_of_the_images_and_gradients_reach_the_encoder():
    model = td.wrap(tiny_vit(num_classes=0), reduce=td.FFNMerge(r=16), adapt=td.Full())
    segmenter = Segmenter(model, MaskTransformer(48, 5, num_heads=3)).train()
    logits = segmenter(images())
    assert logits.shape == (2, 5, 32, 32)
    logits.square().sum().backward()
    assert model.vit.patch_embed.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in segmenter.decoder.parameters())
