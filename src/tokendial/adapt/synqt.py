"""SynQT: learnt queries read the blocks of the frozen backbone, which does not notice them.

Source: Zhang et al., "Parameter-efficient and Memory-efficient Tuning for Vision Transformer: A
Disentangled Approach", ECCV 2024, https://arxiv.org/abs/2407.06964, section 3 (query synthesis
module, knowledge extraction module), and the authors' code, https://github.com/taolinzhang/SynQT,
for everything that the paper leaves open: norms, residual connections, dropout, initial weights.

In each layer, small trained modules make queries from learnt vectors and from what the queries of
the layer before found. The queries pass through the frozen block: they read the keys and values of
the backbone's tokens, but no token reads them. What they find in all layers is joined to one
feature, which takes the place of the class token. The final norm and the head train.

The backbone's tokens are the same as without queries, so no gradient passes through them. Autograd
keeps their keys and values, which the gradients of the queries need.

Departures: the final norm keeps the backbone's epsilon (1e-6 in timm's ViTs, the authors' copy of
it has 1e-5). Norms and gates that the authors' code makes but never uses are left out. Where a
reduction merges tokens, the queries read the merged ones, with the token sizes that the reduction
gives attention in that layer.
"""

# Shape legend: B batch, Q queries, L features that the layers give, D embed_dim.

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, ResidualBottleneck
from tokendial.checks import check_count, check_dropout, check_positive
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens

_FOUND = ("queries", "attention", "ffn")
"""Names in `Tokens.aside`: the queries that leave each layer, what its attention added to them, and
what its FFN added; each the mean over the queries of a layer, [B, layers so far, D]."""


@register("adapt", "synqt")
@dataclass(frozen=True, kw_only=True)
class SynQT(AdapterConfig):
    """SynQT: learnt queries read the frozen blocks; training keeps few of their activations."""

    queries: int = 4
    """Number of queries in each layer. The authors choose 1, 4 or 16 for each task."""
    dim: int = 48
    """Width of the bottlenecks that act on queries and on what they find."""
    attention_dim: int = 8
    """Width of the four bottlenecks in the attention among the queries of a layer."""
    feature_scale: float = 0.1
    """First value of the learnt factor on what the queries of the layer before found, above 0. The
    authors choose 0.1 or 1 for each task, as for the next two."""
    attention_scale: float = 0.1
    """First value of the learnt factors on the attention among the queries, above 0."""
    ffn_scale: float = 0.1
    """First value of the learnt factors on the bottleneck after that attention, above 0."""
    dropout: float = 0.1
    """Probability of dropout in these modules in training, in [0, 1)."""
    drop_path: float = 0.3
    """Probability, in [0, 1), that one of the joined features is left out for an image in training;
    the first one stays."""

    def __post_init__(self) -> None:
        for name in ("queries", "dim", "attention_dim"):
            check_count(name, getattr(self, name))
        for name in ("feature_scale", "attention_scale", "ffn_scale"):
            check_positive(name, getattr(self, name))
        for name in ("dropout", "drop_path"):
            check_dropout(name, getattr(self, name))

    def build(self, vit: ViTShape) -> "SynthesizedQueries":
        """Make the queries, their modules for each block, and the module that joins features."""
        return SynthesizedQueries(self, vit)


class QueryAttention(nn.Module):
    """Attention of one head among the queries; bottlenecks take the place of its projections."""

    def __init__(self, embed_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_q, self.norm_kv = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.q, self.k, self.v, self.proj = (
            ResidualBottleneck(embed_dim, dim, 0.0) for _ in range(4)
        )
        self.dropout = dropout

    def forward(self, x_BQD: Tensor) -> Tensor:
        """Map queries [B, Q, D] to what attention gives them, [B, Q, D]."""
        normed = self.norm_kv(x_BQD)
        q, k, v = self.q(self.norm_q(x_BQD)), self.k(normed), self.v(normed)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        mixed = F.dropout(weights, self.dropout, self.training) @ v
        return F.dropout(self.proj(mixed), self.dropout, self.training)


class QuerySynthesis(nn.Module):
    """Makes the queries of one layer."""

    def __init__(self, config: SynQT, embed_dim: int) -> None:
        super().__init__()
        self.first = ResidualBottleneck(embed_dim, config.dim, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention = QueryAttention(embed_dim, config.attention_dim, config.dropout)
        self.last = ResidualBottleneck(embed_dim, config.dim, config.dropout)
        self.attention_scale = nn.Parameter(torch.tensor([float(config.attention_scale)]))
        self.ffn_scale = nn.Parameter(torch.tensor([float(config.ffn_scale)]))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_BQD: Tensor) -> Tensor:
        """Map the vectors [B, Q, D] of a layer to its queries, [B, Q, D]."""
        x = self.first(x_BQD)
        x = x + self.attention_scale * self.attention(self.norm1(x))
        out: Tensor = self.drop(x + self.ffn_scale * self.last(self.norm2(x)))
        return out


class FeatureJoin(nn.Module):
    """Joins what the queries found to one feature; gates read the first of the features."""

    def __init__(self, config: SynQT, embed_dim: int, num_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.bottleneck = ResidualBottleneck(embed_dim, config.dim, config.dropout)
        self.gates = nn.Linear(embed_dim, num_features - 1)
        self.activation, self.drop = nn.GELU(), nn.Dropout(config.dropout)
        self.drop_path = config.drop_path

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map features [B, L, D] to their gated mean, [B, D]."""
        x = x_BLD + self.bottleneck(self.norm(x_BLD))
        first = x[:, :1]
        gates_BL = self.drop(self.activation(self.gates(first[:, 0]))).tanh()
        if self.training:
            # Dropout on ones leaves some gates out, and enlarges the others.
            gates_BL = gates_BL * F.dropout(torch.ones_like(gates_BL), self.drop_path)
        gated = gates_BL.unsqueeze(-1) * x[:, 1:]
        return torch.cat([first, gated], dim=1).mean(dim=1)


class SynthesizedQueries(Adapter):
    """Runs SynQT. `Tokens.aside` holds what the queries of the layers so far found.

    A new one does not leave the outputs unchanged: another feature takes the class token's place.
    """

    asks_blocks = True
    replaces_class_token = True

    def __init__(self, config: SynQT, vit: ViTShape) -> None:
        super().__init__()
        self.depth = vit.depth
        self.vectors = nn.Parameter(torch.empty(vit.depth, config.queries, vit.embed_dim))
        nn.init.uniform_(self.vectors, -1.0, 1.0)
        self.synthesis = nn.ModuleList(
            QuerySynthesis(config, vit.embed_dim) for _ in range(vit.depth)
        )
        self.feature_scale = nn.Parameter(torch.tensor([float(config.feature_scale)]))
        self.join = FeatureJoin(config, vit.embed_dim, len(_FOUND) * vit.depth + 1)

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Train the backbone's final norm: the last norm that is in no block.

        Raises:
            ValueError: If there is no norm outside of the blocks.
        """
        inside = {id(part) for block in blocks for part in block.modules()}
        norms = [part for part in vit.modules() if _is_norm(part) and id(part) not in inside]
        if not norms:
            raise ValueError("SynQT trains the norm after the last block, which this model lacks.")
        norms[-1].requires_grad_(True)

    def ask_block(
        self, layer: int, tokens: Tokens, ask: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Make the queries of this layer, send them through the block, and store what they find."""
        vectors = self.vectors[layer - 1].expand(tokens.x.shape[0], -1, -1)
        if layer > 1:
            vectors = vectors + self.feature_scale * tokens.aside[_FOUND[0]][:, -1:]
        queries = self.synthesis[layer - 1](vectors)
        of_attention, of_ffn = ask(queries)
        found = (queries + of_attention + of_ffn, of_attention, of_ffn)
        means = {n: x.mean(dim=1, keepdim=True) for n, x in zip(_FOUND, found, strict=True)}
        if layer > 1:
            means = {n: torch.cat([tokens.aside[n], mean], dim=1) for n, mean in means.items()}
        return tokens.aside | means

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """After the last block, put the joined feature into the place of the class token."""
        if layer < self.depth:
            return tokens
        queries, of_attention, of_ffn = (tokens.aside[name] for name in _FOUND)
        joined = self.join(torch.cat([queries[:, -1:], queries, of_attention, of_ffn], dim=1))
        x = torch.cat([joined.unsqueeze(1).to(tokens.x.dtype), tokens.x[:, 1:]], dim=1)
        aside = {name: value for name, value in tokens.aside.items() if name not in _FOUND}
        return replace(tokens, x=x, aside=aside)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a weight for each channel and nothing else, as norms do."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1
