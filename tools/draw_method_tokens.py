"""Draw docs/img/methods: what each reduction method does to the tokens of one image.

    python tools/draw_method_tokens.py docs/img/methods      # about five minutes on one core

Everything is the shipped small model on a shipped scene at 72 pixels (144 patches). ToMe, PiToMe,
EViT, PruneMerge and FFNMerge need no training. DynamicViT, DyT and DAR learn which tokens matter,
so they are trained for two epochs first: the first two count sneakers, DAR outlines items.
"""

import io
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

import tokendial as td
from tokendial.data import SceneMasks, Scenes
from tokendial.runs import read_recipe
from tokendial.show.token_figures import token_figure
from tokendial.show.tokens import input_pixels
from tokendial.train import train

SIDE, COLOURS, DPI = 72, 96, 80
UNTRAINED = {
    "tome": td.ToMe(r=10),
    "evit": td.EViT(keep_rate=0.6, layers=(4, 7, 10)),
    "ffn-merge": td.FFNMerge(r=60),
    "pitome": td.PiToMe(r=10),
    "prune-merge": td.PruneMerge(r=10),
    "in-windows": td.InWindows(reduce=td.ToMe(r=3), windows=(2, 2)),
}
COUNTING = ("adapt={name: adaptformer, dim: 16}", f"data.img_size={SIDE}", "data.train_size=500")
TRAINED = {
    "dynamicvit": ("demo", ("reduce={name: dynamicvit, keep_rate: 0.6}", *COUNTING)),
    "learnt-metric": ("demo", ("reduce={name: learnt_metric, r: 10}", *COUNTING)),
    "dyt": ("demo", ("reduce={name: dyt, target_ratio: 0.5}", *COUNTING)),
    "dar": ("demo_masks", (f"data.img_size={SIDE}", "data.train_size=400")),
}


def scene(task: str) -> Image.Image:
    """The image that is drawn."""
    if task == "masks":
        masks = SceneMasks(img_size=SIDE).build(seed=0).val
        image: Image.Image = masks[9][0]
        return image
    return Scenes(img_size=SIDE).build(seed=0).val[0][0]  # type: ignore[no-any-return]


def trained(name: str, folder: Path) -> td.DialViT:
    """A model that was trained for a few epochs."""
    recipe, overrides = TRAINED[name]
    short = ("train.epochs=2", "train.workers=0", "data.val_size=20", f"model.img_size={SIDE}")
    output = f"output={folder / name}"
    return train(read_recipe(recipe, [*overrides, *short, output]), quiet=True).model()


@torch.no_grad()
def draw(model: td.DialViT, image: Image.Image, file: Path) -> None:
    """Write the panels as a PNG with few colours."""
    pixels = tvf.pil_to_tensor(image) / 255
    tensor = tvf.normalize(pixels, *model.anatomy.statistics)
    figure = token_figure(model.eval(), tensor, input_pixels(model, tensor))
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI)
    Image.open(picture).convert("RGB").quantize(COLOURS).save(file, optimize=True)


def main() -> None:
    """Draw every method."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, reduce in UNTRAINED.items():
        shape = {"img_size": SIDE}
        vit = td.Backbone(name="scenes_vit", weights="shipped", args=shape).create()
        draw(td.wrap(vit, reduce=reduce), scene("count"), out / f"{name}.png")
    with tempfile.TemporaryDirectory() as folder:
        for name in TRAINED:
            task = "masks" if name == "dar" else "count"
            draw(trained(name, Path(folder)), scene(task), out / f"{name}.png")


if __name__ == "__main__":
    main()
