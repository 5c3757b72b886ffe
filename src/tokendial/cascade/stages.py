"""What defines a cascade, apart from its model: degrees, score and thresholds. Kept as JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.cascade.answers import SCORES, ScoreName, how_sure
from tokendial.cascade.thresholds import CascadeCalibration
from tokendial.checks import check_choice


@dataclass(frozen=True, slots=True)
class CascadeStages:
    """The stages of a cascade.

    Raises:
        ValueError: If degrees do not fall, `score` is unknown, or the calibration has another
            number of stages.
    """

    degrees: tuple[int, ...]
    """Two or three degrees, falling: the cheapest first."""
    score: ScoreName = "margin"
    """How sure the model is."""
    multi_label: bool = False
    """Whether each logit is a label of its own (a sigmoid), not one of K classes."""
    calibration: CascadeCalibration | None = None
    """The thresholds and their bound; None: not calibrated."""
    revision: str | None = None
    """Revision of the weights that it was calibrated for, as `Run.revision` gives it; None: not
    known."""
    numerics: str = "fp32"
    """How the model computed in the calibration, as `Runtime.numerics` says it."""

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        if len(self.degrees) not in (2, 3) or [*self.degrees] != sorted(
            {*self.degrees}, reverse=True
        ):
            raise ValueError(
                f"degrees must be two or three, the cheapest first, such as 8,0; got "
                f"{','.join(map(str, self.degrees))}."
            )
        if self.calibration and len(self.calibration.thresholds) != len(self.degrees) - 1:
            raise ValueError("calibration: thresholds must be one less than degrees.")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """How sure each stage but the last must be to answer. Infinity without a calibration."""
        if self.calibration is None:
            return (math.inf,) * (len(self.degrees) - 1)
        return self.calibration.thresholds

    def how_sure(self, logits: Tensor) -> Tensor:
        """How sure the model is of each answer, [B], from logits [B, ...]; higher is surer."""
        return how_sure(logits, self.score, multi_label=self.multi_label)

    def check_numerics(self, numerics: str) -> None:
        """Raise a ValueError if the model computes in another way than in the calibration.

        Rounding changes answers, so neither the thresholds nor their bound would hold.
        """
        if numerics != self.numerics:
            raise ValueError(
                f"the cascade was calibrated in {self.numerics}, not in {numerics}: choose the "
                "runtime and precision of `tokendial cascade`, or run it again with these."
            )

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        contents = dataclasses.asdict(self)
        contents["calibration"] = self.calibration.to_json() if self.calibration else None
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(contents, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "CascadeStages":
        """Read what `save` wrote.

        Raises:
            ValueError: If there is no such file, or it holds no cascade.
        """
        if not path.is_file():
            raise ValueError(f"{path}: there is no cascade; `tokendial cascade RUN` makes one.")
        try:
            contents = json.loads(path.read_text())
            contents["degrees"] = tuple(contents["degrees"])
            if contents["calibration"] is not None:
                contents["calibration"] = CascadeCalibration.from_json(contents["calibration"])
            return cls(**contents)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} holds no cascade: {error}") from None
