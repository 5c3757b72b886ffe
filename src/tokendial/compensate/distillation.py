"""Distillation losses: of compensators, and between the degrees of one model."""

# Shape legend: B batch, K classes.

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from tokendial.reduce.base import kl_divergence


def soft_distillation(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float = 1.0,
    mean_over: Literal["batch_and_classes", "batch"] = "batch_and_classes",
) -> Tensor:
    """Kullback-Leibler divergence of student and teacher, times the squared temperature.

    Args:
        student_BK: Logits of the student.
        teacher_BK: Logits of the teacher, without gradients.
        temperature: Divides the logits before the softmax.
        mean_over: What the sum of the divergence is divided by. "batch_and_classes" follows the
            authors' code (and DeiT's), "batch" the definition.

    Source:
        ToCom, equation 5; the authors' code for the normalisation.
    """
    student, teacher = student_BK.float() / temperature, teacher_BK.float() / temperature
    loss = kl_divergence(student, teacher) * temperature**2
    return loss / student.shape[1] if mean_over == "batch_and_classes" else loss


def binary_distillation(
    student_BK: Tensor, teacher_BK: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """`soft_distillation` for multi-label models: each label is a binary choice.

    Args:
        student_BK: Logits of the student.
        teacher_BK: Logits of the teacher, without gradients.
        temperature: Divides the logits before the sigmoid.

    Returns:
        Mean over batch and labels.
    """
    student, teacher = student_BK.float() / temperature, teacher_BK.float() / temperature
    cross = F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    entropy = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid())
    return (cross - entropy) * temperature**2
