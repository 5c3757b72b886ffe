"""The difference between two fine-tuned models, which can be added to a third.

Source: ToCom, section 3.1 and table 1: the weights of a model fine-tuned at one degree minus those
of the same model fine-tuned at another, on one data set, help a model of another data set to run at
the first degree. Any two models with the same backbone and the same kind of adapter have one.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from tokendial.model.dial_vit import DialViT
from tokendial.model.files import read_files, write_files


class Difference:
    """Weights of one model minus those of another: trained backbone weights and the adapter's.

    Heads and decoders are left out, because they belong to a data set.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @torch.no_grad()
    def add_to(self, model: DialViT, factor: float = 1.0) -> None:
        """Add the difference to the weights of a model, in place.

        Args:
            model: A model whose trained weights have the names and shapes of the difference.
            factor: What the difference is multiplied by; -1 takes off what 1 has added, but for
                rounding.

        Raises:
            ValueError: If the weights do not fit; the model is unchanged then.
        """
        own = _trained(model)
        _check_same(own, self.tensors, "the model", "the difference")
        for name, value in self.tensors.items():
            own[name].add_(value.to(own[name].device, own[name].dtype), alpha=factor)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        write_files(Path(directory), {"kind": "difference"}, self.tensors)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Load a difference that `save_pretrained` has written.

        Args:
            directory: Local folder, or the name of a repository on the Hugging Face hub.

        Raises:
            ValueError: If the folder holds no difference.
        """
        return cls(read_files(directory, kind="difference")[2])


@torch.no_grad()
def difference(model: DialViT, base: DialViT) -> Difference:
    """Weights that fine-tuning gave to `model` minus those that it gave to `base`.

    Args:
        model: For example, a model that was fine-tuned at a high degree.
        base: The same model, fine-tuned on the same data at another degree.

    Raises:
        ValueError: If the models were not fine-tuned in the same way.

    Example:
        >>> import timm, tokendial as td
        >>> settings = {"reduce": td.ToMe(r=8), "adapt": td.AdaptFormer(dim=4)}
        >>> a, b, c = (
        ...     td.wrap(timm.create_model("vit_tiny_patch16_224", depth=2), **settings)
        ...     for _ in range(3)
        ... )
        >>> td.difference(a, b).add_to(c)
    """
    first, second = _trained(model), _trained(base)
    _check_same(first, second, "model", "base")
    return Difference({name: first[name] - second[name] for name in first})


def _trained(model: DialViT) -> dict[str, Tensor]:
    """The model's own trained weights by name, without heads and decoder; not copies of them."""
    if model.compensation:
        raise ValueError("the model must be without a compensator: detach it first.")
    left_out = (*(f"vit.{name}." for name in model.head_names), "decoder.")
    return {
        name: value
        for name, value in model.saved_tensors().items()
        if not name.startswith(left_out) and value.is_floating_point()
    }


def _check_same(first: dict[str, Tensor], second: dict[str, Tensor], one: str, other: str) -> None:
    if not first:
        raise ValueError(f"{one} has no trained weights besides a head.")
    for name in sorted({*first, *second}):
        shapes = [list(each[name].shape) if name in each else None for each in (first, second)]
        if shapes[0] != shapes[1]:
            has = " and ".join(
                f"{who} {f'has {shape}' if shape is not None else 'has none'}"
                for who, shape in zip((one, other), shapes, strict=True)
            )
            raise ValueError(f"trained weights must be the same, but of {name} {has}.")
