"""Pictures of tokens, plots, and report pages.

The figures are imported from their modules, since they need matplotlib: `token_maps` does not.
"""

from tokendial.show.tokens import TokenMaps, token_maps

__all__ = ["TokenMaps", "token_maps"]
