"""The command for masks of classes that are given by names: segment."""

import csv
import sys
from pathlib import Path
from typing import Annotated

import typer

from tokendial.cli.app import USE_PANEL, app


@app.command(rich_help_panel=USE_PANEL)
def segment(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of images.")],
    classes: Annotated[
        str,
        typer.Option(
            help="Classes to tell apart: names separated by commas, such as 'cat,dog,sofa|couch' "
            "(several names of one class by |); a text file (.txt) with one class a line; or a "
            "list of a data set: voc20, voc21, context59, context60, coco_object, coco_stuff, "
            "cityscapes, ade20k."
        ),
    ],
    clip: Annotated[
        str,
        typer.Option(
            help="CLIP model: a name of open_clip, or a local folder of open_clip or transformers."
        ),
    ] = "ViT-B-16-quickgelu",
    clip_weights: Annotated[
        str | None,
        typer.Option(
            help="Weights for a name of open_clip: a tag such as openai, or a local file "
            "(default: openai; none for a folder)."
        ),
    ] = None,
    proxy: Annotated[
        str,
        typer.Option(
            help="Self-supervised model: a name of timm, or a local folder of transformers."
        ),
    ] = "vit_base_patch8_224.dino",
    proxy_weights: Annotated[
        str, typer.Option(help="Weights for a name of timm: pretrained, or a local file.")
    ] = "pretrained",
    degree: Annotated[
        int,
        typer.Option(min=0, help="Tokens that ToMe merges in each block of CLIP's image tower."),
    ] = 0,
    proxy_degree: Annotated[
        int,
        typer.Option(min=0, help="Tokens that ToMe merges in each block of the proxy."),
    ] = 0,
    threshold: Annotated[
        float,
        typer.Option(
            help="Probability below which a pixel gets the first class, for lists that begin with "
            "the background; 0.4 to 0.6 are published."
        ),
    ] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to (default: beside each image).")
    ] = None,
) -> None:
    """Find the pixels of classes that are given by names, with CLIP and DINO; nothing is trained.

    Writes NAME.mask.png (class indices) and NAME.classes.png (the image, its mask and a legend) for
    each image, and prints the share of each class. Exit code 1 if some files could not be read.
    """
    from tokendial.data import ImageError, find_images
    from tokendial.open_vocabulary import ProxyCLIP, ProxyCLIPConfig, parse_classes
    from tokendial.open_vocabulary.loading import load_clip, load_proxy
    from tokendial.reduce import ToMe
    from tokendial.runs.class_names import MASK_ENDINGS, predict_class_names
    from tokendial.runs.device import default_device

    names, config = parse_classes(classes), ProxyCLIPConfig(threshold=threshold)
    files = [path for path in find_images(paths) if not path.name.endswith(MASK_ENDINGS)]
    if not files:
        raise ValueError("paths: there are no images but masks of an earlier run.")
    if clip_weights is None and not Path(clip).is_dir():
        clip_weights = "openai"
    model = ProxyCLIP(
        load_clip(clip, clip_weights),
        load_proxy(proxy, proxy_weights),
        reduce=ToMe(r=degree) if degree else None,
        proxy_reduce=ToMe(r=proxy_degree) if proxy_degree else None,
        config=config,
    )
    model.eval().to(default_device())
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
