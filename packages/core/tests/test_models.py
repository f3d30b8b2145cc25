import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_core.models import (
    Normalize,
    PassCounter,
    fingerprint,
    frozen,
    model_device,
    padded,
    predict_logits,
)


def _cnn():
    first = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    second = (nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Dropout(0.5), nn.Linear(256, 10))


def _attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Flatten(0, 1), layer, nn.Flatten(), nn.Linear(64, 5))  # the rows of an image are its tokens


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 7)),
    "cnn": _cnn,
    "attention": _attention,
}


def network(name, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name]()


def images(n, seed=0, dtype=torch.float32):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def states(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.quick
def test_frozen_leaves_everything_as_found_even_after_an_error():
    model = network("cnn")
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = states(model)
    with frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert states(model) == before
    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        raise RuntimeError("inside")
    assert states(model) == before
    with frozen(model), frozen(model):
        pass
    assert states(model) == before


def test_frozen_keeps_gradients_clean_and_passes_callables_through():
    model = network("mlp")
    x = images(4).requires_grad_(True)
    with frozen(model):
        model(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())
    with frozen(lambda x: x):
        pass


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 200))
def test_padding_repeats_the_last_row_up_to_a_multiple(n):
    x = images(n)
    wide = padded(x)
    assert len(wide) >= 16
    assert len(wide) % 8 == 0
    assert len(wide) - n < 16
    assert torch.equal(wide[:n], x)
    assert bool((wide[n:] == x[-1]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_padded_rows_have_the_same_bits_in_any_company(name, dtype):
    """The promise behind every seed: batch size, order and neighbours change no bit of a row."""
    model = network(name).to(dtype).eval()
    x = images(80, dtype=dtype)
    with torch.no_grad():
        alone = torch.cat([model(padded(x[i : i + 1]))[:1] for i in range(24)])
        for size in (*range(1, 34), 40, 47, 64, 65, 80):
            logits = model(padded(x[:size]))[:size]
            assert torch.equal(logits[:24], alone[:size]), size
        turned = model(padded(x.flip(0)))
        assert torch.equal(turned.flip(0)[:24], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_padded_rows_have_the_same_gradient_bits_in_any_company(name, dtype):
    model = network(name).to(dtype).eval()
    x = images(40, dtype=dtype)

    def gradient(rows):
        point = rows.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(model(padded(point))[: len(rows)].logsumexp(1).sum(), point)
        return found

    alone = torch.cat([gradient(x[i : i + 1]) for i in range(8)])
    for size in (8, 9, 15, 16, 17, 24, 31, 40):
        assert torch.equal(gradient(x[:size])[:7], alone[:7]), size


@pytest.mark.quick
def test_predictions_do_not_depend_on_the_batch_size_and_leave_the_model_alone():
    model = network("cnn").train()
    before, state = states(model), copy.deepcopy(model.state_dict())
    x = images(37)
    whole = predict_logits(model, x)
    for size in (1, 5, 16, 37, 100):
        assert torch.equal(predict_logits(model, x, batch_size=size), whole)
    assert not whole.requires_grad
    assert states(model) == before
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_models_that_are_no_classifiers_are_named():
    for model in (lambda x: x, lambda x: (x, x), lambda x: x.sum()):
        with pytest.raises(ValueError, match="logits"):
            predict_logits(model, images(2))


@pytest.mark.quick
def test_normalisation_is_a_layer():
    layer = Normalize([0.5, 0.2], [2.0, 4.0])
    x = torch.rand(3, 2, 4, 4)
    expected = torch.stack([(x[:, 0] - 0.5) / 2, (x[:, 1] - 0.2) / 4], 1)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x.double()).dtype == torch.float64
    assert layer(torch.rand(3, 2)).shape == (3, 2)
    assert set(layer.state_dict()) == {"mean", "std"}
    for mean, std in (([0.5], [0.0]), ([0.5], [1.0, 1.0]), ([], []), ([0.5], [-1.0])):
        with pytest.raises(ValueError, match="std"):
            Normalize(mean, std)


@pytest.mark.quick
def test_fingerprints_tell_networks_apart():
    model = network("cnn")
    base = fingerprint(model)
    assert len(base) == 64
    assert fingerprint(copy.deepcopy(model)) == base
    moved = copy.deepcopy(model)
    moved[0].weight.data[0, 0, 0, 0] += 1e-7
    buffer = copy.deepcopy(model)
    buffer[1].running_mean += 1
    others = [moved, buffer, copy.deepcopy(model).double(), network("mlp"), nn.Sequential(*model, nn.ReLU())]
    assert len({base, *map(fingerprint, others)}) == len(others) + 1
    assert fingerprint(torch.relu) != fingerprint(torch.tanh)


def test_a_fingerprint_does_not_heed_where_a_checkpoint_was_found():
    here, there, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    there.load_state_dict(here.state_dict())
    other.load_state_dict(here.state_dict())
    here.name_or_path, there.name_or_path = "here", "there"
    here._loaded_with, other.temperature = "mmap", 2.0
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint(here) != fingerprint(other)


def test_devices():
    assert model_device(network("linear")) == torch.device("cpu")
    assert model_device(nn.ReLU()) is None
    assert model_device(torch.relu) is None
    assert model_device(Normalize([0.5], [0.5])) == torch.device("cpu")


@pytest.mark.quick
def test_passes_are_counted_in_samples():
    counter = PassCounter(network("linear"))
    x = images(5).requires_grad_(True)
    counter(x).sum().backward()
    counter(images(3))
    with torch.no_grad():
        counter(images(2))
    assert (counter.forwards, counter.backwards) == (10, 5)
