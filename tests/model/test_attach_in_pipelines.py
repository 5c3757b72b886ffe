"""Pipelines and libraries that call a model by themselves notice nothing of an attached dial."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CLIPModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from whole_models import IMAGE_TOKEN, PATCH, PIPELINES, SIDE, WHOLE, whole_model

import tokendial as td

WORDS = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, "a": 4, "photo": 5, "of": 6, "cat": 7,
         "dog": 8, "<image>": IMAGE_TOKEN}  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of few words, and one that stands for an image."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.add_special_tokens(["<image>"])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        unk_token="[UNK]", model_input_names=["input_ids", "attention_mask"], model_max_length=128,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def pictures(count: int = 3) -> list[Image.Image]:
    """Pictures of noise."""
    noise = np.random.default_rng(0).integers(0, 255, (count, 80, 96, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in noise]


def processor(name: str) -> transformers.BaseImageProcessor:
    """The image processor of a family, for small images."""
    size = {"height": SIDE, "width": SIDE}
    if name == "CLIP":
        return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    if name == "SigLIP 2":
        return transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=64)
    if name in ("SAM", "SAM-HQ"):
        small = {"height": SIDE // 2, "width": SIDE // 2}
        return transformers.SamImageProcessor(
            size={"longest_edge": SIDE}, pad_size=size,
            mask_size={"longest_edge": SIDE // 2}, mask_pad_size=small,
        )  # fmt: skip
    if name == "OWL-ViT":
        return transformers.OwlViTImageProcessor(size=size, do_center_crop=False)
    kinds = {
        "SigLIP": transformers.SiglipImageProcessor,
        "Depth Anything": transformers.DPTImageProcessor,
        "DPT": transformers.DPTImageProcessor,
        "UperNet": transformers.SegformerImageProcessor,
        "OWLv2": transformers.Owlv2ImageProcessor,
        "YOLOS": transformers.YolosImageProcessor,
    }
    return kinds.get(name, transformers.ViTImageProcessor)(size=size)


def preparation(name: str, task: str) -> dict[str, object]:
    """What a pipeline prepares images and texts with."""
    if name == "LLaVA":
        joined = transformers.LlavaProcessor(
            processor("CLIP"), tokenizer(), patch_size=PATCH, num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
        )  # fmt: skip
        return {"processor": joined}
    texts = {"tokenizer": tokenizer()} if "zero-shot" in task else {}
    return {"image_processor": processor(name), **texts}


def plain(found: Any) -> Any:
    """An answer of a pipeline as numbers and words, which can be compared."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, list):
        return [plain(value) for value in found]
    if isinstance(found, torch.Tensor | Image.Image):
        return np.asarray(found).tolist()
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_the_dial(name):
    task, arguments = PIPELINES[name]
    model, _ = whole_model(name)
    pipe = transformers.pipeline(task, model=model, device="cpu", **preparation(name, task))

    def run() -> list[Any]:
        return [plain(pipe(picture, **arguments)) for picture in pictures(2)]

    before = run()
    method = td.FFNMerge(r=32) if WHOLE[name].windowed else td.ToMe(r=24)
    with td.attach(pipe.model, method) as dial:
        assert run() != before
        dial.set_degree(0)
        assert run() == before
    assert run() == before


def test_sentence_transformers_encodes_images_and_texts(tmp_path):
    model, _ = whole_model("CLIP")
    model.save_pretrained(tmp_path)
    transformers.CLIPProcessor(processor("CLIP"), tokenizer()).save_pretrained(tmp_path)
    encoder = SentenceTransformer(modules=[CLIPModel(str(tmp_path))], device="cpu")
    images, texts = pictures(), ["a photo of cat"]
    before, words = encoder.encode(images), encoder.encode(texts)
    with td.attach(encoder, td.ToMe(r=6)):
        after = encoder.encode(images)
        assert after.shape == before.shape
        assert np.abs(after - before).max() > 1e-4
        np.testing.assert_array_equal(encoder.encode(texts), words)
    np.testing.assert_array_equal(encoder.encode(images), before)
