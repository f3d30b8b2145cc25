from dataclasses import replace

import numpy as np
import pytest
import torch

from robust_core.attacks.zeroth_order import ArrayModel, ZerothOrder
from robust_core.testing.tiny import digits, digits_cnn, linear_binary
from robust_core.threats import L1, L2, Linf


def _problem(dtype=torch.float32):
    model = linear_binary(12).to(dtype)
    x = 0.45 + 0.1 * torch.rand(24, 12, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return model, x, model(x).argmax(1)


@pytest.mark.quick
@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_succeeds_only_inside_the_distance_of_a_linear_model(kind):
    model, x, y = _problem()
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    exact = (model(x)[:, 1] - model(x)[:, 0]).detach().abs() / kind.dual_norm(w[None])
    threat = kind(float(exact.median()), domain=None)
    result = ZerothOrder(threat).run(model, x, y)
    assert not result.success[exact > threat.eps].any()
    assert result.success[exact < 0.9 * threat.eps].double().mean() > 0.85
    assert result.backwards == 0


@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_stays_inside_in_every_dtype(kind, dtype):
    model, x, y = _problem(dtype)
    x_adv = ZerothOrder(kind(0.03), n_iter=5, n_directions=2)(model, x, y)
    assert x_adv.dtype == dtype
    assert kind(0.03).contains(x_adv, x).all()


def test_batch_size_and_order_do_not_matter():
    x, y = (part[:20] for part in digits())
    model = digits_cnn()
    attack = ZerothOrder(L2(0.5), n_iter=6, n_directions=3)
    whole = attack(model, x, y, generator=2)
    for batch_size in (1, 7):
        assert torch.equal(replace(attack, batch_size=batch_size)(model, x, y, generator=2), whole)
    order = torch.arange(len(x) - 1, -1, -1)
    assert torch.equal(attack(model, x[order], y[order], index=order, generator=2)[order], whole)


def test_attacks_a_function_of_arrays_and_counts_its_queries():
    rows = []

    def scores(images: np.ndarray) -> np.ndarray:
        rows.append(len(images))
        dark = images.reshape(len(images), -1).mean(1)
        return np.stack([dark, 0.9 - dark], 1)

    x, y = np.full((3, 1, 4, 5), 0.5, dtype=np.float32), np.zeros(3, dtype=np.int64)
    attack = ZerothOrder(Linf(0.08), n_iter=40, n_directions=6)
    result = attack.run(ArrayModel(scores), torch.from_numpy(x), torch.from_numpy(y))
    assert result.success.all()
    assert result.forwards == sum(rows)
    stuck = replace(attack, threat=Linf(0.01), n_iter=4)
    rows.clear()
    assert not stuck.run(ArrayModel(scores), torch.from_numpy(x), torch.from_numpy(y)).success.any()
    assert sum(rows) == 16 * (4 + 3 * 2 * 6 + 1)  # 4 points, a slope after each but the last, the final check


def test_refuses_bad_settings():
    for bad in ({"n_iter": 0}, {"n_directions": 0}, {"spread": 0.0}, {"momentum": 1.0}, {"step_size": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ZerothOrder(Linf(0.1), **bad)
    with pytest.raises(TypeError, match="callable"):
        ArrayModel(3)
