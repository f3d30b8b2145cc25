"""Look a policy and its environment over before a long run: what goes wrong silently is told in seconds.

    report = check_policy(policy, Task("CartPole-v1", n_frames=4))
    if not report.ok: print(report)

Errors make figures wrong or stop the run: observations of another shape, stack or dtype than the policy takes; actions
outside the space; outputs that are not finite, that change from call to call, or with the company of a row (batch
normalisation in train mode); pixels divided by 255 twice; an environment that ignores its seed. Warnings are likely
mistakes that a run alone cannot prove: observations that look as if statistics were forgotten, an environment in which
all seeds are alike.

A random walk and a walk of the policy's own are looked at; nothing is trained, and a module is left as found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_robust.policy import CallablePolicy, Policy, as_policy, env_actions
from rl_robust.task import Task
from robust_core.checks import check_count, check_number
from robust_core.models import model_device, padded
from robust_core.random import Seed, borrowed_generators, derive, resolve_seed

__all__ = ["Finding", "PolicyCheck", "check_policy"]

CHECKS = ("space", "observation", "seed", "shape", "dtype", "finite", "action", "determinism", "batch", "scale",
          "pixels")  # fmt: skip
ROWS = 32
_RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class Finding:
    """Something that is, or may be, wrong.

    Attributes:
        level: an error makes figures wrong; a warning may.
        name: of the check, one of :data:`CHECKS`.
        message: what was seen, and what to do.
    """

    level: Literal["error", "warning"]
    name: str
    message: str


@dataclass(frozen=True)
class PolicyCheck:
    """What was looked at, and what was found.

    Attributes:
        task: name of the environment.
        shown: shape of what the policy is shown, without the batch.
        span: (lowest, highest) value that it was shown.
        findings: errors first.
    """

    task: str
    shown: tuple[int, ...]
    span: tuple[float, float]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return all(finding.level != "error" for finding in self.findings)

    @property
    def document(self) -> dict[str, Any]:
        """The report as JSON."""
        found = [{"level": f.level, "name": f.name, "message": f.message} for f in self.findings]
        about = {"data": self.task, "shown": list(self.shown), "span": list(self.span)}
        return {"schema": "robust.policy-check/1", "ok": self.ok, **about, "checks": list(CHECKS), "findings": found}

    def __str__(self) -> str:
        lines = [f"{finding.level}: {finding.name}: {finding.message}" for finding in self.findings]
        return "\n".join(lines or [f"{self.task}: nothing found"])


def check_policy(
    policy: Any, task: Task, *, n_steps: int = 64, bound: float = 10.0, generator: Seed = None
) -> PolicyCheck:
    """Return what is wrong with a policy on a task.

    Args:
        policy: anything that :func:`rl_robust.policy.as_policy` takes.
        task: the environment.
        n_steps: of each walk.
        bound: values beyond it look un-normalised, unless they are pixels; ``VecNormalize`` cuts at 10.
        generator: seed of the walks.

    Raises:
        TypeError, ValueError: arguments that are no policy or no task.
        ResourceError: the environment cannot be made.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task is a {type(task).__name__}; Task({task!r}) is needed")
    check_count("n_steps", n_steps, low=2)
    check_number("bound", bound, low=0, open_low=True)
    probe = task.make()
    space, actions = probe.observation_space, probe.action_space
    probe.close()
    victim = as_policy(policy, actions)
    look = _Look(victim, task, resolve_seed(generator), n_steps, bound, actions)
    with _left_as_found(victim), borrowed_generators(look.device), torch.no_grad():
        look.run(space)
    found = tuple(sorted(look.findings, key=lambda finding: finding.level))
    return PolicyCheck(task.name, look.shape, look.span, found)


@contextmanager
def _left_as_found(policy: Any) -> Iterator[None]:
    """Put buffers back: a batch normalisation in train mode moves its statistics with each look."""
    if not isinstance(policy, nn.Module):
        yield
        return
    kept = [(buffer, buffer.clone()) for buffer in policy.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


class _Look:
    """One look at one policy."""

    def __init__(
        self, policy: Policy, task: Task, seed: int, n_steps: int, bound: float, actions: spaces.Space
    ) -> None:
        self.policy, self.task, self.seed, self.n_steps, self.bound = policy, task, seed, n_steps, bound
        self.actions = actions
        self.device = model_device(policy) or torch.device("cpu")  # pyright: ignore[reportArgumentType]
        self.findings: list[Finding] = []
        self.shape: tuple[int, ...] = ()
        self.span = (0.0, 0.0)

    def error(self, name: str, message: str) -> None:
        self.findings.append(Finding("error", name, message))

    def warn(self, name: str, message: str) -> None:
        self.findings.append(Finding("warning", name, message))

    def run(self, space: spaces.Space) -> None:
        """Make all checks; what needs a policy that works is left out where it does not."""
        if self.policy.action_space != self.actions:
            self.error("space", f"the policy acts in {self.policy.action_space}, {self.task.name} in {self.actions}")
            return
        try:
            shown = self.seeds()
        except ValueError as error:  # a normaliser of another shape, or observations that are not finite
            self.error("observation", str(error))
            return
        self.shape = tuple(shown.shape[1:])
        self.span = (float(shown.min()), float(shown.max()))
        if not self.fits(shown):
            return
        own, _ = _walk(self.task, derive(self.seed, "walk"), self.n_steps, self.choose)
        shown = torch.cat([shown, own.to(self.device)])
        self.span = (float(shown.min()), float(shown.max()))
        self.acts(shown)
        if self.deterministic(shown):
            self.rows(shown)
        self.scale(shown, pixels=space.dtype == np.uint8 and len(space.shape or ()) > 1)

    # -- the environment ------------------------------------------------------------------------------------

    def seeds(self) -> Tensor:
        """Compare walks of equal and of different seeds; return what a policy would be shown."""
        first, raw = _walk(self.task, derive(self.seed, "walk"), self.n_steps)
        _, again = _walk(self.task, derive(self.seed, "walk"), self.n_steps)
        _, other = _walk(self.task, derive(self.seed, "another walk"), self.n_steps)
        if not np.array_equal(raw, again, equal_nan=True):
            why = "reset(seed=…) must seed everything that the environment draws (super().reset(seed=seed), np_random)"
            self.error("seed", f"{self.task.name} went two ways from one seed and one list of actions; {why}")
        elif np.array_equal(raw, other, equal_nan=True):
            self.warn("seed", f"{self.task.name} goes one way whatever its seed: all episodes of a greedy policy are "
                      "one episode, and intervals over episodes mean nothing")  # fmt: skip
        return first.to(self.device)

    # -- shape, stack, dtype --------------------------------------------------------------------------------

    def fits(self, shown: Tensor) -> bool:
        """Whether the policy takes what it is shown."""
        wrong = self.wrong(self.policy, shown)
        if wrong is None:
            return True
        name, message = wrong
        wide = {p.dtype for p in getattr(self.policy, "parameters", list)()} - {torch.float32}
        if wide:
            self.error("dtype", f"parameters are {', '.join(map(str, wide))}, observations float32: use policy.float()")
            return False
        self.error(name, f"{message}. It is shown {tuple(shown.shape[1:])}{self.advice(shown)}")
        return False

    def wrong(self, policy: Policy, shown: Tensor) -> tuple[str, str] | None:
        """Return (name, message) of what keeps a policy from acting on (N, ...) observations, or None."""
        rows = padded(shown[:ROWS])
        outputs = getattr(policy, "outputs", None)
        try:
            found = rows.new_zeros(len(rows), 1) if outputs is None else outputs(rows)
            actions, _ = policy.act(rows, None, torch.ones(len(rows), dtype=torch.bool, device=rows.device))
        except _RAISED as error:  # the user's code: what it raises is the finding
            return "shape", f"the policy fails: {' '.join(str(error).split())[:200]}"
        if outputs is not None and isinstance(self.actions, spaces.Discrete) and found.shape[1:] != (self.actions.n,):
            return "shape", f"its outputs are {tuple(found.shape)}; ({len(rows)}, {self.actions.n}) are needed"
        if len(actions) != len(rows):
            return "shape", f"it returns {len(actions)} actions for {len(rows)} observations"
        return None

    def advice(self, shown: Tensor) -> str:
        """Return the change of the task that would fit, if one of the usual does."""
        inner = getattr(getattr(self.policy, "policy", None), "observation_space", None)
        built = "" if inner is None else f"; it was built for {inner.shape}"
        for frames in (1, 2, 3, 4, 5, 8):
            for layout in ("stack", "concat") if frames > 1 else ("stack",):
                task = replace(self.task, n_frames=frames, layout=layout)
                other, _ = _walk(task, self.seed, 4)
                if self.wrong(self.policy, other.to(self.device)) is None:
                    return f"{built}; Task(n_frames={frames}, layout={layout!r}) would fit"
        if shown.ndim == 4 and self.wrong(self.policy, shown.movedim(3, 1)) is None:
            return f"{built}; channels first would fit (wrap the environment so that it gives (C, H, W))"
        return built

    # -- actions --------------------------------------------------------------------------------------------

    def look(self, rows: Tensor) -> Tensor:
        """Return (B, ...) outputs, or actions where there are none."""
        outputs = getattr(self.policy, "outputs", None)
        return self.act(rows).reshape(len(rows), -1) if outputs is None else outputs(rows)

    def act(self, rows: Tensor, draws: Tensor | None = None) -> Tensor:
        start = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return self.policy.act(rows, None, start, draws=draws)[0]

    def choose(self, shown: Tensor) -> np.ndarray | None:
        """Return the policy's action, or None (a random one) where it is none."""
        try:
            return env_actions(self.act(padded(shown.to(self.device)))[:1], self.actions)[0]
        except ValueError:
            return None

    def acts(self, shown: Tensor) -> None:
        """Look at all actions and outputs."""
        rows = padded(shown)
        discrete = isinstance(self.actions, spaces.Discrete)
        if not bool(torch.isfinite(self.look(rows).double()).all()):
            self.error("finite", "the policy's outputs hold NaN or infinity")
        actions = self.act(rows)
        if isinstance(self.policy, CallablePolicy):
            actions = torch.as_tensor(np.array(self.policy.function(rows.cpu().numpy())))
        if discrete and actions.is_floating_point():
            self.error("dtype", f"discrete actions are {actions.dtype}: they would be cut to integers; return int64")
        try:
            env_actions(actions, self.actions)
        except ValueError as error:
            self.error("action", str(error))

    def deterministic(self, shown: Tensor) -> bool:
        """Whether the same rows give the same answer twice: greedy, and with given draws."""
        rows = padded(shown[:ROWS])
        alike = torch.equal(*(torch.nan_to_num(self.look(rows)) for _ in range(2)))
        alike = alike and torch.equal(*(torch.nan_to_num(self.act(rows)) for _ in range(2)))
        if not alike:
            self.error("determinism", "the same observations give other actions at a second call" + self.mode(_DROPOUTS)
                       + "; greedy actions must not be drawn")  # fmt: skip
            return False
        if self.policy.n_draws:
            size = (len(rows), self.policy.n_draws)
            draws = torch.rand(size, generator=torch.Generator().manual_seed(self.seed & 0x7FFFFFFF)).double()
            draws = draws.clamp(1e-6, 1 - 1e-6).to(self.device)
            if not torch.equal(self.act(rows, draws), self.act(rows, draws)):
                self.error("determinism", "sampled actions change at a second call with the same draws; take them "
                           "from draws, not from a generator")  # fmt: skip
        return True

    def rows(self, shown: Tensor) -> None:
        """Show the same rows in other company."""
        half = ROWS // 2
        picked = shown[torch.linspace(0, len(shown) - 1, ROWS).long()]
        alone = padded(picked[:half])[:ROWS]
        others = torch.cat([picked[:half], picked[half:].flip(0) * 3 + 1])
        answers = [torch.nan_to_num(self.look(batch)[:half].double()) for batch in (alone, others)]
        if not torch.allclose(*answers, rtol=1e-4, atol=1e-4 * float(answers[0].abs().max()) + 1e-12):
            self.error("batch", "what the policy answers to a row depends on the rows beside it"
                       + self.mode(_BATCH_NORMS) + "; figures would depend on n_envs")  # fmt: skip

    def mode(self, kinds: tuple[type, ...]) -> str:
        """Name a layer that is in train mode, if one is to blame."""
        modules = self.policy.named_modules() if isinstance(self.policy, nn.Module) else ()
        named = [f"{type(module).__name__} {name!r}" for name, module in modules
                 if isinstance(module, kinds) and module.training]  # fmt: skip
        return f": {named[0]} is in train mode, call policy.eval()" if named else ""

    # -- scale ----------------------------------------------------------------------------------------------

    def scale(self, shown: Tensor, *, pixels: bool) -> None:
        """Look for statistics that were forgotten, are of another task, or are applied twice."""
        largest, frozen = float(shown.abs().max()), self.task.normaliser
        if pixels:
            self.pixels(shown, largest)
        elif frozen is None and largest > self.bound:
            self.warn("scale", f"the policy is shown values up to {largest:.4g}; if it was trained with VecNormalize, "
                      "give Task(normaliser=Normaliser.of_vec_normalize(…))")  # fmt: skip
        if frozen is not None:
            cut = float((shown.abs() >= frozen.clip).double().mean())
            if cut > 0.05:
                self.warn("scale", f"{cut:.0%} of normalised values are cut at {frozen.clip:g}: the statistics look "
                          "like those of another task")  # fmt: skip

    def pixels(self, shown: Tensor, largest: float) -> None:
        """Compare the range of images with what the policy does to them."""
        divides = _divides(self.policy)
        if divides and largest <= 1.0:
            self.error("pixels", f"images lie in 0..{largest:.3g} and the policy divides by 255 again; drop "
                       "Task(scale=1/255), or build it with normalize_images=False")  # fmt: skip
        elif divides is False and largest > self.bound:
            self.warn("scale", f"images go up to {largest:.4g} and the policy does not divide by 255; give "
                      "Task(scale=1/255) if it was trained so")  # fmt: skip
        elif divides is None and largest <= 1.0 and self.blind(shown):
            self.warn("pixels", "the policy acts alike on all images in 0..1, but not on the same times 255: if it "
                      "divides by 255 itself, drop Task(scale=1/255)")  # fmt: skip

    def blind(self, shown: Tensor) -> bool:
        """Whether images, noise and black are all the same to the policy, until they are 255 times as bright."""
        drawn = torch.Generator().manual_seed(self.seed & 0x7FFFFFFF)
        noise = torch.rand((ROWS, *shown.shape[1:]), generator=drawn).to(shown)
        noise *= torch.linspace(0, 1, ROWS).to(shown).reshape(-1, *[1] * (shown.ndim - 1))
        rows = torch.cat([padded(shown[:ROWS]), noise])
        dark, bright = self.look(rows), self.look(rows * 255)
        spread = [float((out - out.mean(0)).abs().max() / out.abs().max().clamp(min=1e-12)) for out in (dark, bright)]
        return spread[0] < 0.02 and spread[1] > 0.1


def _divides(policy: Policy) -> bool | None:
    """Return whether an SB3 policy divides images by 255; None where that cannot be told."""
    inner = getattr(policy, "policy", None)
    if not hasattr(inner, "normalize_images"):
        return None
    from stable_baselines3.common.preprocessing import is_image_space

    return bool(inner.normalize_images) and is_image_space(inner.observation_space)  # pyright: ignore


def _walk(
    task: Task, seed: int, n_steps: int, choose: Callable[[Tensor], np.ndarray | None] | None = None
) -> tuple[Tensor, np.ndarray]:
    """Return (N, ...) what a policy is shown, and the raw observations; actions are random unless chosen."""
    env = task.make()
    try:
        drawn = np.random.default_rng(0)
        raw, frames, shown = [], torch.empty(0), []
        obs, over = np.empty(0), True
        for step in range(n_steps):
            if over:
                obs, _ = env.reset(seed=derive(seed, "env", step) & 0x7FFFFFFF)
                frames = task.observe(np.asarray(obs)[None])[:, None].repeat_interleave(task.n_frames, 1)
            else:
                frames = torch.cat([frames[:, 1:], task.observe(np.asarray(obs)[None])[:, None]], 1)
            raw.append(np.array(obs))
            shown.append(task.show(frames))
            action = None if choose is None else choose(shown[-1])
            obs, _, ended, cut, _ = env.step(_random(env, drawn) if action is None else action)
            over = ended or cut
        return torch.cat(shown), np.stack(raw)
    finally:
        env.close()


def _random(env: gym.Env, drawn: np.random.Generator) -> Any:
    """Return a random action that no seed but this generator's decides."""
    env.action_space.seed(int(drawn.integers(2**31)))
    return env.action_space.sample()
