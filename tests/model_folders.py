"""Folders of small models of transformers and open_clip, as their own tools write them."""

import json
from pathlib import Path

import transformers
from safetensors.torch import save_file
from torch import nn
from whole_models import SIDE, WHOLE, whole_model

SQUARE = {"height": SIDE, "width": SIDE}
PROCESSORS = {
    "CLIP": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "Depth Anything": lambda: transformers.DPTImageProcessor(
        size=SQUARE, keep_aspect_ratio=True, ensure_multiple_of=8
    ),
    "SAM": lambda: transformers.SamImageProcessor(size={"longest_edge": SIDE}, pad_size=SQUARE),
    "ViTPose": lambda: transformers.VitPoseImageProcessor(size=SQUARE | {"width": SIDE // 2}),
    "YOLOS": lambda: transformers.YolosImageProcessor(size=SQUARE),
}


def write_transformers_folder(name: str, folder: Path) -> Path:
    """Write a model of `WHOLE`, and its image processor."""
    save_quietly(whole_model(name)[0], folder)
    make = PROCESSORS.get(name, lambda: transformers.ViTImageProcessor(size=SQUARE))
    make().save_pretrained(folder)
    return folder


def write_open_clip_folder(folder: Path) -> Path:
    """Write the CLIP of open_clip in `WHOLE`."""
    vision = {"image_size": SIDE, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    content = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(WHOLE["open_clip"].build().state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_quietly(model: nn.Module, folder: Path) -> None:
    """Save a model without the progress bar on stderr, where the errors of commands are read."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
