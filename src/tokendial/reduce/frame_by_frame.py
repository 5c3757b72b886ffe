"""Frame-by-frame reduction: a method reduces the tokens of each time step of a clip separately.

A video model that embeds tubelets (VideoMAE) has the tokens of a whole clip in one sequence. A
reduction method then compares all of them: ToMe merges across time, EViT may drop a whole time
step. Inside `FrameByFrame` the method receives one time step at a time, so that every time step
loses the same number of tokens. Attention still reads the whole clip.

Source: none; it is a variant of this library.
"""

from dataclasses import dataclass
from typing import Any

from tokendial.methods import register
from tokendial.reduce.base import ReducerConfig
from tokendial.reduce.part_by_part import PartByPartReducer, read_inner
from tokendial.shape import ViTShape


@register("reduce", "frame_by_frame")
@dataclass(frozen=True, kw_only=True)
class FrameByFrame(ReducerConfig):
    """Run another reduction method on each time step of a clip separately."""

    reduce: Any
    """The method to run, such as `ToMe(r=8)`, or its plain-JSON form. Its numbers of tokens count
    for one time step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduce", read_inner(self.reduce, "frame_by_frame"))

    def build(self, vit: ViTShape) -> "FrameByFrameReducer":
        """Make the module. Raises a ValueError if the method does not fit one time step."""
        return FrameByFrameReducer(self.reduce, vit, vit.num_grids)


class FrameByFrameReducer(PartByPartReducer):
    """Runs the inner method on each time step."""
