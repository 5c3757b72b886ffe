"""Settings of ProxyCLIP."""

from dataclasses import dataclass

from tokendial.checks import check_count, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class ProxyCLIPConfig:
    """Settings of ProxyCLIP; the defaults are the published ones."""

    beta: float = 1.2
    """Factor on the mean similarity of an image, which is subtracted from every similarity. A
    higher value leaves fewer patches that each patch attends to."""
    gamma: float = 3.0
    """Factor on the similarities before the softmax. A higher value makes attention sharper."""
    scale: float = 40.0
    """Factor on the cosines of patches and class names before the softmax over the names."""
    threshold: float = 0.0
    """Probability below which a pixel gets class 0, the background, in [0, 1]. Published values:
    0 for classes without background, 0.4 to 0.6 for those with it."""
    shortest_side: int = 336
    """Pixels of the shorter side to which an image is resized before windows are cut from it."""
    window: int = 336
    """Side of a window in pixels."""
    stride: int = 112
    """Distance between two windows in pixels, at most `window`."""
    multiple: int = 56
    """Sides of a window are padded with CLIP's mean colour until they are multiples of this number
    and of both patch sizes."""
    windows_per_pass: int = 8
    """Number of windows in one forward pass."""

    def __post_init__(self) -> None:
        for name in ("shortest_side", "window", "stride", "multiple", "windows_per_pass"):
            check_count(name, getattr(self, name))
        for name in ("gamma", "scale"):
            check_positive(name, getattr(self, name))
        check_not_negative("beta", self.beta)
        check_not_negative("threshold", self.threshold)
        if self.threshold > 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}.")
        if self.stride > self.window:
            raise ValueError(f"stride must be at most window ({self.window}), got {self.stride}.")
