"""The plugin of ToCom: a difference of q and v weights for every two degrees of the dial.

Source: Jie et al., "Token Compensator: Altering Inference Cost of Vision Transformer without
Re-Tuning", ECCV 2024, https://arxiv.org/abs/2408.06798, and the authors' code. Group g bridges
degree g - 1 to g, by one low-rank pair on the queries and one on the values of each layer. In
training, dropout acts between the two matrices of a pair.
"""

# Shape legend: B batch, N tokens, D embed_dim, K rank of a pair times steps between two degrees.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.backbones.loading import warn_of_unused_weights
from tokendial.checks import check_count
from tokendial.compensate.attachment import PARTS, Attachment, Part
from tokendial.compensate.authors_format import STEPS, read_authors_format, to_authors_format
from tokendial.compensate.config import ToCom
from tokendial.compensate.origin import Origin, check_origin, origin_of
from tokendial.compensate.scale_search import SCALES, search_scale
from tokendial.methods import from_fields, from_json, to_json
from tokendial.model.dial_vit import DialViT
from tokendial.model.files import check_field, check_numbers, config_errors, read_files, write_files
from tokendial.model.hub import push_files
from tokendial.reduce.base import ReducerConfig
from tokendial.weights import check_finite, hash_tensors


class Compensator(nn.Module):
    """Weights that let a fine-tuned model run at other degrees than it was fine-tuned at.

    It belongs to a backbone and a reduction method, and fits every model that was fine-tuned from
    that backbone. It has 4 * depth * embed_dim * rank parameters for each step of the dial.

    Args:
        config: Settings.
        depth: Number of transformer blocks of the backbone.
        embed_dim: Width of a token.
        steps: Highest degree; the compensator bridges the degrees 0 to `steps`.

    Raises:
        ValueError: If `steps` is below 1.
    """

    def __init__(self, config: ToCom, depth: int, embed_dim: int, steps: int) -> None:
        super().__init__()
        check_count("steps", steps)
        self.config, self.depth, self.embed_dim, self.steps = config, depth, embed_dim, steps
        self.scale = config.scale
        """Factor on the weight difference; the paper searches it for each model. A new value acts
        from the next turn of the dial on where the difference is merged into weights."""
        self.origin: Origin | None = None
        """The model that the compensator was trained on. If None, `attach` compares only depth and
        width."""
        groups = 1 if config.shared else steps if config.inversion else 2 * steps
        width = groups * config.rank
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        for part in PARTS:
            down = [nn.Parameter(torch.empty(width, embed_dim)) for _ in range(depth)]
            for weight in down:
                nn.init.kaiming_uniform_(weight, a=5**0.5)
            self.down[part] = nn.ParameterList(down)
            self.up[part] = nn.ParameterList(torch.zeros(embed_dim, width) for _ in range(depth))

    @classmethod
    def for_model(cls, model: DialViT, config: ToCom, steps: int | None = None) -> Self:
        """Make an untrained compensator for the backbone and reduction method of a model.

        Args:
            model: The wrapped model that the compensator is to be trained on.
            config: Settings.
            steps: Highest degree that the compensator bridges. By default the degree that the
                model's reduction method describes.

        Raises:
            ValueError: If the model has no reduction method, or its dial ends below `steps`.
        """
        if model.reducer is None:
            raise ValueError("a compensator needs a model with a reduction method, got none.")
        steps = model.reducer.degree if steps is None else steps
        if steps > model.degrees[-1]:
            raise ValueError(f"steps must be at most {model.degrees[-1]}, got {steps}.")
        shape = model.anatomy.shape
        plugin = cls(config, shape.depth, shape.embed_dim, steps)
        plugin.origin = origin_of(model)
        return plugin

    @property
    def reduce_config(self) -> ReducerConfig | None:
        """The reduction method that the compensator was trained with; None if it is unknown."""
        return from_json("reduce", self.origin.reduce) if self.origin else None

    def check_degrees(self, source: int, target: int) -> None:
        """Check that the compensator bridges two degrees.

        Raises:
            ValueError: If one is no integer in [0, steps].
        """
        for name, degree in (("source", source), ("degree", target)):
            if type(degree) is not int or not 0 <= degree <= self.steps:
                raise ValueError(
                    f"{name} must be an integer in [0, {self.steps}], which is as far as the "
                    f"compensator goes, got {degree!r}."
                )

    def pair(self, part: Part, layer: int, source: int, target: int) -> tuple[Tensor, Tensor]:
        """The weight difference of one layer (counted from 1) between two degrees.

        Returns:
            `down` [K, D] and `up` [D, K], sign and scale included: the difference is `up @ down`.
            K is 0 if the degrees are equal.

        Raises:
            ValueError: If the compensator does not bridge the degrees.

        Source:
            ToCom, equations 3 and 4.
        """
        self.check_degrees(source, target)
        config = self.config
        sign = -1 if target < source and config.inversion else 1
        first, last = sorted((source, target))
        if config.shared:
            first, last = 0, min(1, last - first)
        elif target < source and not config.inversion:
            first, last = first + self.steps, last + self.steps
        groups = slice(first * config.rank, last * config.rank)
        down: Tensor = self.down[part][layer - 1][groups]  # type: ignore[index]
        up: Tensor = self.up[part][layer - 1][:, groups]  # type: ignore[index]
        return down, sign * self.scale * up

    def branch(self, part: Part, layer: int, source: int, target: int, x_BND: Tensor) -> Tensor:
        """Apply the difference to `x_BND`: what is added to the layer's queries or values."""
        down, up = (matrix.to(x_BND) for matrix in self.pair(part, layer, source, target))
        hidden = F.dropout(F.linear(x_BND, down), self.config.dropout, self.training)
        return F.linear(hidden, up)

    def attach(
        self, model: DialViT, source: int = 0, *, merge: bool = True, strict: bool = True
    ) -> None:
        """Attach the compensator: from now on `model.set_degree` adjusts queries and values too.

        The difference is added to the queries and values of the fine-tuned model, after whatever
        its adapter does to them (ToCom, equations 3 and 4).

        Args:
            model: Fine-tuned, by any method, from the backbone that the compensator belongs to.
            source: The degree that the model was fine-tuned at.
            merge: Write the difference into the weights each time the dial turns, from pristine
                copies. It then costs nothing at inference, and turning back restores every bit.
                For an adapter that does more than add to a layer's output (SSF, IA3, OFT, DoRA)
                the difference is added to the output anyway, until `merge_adapters` is called.
                False always adds it to the outputs, which makes turning the dial free: for
                requests of mixed degrees.
            strict: Require the weights of the backbone to be those that the compensator was
                trained on. False is for a model that was fine-tuned with other software.

        Raises:
            ValueError: If depth, width, reduction method or backbone differ, a degree lies beyond
                the compensator's, the model was trained at several degrees at once, or a
                compensator is attached already.
        """
        if model.compensation is not None:
            raise ValueError("a compensator is attached already: detach it first.")
        if model.reducer is not None and (trained := model.reducer.trained_degrees):
            raise ValueError(
                f"this model was trained at the degrees {', '.join(map(str, trained))} at once, so "
                "there is nothing to compensate."
            )
        shape = model.anatomy.shape
        for name in ("depth", "embed_dim"):
            if getattr(self, name) != getattr(shape, name):
                raise ValueError(
                    f"this compensator is for {name} {getattr(self, name)}, the model's is "
                    f"{getattr(shape, name)}."
                )
        if self.origin is not None:
            check_origin(self.origin, model, strict=strict)
        self.check_degrees(source, model.degree)
        attachment = Attachment(self, model, source, merge=merge)
        try:
            attachment.start()
        except BaseException:
            attachment.stop()
            raise
        model.compensation = attachment
        model.update_hook_version()

    def detach(self, model: DialViT) -> None:
        """Restore the model's own weights, bit for bit.

        Raises:
            ValueError: If this compensator is not attached to the model.
        """
        self._attachment(model).stop()
        model.compensation = None
        model.update_hook_version()

    def _attachment(self, model: DialViT) -> Attachment:
        attachment = model.compensation
        if not isinstance(attachment, Attachment) or attachment.compensator is not self:
            raise ValueError("this compensator is not attached to the model.")
        return attachment

    def search_scale(
        self,
        model: DialViT,
        loader: Iterable[tuple[Tensor, Tensor]],
        degree: int,
        scales: Sequence[float] = SCALES,
    ) -> dict[float, float]:
        """Set `scale` to the factor with the best top-1 accuracy at a degree.

        Args:
            model: A model that the compensator is attached to. It is left at `degree`, in
                evaluation mode.
            loader: Batches of images and class indices, not those of the final test. It is gone
                through once for each factor.
            degree: Degree to search at.
            scales: Factors to try; those of the paper by default.

        Returns:
            Top-1 accuracy for each factor.

        Raises:
            ValueError: If the compensator is not attached to the model, the degree is not offered,
                or there are no factors or no images. Factor and degree are then as they were.
        """
        self._attachment(model)
        return search_scale(self, model, loader, degree, scales)

    @property
    def revision(self) -> str:
        """A hash of settings, factor and weights."""
        return f"{self.config} {self.scale} {hash_tensors(self.state_dict())}"

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
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
        plugin = cls._untrained(method, config, tensors, folder)
        plugin._load(tensors, folder)
        plugin.scale = scale
        if config.get("origin", "") is not None:
            check_field(config, "origin", dict, folder)
            plugin.origin = from_fields(Origin, config["origin"], "origin", "a compensator")
            from_json("reduce", plugin.origin.reduce)
            check_numbers(plugin.origin.fingerprint, "origin.fingerprint", folder)
        return plugin.eval()

    @classmethod
    def _untrained(
        cls, method: ToCom, config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path
    ) -> Self:
        """Build the compensator that a configuration describes.

        The configuration may come from anywhere, so its sizes are compared with the tensors of the
        file before memory is allocated for them.
        """
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
        """Read a checkpoint of the authors' code.

        The number of other tensors in it is logged.

        Args:
            state_dict: Tensors `blocks.N.attn.{q,v}_tocom.adapter_{down,up}.weight`, as such or
                under "model".
            scale: Factor on the weight difference.

        Raises:
            ValueError: If there are none, their shapes do not make 16 equal steps, or their numbers
                are not finite.
        """
        found = read_authors_format(state_dict)
        plugin = cls(ToCom(rank=found.rank, scale=scale), found.depth, found.embed_dim, STEPS)
        plugin._load(found.tensors, "the state dict")
        warn_of_unused_weights("compensator", found.ignored)
        return plugin.eval()

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights by the names and in the order of the authors' code.

        Raises:
            ValueError: If the authors' code could not read them: there are not 16 steps, or the
                compensator is an ablation.
        """
        if self.steps != STEPS or self.config.shared or not self.config.inversion:
            raise ValueError(
                f"the authors' code knows {STEPS} steps, one pair each, inverted downwards."
            )
        return to_authors_format(self.state_dict(), depth=self.depth, embed_dim=self.embed_dim)

    def _check_shapes(self, tensors: Mapping[str, Tensor], where: object) -> None:
        own = self.state_dict()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError(f"{where} does not hold the tensors of this compensator.")

    def _load(self, tensors: Mapping[str, Tensor], where: object) -> None:
        self._check_shapes(tensors, where)
        check_finite(tensors, where)
        self.load_state_dict(dict(tensors))
