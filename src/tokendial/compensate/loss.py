"""What a compensator learns from."""

# Shape legend: B batch, K classes.

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from tokendial.reduce.base import divergence


def soft_distillation(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float = 1.0,
    mean_over: Literal["batch_and_classes", "batch"] = "batch_and_classes",
) -> Tensor:
    """Divergence of the student's softmax from the teacher's, times the squared temperature.

    Args:
        student_BK: Logits.
        teacher_BK: Logits, without gradients.
        temperature: Divides the logits.
        mean_over: What the sum is divided by: batch and classes as in the authors' code (and
            DeiT's), or the batch alone as in the definition.

    Source:
        ToCom, equation 5; the authors' code for the normalisation.
    """
    student, teacher = student_BK.float() / temperature, teacher_BK.float() / temperature
    mean = divergence(student, teacher) * temperature**2
    return mean / student.shape[1] if mean_over == "batch_and_classes" else mean


def binary_distillation(
    student_BK: Tensor, teacher_BK: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The same label by label, for models whose labels do not exclude each other; mean over all."""
    student, teacher = student_BK.float() / temperature, teacher_BK.float() / temperature
    cross = F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    entropy = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid())
    return (cross - entropy) * temperature**2
