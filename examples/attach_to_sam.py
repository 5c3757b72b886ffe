"""Merge tokens in the image encoder of Segment Anything.

facebookresearch/ToMe issue 42 wants to merge tokens in SAM's encoder. Its attention is in windows,
so each token is needed in its place; and its last layers are convolutions, so the grid has to be
whole at the end. FFNMerge fits both: attention stays as it is, each FFN runs on merged tokens, and
its output returns to every position. Other methods are refused with a message.

The model here is small and has random weights. For a trained one:
`transformers.SamModel.from_pretrained("facebook/sam-vit-base")`. (The classes of the
segment-anything repository itself are others; its weights are the same.)
"""

import argparse

import torch
import transformers
from torch import Tensor

import tokendial as td
from tokendial.measure import time_in_rounds

SIDE, PATCH = 512, 16


def load_model() -> transformers.SamModel:
    """Return a small SAM."""
    torch.manual_seed(0)
    vision = transformers.SamVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=192,
        mlp_dim=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        window_size=14,
        global_attn_indexes=[2, 5],
        output_channels=64,
        num_pos_feats=32,
    )
    prompts = transformers.SamPromptEncoderConfig(hidden_size=64, image_size=SIDE, patch_size=PATCH)
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=64, mlp_dim=128, num_attention_heads=2, iou_head_hidden_dim=64
    )
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    return transformers.SamModel(config).eval()


def iou(found: Tensor, wanted: Tensor) -> float:
    """Overlap of two masks."""
    return float((found & wanted).sum() / (found | wanted).sum().clamp(min=1))


def main() -> None:
    """Attach the dial and compare masks and times along it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="time to measure each degree")
    arguments = parser.parse_args()

    model = load_model()
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    points = torch.tensor([[[[200.0, 300.0]]]])

    def masks() -> Tensor:
        found: Tensor = model(pixel_values=image, input_points=points).pred_masks
        return found > found.median()

    try:
        td.attach(model, td.ToMe(r=8))
    except ValueError as error:
        print(error)
    dial = td.attach(model, td.FFNMerge(r=256))
    degrees = [0, 256, 512]
    with torch.no_grad():
        timings = time_in_rounds(
            degrees,
            dial.set_degree,
            lambda _: model.get_image_embeddings(image),
            device=image.device,
            seconds=arguments.seconds,
        )
        dial.set_degree(0)
        whole = masks()
        print("degree  GMACs  IoU with degree 0  speed")
        for degree, timing in zip(degrees, timings, strict=True):
            dial.set_degree(degree)
            speed = timings[0].seconds / timing.seconds
            gmacs, same = dial.cost().gmacs, iou(masks(), whole)
            print(f"{degree:6}  {gmacs:5.2f}  {same:17.3f}  {speed:4.2f}x")


if __name__ == "__main__":
    main()
