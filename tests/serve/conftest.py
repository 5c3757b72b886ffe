"""Two runs on one backbone, one that gives masks, and one that keeps embeddings."""

import pytest
from examples import perturbed
from served_runs import MODEL, backbone, described, write_run

import tokendial as td
from tokendial.runs import Run
from tokendial.runs.recipe import check_recipe


@pytest.fixture(scope="session")
def pets(tmp_path_factory) -> Run:
    return write_run(tmp_path_factory.mktemp("pets") / "run", ["cat", "dog", "hamster"])


@pytest.fixture(scope="session")
def cars(tmp_path_factory) -> Run:
    return write_run(tmp_path_factory.mktemp("cars") / "run", ["bus", "car", "tram", "van"], seed=2)


@pytest.fixture(scope="session")
def masks(tmp_path_factory) -> Run:
    vit = backbone(num_classes=0)
    decode = td.LinearDecoder(num_classes=1)
    model = perturbed(
        td.wrap(
            vit,
            reduce=td.ToMe(r=4),
            adapt=td.AdaptFormer(dim=4),
            decode=decode,
            backbone=described(num_classes=0),
        )
    )
    folder = tmp_path_factory.mktemp("masks") / "run"
    recipe = {
        "output": str(folder),
        "model": MODEL,
        "reduce": {"name": "tome", "r": 4},
        "adapt": {"name": "adaptformer", "dim": 4},
        "decode": {"name": "linear", "num_classes": 1},
        "data": {"name": "scene_masks", "train_size": 2, "val_size": 2, "img_size": 48},
    }
    run = Run(folder)
    run.claim(check_recipe(recipe), ["thing"], dense=True)
    model.save_pretrained(run.best)
    return run


@pytest.fixture(scope="session")
def embedder(tmp_path_factory) -> Run:
    """A run that was trained to keep the embeddings of its backbone."""
    model = perturbed(
        td.wrap(
            backbone(num_classes=0),
            reduce=td.ToMe(r=4),
            adapt=td.LoRA(rank=2),
            backbone=described(num_classes=0),
        )
    )
    folder = tmp_path_factory.mktemp("embedder") / "run"
    recipe = {
        "output": str(folder),
        "model": MODEL | {"weights": "vit.safetensors"},
        "reduce": {"name": "tome", "r": 4},
        "adapt": {"name": "lora", "rank": 2},
        "data": {"name": "unlabelled", "root": "."},
    }
    run = Run(folder)
    run.claim(check_recipe(recipe), ())
    model.save_pretrained(run.best)
    return run
