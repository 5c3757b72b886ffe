"""Training: the loop, and its two jobs, fine-tuning and the training of compensators."""

from tokendial.train.compensator_training import compensate
from tokendial.train.fine_tuning import train
from tokendial.train.loop import InterruptedRunError

__all__ = ["InterruptedRunError", "compensate", "train"]
