"""What training minimises: the task's loss and those of the reduction method."""

from torch import Tensor, nn, no_grad

from tokendial.model.dial_vit import DialViT
from tokendial.passes import ForwardPass, TrainingPasses
from tokendial.reduce.base import Reducer
from tokendial.tasks import FeatureDistillation, Task


class Objective(nn.Module):
    """Runs every pass that the losses of a method read, in one forward.

    One forward holds them all because distributed training counts forwards.
    """

    def __init__(
        self,
        model: DialViT,
        task: Task,
        teacher: DialViT | None = None,
        distillation: "Distillation | None" = None,
    ) -> None:
        """Put model, task, teacher and distillation together.

        Raises:
            ValueError: If there is a teacher that the method does not learn from, or that does not
                fit the model.
        """
        super().__init__()
        self.model, self.task, self.distillation = model, task, distillation
        reducer = model.reducer
        if teacher is not None:
            if reducer is None or "teacher" not in reducer.also_runs:
                raise ValueError("train.teacher: only DynamicViT learns from a teacher.")
            _check_teacher(model, teacher)
            teacher.eval().requires_grad_(False)
            teacher.set_degree(0)
        # In a tuple, so that it is no part of the model: not saved, not trained, not averaged.
        self._teacher = (teacher,)

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the logits at the degree that trains."""
        model = self.model
        reducer = model.reducer if model.degree else None
        if reducer is not None and type(reducer).losses is Reducer.losses:
            reducer = None
        if reducer is None and self.distillation is None:
            logits = model(images).float()
            return self.task.loss(logits, targets), logits
        student = model.outcome(images)
        loss = self.task.loss(student.logits, targets)
        if self.distillation is not None:
            loss = loss + self.distillation(student.feature_map, images)
        if reducer is None:
            return loss, student.logits
        passes = TrainingPasses(
            student,
            complete=self._complete(images) if "complete" in reducer.also_runs else None,
            teacher=self._taught(images),
            task_loss=lambda logits: self.task.loss(logits, targets),
        )
        return loss + sum(reducer.losses(passes).values()), student.logits

    def _complete(self, images: Tensor) -> ForwardPass:
        degree = self.model.degree
        self.model.set_degree(0)
        try:
            return self.model.outcome(images)
        finally:
            self.model.set_degree(degree)

    def _taught(self, images: Tensor) -> ForwardPass | None:
        (teacher,) = self._teacher
        if teacher is None:
            return None
        with no_grad():
            return teacher.to(images.device).outcome(images)


class Distillation(nn.Module):
    """The weighted loss of DAR*, with its frozen teacher: the backbone as it was pre-trained."""

    def __init__(self, heads: FeatureDistillation, backbone: DialViT, weight: float) -> None:
        super().__init__()
        self.heads, self.weight = heads, weight
        # In a tuple, so that it is no part of the model: not saved, not trained, not averaged.
        self._backbone = (backbone.eval().requires_grad_(False),)

    def forward(self, student_map: Tensor | None, images: Tensor) -> Tensor:
        """The loss of the feature map that the student's decoder reads."""
        assert student_map is not None  # there is a decoder, see the recipe
        (backbone,) = self._backbone
        with no_grad():
            teacher_map = backbone.to(images.device).feature_map(images)
        loss: Tensor = self.weight * self.heads(student_map, teacher_map)
        return loss


def _check_teacher(model: DialViT, teacher: DialViT) -> None:
    ours, theirs = model.anatomy.shape, teacher.anatomy.shape
    for name in ("embed_dim", "num_prefix_tokens", "num_patches"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"train.teacher: its {name} is {getattr(theirs, name)}, but the model's is "
                f"{getattr(ours, name)}."
            )
    if model.num_classes != teacher.num_classes:
        raise ValueError(
            f"train.teacher: it knows {teacher.num_classes} classes, but the model "
            f"{model.num_classes}."
        )
