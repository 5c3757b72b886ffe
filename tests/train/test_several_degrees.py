import pytest
import torch
import torch.nn.functional as F
from examples import ADAPTERS, ON_THE_GRID, REDUCERS, images, perturbed, tiny_vit

import tokendial as td
from tokendial.data.transforms.image import Augment
from tokendial.data.transforms.masks import MaskAugment
from tokendial.runs import read_recipe
from tokendial.runs.recipe import DegreesSection
from tokendial.tasks import BinaryMasks, Classification, Segmentation
from tokendial.train import train
from tokendial.train.objective import Objective
from tokendial.train.several_degrees import SeveralDegrees

SANDWICH = {"sandwich": 2}
TARGETS = torch.tensor([0, 1])


def classification(*, multi_label=False):
    return Classification(7, multi_label=multi_label, augment=Augment())


def several(model, task=None, **settings):
    objective = Objective(perturbed(model, std=0.2), task or classification())
    return SeveralDegrees(objective, DegreesSection(**settings))


def losses_of(training, update, targets=TARGETS):
    """The loss of each degree of an update, whose backward passes are done."""
    training.draw_degrees(0, update)
    found = {}
    for number, degree in enumerate(training.degrees):
        training.number = number
        loss, _ = training(images(), targets)
        loss.backward()
        found[degree] = loss.item()
    return found


@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_an_update_runs_degree_0_some_between_and_the_highest(degree):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=degree))
    training = several(model, **SANDWICH)
    drawn = []
    for update in range(40):
        training.draw_degrees(0, update)
        drawn.append(training.degrees)
    assert {(first, last) for first, *_, last in drawn} == {(0, degree)}
    assert {len(each) for each in drawn} == {2 + min(2, degree - 1)}
    assert all(list(each) == sorted(set(each)) for each in drawn)
    assert set().union(*drawn) == set(range(degree + 1))


def test_one_random_degree_is_any_of_them():
    training = several(td.wrap(tiny_vit(), reduce=td.ToMe(r=4)), random=True)
    drawn = []
    for update in range(200):
        training.draw_degrees(0, update)
        drawn += training.degrees
    assert len(drawn) == 200
    assert all(25 < drawn.count(degree) < 60 for degree in range(5))


def test_each_update_runs_the_degrees_of_a_list():
    training = several(td.wrap(tiny_vit(), reduce=td.ToMe(r=4)), each=(1, 4))
    for update in range(3):
        assert list(losses_of(training, update)) == [1, 4]
    training.mark_trained()
    assert training.objective.model.reducer.trained_degrees == (1, 4)


@pytest.mark.parametrize("task_weight", [0.0, 0.5])
def test_degree_0_learns_the_task_and_teaches_the_others(task_weight):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), adapt=td.AdaptFormer(dim=4))
    training = several(model, sandwich=0, task_weight=task_weight)
    found = losses_of(training, 0)
    with torch.no_grad():
        model.set_degree(0)
        teacher = model(images())
        model.set_degree(4)
        student = model(images())
    target, rows = teacher.softmax(-1), student.log_softmax(-1)
    distilled = (target * (target.log() - rows)).sum(-1).mean()
    expected = distilled + task_weight * F.cross_entropy(student, TARGETS)
    assert found[0] == pytest.approx(F.cross_entropy(teacher, TARGETS).item() / 2, rel=1e-5)
    assert found[4] == pytest.approx(expected.item() / 2, rel=1e-3, abs=1e-6)


def test_gradients_of_all_degrees_add_up_and_none_reaches_the_teacher():
    def gradients(passes):
        torch.manual_seed(0)
        model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), adapt=td.AdaptFormer(dim=4))
        training = several(model, **SANDWICH)
        training.draw_degrees(0, 0)
        for number in range(len(training.degrees)):
            training.number = number
            loss, _ = training(images(), TARGETS)
            if number in passes:
                loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    together = gradients(range(4))
    alone = [gradients([number]) for number in range(4)]
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(each[name] for each in alone))


@pytest.mark.parametrize(
    "reduce", ["tome", "pitome", "prune_merge", "evit", "ffn_merge", "frame_by_frame"]
)
def test_every_method_without_losses_is_trained_along_its_dial(reduce):
    model = td.wrap(tiny_vit(), reduce=REDUCERS[reduce], adapt=td.LoRA(rank=2))
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    training = several(model, **SANDWICH)
    found = losses_of(training, 1)
    assert list(found)[-1] == model.reducer.degree
    assert all(p.grad is not None for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("adapt", ADAPTERS)
def test_every_adapter_is_trained_along_the_dial(adapt):
    reduce = REDUCERS["ffn_merge"] if adapt in ON_THE_GRID else td.ToMe(r=4)
    model = td.wrap(tiny_vit(), reduce=reduce, adapt=ADAPTERS[adapt])
    training = several(model, each=(0, model.degree)).train()
    trained = list(model.trainable_parameters())
    losses = losses_of(training, 0)
    assert all(parameter.grad is not None for parameter in trained)
    torch.optim.SGD(trained, lr=0.01).step()
    model.zero_grad()
    # A supernet draws other widths for each pass, and SynQT drops other features.
    random = adapt in ("noah_supernet", "synqt")
    assert random or sum(losses_of(training, 0).values()) < sum(losses.values())


@pytest.mark.parametrize("reduce", ["learnt_metric", "pyra"])
def test_weights_of_a_reduction_learn_at_every_degree_above_0(reduce):
    model = td.wrap(tiny_vit(), reduce=REDUCERS[reduce], adapt=td.LoRA(rank=2)).train()
    training = several(model, each=(0, 3, 8)).train()
    training.draw_degrees(0, 0)
    moved = []
    for training.number in range(3):
        model.zero_grad()
        loss, _ = training(images(), TARGETS)
        loss.backward()
        gradients = [parameter.grad for parameter in model.reducer.parameters()]
        assert all(gradient is not None for gradient in gradients)
        moved.append(any(gradient.any() for gradient in gradients))
    assert moved == [False, True, True]


@pytest.mark.parametrize("reduce", ["dynamicvit", "dyt", "dar", "stack", "in_windows"])
def test_a_method_that_learns_one_share_is_refused(reduce):
    inner = {
        "stack": td.Stack(methods=[td.ToMe(r=8), td.DyT()]),
        "in_windows": td.InWindows(reduce=td.DynamicViT(), windows=(2, 2)),
    }
    model = td.wrap(tiny_vit(depth=12), reduce=inner.get(reduce, REDUCERS.get(reduce)))
    with pytest.raises(ValueError, match=r"train\.degrees: \w+ learns to select one share"):
        several(model, **SANDWICH)


def test_labels_that_are_independent_are_distilled_one_by_one():
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4))
    training = several(model, classification(multi_label=True), sandwich=0)
    found = losses_of(training, 0, torch.zeros(2, 7))
    with torch.no_grad():
        model.set_degree(0)
        teacher = model(images()).sigmoid()
        model.set_degree(4)
        student = model(images()).sigmoid()
    parts = [(teacher, student), (1 - teacher, 1 - student)]
    expected = sum(p * (p / q).log() for p, q in parts).mean()
    assert found[4] == pytest.approx(expected.item() / 2, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("classes", [1, 3])
def test_masks_are_distilled_at_every_position(classes):
    decode = td.MaskTransformer(num_classes=classes, dim=16, depth=1)
    model = td.wrap(tiny_vit(num_classes=0), reduce=td.EViT(r=2), decode=decode)
    task = BinaryMasks(MaskAugment()) if classes == 1 else Segmentation(3, MaskAugment())
    training = several(model, task, sandwich=0)
    found = losses_of(training, 0, torch.zeros(2, 32, 32, dtype=torch.long))
    highest = training.highest
    with torch.no_grad():
        maps = []
        for degree in (0, highest):
            model.set_degree(degree)
            maps.append(model(images()))
    if classes == 1:
        maps = [torch.cat([logits, torch.zeros_like(logits)], dim=1) for logits in maps]
    teacher, student = (logits.log_softmax(1) for logits in maps)
    expected = (teacher.exp() * (teacher - student)).sum(1).mean()
    assert found[highest] == pytest.approx(expected.item() / 2, rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def trained(recipe_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "several"
    overrides = [f"output={output}", "train.degrees={sandwich: 1}", "train.epochs=4"]
    return train(read_recipe(recipe_file, overrides), quiet=True)


def test_a_run_learns_and_knows_its_degrees(trained):
    losses = [line["train_loss"] for line in trained.metrics()]
    assert losses[-1] < losses[0]
    model = td.load(trained.best)
    assert model.degree == 2
    assert model.reducer.trained_degrees == (0, 1, 2)
    compensator = td.Compensator.for_model(model, td.ToCom(), 2)
    with pytest.raises(
        ValueError, match="trained at the degrees 0, 1, 2 at once, so there is noth"
    ):
        compensator.attach(model)


def test_a_stopped_run_is_resumed_to_the_same_bits(trained, tmp_path):
    recipe = trained.recipe().model_copy(update={"output": str(tmp_path / "again")})
    again = train(recipe, quiet=True)
    newest = max(again.checkpoints.iterdir())
    newest.unlink()
    for folder in (again.best, again.last):
        for file in folder.iterdir():
            file.unlink()
    train(recipe, quiet=True)
    ours, theirs = (td.load(run.last).state_dict() for run in (again, trained))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.degrees={}"], r"one of sandwich \(a number of degrees\), each"),
        (["train.degrees={sandwich: 1, random: true}"], "got sandwich 1, each None and random T"),
        (["train.degrees={random: true, task_weight: 1}"], "for sandwich and each, got 1"),
        (["train.degrees={each: [0, 2], sandwich: 1}"], r"got sandwich 1, each \(0, 2\)"),
        (["train.degrees={each: [2, 0]}"], r"each must be two or more rising .* got \[2, 0\]"),
        (["train.degrees={each: [2]}"], r"each must be two or more rising degrees, got \[2\]"),
        (["train.degrees={each: [-1, 2]}"], r"each must be two or more rising .* got \[-1, 2\]"),
        (["train.degrees={each: [0, 1]}"], r"end with the highest .* 2, got \[0, 1\]"),
        (["train.degrees=[2, 0]"], r"train\.degrees: each must be .* rising .* got \[2, 0\]"),
        (["train.degrees=[0, low]"], r"train\.degrees\.each\.1: .* a valid integer.*, got 'low'"),
        (["train.degrees={sandwich: -1}"], r"train\.degrees\.sandwich: .* greater than or equal"),
        (["train.degrees={sandwhich: 2}"], r"did you mean train\.degrees\.sandwich"),
        (["train.degrees={sandwich: 1}", "reduce=null"], "a highest degree .* got no reduction"),
        (["train.degrees={sandwich: 1}", "train.degree=0"], r"got train\.degree 0"),
    ],
)
def test_mistakes_are_named(recipe_file, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(read_recipe(recipe_file, [f"output={tmp_path / 'run'}", *overrides]), quiet=True)
