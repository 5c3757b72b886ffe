"""Metrics of classification against scikit-learn, and the loss with class weights."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from torch import nn

from tokendial.data import Augment
from tokendial.tasks import Classification, metrics
from tokendial.tasks.metrics import class_metrics

NAMES = ("balanced_accuracy", "accuracy", "f1", "auroc")


def task(num_classes, *, multi_label=False, names=None, weights=None, **augment):
    return Classification(
        num_classes,
        multi_label=multi_label,
        augment=Augment(**augment),
        metrics=names,
        class_weights=weights,
    )


@settings(deadline=None, max_examples=30)
@given(
    num_classes=st.integers(2, 7),
    num_images=st.integers(2, 60),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 40.0]),
)
def test_metrics_are_those_of_scikit_learn(num_classes, num_images, seed, scale):
    draw = np.random.default_rng(seed)
    # Rounded, so that some scores are equal.
    logits = torch.tensor(draw.normal(size=(num_images, num_classes)).round(1) * scale).float()
    targets = draw.integers(num_classes, size=num_images)
    targets[:2] = (0, 1)
    found = class_metrics(num_classes, multi_label=False, names=NAMES)
    for part in torch.arange(num_images).split(7):
        found.update(logits[part], torch.tensor(targets)[part])
    values = found.compute()
    assert tuple(values) == NAMES
    predicted = logits.argmax(dim=1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # absent classes
        balanced = balanced_accuracy_score(targets, predicted)
        average = "binary" if num_classes == 2 else "macro"
        f1 = f1_score(targets, predicted, average=average)
    probabilities = logits.double().softmax(dim=1).numpy()
    classes = [1] if num_classes == 2 else np.unique(targets)
    auroc = np.mean([roc_auc_score(targets == c, probabilities[:, c]) for c in classes])
    wanted = (balanced, (predicted == targets).mean(), f1, auroc)
    assert list(values.values()) == pytest.approx(wanted, abs=1e-6)


def test_f1_of_two_classes_is_0_where_scikit_learn_says_so():
    found = class_metrics(2, multi_label=False, names=["f1"])
    found.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert float(found.compute()["f1"]) == f1_score([0], [0], zero_division=0) == 0


def test_means_over_classes_say_which_are_left_out(caplog):
    metrics._log_once.cache_clear()
    found = class_metrics(4, multi_label=False, names=NAMES)
    found.update(torch.eye(4)[[0, 1, 1]], torch.tensor([0, 1, 2]))
    assert float(found.compute()["balanced_accuracy"]) == pytest.approx(2 / 3)
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "balanced_accuracy is the mean over 3 of 4 classes",
        "f1 is the mean over 3 of 4 classes",
        "auroc is the mean over 3 of 4 classes",
    ]


def test_auroc_of_a_single_class_is_refused():
    found = class_metrics(3, multi_label=False, names=["auroc"])
    found.update(torch.eye(3)[[0, 1]], torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=r"auroc needs .* but all 2 images have class 2"):
        found.compute()


@pytest.mark.parametrize("num_classes", [5, 6])
def test_the_usual_metrics_are_as_before(num_classes):
    found = task(num_classes).metrics()
    found.update(torch.eye(num_classes), torch.arange(num_classes))
    assert list(found.compute()) == ["accuracy", "accuracy_top5"][: num_classes - 4]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_multiply_the_terms_of_their_class(smoothing):
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(8, 3), torch.arange(8) % 3, [0.5, 1.0, 4.0]
    weighted = task(3, weights=weights, smoothing=smoothing)
    soft = F.one_hot(targets, 3) * (1 - smoothing) + smoothing / 3
    terms = soft * torch.tensor(weights) * -logits.log_softmax(dim=1)
    wanted = terms.sum(dim=1).mean()
    torch.testing.assert_close(weighted.loss(logits, targets), wanted)
    # Mixup gives such targets, smoothed by timm.
    torch.testing.assert_close(weighted.loss(logits, soft), wanted)


def test_mixed_targets_are_weighted():
    torch.manual_seed(0)
    mixing = task(2, weights=[1.0, 3.0], mixup=0.8, smoothing=0.1)
    _, targets = mixing.mix_batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    logits = torch.randn(4, 2)
    wanted = (targets * torch.tensor([1.0, 3.0]) * -logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixing.loss(logits, targets), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_1_change_nothing(smoothing):
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 3), torch.arange(8) % 3
    plain, weighted = (task(3, weights=w, smoothing=smoothing) for w in (None, [1.0] * 3))
    torch.testing.assert_close(weighted.loss(logits, targets), plain.loss(logits, targets))


def test_heavy_classes_gain_recall():
    torch.manual_seed(0)
    features = torch.randn(400, 2)
    targets = (features[:, 0] + torch.randn(400) > 1.5).long()
    recalls = []
    for weights in (None, [0.2, 3.0]):
        weighted, head = task(2, weights=weights), nn.Linear(2, 2)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

        def step(weighted=weighted, head=head, optimizer=optimizer):
            optimizer.zero_grad()
            loss = weighted.loss(head(features), targets)
            loss.backward()
            return loss

        optimizer.step(step)
        right = head(features).argmax(dim=1) == targets
        recalls.append(float(right[targets == 1].float().mean()))
    assert recalls[1] > recalls[0] + 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["accuracy_top5"]}, "accuracy_top5 needs more than 5 classes, .* have 3"),
        ({"names": ["f1"], "multi_label": True}, r"metrics must be null .* got \['f1'\]"),
        ({"weights": [1.0] * 3, "multi_label": True}, "train.class_weights must be null for data"),
        ({"weights": [1.0, 2.0]}, "train.class_weights must be 3 numbers, .* got 2"),
    ],
)
def test_settings_that_do_not_fit_the_classes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        task(3, **settings)
