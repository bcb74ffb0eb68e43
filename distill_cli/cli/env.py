"""distill env"""

from __future__ import annotations

import os
import platform
from typing import Any

from distill_cli.cli import common
from distill_cli.errors import DistillError

REINSTALL = "install both from one place: pip install --force-reinstall torch torchvision"


def torchvision_trouble(torch_version: str, error: str) -> str:
    """What a failed import of torchvision means; '' if it is another problem.

    The CPU build of torch (a version like 2.13.0+cpu) with torchvision from PyPI, made for the CUDA build, fails with
    "operator torchvision::nms does not exist"; lpips, transformers and diffusers then fail to import as well.
    """
    if "torchvision::nms" not in error and "undefined symbol" not in error:
        return ""
    build = f"torch {torch_version} is the CPU build; " if torch_version.endswith("+cpu") else f"torch is {torch_version}; "
    return f"{build}torchvision was built for another torch, so lpips, transformers and diffusers cannot be imported"


def gather() -> dict[str, Any]:
    """Versions, devices and problems of this machine."""
    from distill_cli.runs import versions

    trouble: list[str] = []
    devices: list[str] = []
    try:
        import torch

        devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        devices.append(f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
        try:
            import torchvision  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            trouble.append(torchvision_trouble(torch.__version__, str(error)) or f"torchvision: {error}")
    except ImportError as error:
        trouble.append(f"torch: {error}")
    return {"versions": versions(), "platform": platform.platform(), "devices": devices, "trouble": trouble}


def env(json: common.Json = False) -> None:
    """Show versions, devices, and problems of the installation."""
    data = gather()
    lines = [f"{name:13} {version}" for name, version in data["versions"].items()]
    lines += [f"platform      {data['platform']}", *(f"device        {device}" for device in data["devices"])]
    common.result(data, "\n".join(lines), json)
    if data["trouble"]:
        raise DistillError("; ".join(data["trouble"]), REINSTALL)
