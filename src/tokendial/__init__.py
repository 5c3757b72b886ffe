"""Fine-tune a Vision Transformer once, then choose how much compute each prediction uses."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; a test compares it with _NAMES
    from tokendial import checks as checks
    from tokendial.adapt import NOAH as NOAH
    from tokendial.adapt import PEFT as PEFT
    from tokendial.adapt import SSF as SSF
    from tokendial.adapt import VPT as VPT
    from tokendial.adapt import Adapter as Adapter
    from tokendial.adapt import AdapterConfig as AdapterConfig
    from tokendial.adapt import AdaptFormer as AdaptFormer
    from tokendial.adapt import BitFit as BitFit
    from tokendial.adapt import Combined as Combined
    from tokendial.adapt import ConvPass as ConvPass
    from tokendial.adapt import DARAdapter as DARAdapter
    from tokendial.adapt import DenseAdapter as DenseAdapter
    from tokendial.adapt import FacT as FacT
    from tokendial.adapt import FullFineTuning as FullFineTuning
    from tokendial.adapt import Houlsby as Houlsby
    from tokendial.adapt import LastBlocks as LastBlocks
    from tokendial.adapt import LinearProbe as LinearProbe
    from tokendial.adapt import LoRA as LoRA
    from tokendial.adapt import NOAHSupernet as NOAHSupernet
    from tokendial.adapt import ReleasedDenseAdapter as ReleasedDenseAdapter
    from tokendial.adapt import ResTuning as ResTuning
    from tokendial.adapt import SynQT as SynQT
    from tokendial.backbones import Backbone as Backbone
    from tokendial.backbones import convert_weights as convert_weights
    from tokendial.backbones import video_vit as video_vit
    from tokendial.cascade import Cascade as Cascade
    from tokendial.cascade import CascadeCalibration as CascadeCalibration
    from tokendial.compensate import Compensator as Compensator
    from tokendial.compensate import ToCom as ToCom
    from tokendial.decode import DARDecoder as DARDecoder
    from tokendial.decode import DecoderConfig as DecoderConfig
    from tokendial.decode import LinearDecoder as LinearDecoder
    from tokendial.decode import MaskTransformer as MaskTransformer
    from tokendial.decode import UpConvDecoder as UpConvDecoder
    from tokendial.export_files import ExportedFile as ExportedFile
    from tokendial.export_files import export as export
    from tokendial.measure import calibrate as calibrate
    from tokendial.methods import register as register
    from tokendial.model.attach import AttachedDial as AttachedDial
    from tokendial.model.attach import attach as attach
    from tokendial.model.attach import attached as attached
    from tokendial.model.dial_vit import DialViT as DialViT
    from tokendial.model.difference import Difference as Difference
    from tokendial.model.difference import difference as difference
    from tokendial.model.loading import load as load
    from tokendial.model.protect import patches_in_boxes as patches_in_boxes
    from tokendial.model.wrap import wrap as wrap
    from tokendial.open_vocabulary import ProxyCLIP as ProxyCLIP
    from tokendial.open_vocabulary import ProxyCLIPConfig as ProxyCLIPConfig
    from tokendial.reduce import DAR as DAR
    from tokendial.reduce import PYRA as PYRA
    from tokendial.reduce import DynamicViT as DynamicViT
    from tokendial.reduce import DyT as DyT
    from tokendial.reduce import EViT as EViT
    from tokendial.reduce import FFNMerge as FFNMerge
    from tokendial.reduce import FrameByFrame as FrameByFrame
    from tokendial.reduce import InWindows as InWindows
    from tokendial.reduce import LearntMetric as LearntMetric
    from tokendial.reduce import PiToMe as PiToMe
    from tokendial.reduce import PruneMerge as PruneMerge
    from tokendial.reduce import Reducer as Reducer
    from tokendial.reduce import ReducerConfig as ReducerConfig
    from tokendial.reduce import Stack as Stack
    from tokendial.reduce import ToMe as ToMe
    from tokendial.reduce import preset as preset
    from tokendial.reference import load_reference as load_reference
    from tokendial.runtimes import ExportedViT as ExportedViT
    from tokendial.runtimes import Runtime as Runtime
    from tokendial.shape import ViTShape as ViTShape
    from tokendial.tokens import Grouping as Grouping
    from tokendial.tokens import Tokens as Tokens
    from tokendial.tune import FitResult as FitResult
    from tokendial.tune import OptimizedViT as OptimizedViT
    from tokendial.tune import fit as fit
    from tokendial.tune import optimize as optimize

__version__ = "0.2.0"
_NAMES = {
    "adapt": (
        "NOAH PEFT SSF VPT AdaptFormer Adapter AdapterConfig BitFit Combined ConvPass DARAdapter "
        "DenseAdapter FacT FullFineTuning Houlsby LastBlocks LinearProbe LoRA NOAHSupernet "
        "ReleasedDenseAdapter ResTuning SynQT"
    ),
    "backbones": "Backbone convert_weights video_vit",
    "cascade": "Cascade CascadeCalibration",
    "compensate": "Compensator ToCom",
    "decode": "DARDecoder DecoderConfig LinearDecoder MaskTransformer UpConvDecoder",
    "export_files": "ExportedFile export",
    "measure": "calibrate",
    "methods": "register",
    "model.attach": "AttachedDial attach attached",
    "model.dial_vit": "DialViT",
    "model.difference": "Difference difference",
    "model.loading": "load",
    "model.protect": "patches_in_boxes",
    "model.wrap": "wrap",
    "open_vocabulary": "ProxyCLIP ProxyCLIPConfig",
    "reduce": "DAR PYRA DynamicViT DyT EViT FFNMerge FrameByFrame InWindows LearntMetric PiToMe"
    " PruneMerge Reducer ReducerConfig Stack ToMe preset",
    "reference": "load_reference",
    "runtimes": "ExportedViT Runtime",
    "shape": "ViTShape",
    "tokens": "Grouping Tokens",
    "tune": "FitResult OptimizedViT fit optimize",
}
"""The public names by the module that holds them."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted([*_HOMES, "checks"])

if not TYPE_CHECKING:  # else every name would have the type Any

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the library, when it is first asked for.

        Importing torch takes seconds. The command line answers `--help` and Ctrl-C without it.
        """
        home = _HOMES.get(name)
        try:
            module = importlib.import_module(f"tokendial.{home or name}")
        except ModuleNotFoundError as error:
            if home or error.name != f"tokendial.{name}":
                raise
            raise AttributeError(f"module 'tokendial' has no attribute {name!r}") from None
        globals()[name] = getattr(module, name) if home else module
        return globals()[name]
