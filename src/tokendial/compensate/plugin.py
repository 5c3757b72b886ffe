"""ToCom: small weights that bridge degrees of the dial, for any model fine-tuned from a backbone.

Source: Jie et al., "Token Compensator: Altering Inference Cost of Vision Transformer without
Re-Tuning", ECCV 2024, https://arxiv.org/abs/2408.06798, and the authors' code: group g bridges
degree g - 1 to g, by one low-rank pair on the queries and one on the values of each layer; in
training, dropout acts between the two halves of a pair.
"""

# Shape legend: B batch, N tokens, D embed_dim, K rank of a pair times steps between two degrees.

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.backbones import same_backbone
from tokendial.backbones.loading import warn_of_unused_weights
from tokendial.compensate.attachment import Attachment
from tokendial.methods import from_fields, from_json, register, to_json
from tokendial.model.dial_vit import DialViT
from tokendial.model.files import check_field, check_numbers, config_errors, read_files, write_files
from tokendial.model.hub import push_files
from tokendial.reduce.base import DIAL_RATES, ReducerConfig
from tokendial.shape import ViTShape
from tokendial.weights import check_finite

Part = Literal["query", "value"]
PARTS: tuple[Part, Part] = ("query", "value")
SCALES = (0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15)
"""Factors that the paper searches at inference."""
# The authors' names; their units stand in the opposite order: degree r switches on the last ones.
_REFERENCE = re.compile(r"blocks\.(\d+)\.attn\.([qv])_tocom\.adapter_(down|up)\.weight")


@register("compensate", "tocom")
@dataclass(frozen=True, kw_only=True)
class ToCom:
    """Settings of a compensator."""

    rank: int = 2
    """Rank of the pair of one step of the dial."""
    scale: float = 0.1
    """Factor on the difference in training, and to begin with at inference."""
    dropout: float = 0.1
    """Dropout between the halves of a pair, in training."""
    shared: bool = False
    """Ablation: one pair for all steps, added or subtracted."""
    inversion: bool = True
    """False: ablation, pairs of their own for steps down, instead of the negative of those up."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank}.")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.shared and not self.inversion:
            raise ValueError("inversion must be true with shared, got false.")

    def build(self, vit: ViTShape, steps: int) -> "Compensator":
        """Make the plugin for a dial of degrees 0 to `steps`.

        Raises:
            ValueError: If there is no step.
        """
        return Compensator(self, vit.depth, vit.embed_dim, steps)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a compensator was trained on."""

    backbone: str
    """Name of the model."""
    fingerprint: list[float]
    """A few of its weights."""
    reduce: dict[str, Any]
    """The reduction method."""


class Compensator(nn.Module):
    """The plugin: 4 * depth * D * rank parameters for each step of the dial."""

    def __init__(self, config: ToCom, depth: int, embed_dim: int, steps: int) -> None:
        super().__init__()
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")
        self.config, self.depth, self.embed_dim, self.steps = config, depth, embed_dim, steps
        self.scale = config.scale
        """Factor on the difference; the paper searches it for each model. Where the difference is
        in a model's weights, another factor acts from the next turn of the dial on."""
        self.origin: Origin | None = None
        """What it was trained on; None: unknown, nothing is checked."""
        groups = 1 if config.shared else steps if config.inversion else 2 * steps
        wide = groups * config.rank
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        for part in PARTS:
            down = [nn.Parameter(torch.empty(wide, embed_dim)) for _ in range(depth)]
            for weight in down:
                nn.init.kaiming_uniform_(weight, a=5**0.5)
            self.down[part] = nn.ParameterList(down)
            self.up[part] = nn.ParameterList(torch.zeros(embed_dim, wide) for _ in range(depth))

    @classmethod
    def for_model(cls, model: DialViT, config: ToCom, steps: int | None = None) -> Self:
        """A fresh compensator for the backbone and the reduction method of a wrapped model.

        Args:
            model: The model that it is to be trained on.
            config: Settings.
            steps: Highest degree that it bridges; None: the one that the method describes.

        Raises:
            ValueError: If the model has no reduction, or the dial does not go so far.
        """
        if model.reducer is None:
            raise ValueError("a compensator needs a model with a reduction method, got none.")
        steps = model.reducer.degree if steps is None else steps
        if steps > model.degrees[-1]:
            raise ValueError(f"steps must be at most {model.degrees[-1]}, got {steps}.")
        shape = model.anatomy.shape
        plugin = cls(config, shape.depth, shape.embed_dim, steps)
        plugin.origin = Origin(
            model.backbone.name, model.fingerprint, to_json("reduce", model.reduce_config)
        )
        return plugin

    @property
    def reduce_config(self) -> ReducerConfig | None:
        """The reduction method that it was trained with; None: unknown."""
        return from_json("reduce", self.origin.reduce) if self.origin else None

    def rows(self, source: int, target: int) -> tuple[slice, int]:
        """Which rows of the halves bridge two degrees, and their sign.

        Source:
            ToCom, equations 3 and 4.

        Raises:
            ValueError: If a degree is not one that the plugin was made for.
        """
        for name, degree in (("source", source), ("degree", target)):
            if type(degree) is not int or not 0 <= degree <= self.steps:
                raise ValueError(
                    f"{name} must be an integer in [0, {self.steps}], which is as far as the "
                    f"compensator goes, got {degree!r}."
                )
        config = self.config
        sign = -1 if target < source and config.inversion else 1
        first, last = sorted((source, target))
        if config.shared:
            first, last = 0, min(1, last - first)
        elif target < source and not config.inversion:
            first, last = first + self.steps, last + self.steps
        return slice(first * config.rank, last * config.rank), sign

    def pair(self, part: Part, layer: int, source: int, target: int) -> tuple[Tensor, Tensor]:
        """The difference of the weights of one layer (counted from 1), as two matrices.

        Returns:
            `down` [K, D] and `up` [D, K], sign and scale included: the difference is `up @ down`.
            K is 0 if the degrees are equal.
        """
        rows, sign = self.rows(source, target)
        down: Tensor = self.down[part][layer - 1][rows]  # type: ignore[index]
        up: Tensor = self.up[part][layer - 1][:, rows]  # type: ignore[index]
        return down, sign * self.scale * up

    def branch(self, part: Part, layer: int, source: int, target: int, x_BND: Tensor) -> Tensor:
        """What is added to queries or values that are computed from `x_BND`."""
        down, up = (half.to(x_BND) for half in self.pair(part, layer, source, target))
        hidden = F.dropout(F.linear(x_BND, down), self.config.dropout, self.training)
        return F.linear(hidden, up)

    def attach(
        self, model: DialViT, source: int = 0, *, merge: bool = True, strict: bool = True
    ) -> None:
        """Tie the compensator to a model: from now on the dial turns its queries and values too.

        The difference is added to the queries and values of the fine-tuned model, whatever its
        adapter makes of them (ToCom, equations 3 and 4: it is one of the downstream weights).

        Args:
            model: Fine-tuned, by whatever method, from the backbone that the compensator belongs
                to.
            source: The degree that it was fine-tuned at.
            merge: Put the difference into the weights each time the dial turns, from pristine
                copies, so that it costs nothing afterwards and turning back restores every bit.
                As long as an adapter does more than add to what layers give (SSF, IA3, OFT, DoRA)
                it is added to their outputs all the same: `merge_adapters` frees of that cost.
                False: always add it to the outputs, which makes turning free; for requests of
                mixed degrees.
            strict: Whether the backbone's weights have to be those that it was trained on; False
                for a model that was fine-tuned with other software.

        Raises:
            ValueError: If depth, width, reduction method or backbone differ, a degree lies beyond
                the compensator's, or one is attached already.
        """
        if model.compensation is not None:
            raise ValueError("a compensator is attached already: detach it first.")
        shape = model.anatomy.shape
        for name in ("depth", "embed_dim"):
            if getattr(self, name) != getattr(shape, name):
                raise ValueError(
                    f"this compensator is for {name} {getattr(self, name)}, the model's is "
                    f"{getattr(shape, name)}."
                )
        if self.origin is not None:
            self._check_origin(self.origin, model, strict=strict)
        self.rows(source, model.degree)
        attachment = Attachment(self, model, source, merge=merge)
        try:
            attachment.on()
        except BaseException:
            attachment.off()
            raise
        model.compensation = attachment
        model.note_hooks()

    def detach(self, model: DialViT) -> None:
        """Give the model its own weights back, to the bit.

        Raises:
            ValueError: If this compensator is not attached to it.
        """
        self._attachment(model).off()
        model.compensation = None
        model.note_hooks()

    def _attachment(self, model: DialViT) -> Attachment:
        attachment = model.compensation
        if not isinstance(attachment, Attachment) or attachment.compensator is not self:
            raise ValueError("this compensator is not attached to the model.")
        return attachment

    @torch.no_grad()
    def search_scale(
        self,
        model: DialViT,
        loader: Iterable[tuple[Tensor, Tensor]],
        degree: int,
        scales: Sequence[float] = SCALES,
    ) -> dict[float, float]:
        """Find the factor with the best accuracy at a degree, and keep it.

        Args:
            model: It is attached to; left at `degree`.
            loader: Batches of images and class indices, not those of the final test; gone through
                once for each factor.
            degree: Degree to search at.
            scales: Factors to try; the paper's by default.

        Returns:
            Top-1 accuracy for each factor.

        Raises:
            ValueError: If the compensator is not attached to the model, the degree is not offered,
                or there are no factors or no images. Factor and degree are then as they were.
        """
        self._attachment(model)
        if not scales:
            raise ValueError("scales must name at least one factor, got none.")
        before, degree_before, training = self.scale, model.degree, model.training
        try:
            found = {scale: self._accuracy(model.eval(), loader, degree, scale) for scale in scales}
            self.scale = max(found, key=lambda scale: found[scale])
            model.set_degree(degree)
        except BaseException:
            self.scale = before
            model.set_degree(degree_before)
            model.train(training)
            raise
        return found

    def _accuracy(
        self,
        model: DialViT,
        loader: Iterable[tuple[Tensor, Tensor]],
        degree: int,
        scale: float,
    ) -> float:
        """Top-1 accuracy of the model that it is attached to, with another factor."""
        self.scale = scale
        model.set_degree(degree)
        device = next(model.parameters()).device
        right = total = 0
        for images, targets in loader:
            predicted = model(images.to(device)).argmax(-1).cpu()
            right += int((predicted == targets).sum())
            total += len(targets)
        if not total:
            raise ValueError(
                f"loader must give images each time it is gone through, got none at factor {scale}."
            )
        return right / total

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        config = {
            "kind": "compensator",
            "compensate": to_json("compensate", self.config),
            "scale": self.scale,
            "depth": self.depth,
            "embed_dim": self.embed_dim,
            "steps": self.steps,
            "origin": asdict(self.origin) if self.origin else None,
        }
        write_files(Path(directory), config, self.state_dict())

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; returns the address."""
        return push_files(self.save_pretrained, repo_id, private=private, token=token)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Load a compensator that `save_pretrained` has written.

        Args:
            directory: Local folder, or the name of a repository on the Hugging Face hub.

        Raises:
            ValueError: If the folder holds no compensator.
        """
        folder, config, tensors = read_files(directory, kind="compensator")
        for name in ("depth", "embed_dim", "steps"):
            check_field(config, name, int, folder)
        check_field(config, "compensate", dict, folder)
        scale: Any = config.get("scale")
        if type(scale) not in (int, float) or scale <= 0:
            raise ValueError(f"{folder}: scale must be a number above 0, got {scale!r:.60}.")
        method = from_json("compensate", config["compensate"])
        plugin = cls._blank(method, config, tensors, folder)
        plugin._load(tensors, folder)
        plugin.scale = scale
        if config.get("origin", "") is not None:
            check_field(config, "origin", dict, folder)
            plugin.origin = from_fields(Origin, config["origin"], "origin", "a compensator")
            from_json("reduce", plugin.origin.reduce)
            check_numbers(plugin.origin.fingerprint, "origin.fingerprint", folder)
        return plugin.eval()

    @classmethod
    def _blank(
        cls, method: ToCom, config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path
    ) -> Self:
        """A compensator for tensors to be read into, if they can be its own."""
        if 4 * config["depth"] != len(tensors):
            raise ValueError(
                f"{folder} does not hold the tensors of this compensator: 4 for each of "
                f"{config['depth']} blocks, got {len(tensors)}."
            )
        shape = config["depth"], config["embed_dim"], config["steps"]
        with config_errors(folder):
            with torch.device("meta"):
                cls(method, *shape)._check_shapes(tensors, folder)
            return cls(method, *shape)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], *, scale: float = 0.1) -> Self:
        """Read a checkpoint of the authors' code; other tensors in it are counted in the log.

        Args:
            state_dict: Tensors `blocks.N.attn.{q,v}_tocom.adapter_{down,up}.weight`.
            scale: Factor on the difference.

        Raises:
            ValueError: If there are none, their shapes do not make 16 equal steps, or their numbers
                are not finite.
        """
        state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
        steps = 16
        found = {match.groups(): name for name in state_dict if (match := _REFERENCE.search(name))}
        depth = 1 + max((int(layer) for layer, _, _ in found), default=-1)
        wanted = {
            (str(layer), part, half) for layer in range(depth) for part in "qv" for half in _HALVES
        }
        if not found or set(found) != wanted:
            raise ValueError(
                "this is not a ToCom state dict: it needs blocks.N.attn.{q,v}_tocom."
                f"adapter_{{down,up}}.weight for every block, got {len(found)} of them."
            )
        if odd := [n for n in state_dict if "_tocom." in n and n not in found.values()]:
            raise ValueError(f"this is not a ToCom state dict: {odd[0]} has no place in one.")
        check_finite({name: state_dict[name] for name in found.values()}, "the state dict")
        wide, embed_dim = state_dict[found["0", "q", "down"]].shape
        if wide % steps:
            raise ValueError(f"the width of a pair must be a multiple of {steps}, got {wide}.")
        config = ToCom(rank=wide // steps, scale=scale)
        plugin = cls(config, depth, embed_dim, steps)
        tensors = {
            plugin._own_name(*key): plugin._reordered(state_dict[name], key[2])
            for key, name in found.items()
        }
        plugin._load(tensors, "the state dict")
        others = Counter(name.split(".")[0] for name in state_dict if name not in found.values())
        warn_of_unused_weights("compensator", others)
        return plugin.eval()

    def to_reference(self) -> dict[str, Tensor]:
        """The weights by the names and in the order of the authors' code.

        Raises:
            ValueError: If the authors' code could not read them: other than 16 steps, an ablation.
        """
        if self.steps != 16 or self.config.shared or not self.config.inversion:
            raise ValueError("the authors' code knows 16 steps, one pair each, inverted downwards.")
        own = self.state_dict()
        return {
            f"blocks.{layer}.attn.{part}_tocom.adapter_{half}.weight": self._reordered(
                own[self._own_name(str(layer), part, half)], half
            )
            for layer in range(self.depth)
            for part in "qv"
            for half in _HALVES
        }

    @staticmethod
    def _own_name(layer: str, part: str, half: str) -> str:
        return f"{half}.{'query' if part == 'q' else 'value'}.{layer}"

    def _reordered(self, weight: Tensor, half: str) -> Tensor:
        """Turn the order of the steps around."""
        rows = weight if half == "down" else weight.T
        turned = rows.reshape(self.steps, -1, self.embed_dim).flip(0).reshape(rows.shape)
        return (turned if half == "down" else turned.T).contiguous()

    def _check_shapes(self, tensors: Mapping[str, Tensor], where: object) -> None:
        own = self.state_dict()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError(f"{where} does not hold the tensors of this compensator.")

    def _load(self, tensors: Mapping[str, Tensor], where: object) -> None:
        self._check_shapes(tensors, where)
        check_finite(tensors, where)
        self.load_state_dict(dict(tensors))

    @staticmethod
    def _check_origin(origin: Origin, model: DialViT, *, strict: bool) -> None:
        if model.reduce_config is None:
            raise ValueError("this compensator needs a model with a reduction method, got none.")
        theirs, ours = _dial(origin.reduce), _dial(to_json("reduce", model.reduce_config))
        if differing := [n for n in theirs | ours if theirs.get(n) != ours.get(n)]:
            told = ", ".join(f"{n} {theirs.get(n)} there, {ours.get(n)} here" for n in differing)
            raise ValueError(f"this compensator was trained with another reduction: {told}.")
        if strict and not same_backbone(origin.fingerprint, model.fingerprint):
            raise ValueError(
                f"this compensator belongs to {origin.backbone} with other weights than those that "
                "the model was fine-tuned from; strict=False attaches it all the same."
            )


_HALVES = ("down", "up")


def _dial(reduce: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a reduction method without the position of its dial."""

    def is_position(name: str, value: Any) -> bool:
        if name == "r":
            return type(value) is int
        return name in ("keep_rate", "target_ratio") and value in DIAL_RATES

    return {n: "any" if is_position(n, value) else value for n, value in reduce.items()}
