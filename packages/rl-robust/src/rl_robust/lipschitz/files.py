"""Lipschitz policies on disk: weights as safetensors, the rest as JSON, and no code in either.

``policy.json`` names the kind, its sizes and the bound that was certified; ``policy.safetensors`` holds the tensors.
The bound is computed again from the weights that were read, and a folder whose weights break it is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rl_robust.lipschitz.policies import GraphLipschitzPolicy, LinearLipschitzPolicy, LipschitzPolicy
from robust_core.errors import UntrustedFileError
from robust_core.io import load_tensors, read_json, save_tensors, sha256, write_json

__all__ = ["AnyLipschitzPolicy", "load_policy", "save_policy"]

SCHEMA = "robust.lipschitz-policy/1"
WORDS, WEIGHTS = "policy.json", "policy.safetensors"

AnyLipschitzPolicy = LipschitzPolicy | LinearLipschitzPolicy | GraphLipschitzPolicy


def save_policy(
    folder: str | os.PathLike[str], policy: AnyLipschitzPolicy, *, about: Mapping[str, Any] | None = None
) -> Path:
    """Write a policy with its certified constant into a folder.

    Args:
        folder: made where it is missing.
        policy: of any of the three kinds.
        about: more to remember, such as the environment; plain JSON.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / WEIGHTS, policy.state_dict())
    write_json(
        path / WORDS,
        {
            "schema": SCHEMA,
            **_kind(policy),
            "lipschitz": policy.lipschitz,
            "certified": policy.lipschitz_bound(),
            "action_space": _space(policy.action_space),
            "weights_sha256": sha256(path / WEIGHTS),
            "about": dict(about or {}),
        },
    )
    return path


def _kind(policy: AnyLipschitzPolicy) -> dict[str, Any]:
    if isinstance(policy, LipschitzPolicy):
        return {"kind": "network", "sizes": list(policy.sizes), "activation": policy.activation}
    return {"kind": "linear" if isinstance(policy, LinearLipschitzPolicy) else "graph"}


def _space(space: spaces.Space) -> dict[str, Any]:
    """Return a Box as JSON, which has no infinity: None stands for no bound."""
    if not isinstance(space, spaces.Box):
        raise TypeError(f"action_space={space}: a Box is needed")
    ends = {
        name: np.asarray(bound, dtype=np.float64).ravel() for name, bound in (("low", space.low), ("high", space.high))
    }
    told = {name: [float(v) if np.isfinite(v) else None for v in bound] for name, bound in ends.items()}
    return {"shape": list(space.shape), "dtype": str(space.dtype), **told}


def load_policy(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    shown: tuple[int, ...] | None = None,
    actions: spaces.Space | None = None,
) -> AnyLipschitzPolicy:
    """Read what :func:`save_policy` wrote, and certify it again.

    Args:
        folder: with ``policy.json`` and ``policy.safetensors``.
        device: where the policy shall be.
        shown: shape of the observations that it is to see; not compared when None.
        actions: space in which it is to act; not compared when None.

    Raises:
        UntrustedFileError: the files are no such policy, do not belong together, or break the constant they promise.
        ValueError: it was made for other observations or actions.
        OSError: they cannot be read.
    """
    path = Path(folder)
    words = read_json(path / WORDS)
    if not isinstance(words, dict) or words.get("schema") != SCHEMA:
        raise UntrustedFileError(f"{path / WORDS}: no policy of schema {SCHEMA!r}")
    if words.get("weights_sha256") != sha256(path / WEIGHTS):
        raise UntrustedFileError(f"{path / WEIGHTS} is not the file that {WORDS} speaks of")
    try:
        policy = _built(words, load_tensors(path / WEIGHTS, finite=True))
        bound = policy.lipschitz_bound()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UntrustedFileError(f"{path}: no Lipschitz policy ({' '.join(str(error).split())})") from error
    if not bound <= policy.lipschitz * (1 + 1e-8):
        raise UntrustedFileError(f"{path}: the weights have the bound {bound:.9g}, above {policy.lipschitz:g}")
    if shown is not None and policy.in_dim != math.prod(shown):
        raise ValueError(f"{path}: the policy sees {policy.in_dim} numbers, and is shown {shown}")
    if actions is not None and policy.action_space != actions:
        raise ValueError(f"{path}: the policy acts in {policy.action_space}, not in {actions}")
    return policy.to(device).eval()


def _built(words: Mapping[str, Any], tensors: dict[str, Tensor]) -> AnyLipschitzPolicy:
    box = words["action_space"]
    low, high = (
        np.array([end if v is None else v for v in box[name]], dtype=box["dtype"]).reshape(box["shape"])
        for name, end in (("low", -np.inf), ("high", np.inf))
    )
    space = spaces.Box(low, high, dtype=low.dtype.type)
    lipschitz = float(words["lipschitz"])
    if words["kind"] == "linear":
        return LinearLipschitzPolicy(tensors["gain"], lipschitz=lipschitz, action_space=space)
    if words["kind"] == "graph":
        return GraphLipschitzPolicy(tensors["x"], tensors["v"], lipschitz=lipschitz, action_space=space)
    if words["kind"] != "network":
        raise ValueError(f"kind={words['kind']!r}: network, linear or graph is known")
    first, *hidden, last = (int(size) for size in words["sizes"])
    policy = LipschitzPolicy(
        first, last, lipschitz=lipschitz, hidden=hidden, activation=words["activation"], action_space=space
    )
    policy.load_state_dict(tensors)
    return policy
