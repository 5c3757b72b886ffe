"""Pipelines and libraries that call a model by themselves notice nothing of an attached dial."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CLIPModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from whole_models import PIPELINES, SIDE, whole_model

import tokendial as td

WORDS = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, "a": 4, "photo": 5, "of": 6, "cat": 7,
         "dog": 8}  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of nine words."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        unk_token="[UNK]", model_input_names=["input_ids", "attention_mask"], model_max_length=16,
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
    if name == "SigLIP":
        return transformers.SiglipImageProcessor(size=size)
    if name == "Depth Anything":
        return transformers.DPTImageProcessor(size=size)
    if name == "YOLOS":
        return transformers.YolosImageProcessor(size=size)
    return transformers.ViTImageProcessor(size=size)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_the_dial(name):
    task, arguments = PIPELINES[name]
    model, _ = whole_model(name)
    texts = {"tokenizer": tokenizer()} if "zero-shot" in task else {}
    pipe = transformers.pipeline(
        task, model=model, image_processor=processor(name), device="cpu", **texts
    )

    def run() -> list[str]:
        found = [pipe(picture, **arguments) for picture in pictures()]
        return [str(each["predicted_depth"] if "depth" in task else each) for each in found]

    before = run()
    with td.attach(pipe.model, td.ToMe(r=6)) as dial:
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


def test_generation_of_a_vision_language_model_keeps_its_prompt():
    model, images = whole_model("LLaVA")
    patches = torch.full((1, 64), 98)
    ids = torch.cat([torch.tensor([[1]]), patches, torch.tensor([[5, 6]])], dim=1)

    def generate() -> torch.Tensor:
        return model.generate(
            input_ids=ids, pixel_values=images[:1], attention_mask=torch.ones_like(ids),
            max_new_tokens=4, do_sample=False,
        )  # fmt: skip

    before = generate()
    with td.attach(model, td.ToMe(r=6)) as dial:
        after = generate()
        assert after.shape[1] > ids.shape[1]
        assert torch.equal(after[:, : ids.shape[1]], ids)
        dial.set_degree(0)
        assert torch.equal(generate(), before)
