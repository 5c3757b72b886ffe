"""Training: the loop and its two jobs, fine-tuning and compensators."""

from tokendial.train.compensate import compensate
from tokendial.train.finetune import train
from tokendial.train.loop import InterruptedRunError

__all__ = ["InterruptedRunError", "compensate", "train"]
