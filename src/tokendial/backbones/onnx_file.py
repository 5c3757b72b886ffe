"""ONNX files as graphs: the values that they store, and which nodes make and read each value."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.extras import check_installed
from tokendial.weights import unreadable_error


class OnnxFile:
    """An ONNX file that was read into memory. Nothing in it is run."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Args:
            path: The file. Weights that it stores outside of itself must lie beside it.

        Raises:
            ValueError: If the package onnx is missing, or the file cannot be read.
        """
        check_installed(f"reading {path}", "onnx")
        import onnx

        self.path = path
        try:
            graph = onnx.load(path).graph
        except Exception as error:  # protobuf's own errors, missing files with weights
            raise unreadable_error(path, "ONNX", error) from None
        self.nodes = list(graph.node)
        """The operations, in an order in which they can run."""
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._readers = defaultdict[str, list[Any]](list)
        self._weights: dict[str, Any] = {value.name: value for value in graph.initializer}
        self._constants: dict[str, Any] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)
            if node.op_type == "Constant":
                values = [a.t for a in node.attribute if a.name == "value"]
                self._constants |= dict(zip(node.output, values, strict=False))
            # torch's exporter stores equal tensors once; copies bear the names of the others.
            if node.op_type == "Identity":
                for source, copy in zip(node.input, node.output, strict=False):
                    if source in self._weights:
                        self._weights[copy] = self._weights[source]

    def weight_names(self) -> list[str]:
        """Names of the stored weights, without those that torch's exporter has numbered."""
        return [name for name in self._weights if "::" not in name]

    def is_stored(self, name: str) -> bool:
        """Whether the file stores a value, as a weight or as a constant of the graph."""
        return name in self._weights or name in self._constants

    def tensor(self, name: str) -> Tensor:
        """A stored value. Raises a ValueError if it is damaged, or torch has no such numbers."""
        from onnx import numpy_helper

        stored = self._weights[name] if name in self._weights else self._constants[name]
        try:
            array = numpy_helper.to_array(stored)
        except Exception as error:  # fewer numbers than its shape says, unknown types
            raise unreadable_error(self.path, f"ONNX: {name}", error) from None
        try:
            return torch.from_numpy(array.copy())
        except TypeError:
            raise ValueError(
                f"{self.path}: {name} must be of a float type, got {array.dtype}."
            ) from None

    def maker(self, name: str, *op_types: str) -> Any:
        """The node that makes a value; None if there is none of these types."""
        node = self._makers.get(name)
        return node if node is not None and node.op_type in op_types else None

    def readers(self, name: str, *op_types: str) -> list[Any]:
        """The nodes of these types that read a value."""
        return [node for node in self._readers.get(name, ()) if node.op_type in op_types]


def attributes(node: Any) -> dict[str, Any]:
    """The settings of a node by name; strings are bytes."""
    from onnx.helper import get_attribute_value

    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
