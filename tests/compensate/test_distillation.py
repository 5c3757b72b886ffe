import pytest
import torch
import torch.nn.functional as F
from examples import golden

from tokendial.compensate.distillation import binary_distillation, soft_distillation

CASE, TENSORS = golden("tocom_kd_loss")


@pytest.mark.parametrize("setting", CASE["settings"], ids=lambda setting: setting["key"])
def test_losses_equal_those_of_the_authors_code(setting):
    student, teacher = TENSORS["input.student_logits"], TENSORS["input.teacher_logits"]
    labels, alpha = TENSORS["input.labels"], setting["alpha"]
    task = F.cross_entropy(student, labels)
    expected = {
        "none": task,
        "soft": task * (1 - alpha)
        + alpha * soft_distillation(student, teacher, temperature=setting["tau"]),
        "hard": task * (1 - alpha) + alpha * F.cross_entropy(student, teacher.argmax(1)),
    }[setting["distillation_type"]]
    torch.testing.assert_close(expected, TENSORS[setting["key"]], rtol=1e-5, atol=1e-6)


def test_both_normalisations_and_the_binary_form():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    whole = soft_distillation(student, teacher, temperature=2.0)
    batch = soft_distillation(student, teacher, temperature=2.0, mean_over="batch")
    torch.testing.assert_close(batch, 7 * whole)
    two = torch.stack([torch.zeros(5, 7), teacher], dim=-1).flatten(0, 1)
    ours = torch.stack([torch.zeros(5, 7), student], dim=-1).flatten(0, 1)
    torch.testing.assert_close(
        binary_distillation(student, teacher), soft_distillation(ours, two, mean_over="batch")
    )
    for loss in (soft_distillation, binary_distillation):
        assert loss(teacher, teacher).abs() < 1e-6
