"""Write what a run has trained in half precision, as it is shipped.

python tools/ship_weights.py model runs/pretrain_scenes/best
python tools/ship_weights.py compensator runs/tocom_scenes/best 0.6

The last number is the compensator's scale at inference.
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tokendial import Compensator

ASSETS = Path(__file__).parent.parent / "src" / "tokendial" / "assets"

if __name__ == "__main__":
    kind, folder, *scale = sys.argv[1:]
    if kind == "model":
        tensors = load_file(Path(folder) / "model.safetensors")
        half = {name.removeprefix("vit."): value.half() for name, value in tensors.items()}
        save_file(half, ASSETS / "scenes_vit.safetensors", metadata={"format": "pt"})
    else:
        compensator = Compensator.from_pretrained(folder).half()
        compensator.scale = float(scale[0])
        compensator.save_pretrained(ASSETS / "scenes_tocom")
