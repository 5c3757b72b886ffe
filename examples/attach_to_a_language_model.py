"""Merge tokens in the image encoder of a vision language model, and see what that is worth.

facebookresearch/ToMe issue 38 asks whether token merging speeds up models such as LLaVA. In the
image encoder it works, and the prompt keeps its image tokens, so nothing else changes. But the
language model, not the encoder, computes most: the program prints both, for the small model here.
docs/attach.md has the numbers of LLaVA-1.5-7B (4 %) and PaliGemma-3B (15 %).

The model here is small and has random weights. For a trained one:
`transformers.LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")`.
"""

import argparse
from typing import Any

import torch
import transformers

import tokendial as td

SIDE, PATCH, IMAGE_TOKEN = 112, 14, 99
NUM_PATCHES = (SIDE // PATCH) ** 2


def load_model() -> transformers.LlavaForConditionalGeneration:
    """Return a small LLaVA."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=3,
    )
    text = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=NUM_PATCHES,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt() -> dict[str, Any]:
    """A prompt with an image: one token for each patch, then a question of eight words."""
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * NUM_PATCHES, *range(10, 18)]])
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator),
    }


def main() -> None:
    """Attach the dial, generate along it, and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4, help="number of tokens to generate")
    arguments = parser.parse_args()

    model, inputs = load_model(), prompt()
    dial = td.attach(model, td.ToMe(r=4))
    print(dial.towers[0])
    all_macs = dial.cost_of_call(**inputs, degree=0)
    print(f"the image encoder is {dial.cost(0).macs / all_macs:.0%} of the prompt's cost")
    for degree in (0, 4, 8):
        dial.set_degree(degree)
        found = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
        kept = bool((found[:, : inputs["input_ids"].shape[1]] == inputs["input_ids"]).all())
        part = dial.cost_of_call(**inputs) / all_macs
        print(f"degree {degree}: {part:.0%} of the cost, prompt kept: {kept}")


if __name__ == "__main__":
    main()
