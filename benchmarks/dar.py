"""Speed of DAR inference over the dense model, beside the ratio of their costs.

    python benchmarks/dar.py --batch 8 --img-size 518

DINOv2 ViT-B/14 with random weights; the dispatchers are centred first, so that each selects half of
the patches. The model without DAR (same adapters, same decoder) and DAR take turns, as a batch and
image by image; logits of the batch have to be those of the single images. Results go to
benchmarks/results/dar_HARDWARE_DATE.json.
"""

import argparse

import timm
import torch
from methods import centre
from speed import hardware, measure, write_result
from torch import Tensor, nn

import tokendial as td


class OneByOne(nn.Module):
    """Runs a batch image by image."""

    def __init__(self, model: td.DialViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the batch."""
        return torch.cat([self.model(image) for image in images.split(1)])


def selected_share(model: td.DialViT, images: Tensor) -> float:
    """Share of the patches that the FFNs process."""
    tokens = model.outcome(images).tokens
    return float(torch.stack([t.selected[:, t.prefix :] for t in tokens]).mean())


@torch.no_grad()
def main() -> None:
    """Compare, measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=518)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch14_dinov2", img_size=options.img_size, num_classes=0)
    parts = {"adapt": td.DARAdapter(), "decode": td.DARDecoder()}
    model = td.wrap(vit, reduce=td.DAR(), **parts).eval().to(options.device)
    dense = td.wrap(vit, **parts).eval().to(options.device)
    images = torch.randn(options.batch, 3, options.img_size, options.img_size)
    images = images.to(options.device)
    centre(model, images)

    share = selected_share(model, images)
    apart = float((model(images) - OneByOne(model)(images)).abs().max())
    full, reduced = dense.cost(), model.cost()
    # The nominal cost is that of the share DAR is trained to; FFNs of other shares cost in step.
    ffn = (full.macs - reduced.macs) / (1 - model.reduce_config.target_ratio)
    cost_ratio = full.macs / (full.macs - ffn * (1 - share))
    models = {"dense": dense, "DAR": model, "DAR, one by one": OneByOne(model)}
    found = measure(models, images, options.repeats)
    speed_ratio = found["DAR"]["speedup"]
    print(f"tokens processed {share:.1%}; batch and single images differ by {apart:.1e}")
    print(f"cost ratio {cost_ratio:.3f}, speed ratio {speed_ratio:.3f}", end=" ")
    print(f"({speed_ratio / cost_ratio:.0%} of it) on {hardware(options.device)}")
    rows = {"share": share, "apart": apart, "cost_ratio": cost_ratio, "seconds": found}
    write_result("dar", options.device, options.batch, rows)


if __name__ == "__main__":
    main()
