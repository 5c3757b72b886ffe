"""Description of the hardware and the packages that a benchmark ran on."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")
_PACKAGES = ("tokendial", "torch", "timm", "transformers", "onnxruntime")


def describe(device: str) -> dict[str, object]:
    """Everything about the machine that speed depends on, by name."""
    flags = _cpu_field("flags").split()
    machine: dict[str, object] = {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores_given": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
    }
    if device != "cpu":
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine


def one_line(device: str) -> str:
    """The description of the machine in one line."""
    machine = describe(device)
    if device != "cpu":
        return f"{machine['accelerator']}"
    instructions = ", ".join(machine["instructions"]) or "no vector instructions known"
    return (
        f"{machine['cpu']}, {machine['cores_given'] or machine['cores']} cores, "
        f"{machine['threads']} threads, {instructions}; "
        f"PyTorch uses {machine['torch_cpu_capability']}"
    )


def slug(device: str) -> str:
    """The name of the processor, for file names."""
    machine = describe(device)
    name = (
        machine["accelerator"]
        if device != "cpu"
        else f"{machine['cpu']} {machine['threads']}threads"
    )
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of Python and of the relevant packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_field(name: str) -> str:
    """A field of /proc/cpuinfo for the first CPU; empty on systems other than Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
