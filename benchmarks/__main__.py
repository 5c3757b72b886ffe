"""Run one benchmark: `python -m benchmarks COMMAND --help` lists its options."""

import importlib
import os
import sys

COMMANDS = {
    "inference": "images/s of every method and degree, compared with plain timm and with the cost",
    "methods": "speed of every reduction method at the same cost",
    "step": "time of matching and merging alone, beside ToMe's",
    "resolution": "growth of time and memory with the image size",
    "peers": "speed of plain timm, the authors' ToMe, transformers and Tokendial",
    "attach": "speed of whole models that hold a ViT, untouched and with an attached dial",
    "runtimes": "speed and scores in PyTorch, onnxruntime and OpenVINO, in each precision",
    "onnx": "speed of exported files in onnxruntime",
    "dar": "speed of DAR on large images, as a batch and image by image",
    "dial": "time to change the degree with a compensator merged into the weights",
    "training": "time and memory of a training step",
    "input": "fraction of the time that training waits for images",
    "serving": "a load on servers at fixed degrees, and on one that sets its degree itself",
    "soak": "a server under more load than it can answer, for minutes",
    "hostile": "requests that are made to overload a server, while other clients use it",
    "outage": "what clients see when a server loses its model process or folder, or is reloaded",
    "answers": "answers of a server, compared with the offline model",
    "evidence_dense_adapter": "accuracy of Dense Adapters and of other methods, on real images",
    "evidence_tocom": "accuracy that ToCom recovers between degrees, trained on real images",
    "evidence_all_degrees": "accuracy of models trained for all degrees at once, on real images",
    "evidence_fit": "agreement of fitted and of constant schedules at the same measured time",
    "evidence_fit_real": "the same on a real model, by nearest neighbours and by masks",
    "evidence_dar": "scores of DAR, DAR* and a linear decoder, trained on real objects",
    "evidence_real": "tables on a real model and real data: DINOv2-S, solar cells, photographs",
}


def main() -> int:
    """Run a command. Returns its exit code: 2 if its name or an option is wrong."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        stream = sys.stdout if name in ("-h", "--help") else sys.stderr
        print("usage: python -m benchmarks COMMAND [--help]\n", file=stream)
        print("\n".join(f"  {name:24}{text}" for name, text in COMMANDS.items()), file=stream)
        return 0 if stream is sys.stdout else 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler logs each start
    try:
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
