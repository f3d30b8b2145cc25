"""UnlearnDiffAtk and P4D are the published loops, step by step; attacks write what they say and count what they do."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_unlearn.attacks import (
    P4D,
    ConceptInversion,
    Drawing,
    Found,
    RandomPrefix,
    Scene,
    SeedSearch,
    Synonyms,
    Try,
    UnlearnDiffAtk,
    Writing,
)
from diffusion_unlearn.digits import build_pipeline
from diffusion_unlearn.judges import Verdict
from diffusion_unlearn.pipeline import TextToImage
from robust_core.attacks.tokens import Projected, Simplex
from robust_core.attacks.tokens.relaxed import Relaxed
from robust_core.random import SampleStreams


@dataclass
class Reader:
    """A judge that reads the prompt: a hit where it holds the word. Records what it saw."""

    word: str = "no such word"
    name: str = "reader"
    version: str = "1"
    threshold: float = 0.5
    rule: str = "the prompt holds a word"
    seen: list[str] = field(default_factory=list)

    def __call__(self, images: torch.Tensor, prompts: Any = None) -> Verdict:
        """Judge."""
        self.seen += list(prompts)
        score = torch.tensor([float(self.word in prompt) for prompt in prompts])
        return Verdict(score, score > self.threshold)


def scene(pipe: Any, judge: Any = None, texts: tuple[str, ...] = ("a photo of three", "three"), **more: Any) -> Scene:
    """Return prompts before the judge; pictures of the concept are noise."""
    parts, draws = TextToImage(pipe), torch.Generator().manual_seed(1)
    tries = [Try(text, 5 + i, 2.0) for i, text in enumerate(texts)]
    drawing = Drawing(parts, judge or Reader(), steps=2)
    latents = torch.randn(len(texts), 1, 8, 8, generator=draws)
    return Scene(parts, tries, range(10, 10 + len(texts)), drawing, latents=latents, **more)


def recorded(search: type[Relaxed], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the state after every step and, of Simplex, the columns that were drawn."""
    kept: list[dict[str, Any]] = []
    move = search.move

    def watched(self: Any, run: Any, options: Any, state: Any, step: int) -> Any:
        entry: dict[str, Any] = {"before": state["x"].clone()}
        if search is Simplex:
            entry["tokens"] = options.tokens(self._drawn(run, options, state, step))
        found = move(self, run, options, state, step)
        kept.append({**entry, "after": found["x"].clone()})
        return found

    monkeypatch.setattr(search, "move", watched)
    return kept


def noise_of(attack: Any, given: Scene, step: int) -> torch.Tensor:
    streams = SampleStreams(attack.seed(given), given.streams(), "noise")
    return streams.normal((attack.noise_batch, 1, 8, 8), chunk=step)


def nearest_on_simplex(u: torch.Tensor) -> torch.Tensor:
    """Project a row by bisection on mu with sum clip(u - mu, 0, 1) = 1."""
    low, high = float(u.min()) - 1, float(u.max())
    for _ in range(60):
        mu = (low + high) / 2
        low, high = (mu, high) if float((u - mu).clamp(0, 1).sum()) > 1 else (low, mu)
    return (u - (low + high) / 2).clamp(0, 1)


def test_unlearndiffatk_is_the_published_loop(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = UnlearnDiffAtk(k=2, timesteps=2, iterations=3, noise_batch=2)
    given, kept = scene(untrained), recorded(Simplex, monkeypatch)
    attack.run(given)
    parts, n_tokens = given.victim, len(untrained.tokenizer)
    marks = untrained.tokenizer.all_special_ids
    usable = torch.tensor([i for i in range(n_tokens) if i not in marks])
    table = parts.embedding_table.detach()[usable]
    for row, one in enumerate(given.tries):
        tokens = untrained.tokenizer(one.text).input_ids
        u = torch.full((2, len(usable)), 1 / len(usable), requires_grad=True)
        optimiser = torch.optim.Adam([u], lr=0.01, weight_decay=0.1)
        for step in range(6):
            drawn = kept[step]["tokens"][row]
            onehot = (usable == drawn[:, None]).float()
            straight = onehot + u - u.detach()
            straight.register_hook(lambda gradient: gradient.clamp(-1, 1))
            body = parts.embedding_table.detach()[torch.tensor(tokens)]
            filling = parts.embedding_table.detach()[untrained.tokenizer.pad_token_id].expand(10 - len(tokens), -1)
            vectors = torch.cat([body[:1], straight @ table, body[1:], filling])[None]
            told = parts.encode(ids=[torch.tensor([[*tokens[:1], 0, 0, *tokens[1:], *[251] * (10 - len(tokens))]])],
                                embeddings=vectors)  # fmt: skip
            noise, t = noise_of(attack, given, step)[row], torch.tensor((250, 750)[step // 3])
            assert given.latents is not None
            x_t = parts.noised(given.latents[row].expand(2, -1, -1, -1), noise, t)
            loss = (noise - parts.predict(x_t, t, told.expand(2))).square().mean()
            (u.grad,) = torch.autograd.grad(loss, u)  # the pipeline is shared: nothing is left on it
            optimiser.step()
            with torch.no_grad():
                u.copy_(torch.stack([nearest_on_simplex(r) for r in u]))
            ours = kept[step]["after"][row]
            assert ours[:, -1].eq(0).all() or ours.shape[1] == len(usable) + 1
            assert torch.allclose(ours[:, : len(usable)], u, atol=2e-5)


def test_p4d_is_the_published_loop(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, original = P4D(k=2, timesteps=1, iterations=4, noise_batch=2), build_pipeline(generator=3)
    given = scene(untrained, original=TextToImage(original))
    kept = recorded(Projected, monkeypatch)
    attack.run(given)
    parts, table = given.victim, given.victim.embedding_table.detach()
    usable = [i for i in range(len(table)) if i not in untrained.tokenizer.all_special_ids]
    row, (ids,) = 0, parts.ids([given.tries[0].text])
    ids = torch.cat([ids[:, :1], ids[:, :1], ids[:, :1], ids[:, 1:]], 1)[:, :12]
    vectors = kept[0]["before"][row].clone().requires_grad_(True)
    optimiser = torch.optim.Adam([vectors], lr=0.01, weight_decay=0.1)
    for step in range(4):
        cosine = torch.cosine_similarity(vectors.detach()[:, None], table[usable][None], dim=2)
        hard = table[usable][cosine.argmax(1)].clone().requires_grad_(True)
        whole = table[ids[0]].clone()
        told = parts.encode(ids=[ids], embeddings=torch.cat([whole[:1], hard, whole[3:]])[None])
        noise, t = noise_of(attack, given, step)[row], torch.tensor(500)
        assert given.latents is not None
        assert given.original is not None
        x_t = parts.noised(given.latents[row].expand(2, -1, -1, -1), noise, t)
        with torch.no_grad():
            wanted = given.original.predict(x_t, t, given.original.encode([given.tries[0].text]).expand(2))
        loss = (wanted - parts.predict(x_t, t, told.expand(2))).square().mean()
        (vectors.grad,) = torch.autograd.grad(loss, hard)
        optimiser.step()
        assert torch.allclose(kept[step]["after"][row], vectors.detach(), atol=2e-5)


def test_the_judge_sees_decoded_texts_once_for_each_time(untrained: Any) -> None:
    judge = Reader()
    given = scene(untrained, judge)
    found = UnlearnDiffAtk(k=2, timesteps=3, iterations=2).run(given)
    assert all(one.n_gradients == 6 for one in found)
    assert len(judge.seen) == given.drawing.n_drawn == sum(one.n_tries for one in found)
    assert 1 <= found[0].n_tries <= 3
    assert all(text not in [t.text for t in given.tries] for text in judge.seen)  # bare prompts are another's business
    assert not any("!" in text for text in judge.seen)  # nor is the filling ever drawn


def test_an_attack_stops_where_the_judge_sees_the_concept(untrained: Any) -> None:
    given = scene(untrained, Reader(word="photo"))
    first, second = UnlearnDiffAtk(k=2, timesteps=3, iterations=2).run(given)
    assert first.success
    assert "photo" in first.text
    assert first.n_gradients == 2
    assert first.n_tries == 1
    assert len(first.tokens) == 2
    assert second.success == ("photo" in second.text)


def test_attacks_do_not_depend_on_their_company(untrained: Any) -> None:
    attack = UnlearnDiffAtk(k=2, timesteps=2, iterations=3)
    together = scene(untrained)
    alone = scene(untrained)
    alone.tries, alone.index, alone.latents = alone.tries[1:], alone.index[1:], alone.latents[1:]  # pyright: ignore
    a, b = attack.run(together)[1], attack.run(alone)[0]
    assert (a.text, a.n_tries, a.tokens) == (b.text, b.n_tries, b.tokens)


def test_only_tokens_of_the_given_vocabulary_are_written(untrained: Any) -> None:
    words = ("drei", "tres", "paper")
    usable = tuple(int(TextToImage(untrained).ids([word])[0][0, 1]) for word in words)
    for attack in (
        UnlearnDiffAtk(k=2, timesteps=1, iterations=3, vocabulary=usable),
        RandomPrefix(k=2, n_tries=2, vocabulary=usable),
    ):
        judge = Reader()
        attack.run(scene(untrained, judge))
        assert judge.seen
        assert all({*text.split()} - {"a", "photo", "of", "three"} <= {*words} for text in judge.seen)


def test_nothing_is_changed_in_the_victim(untrained: Any) -> None:
    pipe = copy.deepcopy(untrained)
    pipe.unet.train()
    before = copy.deepcopy(pipe.unet.state_dict())
    given = scene(pipe, original=TextToImage(pipe))
    for attack in (UnlearnDiffAtk(k=1, timesteps=1, iterations=1), ConceptInversion(k=1, steps=2)):
        attack.run(given)
    assert pipe.unet.training
    assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("position", ["prefix", "suffix", "middle", "spread", "replace"])
def test_what_is_written_stands_where_it_should(untrained: Any, position: str) -> None:
    parts = TextToImage(untrained)
    writing = Writing.around(parts, ["a photo of three", "the digit two"], 2, position)
    assert writing.space.ids.shape == (2, 12)
    assert writing.space.slots.ge(0).sum(1).tolist() == [2, 2]
    words = {word: parts.ids([word])[0][0, 1] for word in ("drei", "tres")}
    ids = writing.space.ids.clone()
    ids[writing.space.slots >= 0] = torch.stack([words["drei"], words["tres"]] * 2)
    wanted = {
        "prefix": "drei tres a photo of three",
        "suffix": "a photo of three drei tres",
        "middle": "a photo drei tres of three",
        "spread": "a drei photo tres of three",
        "replace": "drei tres of three",
    }
    assert writing.texts(ids)[0] == wanted[position]
    assert writing.reads_back(ids) == [True, True]
    assert writing.written(ids, torch.arange(2)) == [[int(words["drei"]), int(words["tres"])]] * 2
    marks = set(untrained.tokenizer.all_special_ids)
    assert not marks & set(writing.space.table[0].tolist())


@pytest.mark.quick
def test_tokens_that_run_into_their_neighbours_are_not_read_back(untrained: Any) -> None:
    parts = TextToImage(untrained)
    writing = Writing.around(parts, ["three"], 2)
    ids, words = writing.space.ids.repeat(2, 1), untrained.tokenizer.get_vocab()
    ids[0, 1:3] = torch.tensor([words["t"], words["h"]])  # without an end of the word
    ids[1, 1:3] = torch.tensor([words["t</w>"], words["h</w>"]])
    assert writing.texts(ids) == ["ththree", "t h three"]
    assert writing.reads_back(ids) == [False, True]


def test_xl_is_written_for_both_encoders(tiny_xl: Callable[[], Any]) -> None:
    given = scene(tiny_xl())
    writing = Writing.around(given.victim, given.texts, 2)
    ids = writing.space.ids.clone()
    ids[:, 1:3] = torch.tensor([40, 41])
    rows = torch.arange(2)
    ours = writing.condition(torch.nn.functional.embedding(ids, writing.embedding), rows)
    theirs = given.victim.encode(ids=[ids, *(other.scatter(1, torch.tensor([[1, 2]] * 2), ids[:, 1:3])
                                             for other in writing.others)])  # fmt: skip
    assert torch.equal(ours.hidden, theirs.hidden)
    assert torch.equal(ours.pooled, theirs.pooled)  # pyright: ignore
    found = UnlearnDiffAtk(k=2, timesteps=1, iterations=2).run(given)
    assert [one.n_gradients for one in found] == [2, 2]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.integers(0, 249), min_size=1, max_size=4))
def test_what_reads_back_is_encoded_as_it_was_searched(untrained: Any, tokens: list[int]) -> None:
    parts = TextToImage(untrained)
    writing = Writing.around(parts, ["a photo of three"], len(tokens), "suffix")
    ids = writing.space.ids.clone()
    ids[writing.space.slots >= 0] = torch.tensor(tokens)
    (text,), (back,) = writing.texts(ids), writing.reads_back(ids)
    if back:
        assert torch.equal(parts.ids([text])[0], ids)


def test_controls_try_what_they_say_in_an_order_that_does_not_depend_on_batches(untrained: Any) -> None:
    for attack in (RandomPrefix(k=2, n_tries=6), SeedSearch(n_tries=6)):
        runs = []
        for size in (1, 16):
            judge = Reader(word="r")
            given = scene(untrained, judge)
            given.drawing.batch_size = size
            runs.append(attack.run(given))
        assert runs[0] == runs[1]
    found = SeedSearch(n_tries=3).run(scene(untrained))
    assert [one.n_tries for one in found] == [3, 3]
    assert all(one.seed != t.seed for one, t in zip(found, scene(untrained).tries, strict=True))
    texts = {one.text for one in RandomPrefix(k=2, n_tries=3).run(scene(untrained))}
    assert all(text.endswith(("three", "a photo of three")) for text in texts)


def test_synonyms_stand_for_whole_words_only(untrained: Any) -> None:
    attack = Synonyms({"three": ["drei", "tres"], "a photo": ["a drawing"]})
    assert attack.texts("a photo of Three, threefold") == [
        "a photo of drei, threefold", "a photo of tres, threefold", "a drawing of Three, threefold",
    ]  # fmt: skip
    judge = Reader(word="tres")
    found = attack.run(scene(untrained, judge, ("a photo of three", "two")))
    assert found[0] == Found(True, "a photo of tres", 5, 1.0, 2)
    assert (found[1].success, found[1].text) == (False, "two")


def test_a_text_that_does_not_fit_any_more_is_no_success(untrained: Any) -> None:
    drawing = Drawing(TextToImage(untrained), Reader(word=""), steps=2)
    long = Try(" ".join(["three"] * 11), 0, 2.0)
    looks = drawing.look([long, Try("three", 0, 2.0), Try("three", 0, 2.0)])
    assert [look.hit for look in looks] == [False, True, True]
    assert drawing.n_drawn == 1


def test_inversion_lowers_its_loss_and_is_another_threat(untrained: Any) -> None:
    given = scene(untrained)
    attack = ConceptInversion(k=2, steps=20, noise_batch=2, lr=0.1)
    problem = attack.problem(given, attack.writing(given.victim, given.texts))
    from robust_core.attacks.tokens import SoftTokens

    def held_out(vectors: torch.Tensor) -> float:
        text = torch.arange(2)
        ids = problem.space.ids
        x = torch.nn.functional.embedding(ids, problem.embedding).clone()  # pyright: ignore
        x[problem.space.slots >= 0] = vectors.flatten(0, 1)
        with torch.no_grad():
            return sum(float(problem.embedded(x, text, 1000 + draw).sum()) for draw in range(8))  # pyright: ignore

    start = SoftTokens(n_steps=0, padding=False).run(problem, index=given.streams())
    end = SoftTokens(n_steps=20, lr=0.1, padding=False).run(problem, index=given.streams())
    assert held_out(end.vectors) < held_out(start.vectors)
    found = attack.run(given)
    assert attack.threat == "embedding"
    assert [(one.n_tries, one.n_gradients) for one in found] == [(1, 20), (1, 20)]
    assert given.drawing.known == {}  # pictures of vectors are nobody's text


def test_bad_settings_are_named(untrained: Any) -> None:
    for make, words in (
        (lambda: UnlearnDiffAtk(k=0), "k=0"),
        (lambda: UnlearnDiffAtk(position="front"), "position='front'"),
        (lambda: P4D(loss="l3"), "loss='l3'"),
        (lambda: ConceptInversion(steps=0), "steps=0"),
        (lambda: Synonyms({}), "at least one word"),
        (lambda: Synonyms({"three": "drei"}), "needs a list"),
        (lambda: RandomPrefix(n_tries=0), "n_tries=0"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    parts = TextToImage(untrained)
    with pytest.raises(ValueError, match="needs 13 of 12"):
        UnlearnDiffAtk(k=7).check(parts, ["a photo of three"])
    with pytest.raises(ValueError, match="no token is left"):
        UnlearnDiffAtk(k=1, vocabulary=(untrained.tokenizer.eos_token_id,)).check(parts, ["three"])
    with pytest.raises(ValueError, match="only 1 tokens to replace"):
        UnlearnDiffAtk(k=2, position="replace").check(parts, ["three"])
    bare = scene(untrained)
    bare.latents = None
    with pytest.raises(ValueError, match="needs pictures of the concept"):
        UnlearnDiffAtk(k=1, timesteps=1, iterations=1).run(bare)
    with pytest.raises(ValueError, match="needs the pipeline before the erasure"):
        P4D(k=1, timesteps=1, iterations=1).run(scene(untrained))
