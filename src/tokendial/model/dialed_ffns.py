"""FFNs on merged tokens, inside of windowed encoders, whose attention stays as it is."""

from typing import Any

from torch import Tensor

from tokendial.backbones.windowed import WindowedEncoder
from tokendial.model.tower_dial import DialedPart, TowerDial
from tokendial.reduce.base import ReducerConfig
from tokendial.reduce.ffn_merge import FFNMerge, FFNMergeReducer


class FFNsDial(TowerDial):
    """The dial of a windowed encoder: tokens merge before each FFN and are restored after it.

    Windows need every token in its place, so nothing else can be reduced. Unlike `FFNMerge` in
    other ViTs, tokens merge after the norm, by the similarity of what the FFN reads: blocks do not
    hand out their keys.
    """

    reducer: FFNMergeReducer

    def __init__(self, encoder: WindowedEncoder, reduce: ReducerConfig) -> None:
        if not isinstance(reduce, FFNMerge):
            raise ValueError(
                f"reduce must be FFNMerge for {type(encoder.vit).__name__}, whose windows need "
                f"every token in its place, got {type(reduce).__name__}."
            )
        super().__init__(
            encoder.vit,
            encoder.ffns,
            reduce.build(encoder.shape),
            encoder.shape,
            encoder.input_shape,
        )

    def protect(self, mask: Tensor | None) -> None:
        """Refuse a mask: windows need every token in its place.

        Raises:
            ValueError: If there is a mask.
        """
        if mask is not None:
            raise ValueError(
                f"{type(self.vit).__name__} cannot protect patches: its windows need every token "
                "in its place."
            )

    def run_vit(self, images_B3HW: Tensor) -> Any:
        """Run the encoder on images of the configured size."""
        return self.vit(images_B3HW)

    def run(self, part: DialedPart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an FFN [B, H, W, D] on merged tokens, and return its output at every position."""
        x: Tensor = args[0]
        tokens_BND = x.flatten(1, -2)
        out = self.reducer.run_merged(
            part.tower_layer, self.degree, tokens_BND, tokens_BND, 0, part.run_own_code
        )
        if self.counts is not None:
            self.counts.append(tokens_BND.shape[1])
        return out.view(x.shape)
