"""The commands for masks of classes that are given by names: segment, segment-eval."""

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokendial.cli.app import USE_PANEL, app

if TYPE_CHECKING:
    from tokendial.open_vocabulary import ProxyCLIP

_DATA_SETS = "voc20, voc21, context59, context60, coco_object, coco_stuff, cityscapes or ade20k"
_Clip = Annotated[
    str,
    typer.Option(
        help="CLIP model: a name of open_clip, or a local folder of open_clip or transformers."
    ),
]
_ClipWeights = Annotated[
    str | None,
    typer.Option(
        help="Weights for a name of open_clip: a tag such as openai, or a local file "
        "(default: openai; none for a folder)."
    ),
]
_ClipTower = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the image tower of this CLIP, wrapped, fine-tuned and saved in Python by "
        "save_pretrained (default: CLIP's own)."
    ),
]
_Proxy = Annotated[
    str,
    typer.Option(
        help="Self-supervised model such as DINO, or the encoder of SAM or ViTDet: a name of timm, "
        "or a local folder of transformers."
    ),
]
_ProxyWeights = Annotated[
    str, typer.Option(help="Weights for a name of timm: pretrained, or a local file.")
]
_ProxyDegree = Annotated[
    int,
    typer.Option(
        min=0,
        help="Tokens that ToMe merges in each block of the proxy; with SAM's encoder, tokens that "
        "merge for each FFN.",
    ),
]
_Threshold = Annotated[
    float,
    typer.Option(
        help="Probability below which a pixel gets the first class, for lists that begin with the "
        "background; 0.4 to 0.6 are published."
    ),
]
_CLIP = "ViT-B-16-quickgelu"
_PROXY = "vit_base_patch8_224.dino"


@app.command(rich_help_panel=USE_PANEL)
def segment(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of images.")],
    classes: Annotated[
        str,
        typer.Option(
            help="Classes to tell apart: names separated by commas, such as 'cat,dog,sofa|couch' "
            "(several names of one class by |); a text file (.txt) with one class a line; or the "
            f"classes of a data set: {_DATA_SETS}."
        ),
    ],
    clip: _Clip = _CLIP,
    clip_weights: _ClipWeights = None,
    clip_tower: _ClipTower = None,
    proxy: _Proxy = _PROXY,
    proxy_weights: _ProxyWeights = "pretrained",
    degree: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that ToMe merges in each block of CLIP's image tower, or the degree of "
            "--clip-tower (default: 0, or the degree that it was trained at).",
        ),
    ] = None,
    proxy_degree: _ProxyDegree = 0,
    threshold: _Threshold = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to (default: beside each image).")
    ] = None,
) -> None:
    """Find the pixels of classes that are given by names, with CLIP and a proxy such as DINO.

    Nothing is trained.

    Writes NAME.mask.png (class indices) and NAME.classes.png (the image, its mask and a legend) for
    each image, and prints the share of each class. Exit code 1 if some files could not be read.
    """
    from tokendial.data import ImageError, find_images
    from tokendial.open_vocabulary import parse_classes
    from tokendial.runs.class_names import MASK_ENDINGS, predict_class_names

    names = parse_classes(classes)
    files = [path for path in find_images(paths) if not path.name.endswith(MASK_ENDINGS)]
    if not files:
        raise ValueError("paths: there are no images but masks of an earlier run.")
    model = _load_model(clip, clip_weights, clip_tower, proxy, proxy_weights, threshold)
    if degree is not None:
        model.set_degree(degree)
    model.set_proxy_degree(proxy_degree)
    model.set_classes(names)
    failed = False
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "mask", "picture", "class", "share"])
    for answer in predict_class_names(model, files, out):
        if isinstance(answer, ImageError):
            failed = True
            print(f"error: {answer}", file=sys.stderr)
            continue
        for name, share in answer.shares.items():
            writer.writerow([answer.path, answer.mask, answer.picture, name, f"{share:.4f}"])
    if failed:
        raise typer.Exit(1)


@app.command("segment-eval", rich_help_panel=USE_PANEL)
def segment_eval(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"Data set: {_DATA_SETS}.")],
    root: Annotated[
        Path,
        typer.Argument(
            help="Folder of the data set as it is published, such as VOCdevkit/VOC2012."
        ),
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            help="Text file (.txt) with the names of each class a line, in the order of the data "
            "set (default: the shipped names)."
        ),
    ] = None,
    clip: _Clip = _CLIP,
    clip_weights: _ClipWeights = None,
    clip_tower: _ClipTower = None,
    proxy: _Proxy = _PROXY,
    proxy_weights: _ProxyWeights = "pretrained",
    degrees: Annotated[
        str,
        typer.Option(
            help="Tokens that ToMe merges in each block of CLIP's image tower, or degrees of "
            "--clip-tower, such as 0,4,8 or 0..16:4: one row for each."
        ),
    ] = "0",
    proxy_degree: _ProxyDegree = 0,
    threshold: _Threshold = 0.0,
) -> None:
    """Measure mean IoU of masks by class names on the validation set of a data set.

    Prints CSV: mean IoU, pixel accuracy and the multiply-accumulates of a window at each degree.
    """
    from rich.console import Console

    from tokendial.data.sets.class_mask_layouts import class_mask_pairs
    from tokendial.open_vocabulary import class_list, parse_classes
    from tokendial.runs.class_names import evaluate_class_names
    from tokendial.runs.degrees import parse_degrees
    from tokendial.runs.progress import progress_bar

    pairs = class_mask_pairs(data, str(root))
    names = class_list(data) if classes is None else parse_classes(classes)
    if len(names) != pairs.num_classes:
        raise ValueError(f"classes must be {pairs.num_classes} for {data}, got {len(names)}.")
    images = pairs.val_set()
    model = _load_model(clip, clip_weights, clip_tower, proxy, proxy_weights, threshold)
    wanted = parse_degrees(degrees, model.degrees)
    model.set_proxy_degree(proxy_degree)
    model.set_classes(names)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["degree", "proxy_degree", "gmacs", "mean_iou", "pixel_accuracy"])
    for degree in wanted:
        model.set_degree(degree)
        with progress_bar(Console(stderr=True)) as shown:
            scores = evaluate_class_names(model, images, shown.update)
        values = [f"{scores[name]:.4f}" for name in ("mean_iou", "pixel_accuracy")]
        writer.writerow([degree, proxy_degree, f"{model.cost().gmacs:.4g}", *values])


def _load_model(
    clip: str,
    clip_weights: str | None,
    clip_tower: Path | None,
    proxy: str,
    proxy_weights: str,
    threshold: float,
) -> "ProxyCLIP":
    """Load both models, each with a dial: at degree 0, or where a fine-tuned tower was saved."""
    from tokendial.open_vocabulary import ProxyCLIP, ProxyCLIPConfig
    from tokendial.open_vocabulary.loading import load_clip, load_clip_tower, load_proxy
    from tokendial.open_vocabulary.proxies import is_windowed
    from tokendial.reduce import FFNMerge, ToMe
    from tokendial.runs.device import default_device

    config = ProxyCLIPConfig(threshold=threshold)
    if clip_weights is None and not Path(clip).is_dir():
        clip_weights = "openai"
    clip_model, proxy_model = load_clip(clip, clip_weights), load_proxy(proxy, proxy_weights)
    tower = load_clip_tower(clip_model, clip_tower) if clip_tower else None
    model = ProxyCLIP(
        clip_model,
        proxy_model,
        reduce=None if tower else ToMe(r=0),
        clip_tower=tower,
        proxy_reduce=FFNMerge(r=0) if is_windowed(proxy_model) else ToMe(r=0),
        config=config,
    )
    return model.eval().to(default_device())
