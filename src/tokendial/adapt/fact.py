"""FacT: stack the updates of all weight matrices into one tensor and factorise it.

Source: Jie and Deng, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", AAAI
2023, https://arxiv.org/abs/2212.03145, section 3.2: the query, key, value and output matrices and
the four D x D parts of each FFN matrix (12 matrices per layer) share two factors. In the
tensor-train form (TT) each matrix has its own core; in the Tucker form (TK) each core is a mix of
shared cores. The authors' code trains with a dropout of 0.1.
"""

# Shape legend: D embed_dim, R rank, M matrices of D x D in one layer of the backbone.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import AdapterConfig
from tokendial.adapt.hooks import HookedAdapter, OutputTransform
from tokendial.checks import check_choice, check_count, check_dropout, check_positive
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("adapt", "fact")
@dataclass(frozen=True, kw_only=True)
class FacT(AdapterConfig):
    """FacT: add `scale * U core V^T` to each D x D part of the weight matrices of the blocks."""

    rank: int = 16
    """Number of rows and columns of each core."""
    scale: float = 1.0
    """Factor on the updates, above 0."""
    kind: Literal["tt", "tk"] = "tt"
    """Factorisation of the updates: "tt" (tensor train) or "tk" (Tucker)."""
    dropout: float = 0.0
    """Probability of dropout after the core in training, in [0, 1)."""

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_positive("scale", self.scale)
        check_choice("kind", self.kind, ("tt", "tk"))
        check_dropout("dropout", self.dropout)

    def build(self, vit: ViTShape) -> "Factors":
        """Make the shared factors; the cores are made when the adapter is installed."""
        return Factors(self, vit)


class Factors(HookedAdapter):
    """Runs FacT.

    It has 2 D R parameters for the shared factors. To these TT adds R ** 2 per matrix, and TK adds
    R ** 3 for the shared cores and R per matrix.
    """

    def __init__(self, config: FacT, vit: ViTShape) -> None:
        super().__init__()
        self.config, self.embed_dim = config, vit.embed_dim
        self.left = nn.Linear(vit.embed_dim, config.rank, bias=False)
        self.right = nn.Linear(config.rank, vit.embed_dim, bias=False)
        nn.init.zeros_(self.right.weight)
        self.cores: nn.Parameter | None = None
        self.mix: nn.Parameter | None = None
        self.decayed_parameters = ("cores",) if config.kind == "tt" else ("cores", "mix")

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Act on all linear layers of the blocks, and make their cores.

        Raises:
            ValueError: If the width of a layer is no multiple of the model's width.
        """
        rank = self.config.rank
        inputs_M: list[int] = []
        for block in blocks:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    count = self._count(name, module)
                    self.act_on(module, _Update(self, len(inputs_M), module.in_features))
                    inputs_M += [rank * module.in_features // self.embed_dim] * count
        if self.config.kind == "tt":
            # In the authors' code the cores of one layer are a Linear, so PyTorch's default
            # initialisation draws them within a bound that depends on the number of its inputs.
            bounds_M11 = torch.tensor(inputs_M)[:, None, None] ** -0.5
            self.cores = nn.Parameter(
                torch.empty(len(inputs_M), rank, rank).uniform_(-1.0, 1.0) * bounds_M11
            )
        else:
            self.cores = nn.Parameter(torch.empty(rank, rank, rank))
            self.mix = nn.Parameter(torch.empty(len(inputs_M), rank))
            nn.init.xavier_uniform_(self.mix)
            nn.init.xavier_uniform_(self.cores)

    def _count(self, name: str, module: nn.Linear) -> int:
        dim = self.embed_dim
        if module.in_features % dim or module.out_features % dim:
            raise ValueError(
                f"FacT needs layers whose widths are multiples of {dim}, but {name} is "
                f"{module.in_features} x {module.out_features}."
            )
        return (module.in_features // dim) * (module.out_features // dim)

    def core(self, first: int, count: int) -> Tensor:
        """Return the cores [count, R, R] of the matrices number `first`, `first` + 1, ..."""
        assert self.cores is not None
        if self.mix is None:
            return self.cores[first : first + count]
        mixed: Tensor = torch.einsum("mk,kij->mij", self.mix[first : first + count], self.cores)
        return mixed


class _Update(OutputTransform):
    """Adds FacT's update to the output of one linear layer."""

    def __init__(self, factors: Factors, first: int, in_features: int) -> None:
        super().__init__()
        # In a tuple, so that the factors do not become a submodule: the model holds them already.
        self._factors = (factors,)
        self.first, self.parts = first, in_features // factors.embed_dim

    def _cores(self, outs: int) -> Tensor:
        """Return the cores [parts of the input, parts of the output, R, R]."""
        (factors,) = self._factors
        cores = factors.core(self.first, self.parts * outs)
        return cores.view(self.parts, outs, *cores.shape[1:])

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output plus that of the update."""
        (factors,) = self._factors
        cores = self._cores(output.shape[-1] // factors.embed_dim)
        hidden = factors.left(x.reshape(*x.shape[:-1], self.parts, factors.embed_dim))
        mixed = torch.einsum("...pi,poij->...oj", hidden, cores.to(hidden.dtype))
        mixed = F.dropout(mixed, factors.config.dropout, factors.training)
        update: Tensor = factors.right(mixed).flatten(-2)
        return output + factors.config.scale * update

    def merged_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the weight with the update added to each of its D x D parts."""
        (factors,) = self._factors
        weight = module.get_parameter("weight")
        cores = self._cores(weight.shape[0] // factors.embed_dim)
        left, right = factors.left.weight, factors.right.weight
        update = torch.einsum("dj,poij,ie->odpe", right, cores, left).reshape(weight.shape)
        return {"weight": weight + factors.config.scale * update}
