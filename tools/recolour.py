"""Give an object the colours of the ground that it lies on."""

import numpy as np
from PIL import Image

_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
)
_WHITE = _TO_XYZ.sum(axis=1)
_FROM_XYZ = np.linalg.inv(_TO_XYZ)
_LEVELS = np.arange(256, dtype=np.float32) / 255.0
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)
_KNEE = 6.0 / 29.0


def recoloured(sprite: Image.Image, ground: np.ndarray, strength: float) -> Image.Image:
    """A sprite with the mean and spread of the ground's colours, the alpha as it was.

    Args:
        sprite: RGBA, h x w.
        ground: [h, w, 3] uint8, the picture where the sprite will lie.
        strength: 0 leaves the colours, 1 takes the ground's mean and spread.

    Source:
        Reinhard et al., Color Transfer between Images, IEEE Computer Graphics and Applications
        21(5), 2001. We work in CIELAB rather than their l-alpha-beta, measure under the object's
        mask only, never widen a spread, and let `strength` mix the two.
    """
    pixels = np.asarray(sprite)
    solid = pixels[..., 3] >= 128
    lab, ground_lab = to_lab(pixels[..., :3]), to_lab(ground)[solid]
    mean, spread = lab[solid].mean(axis=0), lab[solid].std(axis=0)
    # Where the ground has an edge, colours pulled as far apart would glare. An object of one colour
    # has no spread to scale.
    scale = np.minimum(ground_lab.std(axis=0) / np.maximum(spread, 1e-3), 1.0)
    moved = (lab - mean) * scale + ground_lab.mean(axis=0)
    mixed = lab + strength * (moved - lab)
    return Image.fromarray(np.dstack([from_lab(mixed), pixels[..., 3]]))


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB [..., 3] of sRGB [..., 3] uint8; lightness in [0, 100], white is the sRGB white."""
    relative = _LINEAR[rgb] @ _TO_XYZ.T / _WHITE
    root = np.where(
        relative > _KNEE**3, np.cbrt(relative), relative / (3.0 * _KNEE**2) + 4.0 / 29.0
    )
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """SRGB [..., 3] uint8 of CIELAB [..., 3]; colours that a screen lacks are clipped."""
    y = (lab[..., 0] + 16.0) / 116.0
    root = np.stack([y + lab[..., 1] / 500.0, y, y - lab[..., 2] / 200.0], axis=-1)
    relative = np.where(root > _KNEE, root**3, 3.0 * _KNEE**2 * (root - 4.0 / 29.0))
    linear = (relative * _WHITE @ _FROM_XYZ.T).clip(0.0, 1.0)
    values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray((values * 255.0).round(), np.uint8)
