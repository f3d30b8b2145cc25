"""Learners in the field: merged is pooled, nothing is forgotten, bytes are counted, baselines keep the protocol."""

from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from optim_robust.byzantine.coordinates import median
from optim_robust.federated.reconnaissance import (
    EmbeddingStore,
    EpisodeSampler,
    FedAvg,
    ICaRL,
    JointRetraining,
    PrototypeClassifier,
    Prototypical,
    SequentialFineTuning,
    conv_encoder,
    plan_missions,
    prototypical_loss,
    run_missions,
    summarise,
    traffic_bytes,
)
from optim_robust.federated.reconnaissance.baselines import herd
from optim_robust.federated.reconnaissance.episodes import squared_distances
from robust_core.data import load
from robust_core.errors import RobustError
from robust_core.training import fit

BASE, FIELD = range(5), range(5, 10)


@cache
def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    train, test = load("digits", "train"), load("digits", "test")
    return (train.x, train.y), (test.x, test.y)


@cache
def _encoder() -> nn.Module:
    (x, y), _ = _digits()
    rows = (y < 5).nonzero().flatten()[:400]
    encoder = conv_encoder(1, 16, blocks=2, generator=0)
    sampler = EpisodeSampler(y[rows], 5, 3, queries=5)
    fit(encoder, (x[rows], y[rows]), Prototypical(3), epochs=3, batch_size=sampler.size, order=sampler)
    return encoder.eval()


def _server(**settings: object) -> PrototypeClassifier:
    (x, y), _ = _digits()
    server = PrototypeClassifier(_encoder(), **settings)  # pyright: ignore[reportArgumentType]
    server.learn(x[y < 5], y[y < 5])
    return server


def _plan(missions: int = 3) -> list[list[Tensor]]:
    (_, y), _ = _digits()
    return plan_missions(y, FIELD, clients=3, classes_per_mission=2, shots=10, missions=missions, generator=4)


# -- episodes --------------------------------------------------------------------------------------------------


def test_the_episode_loss_is_cross_entropy_over_distances_to_means() -> None:
    g = torch.Generator().manual_seed(0)
    support, query = torch.randn(6, 4, generator=g).double(), torch.randn(5, 4, generator=g).double()
    labels, asked = torch.tensor([7, 2, 7, 2, 9, 9]), torch.tensor([2, 9, 7, 7, 2])
    means = torch.stack([support[labels == c].mean(0) for c in (2, 7, 9)])
    logits = -torch.cdist(query, means).square()
    slow = torch.stack([logits[i].logsumexp(0) - logits[i, [2, 7, 9].index(int(c))] for i, c in enumerate(asked)])
    assert torch.allclose(prototypical_loss(support, labels, query, asked), slow.mean(), atol=1e-12)


def test_its_gradient_is_the_closed_form() -> None:
    g = torch.Generator().manual_seed(1)
    support, query = torch.randn(4, 3, generator=g).double(), torch.randn(2, 3, generator=g).double()
    labels, asked = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    query.requires_grad_(True)
    prototypical_loss(support, labels, query, asked).backward()
    means = torch.stack([support[labels == c].mean(0) for c in (0, 1)])
    p = (-squared_distances(query.detach(), means)).softmax(1)
    weights = (p - torch.eye(2).double()[asked]) / 2  # d loss / d logit
    expected = torch.einsum("qc,qcd->qd", weights, -2 * (query.detach()[:, None] - means))
    assert query.grad is not None
    assert torch.allclose(query.grad, expected, atol=1e-12)


def test_distances_survive_a_large_offset() -> None:
    g = torch.Generator().manual_seed(2)
    x, c = torch.randn(8, 16, generator=g) + 1e4, torch.randn(3, 16, generator=g) + 1e4
    exact = torch.cdist(x.double(), c.double()).square()
    assert (squared_distances(x, c) - exact).abs().max() < 0.05
    assert float(squared_distances(c, c).diagonal().min()) >= 0


@pytest.mark.quick
def test_batches_of_fit_are_episodes() -> None:
    (_, y), _ = _digits()
    sampler = EpisodeSampler(y, 4, 2, queries=3)
    order = sampler(11, 0, 105)
    for rows in order.split(sampler.size)[:-1]:
        labels = y[rows].unflatten(0, (4, 5))
        assert bool((labels == labels[:, :1]).all())
        assert len(labels[:, 0].unique()) == 4
        assert len(rows.unique()) == 20
    assert torch.equal(order, sampler(11, 0, 105))
    assert not torch.equal(order, sampler(11, 1, 105))
    support, query = next(iter(sampler))
    assert (len(support), len(query)) == (8, 12)
    with pytest.raises(ValueError, match="ways=11"):
        EpisodeSampler(y, 11)


def test_the_objective_splits_a_batch_and_lives_with_a_cut_one() -> None:
    model = nn.Flatten()
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 1])
    expected = prototypical_loss(x[[0, 1, 3, 4]], y[[0, 1, 3, 4]], x[[2, 5]], y[[2, 5]])
    assert torch.equal(Prototypical(2)(model, {"x": x, "y": y}).total, expected)
    assert float(Prototypical(2)(model, {"x": x[:1], "y": y[:1]}).total) == 0.0
    assert bool(torch.isfinite(Prototypical(5)(model, {"x": x[:5], "y": y[:5]}).total))


@pytest.mark.parametrize(("side", "channels", "features"), [(84, 3, 1600), (28, 1, 64)])
def test_the_encoder_has_the_papers_shapes(side: int, channels: int, features: int) -> None:
    """Two steps of the paper's episodes on images of its size."""
    g = torch.Generator().manual_seed(0)
    encoder = conv_encoder(channels, generator=0)
    x, y = torch.rand(40, channels, side, side, generator=g), torch.arange(40) % 5
    sampler = EpisodeSampler(y, 5, 2, queries=2)
    state = fit(encoder, (x, y), Prototypical(2), epochs=1, order=sampler, batch_size=sampler.size,
                optimiser=partial(torch.optim.Adam, lr=1e-3))  # fmt: skip
    assert state.step >= 2
    assert encoder(x[:2]).shape == (2, features)


# -- the classifier --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_after_missions_the_server_is_the_pooled_classifier(dtype: torch.dtype) -> None:
    (x, y), test = _digits()
    encoder = copy.deepcopy(_encoder()).to(dtype)
    server, pooled = PrototypeClassifier(encoder), PrototypeClassifier(encoder)
    server.learn(x[y < 5].to(dtype), y[y < 5])
    plan = _plan()
    run_missions(server, (x.to(dtype), y), (test[0].to(dtype), test[1]), plan, base=BASE, evaluate="last")
    rows = torch.cat([(y < 5).nonzero().flatten(), *(rows for mission in plan for rows in mission)])
    pooled.learn(x[rows].to(dtype), y[rows])
    assert torch.equal(server.count, pooled.count)
    assert (server.mean - pooled.mean).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.equal(server.predict(test[0].to(dtype)), pooled.predict(test[0].to(dtype)))


def test_base_prototypes_keep_their_bits_and_the_embedding_store_agrees() -> None:
    train, test = _digits()
    server, store = _server(), EmbeddingStore(_encoder())
    before = server.mean.clone()
    store.learn(train[0][train[1] < 5], train[1][train[1] < 5])
    records = run_missions(server, train, test, _plan(), base=BASE)
    kept = run_missions(store, train, test, _plan(), base=BASE)
    assert torch.equal(server.mean[:5], before)
    assert (store.state.mean - server.mean).abs().max() < 1e-5
    assert [r.overall for r in records] == [r.overall for r in kept]
    assert records[-1].bytes_up < kept[-1].bytes_up


def test_records_speak_of_their_groups() -> None:
    train, test = _digits()
    records = run_missions(_server(), train, test, _plan(), base=BASE)
    assert [r.mission for r in records] == [0, 1, 2, 3]
    first, second = records[0], records[1]
    assert first.base > 0.8
    assert first.field != first.field
    assert first.clients == ()
    assert all(alone[1] != alone[1] and alone[2] > 0.5 for alone in second.clients)
    assert second.e1[0] == pytest.approx((second.clients[0][0] + second.clients[0][2]) / 2)
    assert records[-1].overall > 0.7


def test_bytes_are_those_of_the_tensors_whatever_the_number_of_examples() -> None:
    (x, y), _ = _digits()
    server = _server()
    sizes = []
    for shots in (1, 30):
        client = server.fork()
        rows = (y == 7).nonzero().flatten()[:shots]
        client.learn(x[rows], y[rows])
        sizes.append(traffic_bytes(client.delta()))
    assert sizes == [server.mean.shape[1] * 4 + 8 + 8] * 2
    assert traffic_bytes(server.fork().delta()) == 0
    with pytest.raises(TypeError, match="int"):
        traffic_bytes({"n": 3})


def test_a_client_without_data_sends_nothing_and_changes_nothing() -> None:
    (x, y), _ = _digits()
    server = _server()
    client = server.fork()
    client.learn(x[:0], y[:0])
    before = server.mean.clone()
    server.merge([client.delta(), None])
    assert torch.equal(server.mean, before)


def test_what_was_sent_is_not_sent_again() -> None:
    (x, y), _ = _digits()
    client = _server().fork()
    client.learn(x[y == 6], y[y == 6])
    client.delta_sent()
    client.learn(x[y == 7], y[y == 7])
    delta = client.delta()
    assert delta is not None
    assert delta.labels.tolist() == [7]


def test_a_liar_moves_the_mean_and_not_themedian() -> None:
    train, test = _digits()
    plan = plan_missions(train[1], FIELD, clients=5, classes_per_mission=5, shots=5, missions=2, generator=1)

    def lie(mission: int, client: int, message: object) -> object:
        if client:
            return message
        return type(message)(message.labels, -10 * message.mean, message.count)  # pyright: ignore

    clean = run_missions(_server(), train, test, plan, base=BASE, evaluate="last")[-1].field
    fooled = run_missions(_server(), train, test, plan, base=BASE, tamper=lie, evaluate="last")[-1].field
    robust = _server(rule=median, quorum=3)
    guarded = run_missions(robust, train, test, plan, base=BASE, tamper=lie, evaluate="last")[-1].field
    assert fooled < clean - 0.2
    assert guarded > clean - 0.1


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "mahalanobis"])
def test_saving_and_loading_keep_classes_counts_and_bits(distance: str) -> None:
    _, (x, _) = _digits()
    server = _server(distance=distance)
    twin = PrototypeClassifier(copy.deepcopy(_encoder()), distance)
    twin.load_state_dict(server.state_dict())
    assert torch.equal(twin.count, server.count)
    assert torch.equal(twin(x[:16]), server(x[:16]))
    state = server.state_dict()
    state["count"] = -state["count"]
    with pytest.raises(ValueError, match="from 1 on"):
        twin.load_state_dict(state)


def test_distances_are_what_they_say() -> None:
    _, (x, _) = _digits()
    server = _server(distance="mahalanobis")
    features = server.features(x[:4])
    gap = features[:, None] - server.mean
    variance = server.m2.sum(0) / (server.count.sum() - 5)
    variance = torch.where(variance > 0, variance, variance.mean())
    assert torch.allclose(server(x[:4]).double(), -(gap.double().square() / variance).sum(2), rtol=1e-3, atol=1e-3)
    server.distance = "cosine"
    expected = torch.cosine_similarity(features[:, None], server.mean, dim=2) - 1
    assert torch.allclose(server(x[:4]), expected, atol=1e-5)


def test_the_encoder_is_left_as_found_and_used_in_eval_mode() -> None:
    (x, y), _ = _digits()
    encoder = copy.deepcopy(_encoder()).train()
    statistics = encoder[1].running_mean.clone()  # pyright: ignore
    classifier = PrototypeClassifier(encoder)
    classifier.learn(x[:50], y[:50])
    classifier(x[:4])
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder[1].running_mean, statistics)  # pyright: ignore
    (gradient,) = torch.autograd.grad(classifier(point := x[:2].clone().requires_grad_(True)).sum(), point)
    assert bool((gradient != 0).any())


def test_bad_input_is_one_clear_error() -> None:
    (x, y), _ = _digits()
    empty = PrototypeClassifier(_encoder())
    with pytest.raises(RobustError, match="no class is known"):
        empty.predict(x[:2])
    with pytest.raises(ValueError, match="distance"):
        PrototypeClassifier(_encoder(), "manhattan")
    with pytest.raises(TypeError, match="Module"):
        PrototypeClassifier(lambda x: x)  # pyright: ignore
    with pytest.raises(ValueError, match="labels"):
        empty.learn(x[:3], torch.tensor([0, -1, 2]))
    with pytest.raises(ValueError, match="one encoder"):
        _server().merge([summarise(torch.ones(1, 3), torch.tensor([6]))])
    with pytest.raises(ValueError, match="no mission is possible"):
        plan_missions(y, FIELD, shots=1000)
    with pytest.raises(ValueError, match="evaluate"):
        run_missions(_server(), (x, y), (x, y), [], base=BASE, evaluate="never")


def test_plans_share_no_example_and_end_when_the_data_do() -> None:
    (_, y), _ = _digits()
    plan = plan_missions(y, FIELD, clients=2, classes_per_mission=3, shots=20, generator=0)
    rows = torch.cat([rows for mission in plan for rows in mission])
    assert len(rows) == len(rows.unique()) > 400
    assert set(y[rows].tolist()) == set(FIELD)
    assert len(plan_missions(y, FIELD, clients=2, missions=100, replacement=True)) == 100


# -- baselines -------------------------------------------------------------------------------------------------


def _baseline(name: str) -> SequentialFineTuning | JointRetraining | ICaRL | FedAvg:
    encoder = _encoder()
    dim = encoder(torch.zeros(1, 1, 8, 8)).shape[1]
    quick = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    kinds = {
        "fine-tuning": partial(SequentialFineTuning, epochs=4),
        "joint": partial(JointRetraining, epochs=4),
        "icarl": partial(ICaRL, budget=60, base_epochs=4, epochs=3, merge_epochs=4),
        "fedavg": partial(FedAvg, body=True, epochs=3),
    }
    return kinds[name](encoder, 10, dim, optimiser=quick, generator=0)


@pytest.mark.parametrize("name", ["fine-tuning", "joint", "icarl", "fedavg"])
def test_baselines_learn_and_keep_the_protocol(name: str) -> None:
    train, test = _digits()
    base = (train[1] < 5).nonzero().flatten()[:200]
    weights = copy.deepcopy(_encoder().state_dict())
    scores = []
    for _ in range(2):
        learner = _baseline(name)
        learner.learn(train[0][base], train[1][base])
        records = run_missions(learner, train, test, _plan(1), base=BASE)
        scores.append((records[-1].base, records[-1].field, records[-1].bytes_up))
    assert scores[0] == scores[1]
    assert records[0].base > 0.7
    assert all(torch.equal(weights[key], value) for key, value in _encoder().state_dict().items())
    base_after, field_after, sent = scores[0]
    if name == "fine-tuning":
        assert base_after < min(0.5, field_after)  # it forgets
    if name in ("joint", "icarl"):
        assert base_after > 0.7
    if name == "fedavg":
        assert sent > 3 * 4 * 2000


def test_herding_follows_the_mean() -> None:
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    chosen = herd(features, 10)
    assert len(chosen.unique()) == 10
    assert int(chosen[0]) == int((features - features.mean(0)).norm(dim=1).argmin())
    assert (features[chosen].mean(0) - features.mean(0)).norm() < 0.5 * features[:10].sub(features.mean(0)).mean(
        0
    ).norm()
    assert len(herd(features, 80)) == 50
