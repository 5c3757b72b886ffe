"""What a benchmark ran on, in words."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")
_PACKAGES = ("tokendial", "torch", "timm", "transformers", "onnxruntime")


def described(device: str) -> dict[str, object]:
    """Everything about the machine that a speed depends on."""
    flags = _cpu_field("flags").split()
    found: dict[str, object] = {
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
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def in_words(device: str) -> str:
    """One line."""
    told = described(device)
    if device != "cpu":
        return f"{told['accelerator']}"
    instructions = ", ".join(told["instructions"]) or "no vector instructions known"
    return (
        f"{told['cpu']}, {told['cores_given'] or told['cores']} cores, {told['threads']} threads, "
        f"{instructions}; PyTorch uses {told['torch_cpu_capability']}"
    )


def in_a_name(device: str) -> str:
    """For the name of a file."""
    told = described(device)
    name = told["accelerator"] if device != "cpu" else f"{told['cpu']} {told['threads']}threads"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def versions() -> dict[str, str]:
    """Of the packages that take part, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_field(name: str) -> str:
    """A line of Linux's description of the first CPU; empty on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
