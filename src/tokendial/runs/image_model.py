"""Whole models in local folders, of transformers or open_clip, as functions of images."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from tokendial.errors import error_message
from tokendial.extras import check_installed
from tokendial.open_vocabulary.loading import folder_config, load_clip

OutputKind = Literal[
    "class_logits", "masks", "depth", "heat_maps", "boxes", "embeddings", "features"
]
"""Kinds of outputs that can be compared."""
Inputs = Mapping[str, Tensor]
"""Named inputs of a model, one row for each image."""
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_MAPS = "feature_maps"


@dataclass(frozen=True, slots=True)
class Output:
    """One thing that a model gives for images."""

    kind: OutputKind
    """What the values are: embeddings [B, D], features of positions [B, P, D], class_logits
    [B, C], masks (logits of pixels) [B, C, H, W], depth [B, H, W], heat_maps [B, K, H, W], or boxes
    [B, boxes, 4 + classes] as `measure.agreement.box_agreement` takes them."""
    name: str
    """The model's own name of it, such as pooler_output."""
    values: Tensor
    """The values, one row for each image."""


@dataclass(frozen=True, slots=True)
class ImageModel:
    """A model of any library as a function of images."""

    name: str
    """The model's name for readers, such as its class."""
    model: nn.Module
    """The model, in evaluation mode."""
    call: str
    """The call that `answer` makes, for readers, such as get_image_features(pixel_values)."""
    prepare: Callable[[Image.Image], Inputs]
    """Turns an RGB image into inputs of one row. Images may give inputs of several sizes."""
    run: Callable[[Inputs], Any]
    """Calls the model with the inputs of images."""
    outputs: Callable[[Any], list[Output]]
    """Reads what `run` gave. It raises a ValueError if nothing in it can be compared."""


def open_image_model(folder: str | Path) -> ImageModel:
    """Load the model in a local folder; the network is not used, and no code of the folder runs.

    Args:
        folder: Folder as `save_pretrained` of transformers writes it, with the configuration of its
            image processor; or a folder of open_clip, with open_clip_config.json.

    Raises:
        ValueError: If there is no such folder, it holds no such model, or the model takes texts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model must be a local folder, {folder} is none.")
    if (folder / _OPEN_CLIP_CONFIG).is_file():
        return _open_clip_model(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no model: there is neither config.json (of transformers) nor "
            f"{_OPEN_CLIP_CONFIG} in it."
        )
    return _transformers_model(folder)


def is_image_model(folder: str | Path) -> bool:
    """Whether a folder holds a model that `open_image_model` may open."""
    folder = Path(folder)
    if (folder / _OPEN_CLIP_CONFIG).is_file():
        return True
    return (folder / "config.json").is_file() and "model_type" in folder_config(folder)


def join_by_shape(rows: Sequence[Inputs]) -> list[tuple[list[int], Inputs]]:
    """Join inputs of one image each to inputs of several images, which must have equal shapes.

    Returns:
        For each shape the indices of its images in `rows`, and their inputs.
    """
    by_shape: defaultdict[tuple[torch.Size, ...], list[int]] = defaultdict(list)
    for index, inputs in enumerate(rows):
        by_shape[tuple(value.shape for value in inputs.values())].append(index)
    return [
        (indices, {name: torch.cat([rows[i][name] for i in indices]) for name in rows[indices[0]]})
        for indices in by_shape.values()
    ]


def move_inputs(inputs: Inputs, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """Inputs on a device, and in a format of floating-point numbers where they are such."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _open_clip_model(folder: Path) -> ImageModel:
    clip: Any = load_clip(str(folder))
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    return ImageModel(
        name=type(clip).__name__,
        model=clip,
        call="encode_image(image)",
        prepare=lambda image: {"image": transform(image).unsqueeze(0)},
        run=lambda inputs: clip.encode_image(**inputs),
        outputs=lambda found: [Output("embeddings", "encode_image", found)],
    )


def _transformers_model(folder: Path) -> ImageModel:
    check_installed(f"model {str(folder)!r}", "transformers")
    model = _load(folder)
    name = type(model).__name__
    call = next(
        (
            method
            for method in ("get_image_features", "get_image_embeddings")
            if hasattr(model, method)
        ),
        "forward",
    )
    function = getattr(model, call) if call != "forward" else model
    taken = inspect.signature(getattr(model, call)).parameters
    if "pixel_values" not in taken or (call == "forward" and "input_ids" in taken):
        raise ValueError(
            f"{folder}: {name} cannot be compared by images alone, because it takes "
            f"{'texts, too' if 'pixel_values' in taken else 'no images'}."
        )
    process = _image_processor(folder)

    def prepare(image: Image.Image) -> Inputs:
        inputs = process(image)
        return {key: value for key, value in inputs.items() if key in taken}

    return ImageModel(
        name=name,
        model=model,
        call=f"{name if call == 'forward' else call}(pixel_values)",
        prepare=prepare,
        run=lambda inputs: function(**inputs),
        outputs=lambda found: _read_outputs(found, name),
    )


def _load(folder: Path) -> nn.Module:
    """The model of transformers in a folder, of the class that its configuration names."""
    import transformers

    config = folder_config(folder)
    if "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} is of no model of transformers: no model_type.")
    names = config.get("architectures") or ["AutoModel"]
    cls: Any = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise ValueError(
            f"{folder / 'config.json'}: architectures names {names[0]}, which this version of "
            "transformers does not have."
        )
    try:
        with _no_progress_bar():
            model, loading = cls.from_pretrained(
                folder, local_files_only=True, weights_only=True, output_loading_info=True
            )
    except Exception as error:  # reading unsuitable files
        raise ValueError(f"model {str(folder)!r}: {error_message(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"model {str(folder)!r}: {len(missing)} tensors of {type(model).__name__} are missing "
            f"in its weights, the first is {missing[0]}."
        )
    model.config.return_dict = True  # outputs are read by their names
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a progress bar, which it does even where no person sees it."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _image_processor(folder: Path) -> Callable[[Image.Image], Mapping[str, Tensor]]:
    """The image processor in a folder, as a function of one RGB image."""
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise ValueError(
            f"{folder} says not how images are prepared: there is no {_PROCESSOR_FILES[0]} in it. "
            "Write it with save_pretrained of the model's image processor."
        )
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # unsuitable files
        raise ValueError(f"image processor in {folder}: {error_message(error)}") from error
    # Models of poses take the box of a person; here that is the whole image.
    with_boxes = "boxes" in inspect.signature(processor.preprocess).parameters

    def process(image: Image.Image) -> Mapping[str, Tensor]:
        boxes = {"boxes": [[[0, 0, *image.size]]]} if with_boxes else {}
        found: Mapping[str, Tensor] = processor(image, return_tensors="pt", **boxes)
        return found

    return process


def _read_outputs(found: Any, name: str) -> list[Output]:
    """What can be compared in the output of a model of transformers."""
    if isinstance(found, Tensor):  # image embeddings of SAM, a map [B, D, H, W]
        found = {"image_embeddings": found}
    if "pred_boxes" in found:
        return [Output("boxes", "pred_boxes and logits", _boxes(found))]
    if "predicted_depth" in found:
        return [Output("depth", "predicted_depth", found["predicted_depth"])]
    if "heatmaps" in found:
        return [Output("heat_maps", "heatmaps", found["heatmaps"])]
    logits = found.get("logits")
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return [Output("class_logits", "logits", logits)]
    if isinstance(logits, Tensor) and logits.ndim == 4 and "reconstruction" not in found:
        return [Output("masks", "logits", logits)]
    pooled, last = found.get("pooler_output"), found.get("last_hidden_state")
    maps = found.get(_MAPS) or found.get("image_embeddings")
    outputs = []
    if isinstance(pooled, Tensor) and pooled.ndim == 2:
        outputs.append(Output("embeddings", "pooler_output", pooled))
    elif pooled is not None:  # features for a language model: a tensor for each image
        rows = pooled if isinstance(pooled, Tensor) else torch.stack(list(pooled))
        return [Output("features", "pooler_output", rows)]
    if last is not None:
        outputs.append(Output("features", "last_hidden_state", _by_position(last)))
    elif maps is not None:
        several = (maps,) if isinstance(maps, Tensor) else maps
        values = torch.cat([_by_position(one) for one in several], dim=1)
        outputs.append(Output("features", _MAPS if _MAPS in found else "image_embeddings", values))
    if not outputs:
        raise ValueError(
            f"{name} gives nothing that can be compared: its outputs are {', '.join(found)}; "
            "compared are logits, predicted_depth, heatmaps, pred_boxes, pooler_output, "
            "last_hidden_state and feature_maps."
        )
    return outputs


def _by_position(features: Tensor) -> Tensor:
    """Features as [B, positions, D]: those of a map [B, D, H, W], or such already."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def _boxes(found: Any) -> Tensor:
    # The last class of these models means that there is no object.
    return torch.cat([found["pred_boxes"], found["logits"].softmax(dim=2)[..., :-1]], dim=2)
