"""ToCom: small weights that let a model run at another degree than it was fine-tuned at."""

from tokendial.compensate.attachment import Attachment
from tokendial.compensate.compensator import Compensator
from tokendial.compensate.config import ToCom

__all__ = ["Attachment", "Compensator", "ToCom"]
