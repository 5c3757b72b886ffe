"""Pictures and plots."""

from tokendial.show.plots import dial_figure
from tokendial.show.tokens import token_figure, token_maps

__all__ = ["dial_figure", "token_figure", "token_maps"]
