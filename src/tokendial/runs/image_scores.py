"""How good the answer of each image is, one by one: scores that can be compared in pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokendial.cascade.answers import answers, are_same, overlap
from tokendial.data.readers.mask_files import IGNORED
from tokendial.tasks import Classification, Task
from tokendial.tasks.dense_prediction import best_class, resize_maps


def image_scores(task: Task, logits: Tensor, targets: Tensor | Sequence[Tensor]) -> Tensor:
    """The score of each image in [0, 1], [B]: right or wrong, or the overlap with its true mask.

    Args:
        task: Classification, or a task with masks.
        logits: Logits [B, K] or [B, K, h, w], on the CPU.
        targets: Labels [B] or [B, K], or B masks [H, W].
    """
    if isinstance(task, Classification):
        assert isinstance(targets, Tensor)
        return right_answers(task, logits, targets)
    return torch.tensor([_overlap(*pair) for pair in zip(logits, targets, strict=True)])


def right_answers(task: Classification, logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is right (1 or 0) [N]. With several labels: whether all of them are."""
    given = answers(logits, multi_label=task.multi_label)
    return are_same(given, labels.long()).float()


def _overlap(logits_Khw: Tensor, target_HW: Tensor) -> float:
    """Overlap of a predicted and a true mask where the true one says something; 1 if nowhere."""
    known = target_HW != IGNORED
    if not known.any():
        return 1.0
    size = target_HW.shape
    if len(logits_Khw) == 1:
        given = (resize_maps(logits_Khw[None], size)[0, 0] > 0).long()
    else:
        given = best_class(logits_Khw, size).long()
    return overlap(given[known], target_HW[known].long())
