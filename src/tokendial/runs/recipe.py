"""Recipes: everything about a run in one YAML file, checked before anything is started."""

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
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
from tokendial.data.transforms.dense import DenseAugment
from tokendial.data.transforms.image import Augment
from tokendial.methods import method_class, method_names, to_json
from tokendial.tune import Precision

KINDS = ("reduce", "adapt", "decode", "data", "compensate")
"""Sections of a recipe that are a method: a name and its settings."""


def _method(kind: str) -> Any:
    """A field that holds a registered method, written as a mapping with its name."""

    def read(value: Any) -> Any:
        if value is None or dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError(
                f"must be a mapping with a name, one of {', '.join(method_names(kind))}"
            )
        cls = method_class(kind, value["name"])
        return TypeAdapter(cls).validate_python({k: v for k, v in value.items() if k != "name"})

    def write(value: Any) -> Any:
        return None if value is None else to_json(kind, value)

    return Annotated[Any, BeforeValidator(read), PlainSerializer(write), _MethodSchema(kind)]


@dataclasses.dataclass(frozen=True, slots=True)
class _MethodSchema:
    """Says in a JSON schema which methods of a kind there are, and their settings."""

    kind: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [*map(self._of, method_names(self.kind)), {"type": "null"}]}

    def _of(self, name: str) -> dict[str, Any]:
        schema = TypeAdapter(method_class(self.kind, name)).json_schema()
        # A file may leave what is needed to its base, or to the command line.
        schema.pop("required", None)
        return schema | {"properties": {"name": {"const": name}} | schema.get("properties", {})}


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
    """The backbone."""

    name: str
    """timm's model name, or scenes_vit for the small model that is shipped."""
    weights: str | None = "pretrained"
    """pretrained (timm's, from the hub), shipped, null (random), or the path of a checkpoint: a
    file in torch's or safetensors' format, a run, or a saved model."""
    img_size: int | tuple[int, int] | None = None
    """Side of the images, or height and width, in pixels; null: the model's own."""
    drop_path: float = Field(0.0, ge=0.0, lt=1.0)
    """Stochastic depth: probability at the last layer, rising from 0 at the first."""
    frames: int | None = Field(None, ge=1)
    """Frames of a clip: makes a video model of an image model; videomae_* are ones already. null:
    images, or what the video model takes by itself."""
    args: dict[str, Any] = {}
    """Further arguments of the timm model, such as patch_size or global_pool."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name.startswith("transformers."):
            raise ValueError(
                f"name must be a timm model, got {self.name!r}; wrap models of transformers in "
                "Python"
            )
        return self

    def backbone(self, num_classes: int | None) -> Backbone:
        """How to build it, with a fresh head for `num_classes`; None: with its own."""
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


class TrainSection(_Section):
    """The optimisation."""

    epochs: int = Field(100, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(64, ge=1)
    """Images of one process in one forward pass."""
    accumulate: int = Field(1, ge=1)
    """Forward passes whose gradients are summed up for one update."""
    lr: float = Field(1e-3, gt=0.0)
    """Peak learning rate, as it is: not scaled by the batch."""
    min_lr: float = Field(0.0, ge=0.0)
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = Field(0.0, ge=0.0)
    """Epochs over which the rate rises linearly from 0."""
    layer_decay: float | None = Field(None, gt=0.0, le=1.0)
    """Factor on the rate of the backbone from one block to the one before it; null: 1."""
    weight_decay: float = Field(0.05, ge=0.0)
    """AdamW's weight decay of matrices; biases, norms, tokens, positions and other vectors have
    none."""
    clip_grad: float | None = Field(None, gt=0.0)
    """Largest norm of the gradient; null: not clipped."""
    ema: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay of the moving average of the weights, which is then evaluated and saved; null: off."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass."""
    degree: int | None = Field(None, ge=0)
    """Degree of the dial to train at; null: the one that the reduction method describes."""
    teacher: str | None = None
    """Folder of a trained model of the same shape whose logits and tokens DynamicViT learns to
    give; null: none."""
    workers: int = Field(0, ge=0)
    """Processes that load images; 0: the training process itself."""
    repeats: int = Field(1, ge=1)
    """How often an epoch shows an image, each time varied differently; it shows as many images
    fewer. DeiT repeats 3 times."""
    trackers: list[str] = ["tensorboard"]
    """Where losses, metrics and the recipe are logged: any of Accelerate's trackers, such as wandb
    or mlflow; files lie in the run's folder, in logs."""
    evaluate: Literal["every", "last"] = "every"
    """Epochs after which the model is evaluated: every one, or the last alone, so that nothing is
    chosen by what it is evaluated on; best is then the same model as last."""
    checkpoint_activations: bool = False
    """Recompute the blocks in the backward pass: less memory, more time."""
    checkpoint_every: int = Field(500, ge=1)
    """Updates between two checkpoints; there is one at the end of each epoch in any case."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be at most lr ({self.lr}), got {self.min_lr}")
        return self

    @field_validator("trackers")
    @classmethod
    def _known(cls, trackers: list[str]) -> list[str]:
        for name in trackers:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise ValueError(
                    f"must be some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, got {name!r}"
                )
        return trackers


class DistillSection(_Section):
    """DAR*: features stay near those of the backbone as it was pre-trained."""

    weight: float = Field(0.1, gt=0.0)
    """Of the loss."""
    dim: int | None = Field(None, ge=1)
    """Width that features are compared at; null: theirs."""
    detach: bool = False
    """Keep gradients out of the head on the teacher's side."""


class BaseRecipe(_Section):
    """What every run has: model, reduction, data, augmentation, optimisation."""

    seed: int = Field(0, ge=0)
    """Seed of everything that is drawn at random."""
    output: str
    """Folder of the run."""
    model: ModelSection
    reduce: _method("reduce") = None  # type: ignore[valid-type]
    """Token reduction; null: none."""
    data: _method("data")  # type: ignore[valid-type]
    """Data set."""
    augment: Augment = Augment()
    train: TrainSection = TrainSection()

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
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class Recipe(BaseRecipe):
    """Fine-tuning."""

    adapt: _method("adapt")  # type: ignore[valid-type]
    """Fine-tuning method."""
    decode: _method("decode") = None  # type: ignore[valid-type]
    """Decoder of dense tasks; null: classification."""
    dense: DenseAugment = DenseAugment()
    """How images and masks of dense tasks are varied and tested, instead of `augment`."""
    clip: Clip = Clip()
    """Which frames of videos are seen, in how many views videos are tested; `augment` says how
    clips are varied."""
    distill: DistillSection | None = None
    """Learn from the frozen pre-trained backbone, too (dense tasks); null: no."""

    @model_validator(mode="after")
    def _check_dense(self) -> Self:
        if self.decode is not None and self.augment != Augment():
            raise ValueError("augment is for classification: with a decoder, use dense instead")
        if self.decode is None and self.dense != DenseAugment():
            raise ValueError("dense goes with a decoder, but decode is null")
        if self.decode is None and self.distill is not None:
            raise ValueError("distill goes with a decoder, but decode is null")
        return self

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if "num_classes" in self.model.args:
            raise ValueError(
                "model.args.num_classes cannot be set: the data set says how many there are"
            )
        return self


class CompensateRecipe(BaseRecipe):
    """Training of a compensator on a pre-trained model with its own head."""

    compensate: _method("compensate") = ToCom()  # type: ignore[valid-type]
    """The plugin."""
    steps: int | None = Field(None, ge=1)
    """Highest degree that it bridges; null: the one that the reduction describes."""
    loss: Literal[
        "distillation", "binary_distillation", "features", "feature_map", "classification"
    ] = "distillation"
    """What the student learns from: the teacher's logits, by softmax or label by label; the
    teacher's pooled features (of models without a head), or those of every patch, as dense tasks
    read them; or the labels."""
    temperature: float = Field(1.0, gt=0.0)
    """Of the distillation."""
    mean_over: Literal["batch_and_classes", "batch"] = "batch_and_classes"
    """What the divergence of the distillation is averaged over."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.reduce is None:
            raise ValueError("reduce must be a reduction method, got null")
        if self.model.weights is None:
            raise ValueError("model.weights must name pre-trained weights, got null")
        for name in ("degree", "teacher", "layer_decay"):
            if (value := getattr(self.train, name)) is not None:
                raise ValueError(f"train.{name} has no meaning for a compensator, got {value}")
        return self


def check_recipe(data: dict[str, Any]) -> Recipe:
    """Make a recipe of a mapping; a ValueError in one line says what is wrong with it."""
    return check_section(Recipe, data)


def check_section(section: type[SectionT], data: dict[str, Any]) -> SectionT:
    """Make a section of a recipe of a mapping; a ValueError in one line says what is wrong."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        raise ValueError(_one_line(error.errors()[0], data)) from None


def check_method(kind: str, data: dict[str, Any] | None) -> Any:
    """Make a method of a mapping with its name; a ValueError in one line says what is wrong."""
    try:
        return TypeAdapter(_method(kind)).validate_python(data)
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
    """Says of what a dotted name is no field, and which one may be meant."""
    section, _, name = where.rpartition(".")
    method = data.get(section) if section in KINDS else None
    if isinstance(method, dict) and "name" in method:
        allowed = [
            f"{section}.{f.name}" for f in dataclasses.fields(method_class(section, method["name"]))
        ]
        hint = _nearest(name, allowed) or f"; it has {', '.join(allowed) or 'no fields'}."
        return f"{where} is not a field of {method['name']}{hint}"
    fields = _all_fields()
    beside = [field for field in fields if field.rpartition(".")[0] == section]
    hint = _nearest(name, beside) or _nearest(name, fields) or "."
    return f"{where} is not a field of a recipe{hint}"


def _nearest(name: str, dotted: list[str]) -> str | None:
    """Which of some dotted fields may be meant by the last part of a name."""
    by_last = {field.rpartition(".")[2]: field for field in reversed(dotted)}
    near = difflib.get_close_matches(name, by_last, n=1)
    return f"; did you mean {by_last[near[0]]}?" if near else None


def _all_fields() -> list[str]:
    """Dotted names of all fields; sections of every recipe come before those of methods."""
    names = [*Recipe.model_fields, *CompensateRecipe.model_fields]
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection,
        "train": TrainSection,
        "distill": DistillSection,
    }
    for section, model in sections.items():
        names += [f"{section}.{name}" for name in model.model_fields]
    own = [("augment", Augment), ("clip", Clip), ("dense", DenseAugment)]
    methods = [(kind, method_class(kind, name)) for kind in KINDS for name in method_names(kind)]
    for section, cls in (*own, *methods):
        names += [f"{section}.{field.name}" for field in dataclasses.fields(cls)]
    return names
