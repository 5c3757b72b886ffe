"""Tasks: loss and metrics."""

from tokendial.tasks.classification import Classification

__all__ = ["Classification"]
