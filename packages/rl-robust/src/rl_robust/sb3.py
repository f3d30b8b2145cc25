"""Policies trained by stable-baselines3 and sb3-contrib, loaded without running code from their files.

An SB3 zip holds weights (``policy.pth``, tensors only) and a JSON in which some attributes are pickles: the policy
class, both spaces, schedules. Un-pickling runs whatever the file says. :func:`load_sb3` reads the weights and the plain
part of the JSON, builds the policy for *your* environment, and loads the weights into it strictly; a zip of another
architecture does not fit and is refused.

``VecNormalize`` files are pickles too: take the statistics from one that is in memory with
:meth:`rl_robust.task.Normaliser.of_vec_normalize`, and save them as safetensors.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_robust.policy import Memory, sample_actions
from robust_core.errors import ResourceError, UntrustedFileError, optional_import

__all__ = ["ALGORITHMS", "SB3Policy", "load_sb3"]

ALGORITHMS = ("a2c", "ddpg", "dqn", "ppo", "qrdqn", "recurrent-ppo", "sac", "td3", "tqc", "trpo")
_MAX_BYTES = 4 << 30
_PLAIN_KWARGS = ("net_arch", "ortho_init", "use_sde", "log_std_init", "share_features_extractor", "n_critics",
                 "lstm_hidden_size", "n_lstm_layers", "shared_lstm", "enable_critic_lstm", "n_quantiles",
                 "normalize_images", "full_std", "squash_output")  # fmt: skip


class SB3Policy(nn.Module):
    """An SB3 policy behind the protocol of :mod:`rl_robust.policy`, differentiable and sampled by given numbers.

    Args:
        policy: ``model.policy`` of PPO, A2C, TRPO, DQN, QR-DQN, DDPG, TD3, SAC, TQC or RecurrentPPO.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        policy.set_training_mode(False)
        self.action_space: spaces.Space = policy.action_space
        self.discrete = isinstance(self.action_space, spaces.Discrete)
        if not isinstance(self.action_space, spaces.Discrete | spaces.Box):
            raise TypeError(f"action space {self.action_space}: Discrete or Box is needed")
        self.recurrent = hasattr(policy, "lstm_actor")
        self.actor_critic = hasattr(policy, "action_net")
        size = 1 if self.discrete else int(self.action_space.shape[0])  # pyright: ignore[reportOptionalSubscript]
        self.n_draws = size if self.actor_critic or self._squashed_gaussian else 0

    @property
    def _squashed_gaussian(self) -> bool:
        return hasattr(getattr(self.policy, "actor", None), "get_action_dist_params")

    @property
    def spread(self) -> Tensor | None:
        """(K,) standard deviations of a Gaussian actor-critic, else None."""
        if self.actor_critic and not self.discrete and isinstance(self.policy.log_std, Tensor):
            return self.policy.log_std.exp()
        return None

    def outputs(self, obs: Tensor) -> Tensor:
        """Return (B, K) logits or action values (discrete), or mean actions in the units of the environment."""
        if self.recurrent:
            return self._recurrent(obs, None, torch.ones(len(obs), dtype=torch.bool, device=obs.device))[0]
        if hasattr(self.policy, "q_net"):
            return self.policy.q_net(obs)
        if hasattr(self.policy, "quantile_net"):
            return self.policy.quantile_net(obs).mean(1)
        if self.actor_critic:
            distribution = self.policy.get_distribution(obs).distribution
            return distribution.logits if self.discrete else distribution.mean
        if self._squashed_gaussian:
            return self._unscaled(torch.tanh(self.policy.actor.get_action_dist_params(obs)[0]))
        return self._unscaled(self.policy.actor(obs))

    def _unscaled(self, action: Tensor) -> Tensor:
        space: Any = self.action_space
        low, high = (torch.as_tensor(b, dtype=action.dtype, device=action.device) for b in (space.low, space.high))
        return low + 0.5 * (action + 1.0) * (high - low)

    def value(self, obs: Tensor) -> Tensor:
        """Return (B,) values: of the critic, or the largest action value."""
        if hasattr(self.policy, "q_net") or hasattr(self.policy, "quantile_net"):
            return self.outputs(obs).amax(1)
        if self.recurrent:
            raise TypeError("the value of a recurrent policy needs its memory; use an attack on its outputs")
        if self.actor_critic:
            return self.policy.predict_values(obs).reshape(len(obs))
        return self.action_value(obs, self.outputs(obs))

    def action_value(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return (B,) the least of the critics' values of an action, in the units of the environment."""
        if not hasattr(self.policy, "critic"):
            raise TypeError(f"{type(self.policy).__name__} has no critic of actions")
        space: Any = self.action_space
        low, high = (torch.as_tensor(b, dtype=action.dtype, device=action.device) for b in (space.low, space.high))
        values = self.policy.critic(obs, 2.0 * (action - low) / (high - low) - 1.0)
        critics = values.unbind(1) if isinstance(values, Tensor) else values  # TQC: (B, critics, quantiles)
        return torch.stack([value.reshape(len(obs), -1).mean(1) for value in critics]).amin(0)

    def act(
        self, obs: Tensor, memory: Memory = None, start: Tensor | None = None, *, draws: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Return the actions; see :class:`rl_robust.policy.Policy`."""
        if self.recurrent:
            outputs, memory = self._recurrent(obs, memory, start)
            return sample_actions(outputs, draws, self.spread, self.action_space), memory
        if draws is not None and self._squashed_gaussian:
            mean, log_std, _ = self.policy.actor.get_action_dist_params(obs)
            pushed = torch.tanh(mean + log_std.exp() * torch.special.ndtri(draws).to(mean.dtype))
            return sample_actions(self._unscaled(pushed), None, None, self.action_space), None
        return sample_actions(self.outputs(obs), draws, self.spread, self.action_space), None

    def _recurrent(self, obs: Tensor, memory: Memory, start: Tensor | None) -> tuple[Tensor, Memory]:
        lstm = self.policy.lstm_actor
        if memory is None:
            zeros = obs.new_zeros(len(obs), lstm.num_layers, lstm.hidden_size)
            memory = (zeros, zeros.clone())
        begins = torch.zeros(len(obs), device=obs.device) if start is None else start.to(obs.dtype)
        states = tuple(m.transpose(0, 1).contiguous() for m in memory)
        distribution, after = self.policy.get_distribution(obs, states, begins)
        inner = distribution.distribution
        outputs = inner.logits if self.discrete else inner.mean
        return outputs, tuple(m.transpose(0, 1).contiguous() for m in after)


def load_sb3(
    path: str | os.PathLike[str],
    observation_space: spaces.Space,
    action_space: spaces.Space,
    *,
    algorithm: str | None = None,
    policy_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> SB3Policy:
    """Return the policy of an SB3 zip, built for these spaces, without un-pickling anything.

    Args:
        path: the zip.
        observation_space: of the environment as the policy sees it (frames stacked).
        action_space: of the environment.
        algorithm: one of :data:`ALGORITHMS`; None reads it off the file.
        policy_kwargs: those of training that the file does not tell in plain text, such as an activation function.
        device: where to put it.

    Raises:
        ResourceError: no such file.
        UntrustedFileError: the file is damaged or no SB3 zip.
        ValueError: weights that do not fit these spaces or this algorithm.
    """
    file = Path(path)
    if not file.is_file():
        raise ResourceError(f"{file}: no such file")
    data, state = _read(file)
    name = algorithm or _algorithm(data, file)
    policy_class = _policy_class(name, observation_space)
    kwargs = {**_kwargs_of(data), **dict(policy_kwargs or {})}
    try:
        policy = policy_class(observation_space, action_space, lambda _: 0.0, **kwargs)
        policy.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{file} does not fit {name} on {observation_space} -> {action_space} (give policy_kwargs of training?): "
            f"{why[:300]}"
        ) from error
    return SB3Policy(policy.to(device))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            if "data" not in sizes or "policy.pth" not in sizes or sum(sizes.values()) > _MAX_BYTES:
                raise UntrustedFileError(f"{file} holds {', '.join(sorted(sizes))[:200]}; no zip of stable-baselines3")
            data = json.loads(archive.read("data"))
            state = torch.load(io.BytesIO(archive.read("policy.pth")), map_location="cpu", weights_only=True)
    except UntrustedFileError:
        raise
    except Exception as error:  # a damaged archive, bad JSON, or tensors that are none: anything may be raised
        raise UntrustedFileError(f"{file} cannot be read as a zip of stable-baselines3: {error}") from error
    if not isinstance(data, dict) or not isinstance(state, dict):
        raise UntrustedFileError(f"{file}: 'data' or 'policy.pth' holds something else than it should")
    if any(isinstance(v, Tensor) and not bool(torch.isfinite(v.double()).all()) for v in state.values()):
        raise ValueError(f"{file}: weights hold NaN or infinity")
    return data, state


def _algorithm(data: Mapping[str, Any], file: Path) -> str:
    """Read the algorithm off the plain text of the JSON."""
    policy = data.get("policy_class")
    module = str(policy.get("__module__", "")) if isinstance(policy, dict) else ""
    for part in ("dqn", "qrdqn", "td3", "sac", "tqc"):
        if f".{part}." in module:
            return part
    if "recurrent" in module:
        return "recurrent-ppo"
    if "policies" in module:
        return "ppo"  # all actor-critics of SB3 share their policies
    raise ValueError(f"{file}: the algorithm is not told; give algorithm=, one of {', '.join(ALGORITHMS)}")


def _policy_class(name: str, observation_space: spaces.Space) -> Any:
    from stable_baselines3.common.preprocessing import is_image_space

    image = is_image_space(observation_space, check_channels=False, normalized_image=True)
    image = image or is_image_space(observation_space)
    if name in ("a2c", "ppo", "trpo"):
        from stable_baselines3.common import policies

        return policies.ActorCriticCnnPolicy if image else policies.ActorCriticPolicy
    if name in ("dqn", "ddpg", "td3", "sac"):
        import importlib

        module = importlib.import_module(f"stable_baselines3.{'td3' if name == 'ddpg' else name}.policies")
    elif name in ("qrdqn", "tqc", "recurrent-ppo"):
        optional_import("sb3_contrib", extra="contrib", package="rl-robust")
        import importlib

        folder = "common.recurrent" if name == "recurrent-ppo" else name
        module = importlib.import_module(f"sb3_contrib.{folder}.policies")
    else:
        raise ValueError(f"algorithm={name!r}: choose one of {', '.join(ALGORITHMS)}")
    if name == "recurrent-ppo":
        return module.RecurrentActorCriticCnnPolicy if image else module.RecurrentActorCriticPolicy
    return module.CnnPolicy if image else module.MlpPolicy


def _kwargs_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the policy that stand in the file in plain text."""
    kept = data.get("policy_kwargs")
    found = {k: v for k, v in kept.items() if k in _PLAIN_KWARGS} if isinstance(kept, dict) else {}
    return found
