"""Pairs, losses, training and folders of rankers, on a small written collection."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from ir_robust.collection import Collection
from ir_robust.formats import Run, ordered
from ir_robust.rankers import DRMM, KNRM, BagRanker, random_vectors, training, vocabulary_of
from ir_robust.rankers.saved import load_saved, save_ranker
from ir_robust.rankers.training import Pairs, Pairwise, fit_ranker, hinge, ranknet, training_pairs
from robust_core.errors import DataMissingError, UntrustedFileError

TOPICS = {
    "air": "wing lift drag flow speed plate".split(),
    "sea": "ship hull wave keel sail rudder".split(),
    "sky": "star moon comet orbit planet sun".split(),
}
NAMES = list(TOPICS)


def collection() -> Collection:
    """Queries name a topic by one of its words; relevant documents are of the topic but lack that word."""
    docs, queries, qrels = {}, {}, {}
    for t, (name, words) in enumerate(TOPICS.items()):
        for i in range(6):
            mixed = [w for j, w in enumerate(words) if j != i] + [TOPICS[NAMES[(t + 1) % 3]][i]]
            docs[f"{name}{i}"] = " ".join(["The", *mixed])
        for i, word in enumerate(words):
            queries[f"q-{name}-{i}"] = f"the {word}"
            qrels[f"q-{name}-{i}"] = {f"{name}{i}": 2, f"{name}{(i + 1) % 6}": 1}
    return Collection(docs, queries, qrels)


def first_stage(data: Collection) -> Run:
    return {qid: {docno: float(-i) for i, docno in enumerate(data.docs)} for qid in data.queries}


DATA = collection()
RUN = first_stage(DATA)


def ranker() -> BagRanker:
    return BagRanker(random_vectors(vocabulary_of(DATA.docs.values()), 16, generator=2), dim=8, generator=1)


@pytest.mark.quick
def test_losses_in_closed_form() -> None:
    better, worse = torch.tensor([2.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    assert float(hinge(better, worse)) == pytest.approx((0 + 2 + 1) / 3)
    assert float(hinge(better, worse, 3.0)) == pytest.approx((1 + 4 + 3) / 3)
    wanted = sum(math.log1p(math.exp(d)) for d in (-2, 1, 0)) / 3
    assert float(ranknet(better, worse)) == pytest.approx(wanted)


@pytest.mark.quick
def test_pairs_put_a_higher_grade_above_one_of_the_chosen_ranks() -> None:
    pairs = training_pairs(DATA, RUN, ranks=(3, 12), n_negatives=4, generator=5)
    assert len(set(pairs.triples)) == len(pairs)
    for qid, up, down in pairs.triples:
        assert DATA.qrels[qid].get(down, 0) < DATA.qrels[qid][up]
        assert 3 <= ordered(RUN[qid]).index(down) + 1 <= 12
    assert {(q, up) for q, up, _ in pairs.triples} == {(q, d) for q in DATA.queries for d in DATA.qrels[q]}
    one = [t for t in pairs.triples if t[0] == "q-sea-2"]
    assert (
        list(training_pairs(DATA, RUN, queries=["q-sea-2"], ranks=(3, 12), n_negatives=4, generator=5).triples) == one
    )
    assert training_pairs(DATA, RUN, ranks=(3, 12), n_negatives=4, generator=6) != pairs


def test_relevant_documents_that_the_list_lacks_are_left_out_unless_asked_for() -> None:
    run = {"q-air-0": {"air1": 3.0, "sea1": 2.0, "sky1": 1.0}}
    found = training_pairs(DATA, run, queries=["q-air-0"], ranks=(1, 3))
    assert {up for _, up, _ in found.triples} == {"air1"}
    found = training_pairs(DATA, run, queries=["q-air-0"], ranks=(1, 3), listed=False)
    assert {up for _, up, _ in found.triples} == {"air0", "air1"}


@pytest.mark.parametrize("kind", [KNRM, DRMM])
def test_training_on_kept_features_is_training_on_words(
    kind: type[KNRM | DRMM], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = random_vectors(vocabulary_of(DATA.docs.values()), 16, generator=2)
    pairs, models = training_pairs(DATA, RUN, ranks=(1, 18)), []
    for most in (10**6, 0):
        monkeypatch.setattr(training, "MOST_KEPT", most)
        models.append(kind(vectors, generator=1))
        before = [p.clone() for p in models[-1].parameters()]
        fit_ranker(models[-1], DATA, pairs, epochs=2, lr=0.01, augment=Noise(), fresh=True)
        assert any(not torch.equal(a, b) for a, b in zip(before, models[-1].parameters(), strict=True))
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="or features"):
        models[0]()


def test_no_pairs_and_bad_numbers() -> None:
    with pytest.raises(ValueError, match="at ranks 30 to 40"):
        training_pairs(DATA, RUN, ranks=(30, 40))
    with pytest.raises(ValueError, match="no list"):
        training_pairs(DATA, {}, ranks=(1, 5))
    with pytest.raises(ValueError, match="n_negatives=0"):
        training_pairs(DATA, RUN, n_negatives=0)
    with pytest.raises(ValueError, match="loss='mse'"):
        fit_ranker(ranker(), DATA, training_pairs(DATA, RUN), loss="mse")
    with pytest.raises(TypeError, match="prepare"):
        fit_ranker(lambda q, d: [0.0] * len(d), DATA, training_pairs(DATA, RUN))


@pytest.mark.parametrize("loss", ["hinge", "ranknet"])
def test_training_puts_pairs_in_order_and_repeats_itself(loss: str) -> None:
    pairs = training_pairs(DATA, RUN, ranks=(1, 18), n_negatives=6)
    steps: list[tuple[str, int, int]] = []
    models = [ranker(), ranker()]

    def tell(name: str, step: int, n_steps: int) -> None:
        steps.append((name, step, n_steps))

    for model in models:
        fit_ranker(
            model,
            DATA,
            pairs,
            loss=loss,
            epochs=12,
            lr=0.03,
            batch_size=32,
            generator=3,
            on_step=tell,
        )
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert steps[-1] == ("train", steps[-1][2], steps[-1][2])

    def right(model: BagRanker) -> float:
        with torch.no_grad():
            found = [model.score(DATA.queries[q], [DATA.docs[up], DATA.docs[down]]) for q, up, down in pairs.triples]
        return sum(float(s[0]) > float(s[1]) for s in found) / len(found)

    assert right(models[0]) > max(0.85, right(ranker()) + 0.2)


def test_a_run_that_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    pairs = training_pairs(DATA, RUN, ranks=(1, 18))

    class StopError(Exception):
        pass

    def stop(name: str, step: int, steps: int) -> None:
        if step == 5:
            raise StopError

    whole, broken = ranker(), ranker()
    fit_ranker(whole, DATA, pairs, epochs=2)
    options = {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(StopError):
        fit_ranker(broken, DATA, pairs, epochs=2, on_step=stop, **options)
    fresh = ranker()
    fit_ranker(fresh, DATA, pairs, epochs=2, **options)
    assert torch.equal(whole.project, fresh.project)


class Noise:
    """Stands for any augmentation: it says which copies it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, docs: Mapping[str, str], *, copy: int = 0) -> dict[str, str]:
        self.asked.append(copy)
        return {docno: f"{text} noise{copy}" for docno, text in docs.items()}


def test_augmented_documents_come_once_or_for_each_epoch() -> None:
    pairs, model = training_pairs(DATA, RUN, ranks=(1, 18)), ranker()
    once, each = Noise(), Noise()
    fit_ranker(model, DATA, pairs, epochs=3, augment=once)
    fit_ranker(model, DATA, pairs, epochs=3, augment=each, fresh=True)
    assert once.asked == [0]
    assert sorted(set(each.asked)) == [0, 1, 2]
    with pytest.raises(ValueError, match="are gone"):
        Pairwise(model, ["x"], DATA.docs, augment=lambda docs, copy: {})


def test_the_objective_is_the_loss_of_its_pairs() -> None:
    model, triples = ranker(), [("q-air-0", "air0", "sea1"), ("q-sky-1", "sky1", "air3")]
    asked = ["q-air-0", "q-sky-1"]
    docs = {d: DATA.docs[d] for d in ("air0", "sea1", "sky1", "air3")}
    objective = Pairwise(model, [DATA.queries[q] for q in asked], docs)
    found = objective(model, {"x": torch.tensor([[0, 0, 1], [1, 2, 3]])})
    gaps = [
        float(torch.relu(1 - s[0] + s[1]).detach())
        for s in (model.score(DATA.queries[q], [DATA.docs[u], DATA.docs[d]]) for q, u, d in triples)
    ]
    assert float(found.total.detach()) == pytest.approx(sum(gaps) / 2, rel=1e-4)
    assert not list(objective.parameters())


@pytest.mark.quick
def test_a_saved_ranker_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = ranker()
    save_ranker(tmp_path / "saved", model, {"epochs": 3})
    found = load_saved(tmp_path / "saved")
    assert isinstance(found, BagRanker)
    docs = list(DATA.docs.values())
    with torch.no_grad():
        assert torch.equal(found.score("the wing", docs), model.score("the wing", docs))
    assert json.loads((tmp_path / "saved" / "ranker.json").read_text())["about"] == {"epochs": 3}


def test_folders_that_are_not_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"ranker\.json"):
        load_saved(tmp_path)
    with pytest.raises(TypeError, match="only those of this package"):
        save_ranker(tmp_path / "other", object())
    place = tmp_path / "saved"
    save_ranker(place, ranker())
    whole = (place / "weights.safetensors").read_bytes()
    for name, content, words in (
        ("weights.safetensors", b"\x80\x04K\x01.", "pickle"),
        ("weights.safetensors", whole[:-8], "bytes"),
        ("vocabulary.json", json.dumps(["one"]).encode(), "for 3 words"),
        ("vocabulary.json", b'["one", "one"]', "distinct"),
        ("ranker.json", b"[]", "does not describe"),
        ("ranker.json", b'{"schema": "robust.ranker/1", "kind": "os", "config": {}}', "none of"),
        ("ranker.json", b'{"schema": "robust.ranker/1", "kind": "bag", "config": {"dim": 3}}', "do not fit"),
        ("ranker.json", b'{"schema": "robust.ranker/1", "kind": "bag", "config": {"x": 3}}', "do not fit"),
    ):
        before = (place / name).read_bytes()
        (place / name).write_bytes(content)
        with pytest.raises(UntrustedFileError, match=words):
            load_saved(place)
        (place / name).write_bytes(before)
    assert isinstance(load_saved(place), BagRanker)


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    model = ranker()
    with torch.no_grad():
        model.project[0, 0] = math.nan
    save_ranker(tmp_path, model)
    with pytest.raises(UntrustedFileError, match="NaN"):
        load_saved(tmp_path)


def test_pairs_know_their_number() -> None:
    assert len(Pairs((("q", "a", "b"),))) == 1
