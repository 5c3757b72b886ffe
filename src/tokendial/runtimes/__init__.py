"""Where a model computes: PyTorch, onnxruntime or OpenVINO, in several precisions."""

from tokendial.runtimes.config import PLAIN, Runtime
from tokendial.runtimes.exported_vit import ExportedViT

__all__ = ["PLAIN", "ExportedViT", "Runtime"]
