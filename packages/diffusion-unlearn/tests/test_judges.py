"""Judges say what their rule says, refuse what cannot be judged, and are refused where they say nonsense."""

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusion_unlearn.digits import digit_images
from diffusion_unlearn.judges import ClassifierJudge, Judge, JudgeError, Verdict, ask, facts, judge_digit


class Colours(nn.Module):
    """Logits are the means of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.scale


@pytest.mark.quick
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    rows=st.lists(st.lists(st.integers(0, 64), min_size=5, max_size=5, unique=True), min_size=1, max_size=6),
    k=st.integers(1, 3),
    concept=st.sets(st.integers(0, 4), min_size=1, max_size=2),
)
def test_a_hit_is_a_place_among_the_best(rows: list[list[int]], k: int, concept: set[int]) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    images = (logits / 64)[:, None, None, :].clone()

    def classify(x: Tensor) -> Tensor:
        return x[:, 0, 0]

    found = ask(ClassifierJudge(classify, sorted(concept), top_k=k), images)
    for row, hit in zip(rows, found.hit.tolist(), strict=True):
        best = max(row[c] for c in concept)
        others = [value for c, value in enumerate(row) if c not in concept]
        assert hit == (sum(value > best for value in others) < k)
    assert torch.equal(found.hit, found.score > 0)


def test_a_threshold_is_on_the_probability_of_all_classes_of_the_concept() -> None:
    x = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    judge = ClassifierJudge(Colours(), (0, 2), threshold=0.7)
    probability = Colours()(x).softmax(1)
    found = ask(judge, x)
    assert torch.allclose(found.score.float(), probability[:, 0] + probability[:, 2], atol=1e-6)
    assert torch.equal(found.hit, found.score > 0.7)
    assert 0 < int(found.hit.sum()) < 40


@pytest.mark.quick
def test_digits_are_seen_as_what_they_are() -> None:
    images, labels = digit_images()
    for concept, digit in (("drei", 3), (7, 7)):
        judge = judge_digit(concept)
        assert isinstance(judge, Judge)
        assert torch.equal(ask(judge, images[:300]).hit, labels[:300] == digit)
        three_channels = images[:50].expand(-1, 3, -1, -1)
        assert torch.equal(ask(judge, three_channels).hit, labels[:50] == digit)
    assert facts(judge_digit(3)) == {"name": "digits-svc", "version": "1", "threshold": 0.0, "rule": "class 3 is first"}
    elsewhere = pickle.loads(pickle.dumps(judge_digit("three")))  # noqa: S301 - our own bytes, as a worker gets them
    assert torch.equal(elsewhere(images[:9]).score, judge_digit(3)(images[:9]).score)


def test_estimators_of_scikit_learn_are_classifiers() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    images, labels = digit_images()
    x, y = images[:400], labels[:400]
    sure: Any = LogisticRegression(max_iter=300).fit(x.flatten(1).numpy(), y.numpy())
    told = sure.predict_proba(x.flatten(1).double().numpy())[:, 4]
    found = ask(ClassifierJudge(sure, 4, threshold=0.5), x)
    assert torch.allclose(found.score, torch.from_numpy(told), atol=1e-9)
    two: Any = LinearSVC().fit(x.flatten(1).numpy(), (y == 4).numpy())
    assert ask(ClassifierJudge(two, 1), x).hit.tolist() == two.predict(x.flatten(1).double().numpy()).tolist()


def test_a_verdict_does_not_depend_on_the_batch_and_leaves_the_network_as_found() -> None:
    x = torch.rand(21, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network = Colours().train()
    whole = ClassifierJudge(network, 1)(x).score
    assert torch.equal(whole, ClassifierJudge(network, 1, batch_size=4)(x).score)
    assert network.training
    assert network.scale.requires_grad
    assert ClassifierJudge(network, 1).version == ClassifierJudge(Colours(), 1).version
    network.scale.data += 1
    assert ClassifierJudge(network, 1).version != ClassifierJudge(Colours(), 1).version


def test_pictures_are_brought_to_the_size_of_the_network() -> None:
    seen: list[tuple[int, ...]] = []

    def classify(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[1:]))
        return x.mean((2, 3))

    judge = ClassifierJudge(classify, 0, size=4)
    judge(torch.rand(2, 3, 9, 7))
    assert judge.rule == "class 0 is first, at 4 x 4"
    assert seen == [(3, 4, 4)]


class Odd:
    name, version, threshold, rule = "odd", "1", 0.0, "none"

    def __init__(self, verdict: Any) -> None:
        self.verdict = verdict

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Verdict:
        return self.verdict


@pytest.mark.quick
def test_what_cannot_be_judged_is_refused() -> None:
    good = torch.rand(2, 3, 4, 4)
    judge = ClassifierJudge(Colours(), 0)
    for bad, why in ((good * 2, "outside the domain"), (good[:, :2], "is needed"), (good[:0], "at least one sample")):
        with pytest.raises(ValueError, match=why):
            ask(judge, bad)
    with pytest.raises(TypeError, match="uint8"):
        ask(judge, (good * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        ask(judge, torch.full_like(good, torch.nan))
    with pytest.raises(ValueError, match="one each is needed"):
        ask(judge, good, ["one"])
    for verdict, why in (
        (None, "a Verdict is needed"),
        (Verdict(torch.zeros(3), torch.zeros(3, dtype=torch.bool)), "for 2 images"),
        (Verdict(torch.zeros(2), torch.zeros(2)), "one bool each"),
        (Verdict(torch.full((2,), torch.nan), torch.zeros(2, dtype=torch.bool)), "NaN for 2 images"),
    ):
        with pytest.raises(JudgeError, match=why):
            ask(Odd(verdict), good)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        ClassifierJudge(Colours(), 0, top_k=1, threshold=0.5)
    with pytest.raises(ValueError, match="different columns"):
        ClassifierJudge(Colours(), [])
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        ClassifierJudge(Colours(), 0, threshold=1.5)
    with pytest.raises(TypeError, match="callable on images"):
        ClassifierJudge(3, 0)
    with pytest.raises(ValueError, match="the classifier knows"):
        ClassifierJudge(Colours(), 3)(torch.rand(1, 3, 2, 2))
    with pytest.raises(ValueError, match="all would be hits"):
        ClassifierJudge(Colours(), 0, top_k=3)(torch.rand(1, 3, 2, 2))
    with pytest.raises(ValueError, match="one of its names"):
        judge_digit("eleven")
