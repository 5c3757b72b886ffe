"""Recipes: all settings of a run, checked before anything starts. The fields of YAML files."""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

import tokendial.data  # noqa: F401  # registers the data sets
from tokendial.backbones import Backbone
from tokendial.compensate import ToCom
from tokendial.data.transforms.clip import Clip
from tokendial.data.transforms.image import Augment
from tokendial.data.transforms.masks import MaskAugment
from tokendial.methods import method_class, method_names
from tokendial.runs.method_field import method_field
from tokendial.tasks.binary_masks import MaskMeasures
from tokendial.tasks.classification import ClassMetric
from tokendial.tasks.mask_losses import MaskLoss
from tokendial.tune import Precision

KINDS = ("reduce", "adapt", "decode", "data", "compensate")
"""Sections of a recipe that hold a registered method: its `name` and its settings."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


SectionT = TypeVar("SectionT", bound=_Section)


class ModelSection(_Section):
    """The backbone and its weights."""

    name: str
    """Name of the backbone: a timm model, or scenes_vit for the small model that is shipped."""
    weights: str | None = "pretrained"
    """Weights that the backbone starts from. pretrained: timm's weights, from the hub. shipped: the
    weights of scenes_vit. null: random. Otherwise the path of a checkpoint (a PyTorch or
    safetensors file), of a run, or of a saved model."""
    img_size: int | tuple[int, int] | None = None
    """Image size in pixels: the side of square images, or [height, width]. null: the size that the
    timm model has."""
    drop_path: float = Field(0.0, ge=0.0, lt=1.0)
    """Stochastic depth: probability of skipping the last block, in [0, 1). It falls linearly to 0
    at the first block."""
    frames: int | None = Field(None, ge=1)
    """Frames per clip. A number makes a video model of an image model, by pooling over frames.
    null: the model stays as it is; videomae_* models are video models already."""
    args: dict[str, Any] = {}
    """Further arguments of timm.create_model, such as patch_size or global_pool."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name.startswith("transformers."):
            raise ValueError(
                f"name must be a timm model, got {self.name!r}; wrap models of transformers in "
                "Python"
            )
        return self

    def backbone(self, num_classes: int | None) -> Backbone:
        """Description of the backbone, from which it can be built.

        Args:
            num_classes: Classes of a new head, 0 for none. None keeps the model's own head.
        """
        args = dict(self.args)
        if num_classes is not None:
            args["num_classes"] = num_classes
        if self.img_size is not None:
            args["img_size"] = self.img_size
        if self.drop_path:
            args["drop_path_rate"] = self.drop_path
        weights = self.weights
        if weights not in (None, "pretrained", "shipped"):
            weights = str(Path(weights).resolve())
        return Backbone(name=self.name, weights=weights, args=args, frames=self.frames)


class DegreesSection(_Section):
    """Training at several degrees of the dial, up to the highest: that of train.degree. Exactly one
    of sandwich, random and each is given; a plain list stands for each."""

    sandwich: int | None = Field(None, ge=0)
    """Each update runs degree 0, the highest degree and this many random ones between on the same
    images. Degree 0 learns the task, the others learn to give its answers (the sandwich rule and
    in-place distillation of US-Nets, arXiv 1903.05134). An update takes that many passes, and the
    memory of one."""
    random: bool = False
    """Each update runs one random degree between 0 and the highest, which learns the task. It costs
    no more than training at one degree."""
    each: tuple[int, ...] | None = None
    """Each update runs all of these degrees, which rise to the highest. The first learns the task,
    the others learn to give its answers."""
    task_weight: float = Field(0.0, ge=0.0)
    """sandwich and each: weight of the task's loss at all degrees but the first, added to the
    distillation."""

    @model_validator(mode="before")
    @classmethod
    def _read_list(cls, value: object) -> object:
        return {"each": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if [self.random, self.sandwich is not None, self.each is not None].count(True) != 1:
            raise ValueError(
                "must have one of sandwich (a number of degrees), each (a list of degrees) and "
                f"random: true, got sandwich {self.sandwich}, each {self.each} and random "
                f"{self.random}"
            )
        if self.each is not None and (
            len(self.each) < 2 or list(self.each) != sorted(set(self.each)) or self.each[0] < 0
        ):
            raise ValueError(f"each must be two or more rising degrees, got {list(self.each)}")
        if self.random and self.task_weight:
            raise ValueError(
                f"task_weight is for sandwich and each, got {self.task_weight} with random"
            )
        return self


def _allow_list_of_integers(schema: dict[str, Any]) -> None:
    schema["anyOf"].insert(1, {"type": "array", "items": {"type": "integer"}})


class TrainSection(_Section):
    """Settings of the training: batches, learning rate, precision, checkpoints, logging."""

    epochs: int = Field(100, ge=1)
    """Number of passes over the training set."""
    batch_size: int = Field(64, ge=1)
    """Images per forward pass in each process."""
    accumulate: int = Field(1, ge=1)
    """Forward passes per update: their gradients are averaged. An update sees batch_size x
    accumulate x processes images."""
    lr: float = Field(1e-3, gt=0.0)
    """Peak learning rate of AdamW. It is not scaled by the batch size."""
    min_lr: float = Field(0.0, ge=0.0)
    """Learning rate at the end of the cosine schedule, at most lr."""
    warmup_epochs: float = Field(0.0, ge=0.0)
    """Epochs in which the learning rate rises linearly from 0 to lr. Fractions are allowed."""
    layer_decay: float | None = Field(None, gt=0.0, le=1.0)
    """Layer-wise learning rate decay of the backbone, in (0, 1]: the rate of each block is this
    factor times the rate of the next block. Adapters and heads keep lr. null: 1, no decay."""
    weight_decay: float = Field(0.05, ge=0.0)
    """Weight decay of AdamW."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays. matrices: weight matrices only; biases, norms, tokens, positions and other
    vectors do not. all: everything that trains, as in the code of DyT and Sparse-Tuning."""
    clip_grad: float | None = Field(None, gt=0.0)
    """Largest allowed norm of the gradient; larger gradients are scaled down to it. null: no
    clipping."""
    ema: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay per update of an exponential moving average of the weights, such as 0.9999. The
    averaged weights are evaluated and saved. null: no average."""
    precision: Precision = "fp32"
    """Floating-point format of the forward pass (autocast): fp32, bf16 or fp16. Weights stay in
    fp32."""
    degree: int | None = Field(None, ge=0)
    """Degree of the dial to train at; 0 trains without reduction. null: the degree that the
    settings of the reduction method stand for."""
    degrees: DegreesSection | None = Field(None, json_schema_extra=_allow_list_of_integers)
    """Train one model for many degrees at once. A list of degrees: in each update, as the field
    each of the section. null: for the one degree above."""
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    """Weight of each class in the cross-entropy of images with one label. A list: one number above
    0 per class, in the order of the classes. balanced: N / (C x n) for a class with n of the N
    training images, which gives all C classes the same share of the loss. null: weights of 1."""
    images_per_class: int | None = Field(None, ge=1)
    """Few-shot: train on so many images of each class only, drawn with the recipe's seed. null: on
    all."""
    teacher: str | None = None
    """Folder of a saved model of the same shape: the teacher whose logits and tokens DynamicViT
    distils. null: no teacher."""
    workers: int = Field(0, ge=0)
    """Processes that load images, per training process. 0: images are loaded in the training
    process itself."""
    repeats: int = Field(1, ge=1)
    """Repeated augmentation: how often each image appears in an epoch, each time augmented anew.
    The epoch keeps its length, so only 1/repeats of the images appear in it. DeiT uses 3."""
    trackers: list[str] = ["tensorboard"]
    """Experiment trackers that log losses, metrics and the recipe: any of Accelerate's, such as
    tensorboard, wandb or mlflow. Their files are written to logs/ in the run's folder. []: none."""
    evaluate: Literal["every", "last"] = "every"
    """When the model is evaluated on the validation set. every: after each epoch; best is the model
    of the best epoch. last: after the last epoch only, so that no model is chosen by the data that
    it is evaluated on; best is then the last model."""
    checkpoint_activations: bool = False
    """Recompute the activations of the blocks in the backward pass: less memory, more time."""
    checkpoint_every: int = Field(500, ge=1)
    """Updates between two checkpoints. A checkpoint is also written at the end of each epoch."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _check_weights(cls, value: object) -> object:
        weights = value if isinstance(value, (list, tuple)) else []
        numbers = [w for w in weights if isinstance(w, (int, float)) and 0 < w < math.inf]
        if value not in (None, "balanced") and (not weights or len(numbers) < len(weights)):
            raise ValueError(f"must be balanced or a list of numbers above 0, got {value!r}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be at most lr ({self.lr}), got {self.min_lr}")
        return self


class DistillSection(_Section):
    """Feature distillation from the frozen pre-trained backbone (DAR*)."""

    weight: float = Field(0.1, gt=0.0)
    """Weight of the distillation loss, added to the loss of the task."""
    dim: int | None = Field(None, ge=1)
    """Width that student and teacher features are projected to before they are compared. null: the
    width of the features."""
    detach: bool = False
    """Stop gradients at the teacher's projection, so that only the student's projection learns."""


class BaseRecipe(_Section):
    """The sections that all recipes share: model, reduction, data, augmentation, training."""

    seed: int = Field(0, ge=0)
    """Seed of all random numbers: new weights, the order of images, augmentation, dropout."""
    output: str
    """Folder of the run. Without it, read_recipe takes runs/NAME of the recipe."""
    model: ModelSection
    """The backbone and its weights."""
    reduce: method_field("reduce") = None  # type: ignore[valid-type]
    """Token reduction method: its name and its settings. null: no reduction."""
    data: method_field("data")  # type: ignore[valid-type]
    """Data set: its name and its settings."""
    augment: Augment = Augment()
    """Augmentation of training images and clips, and the crop of test images. Recipes with a
    decoder use dense instead."""
    train: TrainSection = TrainSection()
    """Settings of the training: batches, learning rate, precision, checkpoints, logging."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
        if mixes and self.train.batch_size % 2:
            raise ValueError(
                "train.batch_size must be even for augment.mixup and augment.cutmix, which pair "
                f"images, got {self.train.batch_size}"
            )
        return self

    def to_yaml(self) -> str:
        """The recipe as YAML, with all fields, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class Recipe(BaseRecipe):
    """A recipe of `tokendial train`: fine-tuning on labelled data, or on images without labels to
    keep the backbone's embeddings when tokens are reduced."""

    adapt: method_field("adapt")  # type: ignore[valid-type]
    """Fine-tuning method: its name and its settings."""
    decode: method_field("decode") = None  # type: ignore[valid-type]
    """Decoder for mask tasks: its name and its settings. null: classification, with a head; no head
    for images without labels."""
    dense: MaskAugment = MaskAugment()
    """Mask tasks: augmentation of images with their masks, and how test images are processed."""
    mask_losses: dict[MaskLoss, PositiveFloat] | None = Field(None, min_length=1)
    """Binary masks: weight of each loss in training. bce: binary cross-entropy; weighted_bce: the
    same with more weight near edges; dice; iou: 1 - intersection over union; ual: how undecided
    pixels are. null: bce 1 and dice 0.5, as published for DAR."""
    mask_measures: MaskMeasures | None = None
    """Binary masks: whose code's measures the evaluation computes. dar: those of DAR's code, whose
    numbers its paper reports. null: pysodmetrics, which leaderboards use."""
    clip: Clip = Clip()
    """Videos: which frames a clip consists of, and how many views of a test video are averaged."""
    distill: DistillSection | None = None
    """Mask tasks: feature distillation from the frozen pre-trained backbone (DAR*). null: none."""
    metrics: list[ClassMetric] | None = Field(None, min_length=1)
    """Metrics of the evaluation of images (or videos) with one label; the first one selects the
    best epoch. accuracy; accuracy_top5: one of the five most probable classes is right;
    balanced_accuracy: mean recall of the classes; f1: F1 score of the second class if there are
    two, the mean over classes otherwise; auroc: area under the ROC curve of the second of two
    classes, otherwise the mean over classes, each against the rest. null: accuracy, and
    accuracy_top5 with more than 5 classes."""

    @model_validator(mode="after")
    def _check_dense(self) -> Self:
        if self.decode is not None and self.augment != Augment():
            raise ValueError("augment is for classification: with a decoder, use dense instead")
        if self.decode is None and self.dense != MaskAugment():
            raise ValueError("dense needs a decoder, but decode is null")
        if self.decode is None and self.distill is not None:
            raise ValueError("distill needs a decoder, but decode is null")
        for name in ("mask_losses", "mask_measures"):
            if self.decode is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs a decoder, but decode is null")
        return self

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.metrics is not None and len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics must name each metric once, got {self.metrics}")
        for name, value in (
            ("metrics", self.metrics),
            ("train.class_weights", self.train.class_weights),
        ):
            if self.decode is not None and value is not None:
                raise ValueError(f"{name} must be null with a decoder, got {value!r}")
        return self

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if "num_classes" in self.model.args:
            raise ValueError(
                "model.args.num_classes cannot be set: the number of classes comes from the data"
            )
        return self


class CompensateRecipe(BaseRecipe):
    """A recipe of `tokendial compensate`: training a compensator on a pre-trained model."""

    compensate: method_field("compensate") = ToCom()  # type: ignore[valid-type]
    """Compensator: its name and its settings."""
    steps: int | None = Field(None, ge=1)
    """Highest degree of the dial that the compensator covers. null: the degree that the settings of
    the reduction method stand for."""
    loss: Literal[
        "distillation", "binary_distillation", "features", "feature_map", "classification"
    ] = "distillation"
    """What the student is trained to match. distillation: the softmax of the teacher's logits.
    binary_distillation: the sigmoid of each logit. features: the teacher's pooled features, for
    models without a head. feature_map: the teacher's features of every patch, as decoders read
    them. classification: the labels."""
    temperature: float = Field(1.0, gt=0.0)
    """Temperature that divides the logits of student and teacher before the distillation loss."""
    mean_over: Literal["batch_and_classes", "batch"] = "batch_and_classes"
    """What the Kullback-Leibler divergence of loss distillation is averaged over: images and
    classes, or images only."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.reduce is None:
            raise ValueError("reduce must be a reduction method, got null")
        if self.model.weights is None:
            raise ValueError("model.weights must name pre-trained weights, got null")
        for name in (
            "degree", "degrees", "teacher", "layer_decay", "class_weights", "images_per_class",
        ):  # fmt: skip
            if (value := getattr(self.train, name)) is not None:
                raise ValueError(f"train.{name} has no meaning for a compensator, got {value}")
        return self


def check_recipe(data: dict[str, Any]) -> Recipe:
    """Make a fine-tuning recipe from a mapping of its fields.

    Raises:
        ValueError: In one line: which field is wrong, its value, and what is allowed.
    """
    return check_section(Recipe, data)


def check_section(section: type[SectionT], data: dict[str, Any]) -> SectionT:
    """Make a recipe, or a section of one, from a mapping of its fields.

    Raises:
        ValueError: In one line: which field is wrong, its value, and what is allowed.
    """
    try:
        return section.model_validate(data)
    except ValidationError as error:
        raise ValueError(_one_line(error.errors()[0], data)) from None


def check_method(kind: str, data: dict[str, Any] | None) -> Any:
    """Make a method from a mapping of its `name` and its settings. None stays None.

    Args:
        kind: One of `KINDS`, such as "reduce".
        data: The mapping.

    Raises:
        ValueError: In one line: which setting is wrong, its value, and what is allowed.
    """
    try:
        return TypeAdapter(method_field(kind)).validate_python(data)
    except ValidationError as error:
        detail = error.errors()[0]
        detail = detail | {"loc": (kind, *detail["loc"])}
        raise ValueError(_one_line(detail, {kind: data})) from None


def _one_line(error: ErrorDetails, data: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("int", "float", "str"))
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    value = error["input"]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown_field(where, data)
    if error["type"] == "missing":
        return f"{where} is missing from the recipe."
    got = f", got {value!r}" if "got" not in message and not isinstance(value, dict) else ""
    return f"{where}: {message}{got}." if where else f"{message}{got}."


def _unknown_field(where: str, data: dict[str, Any]) -> str:
    """The error text for a dotted name that is no field: of what, and which field may be meant."""
    section, _, name = where.rpartition(".")
    method = data.get(section) if section in KINDS else None
    if isinstance(method, dict) and "name" in method:
        allowed = [
            f"{section}.{f.name}" for f in dataclasses.fields(method_class(section, method["name"]))
        ]
        hint = _nearest(name, allowed) or f"; it has {', '.join(allowed) or 'no fields'}."
        return f"{where} is not a field of {method['name']}{hint}"
    fields = _all_fields()
    same_section = [field for field in fields if field.rpartition(".")[0] == section]
    hint = _nearest(name, same_section) or _nearest(name, fields) or "."
    return f"{where} is not a field of a recipe{hint}"


def _nearest(name: str, dotted: list[str]) -> str | None:
    """A hint at the dotted field whose last part resembles `name`; None if there is none."""
    by_last_part = {field.rpartition(".")[2]: field for field in reversed(dotted)}
    near = difflib.get_close_matches(name, by_last_part, n=1)
    return f"; did you mean {by_last_part[near[0]]}?" if near else None


def _all_fields() -> list[str]:
    """Dotted names of all fields. Those of the sections come first, then those of methods."""
    names = [*Recipe.model_fields, *CompensateRecipe.model_fields]
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection,
        "train": TrainSection,
        "train.degrees": DegreesSection,
        "distill": DistillSection,
    }
    for section, model in sections.items():
        names += [f"{section}.{name}" for name in model.model_fields]
    transforms = [("augment", Augment), ("clip", Clip), ("dense", MaskAugment)]
    methods = [(kind, method_class(kind, name)) for kind in KINDS for name in method_names(kind)]
    for section, cls in (*transforms, *methods):
        names += [f"{section}.{field.name}" for field in dataclasses.fields(cls)]
    return names
