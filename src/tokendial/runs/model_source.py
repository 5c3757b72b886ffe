"""Models that are used without training: of a run, of a saved model, or a backbone by its name."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokendial.backbones import Backbone
from tokendial.data.readers.pixels import ValueRange
from tokendial.data.transforms.image import Augment, Transform, eval_transform
from tokendial.data.transforms.masks import MaskAugment, MaskImageTransform
from tokendial.model.dial_vit import DialViT
from tokendial.model.files import CONFIG
from tokendial.model.loading import load
from tokendial.model.wrap import wrap
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.image_model import is_image_model
from tokendial.runs.run import Run
from tokendial.tasks import Classification, Embeddings, VideoClassification
from tokendial.tasks.dense_prediction import DensePrediction, input_format


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model, ready for inference, and how its images or videos are prepared."""

    model: DialViT
    """The model on the CPU, at the degree that it was saved at."""
    transform: Transform
    """Turns a PIL image into the input [3, H, W] of the model; every image gets the same size. For
    a run on videos, turns a video into its middle clip [T, 3, H, W]."""
    value_range: ValueRange
    """Pixel values that are black and white in images of more than 8 bits."""
    run: Run | None
    """The run of the model; None: it is of no run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model comes from."""

    name: str
    """Folder of a run or of a saved model, or name of a backbone: a timm model such as
    vit_small_patch14_dinov2, or transformers.CLASS such as transformers.Dinov2Model. For embeddings
    also a folder of transformers or open_clip, see `open_image_model`."""
    weights: str | None = None
    """Weights of a backbone that is given by its name: a file, or for a class of transformers what
    its from_pretrained takes. None: timm's own weights, from the hub."""
    img_size: int | None = None
    """Side of the images in pixels, for a timm model that is given by its name. None: the model's
    own size."""

    @property
    def is_folder(self) -> bool:
        """Whether the name is that of a run or of a saved model."""
        return Path(self.name).is_dir()

    def absolute(self) -> "ModelSource":
        """The same source for processes of another working folder."""
        weights = self.weights and absolute(self.weights)
        return replace(self, name=absolute(self.name), weights=weights)

    def open(self, reduce: ReducerConfig | None = None, *, videos: bool = False) -> OpenedModel:
        """Load the model.

        Args:
            reduce: Reduction method in place of the model's own one. None: the method of the run or
                saved model; no reduction for a backbone.
            videos: Whether a run on videos may be opened. Only a run says how they are prepared.

        Raises:
            ValueError: If there is no such model, it takes videos and may not, or a setting does
                not fit it.
        """
        if not self.is_folder:
            return self._open_backbone(reduce)
        for field in ("weights", "img_size"):
            if (value := getattr(self, field)) is not None:
                raise ValueError(
                    f"{field} is for backbones that are given by name, but {self.name} is a folder "
                    f"with weights of its own, got {value}."
                )
        run = Run(self.name)
        if run.recipe_file.is_file():
            return _open_run(run, reduce, videos)
        if not (Path(self.name) / CONFIG).is_file():
            raise ValueError(f"{self.name} holds neither a run nor a saved model.")
        if is_image_model(self.name):
            raise ValueError(
                f"{self.name} holds a model of transformers or open_clip: `tokendial attach` "
                "compares its degrees, `tokendial embed` embeds with it."
            )
        model = load(self.name, reduce=reduce)
        if model.anatomy.frames is not None:
            raise ValueError(f"{self.name} takes videos; a model of images is needed.")
        return OpenedModel(model, _plain_transform(model), None, None)

    def _open_backbone(self, reduce: ReducerConfig | None) -> OpenedModel:
        name, args = self.name, dict[str, Any]()
        if "/" in name and ":" not in name:
            raise ValueError(f"{name}: no such folder of a run or of a saved model.")
        if self.img_size is not None:
            if name.startswith("transformers."):
                raise ValueError(f"img_size is for timm models, got {name}.")
            args["img_size"] = self.img_size
        weights = self.weights
        if weights is None:
            if name.startswith("transformers."):
                raise ValueError(f"weights must be given for {name}, such as a folder.")
            weights = "pretrained"
        elif Path(weights).exists():
            weights = str(Path(weights).resolve())
        backbone = Backbone(name=name, weights=weights, args=args)
        if not name.startswith("transformers.") and (size := backbone.head_size()) is not None:
            backbone = backbone.with_head(size)
        model = wrap(backbone.create(), reduce=reduce, backbone=backbone).eval()
        if model.anatomy.frames is not None:
            raise ValueError(f"{name} takes videos; a model of images is needed.")
        return OpenedModel(model, _plain_transform(model), None, None)


def absolute(place: str) -> str:
    """The absolute path of a file or folder; anything else, such as a model's name, as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def _open_run(run: Run, reduce: ReducerConfig | None, videos: bool) -> OpenedModel:
    task = run.task()
    if isinstance(task, VideoClassification) and not videos:
        raise ValueError(f"{run.folder} is a run on videos; a model of images is needed.")
    model = run.model(reduce)
    if isinstance(task, VideoClassification):
        transform = task.clip_transform(model.anatomy)
    elif isinstance(task, DensePrediction):
        whole = replace(task.augment, test="whole")
        transform = MaskImageTransform(whole, input_format(model.anatomy))
    else:
        assert isinstance(task, Classification | Embeddings)
        transform = task.image_transform(model.anatomy)
    return OpenedModel(model, transform, run.value_range(), run)


def _plain_transform(model: DialViT) -> Transform:
    """How images are prepared where no recipe says it: by the defaults of recipes."""
    if model.decoder is not None:
        return MaskImageTransform(MaskAugment(), input_format(model.anatomy))
    return eval_transform(Augment(), model.anatomy.image_size, *model.anatomy.statistics)
