import pytest
import torch
from examples import images, tiny_vit

import tokendial as td
from tokendial.data.transforms.image import Augment
from tokendial.runs import read_recipe
from tokendial.tasks.classification import Classification
from tokendial.train import train
from tokendial.train.objective import Objective

METHODS = {
    "dynamicvit": "{name: dynamicvit, layers: [2, 3]}",
    "dyt": "{name: dyt}",
    "dar": "{name: dar}",
    "evit": "{name: evit, layers: [2], shrink: [0, 2]}",
}


def task(num_classes=7):
    return Classification(num_classes, multi_label=False, augment=Augment())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_losses_of_its_own_is_trained_by_a_recipe(method, recipe_file, run, tmp_path):
    overrides = [f"output={tmp_path / 'run'}", f"reduce={METHODS[method]}", "train.epochs=3"]
    if method == "dynamicvit":
        overrides.append(f"train.teacher={run.best}")
    trained = train(read_recipe(recipe_file, overrides), quiet=True)
    losses = [line["train_loss"] for line in trained.metrics()]
    assert losses[-1] < losses[0]
    loaded = td.load(trained.best)
    assert loaded.reduce_config == trained.recipe().reduce
    assert loaded.degree == loaded.reducer.degree


def test_a_step_of_dyt_runs_the_unreduced_model_and_restores_the_degree(vit):
    model = td.wrap(vit, reduce=td.DyT(), adapt=td.AdaptFormer(dim=4)).train()
    seen = []
    set_degree = model.set_degree
    model.set_degree = lambda degree: (seen.append(degree), set_degree(degree))
    Objective(model, task())(images(), torch.tensor([0, 1]))
    assert seen == [0, 5]
    assert model.degree == 5


def test_at_degree_0_only_the_task_is_trained(vit):
    model = td.wrap(vit, reduce=td.DyT()).train()
    model.set_degree(0)
    targets = torch.tensor([0, 1])
    loss, logits = Objective(model, task())(images(), targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))


def test_the_teacher_is_frozen_and_no_part_of_the_model(vit):
    teacher = td.wrap(tiny_vit(), reduce=td.ToMe(r=4))
    objective = Objective(td.wrap(vit, reduce=td.DynamicViT(layers=(2,))), task(), teacher).train()
    loss, _ = objective(images(), torch.tensor([0, 1]))
    loss.backward()
    assert teacher.degree == 0
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    own = {id(parameter) for parameter in objective.parameters()}
    assert not own & {id(parameter) for parameter in teacher.parameters()}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"embed_dim": 96}, r"train\.teacher: its embed_dim is 96, but the model's is 48"),
        ({"num_classes": 3}, r"train\.teacher: it has 3 classes, but the model has 7"),
    ],
)
def test_a_teacher_that_does_not_fit_raises(vit, teacher, message):
    model = td.wrap(vit, reduce=td.DynamicViT(layers=(2,)))
    with pytest.raises(ValueError, match=message):
        Objective(model, task(), td.wrap(tiny_vit(**teacher)))
