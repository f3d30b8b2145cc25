"""One table: kind of method -> checks that every method of that kind must pass on its example.

``check_method(card)`` runs them on a card of ours or of anyone's; a failed check raises ``AssertionError`` with a
sentence that says what was promised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from robust_core.methods import MethodCard, load
from robust_core.models import frozen, predict_logits
from robust_core.testing.aggregator_checks import AGGREGATOR_CHECKS
from robust_core.testing.case import Case
from robust_core.testing.solver_checks import (
    solver_answers_truthfully,
    solver_knows_infeasible,
    solver_refuses_bad_input,
    solver_repeats,
)
from robust_core.testing.token_checks import (
    token_attack_makes_no_query_beyond_its_limit,
    token_attack_repeats_and_ignores_neighbours,
    token_attack_reports_truth_inside_the_space,
    token_attack_succeeds_on_its_example,
)

__all__ = ["CHECKS", "check_method", "left_as_found", "refuses"]

Check = Callable[[Case], None]


def check_method(card: MethodCard) -> list[str]:
    """Run every check of the card's kind on its example and return the names of the checks that ran.

    Raises:
        AssertionError: a check failed, or the kind has none.
        CatalogueError: the card's target or example does not exist.
    """
    load(card.target)
    build = load(card.example)
    kind = "attack on tokens" if card.kind == "attack" and "problem" in build().extra else card.kind
    checks = CHECKS.get(kind, ())
    _require(bool(checks), f"the kit has no checks for kind {kind!r}")
    for check in checks:
        check(build())
    return [check.__name__ for check in checks]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def refuses(call: Callable[[], Any], what: str) -> None:
    """Require that ``call`` raises ValueError or TypeError with a message."""
    try:
        call()
    except (ValueError, TypeError) as error:
        _require(len(str(error)) > 10, f"{what}: the error says nothing")
        return
    raise AssertionError(f"{what} was accepted")


def _snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in module.modules()],
        "flags": [p.requires_grad for p in module.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "state": {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        "rng": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad_mode": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(p, q) for p, q in zip(a, b, strict=True))
    return a == b


@contextmanager
def left_as_found(module: nn.Module) -> Iterator[None]:
    """Require that modes, flags, gradients, weights, hooks and global state are the same afterwards."""
    if len(list(module.modules())) > 1:
        next(iter(module.children())).train(True)  # a mixed state, so that restoring "all eval" shows
    before = _snapshot(module)
    yield
    after = _snapshot(module)
    for name, value in before.items():
        _require(_same(value, after[name]), f"the model's or the process's {name} changed")


# -- attacks ---------------------------------------------------------------------------------------------------


def attack_stays_inside(case: Case) -> None:
    """The stored tensor is inside the threat to the last bit, in every dtype."""
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(case.model).to(dtype)
        x = case.x.to(dtype)
        x_adv = case.subject(model, x, case.y, generator=1)
        _require(x_adv.dtype == dtype and x_adv.shape == x.shape, "x_adv differs from x in dtype or shape")
        _require(bool(case.subject.threat.contains(x_adv, x).all()), f"x_adv leaves the threat in {dtype}")


def attack_repeats_and_ignores_neighbours(case: Case) -> None:
    """One seed gives one result, whatever the order and the company of the samples."""
    index = torch.arange(100, 100 + len(case.x))
    whole = case.subject(case.model, case.x, case.y, index=index, generator=3)
    again = case.subject(case.model, case.x, case.y, index=index, generator=3)
    _require(torch.equal(whole, again), "the same seed gave another result")
    order = torch.arange(len(case.x) - 1, -1, -1)
    turned = case.subject(case.model, case.x[order], case.y[order], index=index[order], generator=3)
    _require(torch.equal(whole, turned[order]), "the result depends on the order of the samples")
    alone = case.subject(case.model, case.x[:1], case.y[:1], index=index[:1], generator=3)
    _require(torch.equal(whole[:1], alone), "the result depends on the batch")


def attack_reports_truth(case: Case) -> None:
    """``success`` means misclassified and inside, on the stored tensor."""
    result = case.subject.run(case.model, case.x, case.y)
    with frozen(case.model):
        wrong = predict_logits(case.model, result.x_adv).argmax(1) != case.y
    inside = case.subject.threat.contains(result.x_adv, case.x)
    _require(torch.equal(result.success, wrong & inside), "success is not 'misclassified and inside'")
    named = [bool(name) for name in result.found_by]
    _require(named == result.success.tolist(), "found_by names the broken samples only")
    _require(result.forwards > 0, "forwards were not counted")


def attack_of_radius_zero(case: Case) -> None:
    """With eps = 0 nothing moves."""
    attack = replace(case.subject, threat=case.subject.threat.with_eps(0.0))
    _require(torch.equal(attack(case.model, case.x, case.y), case.x), "eps = 0 moved an input")


def attack_leaves_the_model(case: Case) -> None:
    """Modes, flags, gradients, hooks and global state stay as found."""
    with left_as_found(case.model):
        case.subject(case.model, case.x, case.y)


def attack_refuses_bad_input(case: Case) -> None:
    """Each bad input is one clear error."""
    x, y = case.x, case.y
    bad = {
        "NaN": (x.clone().index_fill_(0, torch.tensor([0]), torch.nan), y),
        "inputs out of the domain": (x + 3, y),
        "integer inputs": ((x * 255).to(torch.uint8), y),
        "an empty batch": (x[:0], y[:0]),
        "float labels": (x, y.float()),
        "negative labels": (x, y - 100),
        "labels beyond the classes": (x, y + 1000),
        "too few labels": (x, y[:-1]),
    }
    for what, (bad_x, bad_y) in bad.items():
        refuses(lambda bad_x=bad_x, bad_y=bad_y: case.subject(case.model, bad_x, bad_y), what)


class _Fragile(nn.Module):
    """A linear model that any attack must break: the margin is tiny against the slope."""

    def __init__(self, x: Tensor, n_classes: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(x[0].numel(), n_classes)
        with torch.no_grad():
            angles = 2.4 * torch.arange(self.linear.weight.numel())  # signs alternate: no class wins on every image
            self.linear.weight.copy_(angles.sin().reshape_as(self.linear.weight))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(x))


def attack_breaks_the_breakable(case: Case) -> None:
    """With the whole domain allowed, a linear model falls on every sample."""
    n_classes = predict_logits(case.model, case.x).shape[1]
    model = _Fragile(case.x, n_classes)
    y = predict_logits(model, case.x).argmax(1)
    radius = {"Linf": 0.5, "L2": 0.5 * case.x[0].numel() ** 0.5, "L1": 0.5 * case.x[0].numel()}
    threat = case.subject.threat
    attack = replace(case.subject, threat=threat.with_eps(radius[threat.name]))
    success = attack.run(model, case.x, y).success
    _require(bool(success.all()), f"{int((~success).sum())} of {len(y)} samples of a breakable model survived")


def token_attack_leaves_the_model(case: Case) -> None:
    """Modes, flags, gradients, hooks and global state stay as found."""
    with left_as_found(case.model):
        case.subject.run(case.extra["problem"])


# -- objectives ------------------------------------------------------------------------------------------------


def _batch(case: Case) -> dict[str, Any]:
    return {"x": case.x, "y": case.y, "index": torch.arange(len(case.x)), **case.extra.get("batch", {})}


def _fresh_objective(case: Case) -> Any:
    objective = copy.deepcopy(case.subject)
    if hasattr(objective, "setup"):
        n_classes = predict_logits(case.model, case.x).shape[1]
        objective.setup(case.model, case.extra.get("n_samples", len(case.x)), n_classes)
    return objective


def objective_gives_a_loss(case: Case) -> None:
    """A finite scalar with gradients to the trainable parameters, and detached parts."""
    objective, model = _fresh_objective(case), copy.deepcopy(case.model).train()
    _require(isinstance(objective, nn.Module), "an objective is an nn.Module, so that checkpoints hold its state")
    loss = objective(model, _batch(case))
    _require(loss.total.ndim == 0 and bool(torch.isfinite(loss.total)), "the loss is no finite scalar")
    _require(not any(part.requires_grad for part in loss.parts.values()), "parts must be detached")
    loss.total.backward()
    trainable = objective.trainable(model) if hasattr(objective, "trainable") else model.parameters()
    _require(any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trainable), "no gradient arrived")


def objective_repeats(case: Case) -> None:
    """The same state and batch give the same bits; a deep copy and a reloaded state too."""
    objective, model = _fresh_objective(case), copy.deepcopy(case.model).train()
    twin = _fresh_objective(case)
    twin.load_state_dict(objective.state_dict())
    losses = [o(copy.deepcopy(model), _batch(case)).total.detach() for o in (objective, twin)]
    _require(torch.equal(losses[0], losses[1]), "two copies of one state give different losses")


def objective_works_in_any_loop(case: Case) -> None:
    """Three plain steps: finite all along, the parameters move, the loss falls in the end on one batch."""
    objective, model = _fresh_objective(case), copy.deepcopy(case.model).train()
    trainable = list(objective.trainable(model) if hasattr(objective, "trainable") else model.parameters())
    optimiser = torch.optim.SGD(trainable, lr=case.extra.get("lr", 1e-2))
    values = []
    for step in range(6):
        loss = objective(model, _batch(case))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        if hasattr(objective, "after_step"):
            objective.after_step(model, step)
        values.append(float(loss.total.detach()))
    _require(all(torch.isfinite(torch.tensor(values))), f"losses {values} are not finite")
    _require(min(values[1:]) < values[0], f"six steps on one batch did not lower the loss: {values}")


def objective_leaves_modes(case: Case) -> None:
    """The mode of the model and the global random state are as found."""
    objective, model = _fresh_objective(case), copy.deepcopy(case.model).train()
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    objective(model, _batch(case))
    _require(modes == [m.training for m in model.modules()], "the objective changed the mode of the model")
    _require(torch.equal(rng, torch.get_rng_state()), "the objective touched the global random state")


def objective_refuses_bad_input(case: Case) -> None:
    """Bad labels (unless ``unlabelled``) and NaN, or tokens beyond the vocabulary, are one clear error each.

    An objective that ``draws_its_data`` reads neither.
    """
    if case.extra.get("draws_its_data", False):
        return
    batch = _batch(case)
    changes = {"labels beyond the classes": {"y": case.y + 1000}}
    if case.x.is_floating_point():
        changes["NaN"] = {"x": torch.full_like(case.x, torch.nan)}
    else:
        changes["tokens beyond the vocabulary"] = {"x": case.x + 10**6}
    if case.extra.get("unlabelled", False):  # an objective that never reads labels has none to refuse
        del changes["labels beyond the classes"]
    for what, change in changes.items():
        objective, model = _fresh_objective(case), copy.deepcopy(case.model).train()
        refuses(lambda o=objective, m=model, c=change: o(m, {**batch, **c}), what)


# -- certifiers ------------------------------------------------------------------------------------------------


def _certify(case: Case, x: Tensor, **more: Any) -> Any:
    return case.subject.certify(x, **case.extra.get("certify", {}), **more)


def certifier_speaks_clearly(case: Case) -> None:
    """Only certified rows have a radius; the result names its function, norm and failure probability."""
    certificate = _certify(case, case.x)
    _require(len(certificate) == len(case.x), "one row for each input")
    _require(bool((certificate.radius[~certificate.certified] == 0).all()), "an uncertified row has a radius")
    _require(certificate.about.norm in ("Linf", "L2", "L1"), f"norm {certificate.about.norm!r} is unknown")
    _require(len(certificate.about.fingerprint) == 64, "the function certified has no fingerprint")
    _require(int(certificate.certified.sum()) > 0, "the example certifies nothing: it shows nothing")
    _require(certificate.rigorous, "certify() must be rigorous")


def certifier_repeats(case: Case) -> None:
    """The same bits twice, and for each row alone."""
    whole, again = _certify(case, case.x), _certify(case, case.x)
    _require(torch.equal(whole.radius, again.radius), "two runs differ")
    alone = _certify(case, case.x[:1])
    _require(torch.equal(whole.radius[:1], alone.radius), "the radius depends on the batch")


def certifier_leaves_the_model(case: Case) -> None:
    """Modes, flags, gradients, hooks and global state stay as found."""
    with left_as_found(case.model):
        _certify(case, case.x)


def certifier_refuses_bad_input(case: Case) -> None:
    """NaN, integers and half precision are refused."""
    refuses(lambda: _certify(case, torch.full_like(case.x, torch.nan)), "NaN")
    refuses(lambda: _certify(case, (case.x * 255).to(torch.uint8)), "integer inputs")
    refuses(lambda: _certify(case, case.x.half()), "half precision")


def certifier_withstands_attack(case: Case) -> None:
    """No attack inside the certified radius changes the prediction (deterministic certificates of the base)."""
    from robust_core.attacks import PGD
    from robust_core.threats import parse_threat

    certificate = _certify(case, case.x)
    if certificate.alpha > 0:
        return  # statistical certificates have their own coverage tests: one break proves nothing
    for row in certificate.certified.nonzero().flatten().tolist():
        threat = parse_threat(certificate.about.norm, float(certificate.radius[row]))
        y = certificate.prediction[row : row + 1]
        broken = PGD(threat, n_iter=20).run(case.model, case.x[row : row + 1], y).success
        _require(not bool(broken.any()), f"row {row} is broken inside its certified radius {threat.eps}")


# -- defences --------------------------------------------------------------------------------------------------


def defence_is_a_classifier(case: Case) -> None:
    """Finite logits (B, C), the same for a row alone and in company."""
    logits = predict_logits(case.subject, case.x)
    _require(bool(torch.isfinite(logits).all()), "logits are not finite")
    if not case.subject.stochastic:
        alone = predict_logits(case.subject, case.x[:1])
        _require(bool((alone - logits[:1]).abs().max() < 1e-5), "a row's logits depend on its batch")


def defence_declares_itself(case: Case) -> None:
    """What attackers must know is declared, and is true."""
    for name in ("stochastic", "differentiable", "optimises_at_test_time"):
        _require(isinstance(getattr(case.subject, name, None), bool), f"{name} is not declared")
    _require(callable(getattr(case.subject, "surrogate", None)), "surrogate() is missing")
    first, second = (predict_logits(case.subject, case.x) for _ in range(2))
    same = bool((first - second).abs().max() < 1e-5)
    _require(same or case.subject.stochastic, "two passes differ, yet the defence declares itself deterministic")
    if case.subject.differentiable:
        x = case.x.clone().requires_grad_(True)
        with frozen(case.subject), torch.enable_grad():
            (gradient,) = torch.autograd.grad(case.subject(x).logsumexp(1).sum() - case.subject(x)[:, 0].sum(), x)
        _require(bool(torch.isfinite(gradient).all() and (gradient != 0).any()), "declared differentiable, is not")


def defence_saves_and_loads(case: Case) -> None:
    """A copy with the saved state gives the same bits."""
    twin = copy.deepcopy(case.subject)
    twin.load_state_dict(case.subject.state_dict())
    if not case.subject.stochastic:
        same = torch.equal(predict_logits(case.subject, case.x), predict_logits(twin, case.x))
        _require(same, "a reloaded copy differs")


# -- policies --------------------------------------------------------------------------------------------------


def _act(policy: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return policy.act(x)[0]


def policy_acts_inside_its_space(case: Case) -> None:
    """One finite action for each observation, inside the action space."""
    actions = _act(case.subject, case.x)
    _require(len(actions) == len(case.x), "one action for each observation")
    _require(bool(torch.isfinite(actions.double()).all()), "an action is not finite")
    space = case.subject.action_space
    taken = actions.cpu().numpy().astype(space.dtype)
    for action in taken.reshape(len(taken), *space.shape):
        _require(space.contains(action), f"action {action} lies outside {space}")


def policy_repeats_and_ignores_company(case: Case) -> None:
    """Greedy actions are the same twice, in any order and alone; the policy and global state stay as found."""
    with left_as_found(case.model):
        whole, again = _act(case.subject, case.x), _act(case.subject, case.x)
    _require(torch.equal(whole, again), "two calls act differently without draws")
    turned, alone = _act(case.subject, case.x.flip(0)).flip(0), _act(case.subject, case.x[:1])
    near = (turned.double() - whole.double()).abs().max(), (alone.double() - whole[:1].double()).abs().max()
    _require(max(float(gap) for gap in near) < 1e-5, "an action depends on the other observations of its batch")


def policy_saves_and_loads(case: Case) -> None:
    """A copy whose weights were overwritten acts the same once the saved state is loaded."""
    if not isinstance(case.subject, nn.Module):
        return  # a function has no state
    twin, saved = copy.deepcopy(case.subject), copy.deepcopy(case.subject.state_dict())
    with torch.no_grad():
        for value in (*twin.parameters(), *twin.buffers()):
            if value.is_floating_point():
                value.mul_(0.5)
    twin.load_state_dict(saved)
    _require(torch.equal(_act(twin, case.x), _act(case.subject, case.x)), "a reloaded copy acts differently")


# -- data ------------------------------------------------------------------------------------------------------


def data_repeats_and_ignores_order(case: Case) -> None:
    """``subject(x, y, index, generator)`` is a pure function, sample by sample, that leaves its inputs alone."""
    index = torch.arange(len(case.x))
    before = case.x.clone(), case.y.clone(), torch.get_rng_state()
    first = case.subject(case.x, case.y, index, 5)
    again = case.subject(case.x, case.y, index, 5)
    _require(torch.equal(first, again), "the same seed gave another result")
    other = case.subject(case.x, case.y, index, 6)
    _require(case.extra.get("deterministic", False) or not torch.equal(first, other), "the seed has no effect")
    after = case.x, case.y, torch.get_rng_state()
    _require(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "inputs or global state changed")
    if case.extra.get("per_sample", True):
        order = torch.arange(len(case.x) - 1, -1, -1)
        turned = case.subject(case.x[order], case.y[order], index[order], 5)
        _require(torch.equal(first, turned[order]), "the result depends on the order of the samples")


# -- measures and theory ---------------------------------------------------------------------------------------


def measure_repeats(case: Case) -> None:
    """``subject()`` returns finite figures, the same twice, leaving global state alone."""
    rng = torch.get_rng_state()
    runs = [case.subject() for _ in range(2)]
    for a, b in pairwise(runs):
        _require(a == b, "two runs differ")
    values = [float(value) for value in runs[0].values()]
    _require(all(torch.isfinite(torch.tensor(values))), f"figures {runs[0]} are not finite")
    _require(torch.equal(rng, torch.get_rng_state()), "the global random state was touched")


CHECKS: dict[str, tuple[Check, ...]] = {
    "attack": (
        attack_stays_inside,
        attack_repeats_and_ignores_neighbours,
        attack_reports_truth,
        attack_of_radius_zero,
        attack_leaves_the_model,
        attack_refuses_bad_input,
        attack_breaks_the_breakable,
    ),
    "attack on tokens": (
        token_attack_reports_truth_inside_the_space,
        token_attack_repeats_and_ignores_neighbours,
        token_attack_makes_no_query_beyond_its_limit,
        token_attack_leaves_the_model,
        token_attack_succeeds_on_its_example,
    ),
    "objective": (
        objective_gives_a_loss,
        objective_repeats,
        objective_works_in_any_loop,
        objective_leaves_modes,
        objective_refuses_bad_input,
    ),
    "certifier": (
        certifier_speaks_clearly,
        certifier_repeats,
        certifier_leaves_the_model,
        certifier_refuses_bad_input,
        certifier_withstands_attack,
    ),
    "defence": (defence_is_a_classifier, defence_declares_itself, defence_saves_and_loads),
    "policy": (policy_acts_inside_its_space, policy_repeats_and_ignores_company, policy_saves_and_loads),
    "aggregator": AGGREGATOR_CHECKS,
    "solver": (solver_answers_truthfully, solver_repeats, solver_knows_infeasible, solver_refuses_bad_input),
    "data": (data_repeats_and_ignores_order,),
    "measure": (measure_repeats,),
    "theory": (measure_repeats,),
}
