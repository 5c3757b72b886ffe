"""Tokendial: one fine-tuned Vision Transformer, run at any cost."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokendial.adapt import (
        PEFT,
        SSF,
        VPT,
        AdaptFormer,
        BitFit,
        ConvPass,
        DARAdapter,
        DenseAdapter,
        FacT,
        FullFineTuning,
        Houlsby,
        LastBlocks,
        LinearProbe,
        LoRA,
    )
    from tokendial.backbones import Backbone, convert_weights, video_vit
    from tokendial.compensate import Compensator, ToCom
    from tokendial.decode import DARDecoder, LinearDecoder, MaskTransformer
    from tokendial.measure import calibrate
    from tokendial.model.dial_vit import DialViT, wrap
    from tokendial.model.loading import load
    from tokendial.reduce import DAR, DynamicViT, DyT, EViT, FFNMerge, FrameByFrame, ToMe
    from tokendial.reference import load_reference
    from tokendial.tune import FitResult, OptimizedViT, fit, optimize

__all__ = [
    "DAR",
    "PEFT",
    "SSF",
    "VPT",
    "AdaptFormer",
    "Backbone",
    "BitFit",
    "Compensator",
    "ConvPass",
    "DARAdapter",
    "DARDecoder",
    "DenseAdapter",
    "DialViT",
    "DyT",
    "DynamicViT",
    "EViT",
    "FFNMerge",
    "FacT",
    "FitResult",
    "FrameByFrame",
    "FullFineTuning",
    "Houlsby",
    "LastBlocks",
    "LinearDecoder",
    "LinearProbe",
    "LoRA",
    "MaskTransformer",
    "OptimizedViT",
    "ToCom",
    "ToMe",
    "calibrate",
    "convert_weights",
    "fit",
    "load",
    "load_reference",
    "optimize",
    "video_vit",
    "wrap",
]
__version__ = "0.1.0"
# Imported when they are first asked for: torch takes seconds, and the command line has to be
# there for `--help`, and for Ctrl-C, before that.
_HOMES = {
    "adapt": (
        "PEFT SSF VPT AdaptFormer BitFit ConvPass DARAdapter DenseAdapter FacT FullFineTuning "
        "Houlsby LastBlocks LinearProbe LoRA"
    ),
    "backbones": "Backbone convert_weights video_vit",
    "compensate": "Compensator ToCom",
    "decode": "DARDecoder LinearDecoder MaskTransformer",
    "measure": "calibrate",
    "reduce": "DAR DynamicViT DyT EViT FFNMerge FrameByFrame ToMe",
    "reference": "load_reference",
    "model.loading": "load",
    "tune": "FitResult OptimizedViT fit optimize",
    "model.dial_vit": "DialViT wrap",
}

if not TYPE_CHECKING:  # else every name would have the type Any

    def __getattr__(name: str) -> Any:
        """Import a public name, or a part of the library."""
        home = next((home for home, names in _HOMES.items() if name in names.split()), None)
        try:
            module = importlib.import_module(f"tokendial.{home or name}")
        except ModuleNotFoundError as error:
            if home or error.name != f"tokendial.{name}":
                raise
            raise AttributeError(f"module 'tokendial' has no attribute {name!r}") from None
        globals()[name] = getattr(module, name) if home else module
        return globals()[name]
