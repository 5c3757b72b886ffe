"""Fitted and constant schedules compared at the same measured time, on a real model.

    pip install '.[real]'
    tokendial weights fetch dinov2_small --out weights
    python tools/build_cutouts.py --out cutouts --task saliency
    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks evidence_fit_real

Two models are fitted without training and without labels. DINOv2-S has no head; it gives embeddings
of solar cells (ELPV), and is judged by the nearest neighbours that stay the same as at degree 0. A
saliency model, DINOv2-S with its author's decoder, gives masks of pictures of Cutouts, and is
judged by their intersection over union with the masks at degree 0. For each seed, `fit` gets random
training pictures and searches a schedule of ToMe for each speed-up. The judged pictures are others:
validation cells, and test pictures whose objects and backgrounds no training picture shows.

For each seed the unreduced model, the fitted schedules and ToMe with several constant r are timed
in turns. More merging never takes longer: times of the constant r that seem to say so are averaged
(isotonic regression). The value of a constant r at the time of a fitted schedule is interpolated
between the two neighbouring r, picture by picture. So the difference is paired; its 95 % interval
is a bootstrap over pictures and seeds. A fit that ends with a constant r counts as no difference.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

import tokendial as td
from benchmarks.evidence_real.common import SEEDS, Options, frozen_backbone
from benchmarks.report import write_json
from tokendial.data.transforms.image import Augment
from tokendial.measure import Interval, bootstrap_interval, neighbour_overlap
from tokendial.runs import read_recipe
from tokendial.runs.recipe import check_method
from tokendial.runs.released import released_run
from tokendial.tasks import Classification
from tokendial.tune.cost_meters import Stopwatch, try_schedules
from tokendial.tune.schedules import Schedule, ScheduleSpace

IMG_SIZE = 168
"""Side of the solar cells in pixels: 144 patches. The saliency model takes 224."""
SHARES = (0.015, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
"""Constant schedules: the fraction of all patches that each layer merges."""
NEIGHBOURS = 10
# The judged pictures are the same for every seed.
JUDGED_SEED = 100


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its pictures, and how it is judged."""

    name: str
    """Name of the case: neighbours or masks."""
    model: td.DialViT
    """The model without reduction."""
    fit_images: Callable[[int], Tensor]
    """Prepared training pictures that `fit` may use, by seed."""
    judged: Tensor
    """Prepared pictures that schedules are judged on."""
    output: Callable[[Tensor], Tensor]
    """What the model gives for a batch, at the schedule that it was switched to."""
    values: Callable[[Tensor, Tensor], Tensor]
    """Agreement [pictures] of outputs with those of the unreduced model."""


def prepared(data: Any, transform: Callable[[Any], Tensor], count: int, seed: int) -> Tensor:
    """`count` random pictures of a data set."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return torch.stack([transform(data[index][0]) for index in order[:count].tolist()])


def case_of_neighbours(options: argparse.Namespace) -> Case:
    """DINOv2-S without a head, on solar cells."""
    places = Options(weights=options.weights)
    model = td.wrap(frozen_backbone(IMG_SIZE, places)).eval()
    augment = Augment(crop=False, test_crop_ratio=1.0)
    transform = Classification(2, multi_label=False, augment=augment).image_transform(model.anatomy)
    settings = {"name": "elpv", "task": "defect"}
    if options.elpv:
        settings["root"] = str(Path(options.elpv).resolve())
    splits = check_method("data", settings).build(0)
    return Case(
        "neighbours",
        model,
        lambda seed: prepared(splits.train, transform, options.images, seed),
        prepared(splits.val, transform, options.judged, JUDGED_SEED),
        model.embeddings,
        functools.partial(neighbour_overlap, neighbours=min(NEIGHBOURS, options.judged // 4)),
    )


def case_of_masks(options: argparse.Namespace) -> Case:
    """The saliency model with its author's weights, on objects before backgrounds."""
    root, out = str(options.cutouts.resolve()), options.work / "saliency"
    fields = [f"output={out}", f"data.root={root}"]
    run = released_run(options.onnx, read_recipe("real/focus", fields))
    model = run.model()
    model.set_degree(0)
    transform = run.task().image_transform(model.anatomy)
    splits = check_method("data", {"name": "pairs", "root": root, "val": "test"}).build(0)
    return Case(
        "masks",
        model,
        lambda seed: prepared(splits.train, transform, options.images, seed),
        prepared(splits.val, transform, options.judged, JUDGED_SEED),
        lambda batch: model(batch) > 0,
        overlap,
    )


def overlap(inside: Tensor, unreduced: Tensor) -> Tensor:
    """Intersection over union of masks [N, 1, h, w]; 1 where both are empty."""
    common, either = (
        some.flatten(1).sum(dim=1) for some in (inside & unreduced, inside | unreduced)
    )
    return torch.where(either > 0, common / either.clamp(min=1), 1.0)


CASES = {"neighbours": case_of_neighbours, "masks": case_of_masks}


@torch.inference_mode()
def judge(case: Case, space: ScheduleSpace, schedules: Sequence[Schedule]) -> list[np.ndarray]:
    """Agreement of each judged picture with the unreduced model, by schedule."""
    with try_schedules(case.model, space) as scheduled_model:

        def outputs(schedule: Schedule) -> Tensor:
            scheduled_model.use(schedule)
            return torch.cat([case.output(batch) for batch in case.judged.split(16)])

        unreduced = outputs(space.none)
        return [case.values(outputs(schedule), unreduced).numpy() for schedule in schedules]


def relative_times(
    case: Case, space: ScheduleSpace, schedules: Sequence[Schedule], batch: int, seconds: float
) -> list[float]:
    """Time of each schedule as a fraction of the unreduced model's; all take turns."""
    with try_schedules(case.model, space) as scheduled_model:
        stopwatch = Stopwatch(scheduled_model, case.judged[:batch], seconds)
        none, *costs = stopwatch.compare([space.none, *schedules])
    return [cost / none for cost in costs]


def at_time(times: Sequence[float], values: Sequence[np.ndarray], time: float) -> np.ndarray:
    """Values of each picture at `time`, interpolated between the two nearest schedules.

    If all schedules are slower, these are the values of the fastest one.

    Args:
        times: Measured times of the schedules, from the one that merges least.
        values: Values of the pictures by schedule.
        time: The time.
    """
    falling = IsotonicRegression(increasing=False).fit_transform(range(len(times)), times)
    xs, ys = falling[::-1], np.stack(values)[::-1]
    return np.array([np.interp(time, xs, column) for column in ys.T])


def measure_seed(case: Case, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit, time all schedules in turns, and judge the fitted and the constant ones."""
    fitted = td.fit(
        case.model,
        case.fit_images(seed),
        speedup=options.speedup,
        reduce=td.ToMe(),
        agree_by=options.agree_by,
        batch_size=options.batch,
        minutes=options.minutes,
        note=lambda text: print(f"{case.name}, seed {seed}: {text}", flush=True),
    )
    space = ScheduleSpace(td.ToMe(), case.model.anatomy.shape)
    found = [degree.found.removed for degree in fitted.degrees]
    schedules = [*found, *constant_schedules(space)]
    times = relative_times(case, space, schedules, options.batch, options.seconds)
    lines = set(space.all_linear())
    # The unreduced model is the constant schedule with r = 0.
    curve = [1.0, *times[len(found) :]], [np.ones(len(case.judged)), *constant_values(case)]
    return [
        {
            "speedup": degree.budget,
            "removed": removed,
            "time": time,
            "images": fitted.images,
            "fitted": values,
            "constant": values if removed in lines else at_time(*curve, time),
        }
        for degree, removed, time, values in zip(
            fitted.degrees, found, times, judge(case, space, found), strict=False
        )
    ]


def constant_schedules(space: ScheduleSpace) -> list[Schedule]:
    """Schedules that merge the same number of tokens in each layer, as long as there are any."""
    return [space.linear(round(share * space.shape.num_patches)) for share in SHARES]


@functools.cache
def constant_values(case: Case) -> list[np.ndarray]:
    """Agreement of the judged pictures by each constant r; computed once for all seeds."""
    space = ScheduleSpace(td.ToMe(), case.model.anatomy.shape)
    return judge(case, space, constant_schedules(space))


def summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and pictures of one budget, with their intervals."""
    fitted, constant = (
        torch.from_numpy(np.stack([row[key] for row in rows])).double()
        for key in ("fitted", "constant")
    )

    def interval(values: Tensor) -> Interval:
        return bootstrap_interval(torch.mean, values)

    return {
        "judged by": name,
        "speedup": rows[0]["speedup"],
        "measured": [1 / row["time"] for row in rows],
        "removed": [row["removed"] for row in rows],
        "images": [row["images"] for row in rows],
        "fitted": asdict(interval(fitted)),
        "constant": asdict(interval(constant)),
        "difference": asdict(interval(fitted - constant)),
        "difference by seed": (fitted - constant).mean(dim=1).tolist(),
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the agreement of fitted and constant schedules at the same time, in percent."""
    header = ("judged by", "budget", "measured", "fitted", "constant r", "difference", "by seed")
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        measured = ", ".join(f"{speedup:.2f}" for speedup in row["measured"])
        cells = [row["judged by"], f"{row['speedup']:g}", measured]
        cells += [Interval(**row[key]).percent() for key in ("fitted", "constant")]
        cells.append(Interval(**row["difference"]).percent(sign=True))
        cells.append(", ".join(f"{100 * seed:+.1f}" for seed in row["difference by seed"]))
        print(f"| {' | '.join(cells)} |")


def main(arguments: list[str]) -> None:
    """Fit and judge for every seed, print the table, and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks evidence_fit_real", description=__doc__.splitlines()[0]
    )
    places = Options()
    parser.add_argument("--cases", default="neighbours,masks", help="Which models, by comma.")
    parser.add_argument("--weights", type=Path, default=places.weights, help="DINOv2-S.")
    parser.add_argument("--onnx", type=Path, default=places.onnx, help="The saliency model.")
    parser.add_argument("--elpv", default=places.elpv, help="Folder of ELPV (default: installed).")
    parser.add_argument("--cutouts", type=Path, default=places.cutouts)
    parser.add_argument("--speedup", default="1.5")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Number of seeds.")
    parser.add_argument("--images", type=int, default=128, help="Pictures that a fit may use.")
    parser.add_argument("--judged", type=int, default=120, help="Pictures to judge on.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--agree-by",
        help="What schedules are compared by in the fit (default: embeddings, and masks).",
    )
    parser.add_argument(
        "--minutes", type=float, default=2.5, help="Time limit of each fit, in minutes."
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="Time to spend on timing each schedule."
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/evidence_fit_real"), help="Folder for the run."
    )
    parser.add_argument("--out", type=Path, help="Folder for the results.")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases.split(",") if name not in CASES]:
        raise ValueError(f"cases must be some of {', '.join(CASES)}, got {unknown[0]}.")
    options.speedup = [float(speedup) for speedup in options.speedup.split(",")]
    rows = []
    for name in options.cases.split(","):
        case = CASES[name](options)
        by_seed = [measure_seed(case, seed, options) for seed in range(options.seeds)]
        rows += [summary(name, of_budget) for of_budget in zip(*by_seed, strict=True)]
    print_table(rows)
    settings = {n: getattr(options, n) for n in ("images", "judged", "batch", "minutes", "seeds")}
    settings |= {"img_size": IMG_SIZE, "agree_by": options.agree_by, "constant": SHARES}
    write_json("evidence_fit_real", settings | {"rows": rows}, out=options.out)
