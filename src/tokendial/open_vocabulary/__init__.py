"""Open-vocabulary segmentation: masks of classes that are given as names, without training."""

from tokendial.open_vocabulary.class_lists import (
    CLASS_LISTS,
    ClassNames,
    class_list,
    parse_classes,
)
from tokendial.open_vocabulary.config import ProxyCLIPConfig
from tokendial.open_vocabulary.proxy_attention import proxy_attention
from tokendial.open_vocabulary.proxy_clip import ProxyCLIP

__all__ = [
    "CLASS_LISTS",
    "ClassNames",
    "ProxyCLIP",
    "ProxyCLIPConfig",
    "class_list",
    "parse_classes",
    "proxy_attention",
]
