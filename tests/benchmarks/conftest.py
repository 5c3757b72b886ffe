"""Small runs on scenes, with random weights."""

import pytest
from torch import nn

from tokendial.runs import Run
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import check_recipe

SECTIONS = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "weights": None,
        "img_size": 48,
        "args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    },
    "reduce": {"name": "tome", "r": 4},
    "adapt": {"name": "full"},
}


@pytest.fixture
def make_run(tmp_path):
    """Make a run on data of a name, with their settings."""

    def make(name: str, **settings: object) -> Run:
        run = Run(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        data = {"name": name, "train_size": 8, "val_size": 16} | settings
        decode = {"decode": {"name": "linear"}} if name == "scene_masks" else {}
        recipe = check_recipe(SECTIONS | decode | {"output": str(run.folder), "data": data})
        splits = recipe.data.build(recipe.seed)
        kind = {"multi_label": splits.multi_label, "dense": splits.dense}
        run.claim(recipe, splits.classes, **kind)
        model = build_model(recipe, len(splits.classes))
        # Fresh heads say about the same of every image.
        nn.init.normal_(model.get_parameter("decoder.weight" if decode else "vit.head.weight"))
        model.save_pretrained(run.best)
        return run

    return make
