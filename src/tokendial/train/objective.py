"""The training objective: the task's loss, the losses of the reduction method, distillation."""

from torch import Tensor, nn, no_grad

from tokendial.model.dial_vit import DialViT
from tokendial.passes import ForwardPass, TrainingPasses
from tokendial.reduce.base import Reducer
from tokendial.tasks import FeatureDistillation, Task


class Objective(nn.Module):
    """Runs all forward passes that the losses need, and returns the total loss.

    All passes happen in one forward of this module, because distributed training synchronises
    gradients once per forward.
    """

    def __init__(
        self,
        model: DialViT,
        task: Task,
        teacher: DialViT | None = None,
        distillation: "Distillation | None" = None,
    ) -> None:
        """Set up the objective.

        Args:
            model: The model to train.
            task: Gives the loss of logits and targets.
            teacher: A trained model whose logits and tokens DynamicViT distils.
            distillation: The feature distillation of DAR*.

        Raises:
            ValueError: If the reduction method has no use for a teacher, or the teacher does not
                fit the model.
        """
        super().__init__()
        self.model, self.task, self.distillation = model, task, distillation
        reducer = model.reducer
        if teacher is not None:
            if reducer is None or "teacher" not in reducer.extra_passes:
                raise ValueError("train.teacher: only DynamicViT learns from a teacher.")
            _check_teacher(model, teacher)
            teacher.eval().requires_grad_(False)
            teacher.set_degree(0)
        # In a tuple, so that it is no submodule: it is not saved, trained or averaged.
        self._teacher = (teacher,)

    def forward(
        self, images: Tensor, targets: Tensor, task_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The total loss, in which the task's has a weight; the logits at the present degree."""
        model = self.model
        reducer = model.reducer if model.degree else None
        if reducer is not None and type(reducer).losses is Reducer.losses:
            reducer = None
        if reducer is None and self.distillation is None:
            logits = model(images).float()
            return task_weight * self.task.loss(logits, targets), logits
        student = model.forward_pass(images)
        loss = task_weight * self.task.loss(student.logits, targets)
        if self.distillation is not None:
            loss = loss + self.distillation(student.feature_map, images)
        if reducer is None:
            return loss, student.logits
        passes = TrainingPasses(
            student,
            complete=self._unreduced_pass(images) if "complete" in reducer.extra_passes else None,
            teacher=self._teacher_pass(images),
            task_loss=lambda logits: self.task.loss(logits, targets),
        )
        return loss + sum(reducer.losses(passes).values()), student.logits

    def _unreduced_pass(self, images: Tensor) -> ForwardPass:
        """A pass of the model at degree 0, with gradients."""
        degree = self.model.degree
        self.model.set_degree(0)
        try:
            return self.model.forward_pass(images)
        finally:
            self.model.set_degree(degree)

    def _teacher_pass(self, images: Tensor) -> ForwardPass | None:
        """A pass of the teacher, without gradients; None if there is no teacher."""
        (teacher,) = self._teacher
        if teacher is None:
            return None
        with no_grad():
            return teacher.to(images.device).forward_pass(images)


class Distillation(nn.Module):
    """The feature distillation of DAR*: its weighted loss and its teacher, the frozen backbone."""

    def __init__(self, heads: FeatureDistillation, backbone: DialViT, weight: float) -> None:
        """Set up the distillation.

        Args:
            heads: Projects the features of student and teacher, and compares them.
            backbone: The pre-trained backbone: the teacher.
            weight: Weight of the loss.
        """
        super().__init__()
        self.heads, self.weight = heads, weight
        # In a tuple, so that it is no submodule: it is not saved, trained or averaged.
        self._backbone = (backbone.eval().requires_grad_(False),)

    def forward(self, student_map: Tensor | None, images: Tensor) -> Tensor:
        """The weighted loss between the student's feature map [B, D, H, W] and the teacher's."""
        assert student_map is not None  # the recipe allows distillation with a decoder only
        (backbone,) = self._backbone
        with no_grad():
            teacher_map = backbone.to(images.device).feature_map(images)
        loss: Tensor = self.weight * self.heads(student_map, teacher_map)
        return loss


def _check_teacher(model: DialViT, teacher: DialViT) -> None:
    """Raise a ValueError if shapes or classes of teacher and model differ."""
    ours, theirs = model.anatomy.shape, teacher.anatomy.shape
    for name in ("embed_dim", "num_prefix_tokens", "num_patches"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"train.teacher: its {name} is {getattr(theirs, name)}, but the model's is "
                f"{getattr(ours, name)}."
            )
    if model.num_classes != teacher.num_classes:
        raise ValueError(
            f"train.teacher: it has {teacher.num_classes} classes, but the model has "
            f"{model.num_classes}."
        )
