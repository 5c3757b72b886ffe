"""Run one benchmark: `python -m benchmarks COMMAND --help` tells its options."""

import importlib
import os
import sys

COMMANDS = {
    "inference": "images/s of every method and degree over plain timm, beside what they save",
    "methods": "every method at the same cost",
    "resolution": "growth of time and memory with the image size",
    "peers": "plain timm, the authors' ToMe, transformers, and Tokendial",
    "onnx": "exported files in onnxruntime",
    "dar": "DAR on pixel-level images, as a batch and image by image",
    "dial": "one turn of the dial with a compensator in the weights",
    "training": "time and memory of a training step",
    "input": "share of the time that training waits for images",
    "serving": "a load on servers at fixed degrees, and on one that turns the dial by itself",
    "soak": "a server under more load than it can answer, for minutes",
    "hostile": "requests that are made to cost a server much, while others ask it",
    "outage": "what clients see when a server loses its model process, its folder, or is reloaded",
    "answers": "answers of a server against the offline model",
    "evidence_dense_adapter": "Dense Adapter against other adapters, trained on real images",
    "evidence_tocom": "what ToCom brings back between degrees, trained on real images",
    "evidence_fit": "fitted schedules against constant ones at the same measured time",
    "evidence_dar": "DAR and DAR* against a linear decoder, trained on real objects",
}


def main() -> int:
    """Run the command that was named; 2 if there is none such, or it was told something wrong."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        told = sys.stdout if name in ("-h", "--help") else sys.stderr
        print("usage: python -m benchmarks COMMAND [--help]\n", file=told)
        print("\n".join(f"  {name:24}{text}" for name, text in COMMANDS.items()), file=told)
        return 0 if told is sys.stdout else 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells each start
    try:
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
