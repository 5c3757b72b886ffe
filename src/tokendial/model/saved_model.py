"""A saved model as its two files hold it: checked when it is read, but not yet built."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokendial.adapt.base import AdapterConfig
from tokendial.backbones import Backbone, same_backbone
from tokendial.decode import DecoderConfig
from tokendial.methods import from_fields, from_json, to_json
from tokendial.model.files import (
    CONFIG,
    WEIGHTS,
    check_field,
    check_numbers,
    check_sizes,
    read_files,
    write_files,
)
from tokendial.reduce.base import Calibration, Reducer, ReducerConfig
from tokendial.weights import check_finite


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What the two files of a saved model hold."""

    folder: Path
    """Where the files lie, or are to be written, on this machine."""
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
    trained_degrees: Any
    """The reducer's degrees of that name as plain JSON; None: the model trained at one degree."""
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
            trained_degrees=config.get("trained_degrees"),
            tensors=tensors,
            **methods,
        )

    def write(self) -> None:
        """Write the files into `folder`, which is made if it does not exist."""
        methods = {"reduce": self.reduce, "adapt": self.adapt, "decode": self.decode}
        config: dict[str, Any] = {
            "kind": "model",
            "backbone": dataclasses.asdict(self.backbone),
            "whole": self.whole,
            "fingerprint": self.fingerprint,
            "degree": self.degree,
            "calibration": self.calibration,
            "trained_degrees": self.trained_degrees,
        }
        config |= {
            kind: to_json(kind, method) if method else None for kind, method in methods.items()
        }
        write_files(self.folder, config, self.tensors)

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

    def check_adapter(
        self, reduce: ReducerConfig | None, fingerprint: list[float]
    ) -> AdapterConfig:
        """Check that a model can take the saved adapter over.

        Args:
            reduce: The reduction method of the model.
            fingerprint: That of its backbone.

        Returns:
            The adapter's fine-tuning method.

        Raises:
            ValueError: If the saved model has no adapter, another backbone or another reduction.
        """
        if self.adapt is None:
            raise ValueError(f"{self.folder} holds a model without an adapter.")
        if self.reduce != reduce:
            raise ValueError(
                f"{self.folder} was trained with another reduction ({self.reduce}) than this "
                f"model's ({reduce})."
            )
        self.check_backbone(fingerprint)
        return self.adapt

    def load_trained(self, model: nn.Module, trained: dict[str, Tensor]) -> None:
        """Load the saved weights of an adapter, and leave the frozen backbone as it is.

        Args:
            model: A model in which the adapter is active.
            trained: The tensors of the model that the adapter and its head consist of.

        Raises:
            ValueError: If the saved tensors have other names or shapes, or are not finite.
        """
        # The file may hold the frozen backbone, too, whose weights the model has.
        frozen = model.state_dict().keys() - trained.keys()
        tensors = {name: value for name, value in self.tensors.items() if name not in frozen}
        self.check_shapes(trained, tensors)
        self.check_values(tensors, trained)
        model.load_state_dict(tensors, strict=False)

    def head_size(self, head_names: Collection[str]) -> int | None:
        """Number of classes of the saved head; None: no head was saved.

        Args:
            head_names: Names of the heads in the backbone.
        """
        # A head that pools frames holds its linear layer as `head`.
        biases = {f"vit.{name}.{bias}" for name in head_names for bias in ("bias", "head.bias")}
        sizes = [len(value) for name, value in self.tensors.items() if name in biases]
        return sizes[0] if sizes else None

    def restore_dial(self, reducer: Reducer | None) -> None:
        """Tell a reducer what was saved of its dial: trained degrees and calibration, if any.

        Raises:
            ValueError: If either does not fit the reducer's dial.
        """
        if reducer is None:
            return
        if (trained := self.trained_degrees) is not None:
            offered = [d for d in reducer.degrees if isinstance(trained, list) and d in trained]
            if not offered or trained != offered:
                raise ValueError(
                    f"trained_degrees must be rising degrees in [0, {reducer.degrees[-1]}], got "
                    f"{trained!r:.60}."
                )
            reducer.trained_degrees = tuple(offered)
        if self.calibration is None:
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


def trained_tensors(
    model: nn.Module, adapter: nn.Module, decoder: nn.Module | None
) -> dict[str, Tensor]:
    """Tensors of a model that its training changes, by their names in its `state_dict()`.

    Args:
        model: A `DialViT`, of which those parameters count that train.
        adapter: Its active adapter, which counts as a whole.
        decoder: Its decoder, which counts as a whole; None: there is none.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained |= {f"adapter.{name}": value for name, value in adapter.state_dict().items()}
    decoder_state = decoder.state_dict() if decoder else {}
    return trained | {f"decoder.{name}": value for name, value in decoder_state.items()}
