"""Fit the schedules of a preset on real pictures, and write them into the library's assets.

tokendial weights fetch dinov2_small --out weights
python tools/build_real_pictures.py --out real_pictures ...
python tools/fit_presets.py --weights weights/dinov2_small.safetensors --pictures real_pictures

Schedules are searched on some of the pictures, by counted multiply-accumulates, and judged on
others: beside each one stands the constant schedule of the same cost. A run takes about 10 minutes
for each method and each way to compare on two CPU cores.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

import tokendial as td
from tokendial.atomic import atomic_write
from tokendial.data.readers.images import list_images, read_image
from tokendial.data.transforms.image import ResizeImage
from tokendial.methods import from_json
from tokendial.reduce.presets import Keeps, all_presets
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.tune.agreement import AgreementMeter
from tokendial.tune.cost_meters import MacCounter, try_schedules
from tokendial.tune.schedules import Schedule, ScheduleSpace

PRESETS = Path(td.__file__).parent / "assets" / "presets.json"
IMG_SIZE = 224
BATCH_SIZE = 16


def pictures_in(folder: Path, count: int, seed: int) -> list[Path]:
    """Some pictures of a folder, drawn at random."""
    found = list_images(folder)
    generator = torch.Generator().manual_seed(seed)
    return [found[index] for index in torch.randperm(len(found), generator=generator)[:count]]


def normalised(paths: Sequence[Path], model: td.DialViT) -> Tensor:
    """The pictures as a model reads them, [N, 3, side, side]."""
    resize = ResizeImage((IMG_SIZE, IMG_SIZE))
    images = torch.stack([tvf.pil_to_tensor(resize(read_image(path))) for path in paths])
    return tvf.normalize(images / 255, *model.anatomy.statistics)


def nearest_constant(space: ScheduleSpace, meter: MacCounter, most: float) -> Schedule:
    """The mildest constant schedule that costs at most `most`."""
    return next(s for s in space.all_linear()[1:] if meter.single_cost(s) <= most)


def fit_rows(
    model: td.DialViT,
    method: ScheduledConfig,
    images: Tensor,
    others: Tensor,
    keeps: Keeps,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each speed: the schedule, and its divergence on other pictures."""
    whole = model.cost(0).gmacs
    budgets = [whole / speedup for speedup in options.speedups]
    fitted = td.fit(
        model,
        images,
        gmacs=budgets,
        reduce=method,
        agree_by=keeps,
        batch_size=BATCH_SIZE,
        minutes=options.minutes,
        note=lambda text: print(text, flush=True),
    )
    space = ScheduleSpace(method, model.anatomy.shape)
    rows = []
    with try_schedules(model, space) as scheduled_model:
        meter = MacCounter(scheduled_model)
        judge = AgreementMeter(scheduled_model, torch.split(others, BATCH_SIZE), agree_by=keeps)
        for degree in fitted.degrees:
            constant = nearest_constant(space, meter, 1e9 * degree.budget)
            # A schedule that does not hold on other pictures gives way to the constant one.
            found = min((degree.found.removed, constant), key=lambda s: judge(s).divergence)
            rows.append(
                {
                    "speedup": round(whole / degree.budget, 4),
                    "shares": [round(count / space.shape.num_patches, 4) for count in found],
                    "divergence": round(judge(found).divergence, 5),
                    "divergence_constant": round(judge(constant).divergence, 5),
                    "constant": constant[0],
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Read the arguments, fit, and add the rows to the presets that are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["tome"])
    parser.add_argument("--keeps", nargs="+", default=list(get_args(Keeps)))
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25, 1.5, 1.75, 2.0])
    parser.add_argument("--images", type=int, default=256, help="pictures to fit on")
    parser.add_argument("--others", type=int, default=256, help="pictures to judge on")
    parser.add_argument("--minutes", type=float, default=15.0, help="time limit of each fit")
    options = parser.parse_args()
    args = {"img_size": IMG_SIZE, "num_classes": 0}
    weights = str(options.weights.resolve())
    vit = td.Backbone(name=options.backbone, weights=weights, args=args).create()
    model = td.wrap(vit.eval())
    paths = pictures_in(options.pictures, options.images + options.others, seed=0)
    # Half precision: the pictures are many, and its rounding is far below what schedules change.
    pictures = normalised(paths, model).bfloat16()
    model = model.to(torch.bfloat16)
    images, others = pictures[: options.images], pictures[options.images :]
    for name in options.methods:
        for keeps in options.keeps:
            method = from_json("reduce", {"name": name})
            presets = all_presets() if PRESETS.exists() else {}
            presets.setdefault(options.backbone, {}).setdefault(name, {})[keeps] = {
                "img_size": IMG_SIZE,
                "images": len(images),
                "images_judged": len(others),
                "rows": fit_rows(model, method, images, others, keeps, options),
            }
            with atomic_write(PRESETS) as path:
                path.write_text(json.dumps(presets, indent=1) + "\n")


if __name__ == "__main__":
    main()
