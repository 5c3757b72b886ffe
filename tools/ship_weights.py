"""Write the weights of a fully trained run in half precision, as they are shipped.

python tools/ship_weights.py runs/pretrain_scenes/best src/tokendial/assets
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    model, target = map(Path, sys.argv[1:])
    tensors = load_file(model / "model.safetensors")
    half = {name.removeprefix("vit."): value.half() for name, value in tensors.items()}
    save_file(half, target / "scenes_vit.safetensors", metadata={"format": "pt"})
