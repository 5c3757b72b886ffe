"""Fine-tuning methods: one file per method."""

from tokendial.adapt.adaptformer import AdaptFormer
from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.adapt.dar import DARAdapter
from tokendial.adapt.dense import DenseAdapter
from tokendial.adapt.lora import LoRA
from tokendial.adapt.plain import Full, Linear

__all__ = [
    "AdaptFormer",
    "Adapter",
    "AdapterConfig",
    "DARAdapter",
    "DenseAdapter",
    "Full",
    "Linear",
    "LoRA",
]
