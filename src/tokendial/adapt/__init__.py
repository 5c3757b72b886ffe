"""Fine-tuning methods, one file per method, and the interface that they share."""

from tokendial.adapt.adaptformer import AdaptFormer
from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.adapt.combined import Combined
from tokendial.adapt.convpass import ConvPass
from tokendial.adapt.dar import DARAdapter
from tokendial.adapt.dense import DenseAdapter
from tokendial.adapt.dense_released import ReleasedDenseAdapter
from tokendial.adapt.fact import FacT
from tokendial.adapt.houlsby import Houlsby
from tokendial.adapt.lora import LoRA
from tokendial.adapt.noah import NOAH, NOAHSupernet
from tokendial.adapt.peft import PEFT
from tokendial.adapt.plain import BitFit, FullFineTuning, LastBlocks, LinearProbe
from tokendial.adapt.res_tuning import ResTuning
from tokendial.adapt.ssf import SSF
from tokendial.adapt.synqt import SynQT
from tokendial.adapt.vpt import VPT

__all__ = [
    "NOAH",
    "PEFT",
    "SSF",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "AdapterConfig",
    "BitFit",
    "Combined",
    "ConvPass",
    "DARAdapter",
    "DenseAdapter",
    "FacT",
    "FullFineTuning",
    "Houlsby",
    "LastBlocks",
    "LinearProbe",
    "LoRA",
    "NOAHSupernet",
    "ReleasedDenseAdapter",
    "ResTuning",
    "SynQT",
]
