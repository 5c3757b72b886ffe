import timm
import torch
from examples import images, perturbed, tiny_vit
from torch.nn.functional import multi_head_attention_forward

import tokendial as td
from tokendial.measure.cost import count_macs
from tokendial.tasks.video import QueryPooling, VideoViT


def test_eight_frames_cost_what_the_paper_prints():
    with torch.device("meta"):
        model = td.wrap(timm.create_model("vit_base_patch16_224", num_classes=0))
        video = VideoViT(model, num_classes=400, num_heads=12)
        clips = torch.empty(1, 8, 3, 224, 224)
    assert round(count_macs(video, lambda module: module(clips)) / 1e9, 2) == 142.53


@torch.no_grad()
def test_pooling_is_cross_attention_of_one_query():
    pool = perturbed(QueryPooling(48, 5, num_heads=3), std=0.2)
    x = torch.randn(2, 10, 48)
    q = pool.norm_q(pool.query).expand(2, -1, -1).transpose(0, 1)
    k, v = pool.norm_k(x).transpose(0, 1), pool.norm_v(x).transpose(0, 1)
    biases = torch.cat([pool.q.bias, pool.k.bias, pool.v.bias])
    pooled, _ = multi_head_attention_forward(
        q, k, v, 48, 3, None, biases, None, None, False, 0.0, pool.proj.weight, pool.proj.bias,
        training=False, use_separate_proj_weight=True, q_proj_weight=pool.q.weight,
        k_proj_weight=pool.k.weight, v_proj_weight=pool.v.weight,
    )  # fmt: skip
    torch.testing.assert_close(pool(x), pool.head(pooled[0]))


@torch.no_grad()
def test_clips_are_independent_and_the_dial_turns():
    model = td.wrap(tiny_vit(num_classes=0), reduce=td.EViT(layers=(2,)))
    video = perturbed(VideoViT(model, num_classes=5, num_heads=3))
    clips = images(6).unflatten(0, (2, 3))
    for degree in (0, 5):
        model.set_degree(degree)
        logits = video(clips)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(logits[1:], video(clips[1:]), atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(logits, video(clips[:, order]), atol=1e-5, rtol=1e-5)
