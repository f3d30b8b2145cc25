"""The set network, its scales and files, and its chains of layers."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch

from optim_robust.neur2ro.chains import decision_chain, encode, scenario_chain, value_chain
from optim_robust.neur2ro.data import ValueData, generate
from optim_robust.neur2ro.families import CAPITAL_BUDGETING, CAPITAL_BUDGETING_LOANS, KNAPSACK, Family, fixed
from optim_robust.neur2ro.model import ValueModel
from optim_robust.neur2ro.network import SetValueNetwork
from optim_robust.neur2ro.train import ValueRegression, fit_value_network, scaled_labels, train, untrained
from optim_robust.two_stage import AffineMatrix, AffineVector, Stage, TwoStageProblem
from optim_robust.uncertainty import Box
from robust_core.errors import MalformedFileError, UntrustedFileError


def _mixed_problem() -> TwoStageProblem:
    """Two binaries, an integer and a continuous first-stage variable; three uncertain costs."""
    return TwoStageProblem(
        x=Stage.of(4, upper=[1, 1, 3, 2.5], lower=[0, 0, 1, 0.5], integer=[True, True, True, False]),
        y=Stage.of(2, upper=5, integer=[True, False]),
        uncertainty=Box([-1, 0, 0], [1, 2, 1]),
        c=AffineVector([1.0, 2.0, 1.5, 1.0], dim=3),
        d=AffineVector([3.0, 4.0], np.array([[1.0, 0.5, 0], [0, 1.0, 1.0]])),
        technology=AffineMatrix([[-1.0, -1, -1, -1]]),
        recourse=AffineMatrix([[-1.0, -1.0]]),
        rhs=AffineVector([-6.0], dim=3),
        name="mixed",
    )


def _family(name: str) -> Family:
    known = {"knapsack": KNAPSACK, "capital": CAPITAL_BUDGETING, "loans": CAPITAL_BUDGETING_LOANS}
    return known[name] if name in known else fixed(_mixed_problem())


def _data(name: str, per_instance: bool = False) -> ValueData:
    sizes = None if name == "mixed" else (4, 6)
    return generate(
        _family(name),
        n_instances=4,
        n_first_stage=3,
        n_scenarios=4,
        sizes=sizes,
        per_instance=per_instance,
        generator=1,
    )


def test_order_and_padding_do_not_matter() -> None:
    network = SetValueNetwork(3, 2, generator=1).double()
    generator = torch.Generator().manual_seed(0)
    x, xi = (torch.rand(5, 6, d, generator=generator, dtype=torch.float64) for d in (3, 2))
    plain = network(x, xi)
    order = torch.randperm(6, generator=generator)
    assert torch.allclose(network(x[:, order], xi[:, order.flip(0)]), plain)
    padded = [torch.cat([items, torch.zeros(5, 2, items.shape[2])], dim=1) for items in (x, xi)]
    assert torch.allclose(network(*padded), plain)  # no bias: zeros add nothing
    noisy = [torch.cat([items, torch.rand(5, 2, items.shape[2])], dim=1) for items in (x, xi)]
    mask = torch.cat([torch.ones(5, 6), torch.zeros(5, 2)], dim=1)
    assert torch.allclose(network(*noisy, mask, mask), plain)
    mean = SetValueNetwork(3, 2, agg="mean", bias_embed=True, generator=1).double()
    assert torch.allclose(mean(*noisy, mask, mask), mean(x, xi))
    assert torch.allclose(mean(torch.cat([x, x], 1), xi), mean(x, xi))


def test_weights_are_a_function_of_the_seed_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    one, two, three = (SetValueNetwork(3, 2, generator=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.value[0].weight, two.value[0].weight)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(one.value[0].weight, three.value[0].weight)  # pyright: ignore[reportArgumentType]


@pytest.mark.quick
@pytest.mark.parametrize("agg", ["sum", "mean"])
@pytest.mark.parametrize("name", ["knapsack", "capital", "loans", "mixed"])
def test_chains_say_what_the_network_says(name: str, agg: str) -> None:
    data, family = _data(name), _family(name)
    model = untrained(data, family, embed=(9, 7, 5), post=(6, 4), value=(5, 3), agg=agg, bias_embed=True, generator=3)
    for i, features in enumerate(data.features):
        problem_integer = np.ones(len(features.first), bool)
        problem_integer[-1] = name not in ("mixed", "loans")
        x, xi = data.x[i], data.xi[i][: len(data.x[i])]
        z_x = encode(decision_chain(model, features, problem_integer), x)
        z_xi = encode(scenario_chain(model, features), xi)
        low, span = model.label_range(features)
        expected = (model.predict(features, x, xi) - low) / span
        for row in range(len(x)):
            one = encode(value_chain(model, z_xi[row], of="xi"), z_x[[row]])[0, 0]
            two = encode(value_chain(model, z_x[row], of="x"), z_xi[[row]])[0, 0]
            assert one == pytest.approx(expected[row], abs=1e-9)
            assert two == pytest.approx(expected[row], abs=1e-9)


def test_binary_decisions_cost_no_hidden_unit() -> None:
    data = _data("knapsack")
    model = untrained(data, KNAPSACK)
    n = len(data.features[0].first)
    chain = decision_chain(model, data.features[0], np.ones(n, bool))
    assert sum(layer.weight.shape[0] for layer in chain if layer.relu) == 64  # rho alone


def test_data_repeat_and_labels_are_the_second_stage() -> None:
    data, again = _data("knapsack"), _data("knapsack")
    assert all(np.array_equal(a, b) for a, b in zip(data.values, again.values, strict=True))
    for i in range(len(data)):
        assert (data.values[i] <= 0).all()  # producing nothing costs nothing
        nothing = np.flatnonzero(data.x[i].sum(1) == 0)
        assert (data.values[i][nothing] == 0).all()


def test_the_objective_sees_what_the_model_predicts() -> None:
    data = _data("capital", per_instance=True)
    model = untrained(data, CAPITAL_BUDGETING, label_scaling="per_instance", generator=2)
    position, y = scaled_labels(data, model)
    objective = ValueRegression(data, model, dtype=torch.float64)
    network = copy.deepcopy(model.network).double()
    predicted = network(*objective.items(position))
    for row, (i, a, b) in enumerate(position.tolist()):
        features = data.features[i]
        low, span = model.label_range(features)
        value = model.predict(features, data.x[i][a], data.xi[i][b])[0]
        assert float(predicted[row].detach()) == pytest.approx((value - low) / span, abs=1e-6)
        assert float(y[row]) == pytest.approx((data.values[i][a, b] - low) / span, abs=1e-5)
    assert 0 <= float(y.min()) <= float(y.max()) <= 1 + 1e-6


def test_training_lowers_the_error_and_repeats() -> None:
    data = generate(KNAPSACK, n_instances=12, n_first_stage=4, n_scenarios=5, sizes=(5,), per_instance=True)
    results = []
    for _ in range(2):
        model = untrained(data, KNAPSACK, label_scaling="per_instance", embed=(16, 8), post=(16, 4))
        start = model.network.state_dict()["value.0.weight"].clone()
        errors = train(model, data, epochs=12, learning_rate=5e-3, batch_size=32)
        results.append((errors, model.network.state_dict()["value.0.weight"].clone()))
        assert not torch.equal(start, results[-1][1])
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0]["training_mae"] < 0.15


def test_aligned_samples_lie_where_the_players_meet() -> None:
    spread = {}
    for sampler in ("mixed", "aligned"):
        data = generate(
            KNAPSACK, n_instances=6, n_first_stage=4, n_scenarios=9, sizes=(8,), sampler=sampler, per_instance=True
        )
        for i, features in enumerate(data.features):
            assert (data.xi[i] >= 0).all()
            assert (data.xi[i].sum(1) <= 8 * 0.2 + 1e-9).all()
            assert ((data.x[i] == 0) | (data.x[i] == 1)).all()
            assert len(features.first) == 8
        spread[sampler] = np.mean([v.std(1).mean() / f.unit for v, f in zip(data.values, data.features, strict=True)])
    assert spread["aligned"] > 1.3 * spread["mixed"]


def test_contrast_compares_scenarios_of_one_decision() -> None:
    data = _data("knapsack", per_instance=True)
    model = untrained(data, KNAPSACK, label_scaling="per_instance", embed=(6, 4), post=(5, 3))
    position, y = scaled_labels(data, model)
    batch = {"x": position, "y": y, "index": torch.arange(len(y)), "step": 3}
    objective = ValueRegression(data, model, contrast=0.5)
    other = objective._partner(batch)
    assert torch.equal(other[:, :2], position[:, :2])
    assert bool((other[:, 2] != position[:, 2]).all())
    found = objective(model.network, batch).parts["difference"]
    first, second = (model.network(*objective.items(p)).detach() for p in (position, other))
    expected = ((first - second) - (y - objective.labels[tuple(other.unbind(1))])).square().mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_networks_are_saved_and_loaded(tmp_path) -> None:
    data = _data("knapsack")
    model = untrained(data, KNAPSACK, generator=5)
    model.save(tmp_path / "net")
    again = ValueModel.load(tmp_path / "net")
    x, xi = data.x[0][:1], data.xi[0][:1]
    assert again.predict(data.features[0], x, xi) == pytest.approx(model.predict(data.features[0], x, xi))
    assert (again.family, again.label_scaling) == ("knapsack", "per_size")
    document = json.loads((tmp_path / "net" / "model.json").read_text())
    for change in ({"schema": "x"}, {"label_scaling": "odd"}, {"network": {"x_dim": 2, "xi_dim": 2}}):
        (tmp_path / "net" / "model.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(MalformedFileError):
            ValueModel.load(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(UntrustedFileError):
        ValueModel.load(tmp_path / "net")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="embed"):
        SetValueNetwork(3, 2, embed=(0,))
    with pytest.raises(ValueError, match="agg"):
        SetValueNetwork(3, 2, agg="max")
    with pytest.raises(ValueError, match="xi_items"):
        SetValueNetwork(3, 2)(torch.rand(1, 4, 3), torch.rand(1, 4, 3))
    data = _data("knapsack")
    with pytest.raises(ValueError, match="label_scaling"):
        untrained(data, KNAPSACK, label_scaling="odd")
    with pytest.raises(ValueError, match="sampler"):
        generate(KNAPSACK, n_instances=1, sampler="odd")
    with pytest.raises(ValueError, match="reads"):
        untrained(data, KNAPSACK).static(_data("capital").features[0])
    with pytest.raises(TypeError, match="knapsack"):
        KNAPSACK.features(_mixed_problem(), False)


def test_an_interrupted_training_ends_at_the_same_weights(tmp_path) -> None:
    """Also the best weights so far survive: here they are those of an early epoch."""
    words: dict[str, Any] = {
        "epochs": 22,
        "learning_rate": 0.3,
        "batch_size": 16,
        "generator": 5,
    }  # validated after 10, 20 and 22
    options: dict[str, Any] = {
        "n_instances": 4,
        "n_first_stage": 3,
        "n_scenarios": 4,
        "sizes": (4,),
        "embed": (6, 4),
        "post": (4, 3),
    }
    seen: list[tuple[str, int, int]] = []
    whole, errors = fit_value_network(KNAPSACK, **words, **options, on_step=lambda *step: seen.append(step))
    options["checkpoint"] = tmp_path

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("epochs", 15):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_value_network(KNAPSACK, **words, **options, on_step=stop)
    again, same = fit_value_network(KNAPSACK, **words, **options)
    assert same == errors
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert seen == [*(("labels", i, 4) for i in range(1, 5)), *(("epochs", i, 22) for i in range(1, 23))]
