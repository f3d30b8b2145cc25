"""What ``robust doctor`` looks at."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Literal, TypedDict

from robust_core.claim import versions
from robust_core.errors import RobustError
from robust_core.methods import catalogue, load

__all__ = ["examine"]


class Check(TypedDict):
    """One line of the examination."""

    status: Literal["ok", "note", "FAIL"]
    name: str
    detail: str


def examine() -> list[Check]:
    """Return the findings; ``FAIL`` means that promised functions will not work here."""
    return [_versions(), _device(), _threads(), _disk(), *_methods(), *_extras(), *_data()]


def _versions() -> Check:
    return {
        "status": "ok",
        "name": "versions",
        "detail": ", ".join(f"{k} {v}" for k, v in versions().items()),
    }


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        return {"status": "note", "name": "device", "detail": "no CUDA device: everything runs on the CPU"}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    probe = torch.ones(8, device="cuda").sum().item()
    status = "ok" if probe == 8 else "FAIL"
    return {"status": status, "name": "device", "detail": ", ".join(names)}


def _threads() -> Check:
    import torch

    detail = f"{torch.get_num_threads()} torch threads on {os.cpu_count()} processors"
    return {"status": "ok", "name": "threads", "detail": detail}


def _disk() -> Check:
    free = shutil.disk_usage(os.curdir).free / 2**30
    return {"status": "ok" if free > 1 else "FAIL", "name": "disk", "detail": f"{free:.0f} GiB free here"}


def _methods() -> list[Check]:
    checks: list[Check] = []
    cards = catalogue()
    for package, card in cards.values():
        try:
            load(card.target)
        except (RobustError, ImportError) as error:
            status = "note" if card.extras else "FAIL"
            checks.append({"status": status, "name": f"method {card.slug} ({package})", "detail": str(error)})
    checks.append({"status": "ok", "name": "methods", "detail": f"{len(cards)} methods listed"})
    return checks


def _extras() -> list[Check]:
    optional = {
        "ray": "robust-core[ray]",
        "tensorboard": "robust-core[tensorboard]",
        "timm": "vision-robust[timm]",
    }
    return [
        {
            "status": "ok" if importlib.util.find_spec(module) else "note",
            "name": f"optional {module}",
            "detail": "installed" if importlib.util.find_spec(module) else f"pip install '{extra}'",
        }
        for module, extra in optional.items()
    ]


def _data() -> list[Check]:
    from robust_core.data import available

    return [
        {
            "status": "ok" if status.found else "note",
            "name": f"data {name}",
            "detail": f"found ({status.licence})" if status.found else f"not here; {status.get}",
        }
        for name, status in available().items()
    ]
