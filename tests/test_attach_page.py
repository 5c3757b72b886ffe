"""What docs/attach.md promises about models and costs follows from tests and counts."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from markdown_pages import ROOT
from torch import nn
from whole_models import COMPILED, PIPELINES, WHOLE, depth_anything_small, whole_model

import tokendial as td
from tokendial.measure.cost import count_macs_in_parts
from tokendial.model.tower_dial import DialedPart

PAGE = (ROOT / "docs" / "attach.md").read_text()
NOT_CALLED = {"ViTPose": 5, "MAE features": 6, "PaliGemma": 7}
"""The note that says why no pipeline calls a model, where its class does not say it."""


def table_below(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading of the page."""
    _, _, text = PAGE.partition(f"\n## {heading}\n")
    lines = text.split("\n| ", 1)[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


@cache
def kinds_of(name: str) -> tuple[type[nn.Module], type[nn.Module]]:
    """The class of the ViT in a model of `WHOLE`, and that of the parts that run under the dial."""
    model, _ = whole_model(name)
    method = td.FFNMerge(r=12) if WHOLE[name].windowed else td.ToMe(r=6)
    with td.attach(model, method) as dial:
        (tower,) = dial.towers
        kind = next(type(part) for part in model.modules() if isinstance(part, DialedPart))
        return type(tower.module), kind


def graph_of(name: str) -> str:
    """Which model the tests compile for this one: itself, one with the same ViT, or the same
    blocks."""
    if name in COMPILED:
        return "yes"
    vit, part = kinds_of(name)
    kinds = {other: kinds_of(other) for other in COMPILED}
    if same := [other for other, kind in kinds.items() if kind == (vit, part)]:
        return f"as {same[0]}"
    return f"blocks as {next(other for other, kind in kinds.items() if kind[1] is part)}"


def caller_of(name: str) -> str:
    """What calls a model besides the tests: a pipeline; or the note why nothing does."""
    if name in PIPELINES:
        also = ", sentence-transformers" if name == "CLIP" else ""
        return f"`{PIPELINES[name][0]}`{also}"
    vit, _ = kinds_of(name)
    note = 3
    if vit.__module__.startswith("transformers."):
        note = NOT_CALLED.get(name, 4)
        assert name in NOT_CALLED or vit.__name__.endswith("Backbone")
    return f"- [{note}]"


def test_the_table_of_models_says_what_is_tested():
    """test_attach.py runs every model of `WHOLE` at degree 0, reduced, detached and in half
    precision, and compiles those in `COMPILED`."""
    expected = []
    for name, kind in WHOLE.items():
        methods = "ToMe, EViT, FFNMerge" if kind.has_class_token else "ToMe, FFNMerge [1]"
        expected.append(
            [
                name,
                f"`{kinds_of(name)[0].__name__}`",
                *("yes", "yes", "yes"),
                graph_of(name),
                "yes",
                "FFNMerge [2]" if kind.windowed else methods,
                caller_of(name),
            ]
        )
    assert table_below("Models") == expected


def of_sizes(cls: str, **settings: Any) -> Any:
    """A model of transformers without values."""
    model = getattr(transformers, cls)
    with torch.device("meta"):
        return model(model.config_class(**settings)).eval()


def depth_anything() -> tuple[int, int]:
    """MACs of the tower and of all else: Depth-Anything-V2-Small, 518 pixels."""
    with torch.device("meta"):
        model = depth_anything_small().eval()
    dial = td.attach(model, td.ToMe(r=16))
    image = torch.empty(1, 3, 518, 518, device="meta")
    tower = dial.cost(0).macs
    return tower, dial.cost_of_call(pixel_values=image, degree=0) - tower


def prompt(model: Any, num_patches: int) -> tuple[int, int]:
    """MACs of the tower and of all else for a prompt of an image and 64 tokens of text."""
    length, width = num_patches + 64, model.config.text_config.hidden_size
    hidden = torch.empty(1, length, width, device="meta")
    mask = torch.empty(1, 1, length, length, device="meta", dtype=torch.bool)
    vision_width = model.config.vision_config.hidden_size
    patches = torch.empty(1, num_patches, vision_width, device="meta")

    def call() -> None:
        model.model.multi_modal_projector(patches)
        language = model.model.language_model
        found = language(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
        model.lm_head(found.last_hidden_state[:, -1:])

    return td.attach(model, td.ToMe(r=8)).cost(0).macs, count_macs_in_parts(call, ())[0]


def llava() -> tuple[int, int]:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, Llama 7B."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = transformers.LlamaConfig(vocab_size=32064)
    model = of_sizes("LlavaForConditionalGeneration", vision_config=vision, text_config=text)
    return prompt(model, 576)


def paligemma() -> tuple[int, int]:
    """PaliGemma-3B: SigLIP So400m/14 at 224 pixels, Gemma 2B."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        vision_use_head=False,
    )
    text = transformers.GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=257216,
    )
    model = of_sizes(
        "PaliGemmaForConditionalGeneration",
        vision_config=vision,
        text_config=text,
        hidden_size=2048,
        projection_dim=2048,
    )
    return prompt(model, 256)


SIZES = {
    "Depth-Anything-V2-Small, 518 px": depth_anything,
    "PaliGemma-3B, 224 px": paligemma,
    "LLaVA-1.5-7B, 336 px": llava,
}


def test_every_size_has_its_share():
    assert [row[0] for row in table_below("What to expect")] == list(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_the_share_of_the_tower_is_as_counted(name):
    """The models have their real sizes; on the meta device they take no memory."""
    row = next(row for row in table_below("What to expect") if row[0] == name)
    tower, rest = SIZES[name]()
    share = tower / (tower + rest)
    numbers = [f"{tower / 1e9:.0f}", f"{(tower + rest) / 1e9:,.0f}", f"{100 * share:.0f} %"]
    half, free = 1 / (1 - share / 2), 1 / (1 - share)
    assert row[1:] == [*numbers, f"{half:.2f}x", f"{free:.2f}x"]
