"""Merge tokens in a backbone whose feature maps a segmentation head reads.

facebookresearch/ToMe issue 34 merges tokens and then needs the image's own grid back.
In facebookresearch/dinov3 issue 291 a segmentation head that reads four layers of DINOv3 is too
slow, and cannot be given fewer layers. With `td.attach` the backbone computes fewer tokens, and its
four maps keep the grid of the image, so the head is used as it was trained: a merged patch has the
features of its merged token. In issue 263 the mean of the last map is the vector of an image, and
the backbone is too slow. That needs one map, not those of all layers (`out_features=["stage12"]`),
and the dial lowers the cost of the layers themselves; the last column is the cosine of that vector.

The backbone and the head here are small and have random weights. For a trained backbone:
`transformers.AutoBackbone.from_pretrained("facebook/dinov3-vits16-pretrain-lvd1689m")`. (The
classes of the dinov3 repository itself are others; its weights are the same.)
"""

import argparse

import torch
import transformers
from torch import Tensor, nn
from torchvision.transforms import v2

import tokendial as td
from tokendial.data import Scenes

LAYERS = (3, 6, 9, 12)


class Segmenter(nn.Module):
    """A backbone that gives four maps, and a head that reads all of them."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        config = transformers.DINOv3ViTConfig(
            hidden_size=192,
            num_attention_heads=3,
            intermediate_size=768,
            out_features=[f"stage{layer}" for layer in LAYERS],
        )
        self.backbone = transformers.DINOv3ViTBackbone(config)
        self.head = nn.Conv2d(192 * len(LAYERS), num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes, H / 16, W / 16] of images [B, 3, H, W]."""
        maps = self.backbone(images).feature_maps
        for each in maps:  # [B, D, H / 16, W / 16] at every degree
            assert each.shape[-2:] == (images.shape[-2] // 16, images.shape[-1] // 16)
        logits: Tensor = self.head(torch.cat(maps, dim=1))
        return logits

    def embed(self, images: Tensor) -> Tensor:
        """Vectors [B, D] of images: the mean of the last map."""
        vectors: Tensor = self.backbone(images).feature_maps[-1].mean(dim=(2, 3))
        return vectors


def load_images(count: int) -> Tensor:
    """Return images [N, 3, 256, 320], normalised."""
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((256, 320)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    photos = Scenes(task="present", val_size=count).build(seed=0).val
    return torch.stack([prepare(photos[index][0]) for index in range(count)])


def main() -> None:
    """Attach the dial to the backbone and compare masks along it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4, help="number of images")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model, images = Segmenter().eval(), load_images(arguments.images)
    dial = td.attach(model, td.ToMe(r=8))
    print("degree  GMACs  grid     same pixels  same vector")
    with torch.no_grad():
        dial.set_degree(0)
        whole, vectors = model(images).argmax(dim=1), model.embed(images)
        for degree in (0, 8, 16, 20):
            dial.set_degree(degree)
            logits = model(images)
            same = (logits.argmax(dim=1) == whole).float().mean()
            gmacs = dial.cost_of_call(images[:1]) / 1e9
            grid = " x ".join(map(str, logits.shape[-2:]))
            cosine = torch.cosine_similarity(model.embed(images), vectors).mean()
            print(f"{degree:6}  {gmacs:5.2f}  {grid}  {same:11.1%}  {cosine:11.3f}")


if __name__ == "__main__":
    main()
