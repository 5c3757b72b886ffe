"""Speed of DAR in inference, compared with the dense model and with the ratio of their costs.

The model is DINOv2 ViT-B/14 with random weights. Its dispatchers are centred first, so that each
selects half of the patches. The dense model has the same adapters and decoder, without DAR. Both
take turns, with a batch and image by image; the logits of the batch must equal those of the images.
"""

import copy

import torch
from torch import Tensor

import tokendial as td
from benchmarks.alternating import Runner
from benchmarks.models import backbone, centre, random_images
from benchmarks.options import add_model, options, parse_options
from benchmarks.plots import cost_figure
from benchmarks.report import Column, Report
from benchmarks.speed import MEASURES, Contender, compare
from tokendial.measure import ShareMeter


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    parser = options("dar", __doc__, repeats=5)
    add_model(parser, default="vit_base_patch14_dinov2")
    parser.set_defaults(img_size=518)
    parser.add_argument("--batch", type=int, default=8)
    asked = parse_options(parser, arguments, model="vit_small_patch14_dinov2", img_size=56, batch=2)
    vit = backbone(asked.model, img_size=asked.img_size, device=asked.device)
    vit.reset_classifier(0)
    parts = {"adapt": td.DARAdapter(), "decode": td.DARDecoder()}
    plain = copy.deepcopy(vit)
    model = td.wrap(vit, reduce=td.DAR(), **parts).eval().to(asked.device)
    dense = td.wrap(plain, **parts).eval().to(asked.device)
    images = random_images(vit, asked.batch)
    centre(model, images)

    def one_by_one() -> Tensor:
        return torch.cat([model(image) for image in images.split(1)])

    with ShareMeter(model) as meter:
        logits = model(images)
    share = meter.share
    apart = float((logits - one_by_one()).abs().max())
    full, nominal = dense.cost(), model.cost()
    # The nominal cost holds for the target ratio. The cost of FFNs is linear in the real ratio.
    ffn = (full.gmacs - nominal.gmacs) / (1 - td.DAR().target_ratio)
    gmacs = full.gmacs - ffn * (1 - share)
    contenders = [
        Contender({"method": "dense"}, full.gmacs, Runner(lambda: dense(images))),
        Contender({"method": "dar"}, gmacs, Runner(lambda: model(images))),
        Contender({"method": "dar, one by one"}, gmacs, Runner(one_by_one)),
    ]
    rows = compare(contenders, batch=asked.batch, repeats=asked.repeats, device=asked.device)
    notes = (
        f"FFNs process {share:.1%} of the patches",
        f"logits of the batch and of single images differ by {apart:.1e}",
    )
    columns = (Column("method", "method"), *MEASURES)
    Report("dar", columns, rows, cost_figure(rows, ()), notes).write(asked)
