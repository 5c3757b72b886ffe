"""What answers are worth, for each kind of task."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.load import Exchange
from benchmarks.workload import Workload, mask_of, predictions, probabilities


def png(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def classes_of(named: dict[str, float]) -> dict[str, object]:
    return {"classes": [{"name": name, "probability": value} for name, value in named.items()]}


def test_a_request_carries_the_images_as_they_are(make_run):
    workload = Workload(make_run("scenes", task="count"), 5)
    told = json.loads(workload.body([3, 1], top=2, model="scenes"))
    assert (told["top"], told["model"]) == (2, "scenes")
    for number, encoded in zip([3, 1], told["images"], strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert np.array_equal(np.asarray(image), np.asarray(workload.images[number]))


def test_groups_leave_out_the_rest(make_run):
    workload = Workload(make_run("scenes", task="count"), 1000)
    assert [list(group) for group in workload.groups(6)] == [[*range(6)], [*range(6, 12)]]


def test_accuracy_of_classes(make_run):
    workload = Workload(make_run("scenes", task="count"), 8)
    names = workload.classes
    right = [(n, classes_of({names[int(workload.targets[n])]: 0.4})) for n in range(8)]
    wrong = [(n, classes_of({names[int(workload.targets[n]) - 1]: 0.9})) for n in range(2)]
    assert workload.top == 1
    assert workload.score(right) == 1.0
    assert workload.score(right + wrong) == pytest.approx(0.8)
    assert workload.score([]) is None


def test_accuracy_of_several_labels(make_run):
    workload = Workload(make_run("scenes", task="present"), 16)
    names = workload.classes
    assert workload.top == len(names)
    told = [
        dict(zip(names, np.where(target > 0, 0.9, 0.2).tolist(), strict=True))
        for target in workload.targets
    ]
    assert workload.score((n, classes_of(one)) for n, one in enumerate(told)) == 1.0
    told[0] = {name: 1 - value for name, value in told[0].items()}
    found = workload.score((n, classes_of(one)) for n, one in enumerate(told))
    assert found == pytest.approx(15 / 16)


def test_mean_iou_of_masks_of_classes(make_run):
    workload = Workload(make_run("scene_masks", task="kinds"), 3)
    told = [(n, {"mask": png(target.numpy())}) for n, target in enumerate(workload.targets)]
    assert workload.score(told) == 1.0
    empty = {"mask": png(np.zeros_like(workload.targets[0].numpy()))}
    assert 0 < workload.score([(n, empty) for n in range(3)]) < 0.5


def test_s_measure_of_binary_masks(make_run):
    workload = Workload(make_run("scene_masks", task="items"), 2)
    told = [(n, {"mask": png(target.numpy() * 255)}) for n, target in enumerate(workload.targets)]
    turned = [
        (n, {"mask": png(255 - target.numpy() * 255)}) for n, target in enumerate(workload.targets)
    ]
    assert workload.score(told) == pytest.approx(1.0, abs=1e-3)
    assert workload.score(turned) < 0.5


def test_answers_are_read_as_they_were_told():
    told = [classes_of({"cat": 0.7, "dog": 0.2}), {"mask": png(np.array([[0, 7]]))}]
    exchange = Exchange(0, 0.0, status=200, body=json.dumps({"predictions": told}).encode())
    first, second = predictions(exchange)
    assert probabilities(first, ("dog", "fish", "cat")).tolist() == [0.2, 0.0, 0.7]
    assert mask_of(second).tolist() == [[0, 7]]
