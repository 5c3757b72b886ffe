"""A saved model as it was read from its files: checked, but not yet built."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokendial.adapt.base import AdapterConfig
from tokendial.backbones import Backbone, same_backbone
from tokendial.decode import DecoderConfig
from tokendial.methods import from_fields, from_json
from tokendial.model.files import (
    CONFIG,
    WEIGHTS,
    check_field,
    check_numbers,
    check_sizes,
    read_files,
)
from tokendial.reduce.base import Calibration, Reducer, ReducerConfig
from tokendial.weights import check_finite


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What the two files of a saved model hold."""

    folder: Path
    """Where the files lie on this machine."""
    backbone: Backbone
    """How to build the backbone."""
    whole: bool
    """Whether the file holds all weights of the backbone, not only those that were trained."""
    fingerprint: list[float]
    """A few weights of the backbone that the model was trained on."""
    degree: int
    """The degree that the model was saved at."""
    calibration: Any
    """Fields of the reducer's `Calibration` as plain JSON; None: the dial was not calibrated."""
    reduce: ReducerConfig | None
    """The reduction method; None: there was none."""
    adapt: AdapterConfig | None
    """The fine-tuning method; None: there was none."""
    decode: DecoderConfig | None
    """The decoder; None: the backbone's head gives the logits."""
    tensors: dict[str, Tensor]
    """The saved weights by their names in `DialViT.state_dict()`."""

    @classmethod
    def read(
        cls, directory: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> "SavedModel":
        """Read a saved model from a folder or from the hub; see `read_files`.

        Raises:
            ValueError: If there is no saved model, or its configuration is not allowed.
        """
        folder, config, tensors = read_files(
            directory, kind="model", revision=revision, token=token
        )
        fields = {"whole": bool, "fingerprint": list, "degree": int, "backbone": dict}
        for name, kind in fields.items():
            check_field(config, name, kind, folder)
        check_numbers(config["fingerprint"], "fingerprint", folder)
        check_sizes(config, tensors, folder)
        backbone = from_fields(
            Backbone, config["backbone"], f"{folder / CONFIG}: backbone", "a backbone"
        )
        # Models of the first releases have no decoder in their configuration.
        written = {kind: config.get(kind) for kind in ("reduce", "adapt", "decode")}
        methods = {k: None if v is None else from_json(k, v) for k, v in written.items()}
        return cls(
            folder=folder,
            backbone=backbone,
            whole=config["whole"],
            fingerprint=config["fingerprint"],
            degree=config["degree"],
            calibration=config.get("calibration"),
            tensors=tensors,
            **methods,
        )

    def check_backbone(self, fingerprint: list[float]) -> None:
        """Raise a ValueError unless the model was trained on the backbone of that fingerprint."""
        if not same_backbone(self.fingerprint, fingerprint):
            raise ValueError(
                f"{self.folder} was trained on another backbone: the weights of "
                f"{self.backbone.name} at hand are not the ones it was saved with."
            )

    def check_source(self) -> None:
        """Raise a ValueError if the backbone's name is a path or an address.

        A saved model may come from anywhere, so it must not decide which files are read.
        """
        if ":" in self.backbone.name or "/" in self.backbone.name:
            raise ValueError(
                f"{self.folder / CONFIG}: backbone.name {self.backbone.name!r} is a place, which "
                "is not read; build the backbone and give it: load(..., vit=...)."
            )

    def check_shapes(self, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """Raise a ValueError unless tensors have the names and shapes of those of a model.

        Args:
            expected: Tensors of the model that is to be loaded.
            tensors: The saved tensors, or some of them.
        """
        shapes = {name: tuple(value.shape) for name, value in expected.items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if differing := [n for n in shapes | found if shapes.get(n) != found.get(n)]:
            name = differing[0]
            raise ValueError(
                f"{self.folder} does not fit this model: {len(differing)} tensors differ, the "
                f"first is {name} (model {shapes.get(name, 'none')}, file "
                f"{found.get(name, 'none')})."
            )

    def check_values(self, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Raise a ValueError unless all tensors hold finite floats."""
        check_finite(tensors, self.folder / WEIGHTS, expected)

    def head_size(self, head_names: Collection[str]) -> int | None:
        """Number of classes of the saved head; None: no head was saved.

        Args:
            head_names: Names of the heads in the backbone.
        """
        # A head that pools frames holds its linear layer as `head`.
        biases = {f"vit.{name}.{bias}" for name in head_names for bias in ("bias", "head.bias")}
        sizes = [len(value) for name, value in self.tensors.items() if name in biases]
        return sizes[0] if sizes else None

    def calibrate(self, reducer: Reducer | None) -> None:
        """Give a reducer the saved calibration, if there is one.

        Raises:
            ValueError: If the calibration does not fit the reducer's dial.
        """
        if reducer is None or self.calibration is None:
            return
        if not isinstance(self.calibration, dict):
            raise ValueError(f"calibration must be a mapping, got {self.calibration!r:.60}.")
        lists = {name: tuple(values) for name, values in self.calibration.items()}
        calibration = from_fields(Calibration, lists, "calibration", "a saved model")
        wanted = len(reducer.degrees) - 1
        for name, values in lists.items():
            if len(values) != wanted:
                raise ValueError(f"calibration.{name} must be {wanted} numbers, got {len(values)}.")
        reducer.calibration = calibration
