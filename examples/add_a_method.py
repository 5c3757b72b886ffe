"""Write, register and use a reduction method of your own.

The method keeps every second patch token in two layers. It is the simplest reduction, and a
baseline that learnt methods should beat. The program prints the tokens per layer at each degree,
and shows that saving, loading and feature maps work without more code.

The guide docs/add-a-method.md explains each part.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import tokendial as td
from tokendial.attention import ByProducts


@td.register("reduce", "every_nth")
@dataclass(frozen=True, kw_only=True)
class EveryNth(td.ReducerConfig):
    """Keep one patch token in `n`, in a few layers."""

    n: int = 2
    """Of `n` neighbouring patch tokens one is kept; 1 keeps all of them."""
    layers: tuple[int, ...] = (4, 8)
    """Layers that reduce, counted from 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists
        td.checks.check_layers(self.layers)
        td.checks.check_count("n", self.n)

    def build(self, vit: td.ViTShape) -> "EveryNthReducer":
        """Make the module that runs the method in a backbone of this shape."""
        td.checks.check_layers_exist(self.layers, vit.depth)
        return EveryNthReducer(self)


class EveryNthReducer(td.Reducer):
    """Degree d keeps one patch token in d + 1."""

    def __init__(self, config: EveryNth) -> None:
        super().__init__()
        self.config = config
        self.degrees, self.degree = (0, 1, 2, 3), config.n - 1

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether `group` is called in this layer."""
        return layer in self.config.layers

    def group(
        self, layer: int, degree: int, tokens: td.Tokens, attended: ByProducts
    ) -> td.Grouping | None:
        """Return the tokens that stay; the model applies it to features, sizes and positions."""
        images, count, _ = tokens.x.shape
        kept = [*range(tokens.prefix), *range(tokens.prefix, count, degree + 1)]
        index = torch.tensor(kept, device=tokens.x.device).expand(images, -1)
        return td.Grouping.keep_only(index, count)


@torch.no_grad()
def main() -> None:
    """Use the method as if it were built in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("example_method"), help="saved model")
    arguments = parser.parse_args()

    backbone = td.Backbone(name="scenes_vit", weights="shipped")
    model = td.wrap(backbone.create(), reduce=EveryNth(n=2), backbone=backbone).eval()
    for degree in model.degrees:
        print(f"degree {degree}: tokens per layer {model.cost(degree).tokens_per_layer}")

    images = torch.randn(2, 3, 48, 48)
    print("feature map, every position restored:", list(model.feature_map(images).shape))
    model.save_pretrained(arguments.out)
    loaded = td.load(arguments.out)
    print("loaded:", loaded.reduce_config, torch.equal(loaded(images), model(images)))


if __name__ == "__main__":
    main()
