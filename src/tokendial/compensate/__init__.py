"""ToCom: what bridges the degrees that a model was trained at and runs at."""

from tokendial.compensate.attachment import Attachment
from tokendial.compensate.plugin import Compensator, ToCom

__all__ = ["Attachment", "Compensator", "ToCom"]
