# pyright: reportArgumentType=false, reportOptionalCall=false, reportOptionalMemberAccess=false
"""Promises that every search keeps, whatever it does, and what the searches by queries find exactly."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_core.attacks.tokens import (
    GCG,
    SEARCHES,
    Beam,
    Exhaustive,
    Greedy,
    NearestPGD,
    Projected,
    RandomSearch,
    Simplex,
    TokenProblem,
    TokenSearch,
    TokenSpace,
)
from robust_core.errors import NotDifferentiableError
from robust_core.testing.conformance import left_as_found

V, D, T, B = 24, 6, 7, 5
EVERY = {
    "exhaustive": Exhaustive(),
    "random": RandomSearch(n_samples=200),
    "greedy": Greedy(),
    "greedy left": Greedy(order="left", n_sweeps=2),
    "greedy gradient": Greedy(order="gradient"),
    "greedy deletion": Greedy(order="deletion", blank=0),
    "beam": Beam(width=3),
    "beam left": Beam(width=3, order="left", n_sweeps=2),
    "gcg": GCG(n_steps=6, n_candidates=20, top_k=8),
    "gcg monotone": GCG(n_steps=6, n_candidates=20, top_k=8, monotone=True),
    "pgd": NearestPGD(n_rounds=2, n_steps=4),
    "pgd cosine": NearestPGD(n_steps=4, metric="cosine", eps=2.0, jointly=False),
    "simplex": Simplex(n_steps=25, check_every=5),
    "simplex argmax": Simplex(
        n_steps=25, check_every=5, forward="argmax", init="random", optimiser="sgd", lr=0.3, clamp=None
    ),
    "simplex soft": Simplex(n_steps=25, check_every=5, forward="soft", lr=0.3, optimiser="sgd", gini=0.5),
    "projected": Projected(n_steps=25, check_every=5),
}
searches = pytest.mark.parametrize("search", EVERY.values(), ids=EVERY.keys())


def _draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


E = _draw(V, D, seed=1)


def _space(kind="synonyms", budget=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=draw)
    editable = torch.rand(B, T, generator=draw) < 0.6
    editable[:, 0], editable[:, 1] = False, True
    if kind == "vocabulary":
        return TokenSpace.vocabulary(ids, editable, V, banned=[3, 4, 5], budget=min(budget, 2))
    table = torch.full((V, 5), -1)
    for word in range(V):
        n = int(torch.randint(0, 6, (), generator=draw))
        table[word, :n] = torch.randperm(V, generator=draw)[:n]
    return TokenSpace.substitutes(ids, table, editable=editable, budget=budget)


class Scorer(nn.Module):
    """A smooth score of embeddings in which places interact, with a term of each text's own."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.place = nn.Parameter(_draw(T, D, seed=2, dtype=dtype) / 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, text):
        each = torch.tanh((self.drop(x) * self.place).sum(2) + 0.1 * text[:, None])
        return each.sum(1) + 0.5 * (each[:, :-1] * each[:, 1:]).sum(1)


class Watch:
    """A black box that notes what it is asked."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, x, text, *rest):
        self.calls.append((x.clone(), text.clone(), *rest))
        return self.function(x, text, *rest)

    def count(self):
        return Counter(int(t) for _, text, *_ in self.calls for t in text)


def _problem(space=None, dtype=torch.float32, **settings):
    scorer, table = Scorer(dtype).eval(), E.to(dtype)
    loss = Watch(lambda ids, text: scorer(table[ids], text).detach())
    embedded = Watch(scorer)
    problem = TokenProblem(space or _space(), loss, embedded=embedded, embedding=table, models=[scorer], **settings)
    return problem, loss, embedded


# -- what holds for every search ------------------------------------------------------------------------------------


def _allowed(space, row, ids):
    """By hand, apart from the engine: whether a text may be written."""
    changed = 0
    for place, token in enumerate(ids):
        own, line = int(space.ids[row, place]), int(space.slots[row, place])
        if token == own:
            continue
        changed += 1
        if line < 0 or token not in space.table[line].tolist():
            return False
    return changed <= int(space.budget[row])


@searches
@settings(deadline=None, derandomize=True, max_examples=5)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 4), kind=st.sampled_from(["synonyms", "vocabulary"]))
def test_no_text_outside_the_space_is_asked_about_or_returned(search, seed, budget, kind):
    space = _space(kind, budget, seed)
    budgets = torch.randint(0, int(space.allowance.max()) + 1, (B,), generator=torch.Generator().manual_seed(seed))
    slots = space.slots.clone()
    slots[4] = -1  # nothing may change there
    space = TokenSpace(space.ids, slots, space.table, budgets)
    problem, loss, _ = _problem(space)
    result = search.run(problem, generator=seed)
    asked = {(int(t), tuple(ids)) for x, text in loss.calls for t, ids in zip(text, x.tolist(), strict=True)}
    if getattr(search, "order", "") == "deletion":  # whose probes lie outside, and are not kept
        asked = {(t, ids) for t, ids in asked if 0 not in ids}
    assert all(_allowed(space, row, ids) for row, ids in asked)
    for row in range(B):
        assert _allowed(space, row, result.ids[row].tolist())
    assert torch.equal(result.changed, result.ids != space.ids)
    assert (result.n_changed <= space.budget).all()
    assert (result.loss <= result.initial_loss).all()
    assert torch.allclose(result.loss, problem.loss(result.ids, torch.arange(B)).double(), atol=1e-6)


@searches
def test_answers_do_not_depend_on_batches_order_or_company(search):
    for kind in ("synonyms", "vocabulary"):
        problem, *_ = _problem(_space(kind), goal=-1.0)
        whole = search.run(problem, generator=3)
        for size in (1, 2):
            other = replace(search, batch_size=size).run(problem, generator=3)
            for name in ("ids", "loss", "success", "n_queries", "n_gradients", "trace"):
                assert torch.equal(getattr(whole, name), getattr(other, name)), name
        alone, *_ = _problem(problem.space.rows(torch.tensor([2])), goal=-1.0)
        named = [lambda x, text, f=f: f(x, text + 2) for f in (alone.loss, alone.embedded)]  # its text 0 is text 2
        alone = replace(alone, loss=named[0], embedded=named[1])
        single = search.run(alone, index=torch.tensor([2]), generator=3)
        assert torch.equal(single.ids[0], whole.ids[2])
        assert torch.equal(single.n_queries[0], whole.n_queries[2])


@searches
def test_queries_and_gradients_are_counted(search):
    problem, loss, embedded = _problem()
    result = replace(search, padding=False).run(problem)
    black, white = loss.count(), embedded.count()
    assert [black[row] + white[row] for row in range(B)] == result.n_queries.tolist()
    assert [white[row] for row in range(B)] == result.n_gradients.tolist()
    assert result.trace.shape[0] == B
    assert torch.equal(result.trace[:, 0], result.initial_loss)
    assert torch.equal(result.trace[:, -1], result.loss)
    assert (result.trace.diff(dim=1) <= 0).all()


@searches
@pytest.mark.parametrize("limit", [1, 2, 7, 23])
def test_the_limit_of_queries_is_kept(search, limit):
    problem, loss, embedded = _problem()
    result = replace(search, padding=False, max_queries=limit).run(problem)
    black, white = loss.count(), embedded.count()
    assert (result.n_queries <= limit).all()
    assert [black[row] + white[row] for row in range(B)] == result.n_queries.tolist()


@searches
def test_nothing_is_done_for_decided_texts(search):
    problem, *_ = _problem(_space("vocabulary"))
    goal = problem.loss(problem.space.ids, torch.arange(B)).double() - 0.3
    goal[1] += 1.0  # met by the text itself
    problem, loss, _ = _problem(_space("vocabulary"), goal=goal)
    result = replace(search, padding=False, batch_size=10_000).run(problem)  # what is asked at once is one call
    assert result.success[1]
    assert result.n_queries[1] == 1
    assert not result.changed[1].any()
    assert torch.equal(result.success, result.loss <= goal)
    if getattr(search, "order", "") == "deletion":
        del loss.calls[1]  # probes are not candidates
    for row in range(B):  # no later call knows a text once one of its losses met the goal
        met = False
        for ids, text in loss.calls:
            here = text == row
            assert not (met and here.any())
            met |= bool((loss.function(ids[here], text[here]).double() <= goal[row]).any())


@searches
def test_the_models_are_left_as_found(search):
    scorer = Scorer()
    scorer.train()
    problem = TokenProblem(_space(), embedded=scorer, embedding=nn.Parameter(E.clone()), models=[scorer])
    with left_as_found(scorer):
        result = search.run(problem)
    scorer.eval()
    assert torch.allclose(result.loss, scorer(E[result.ids], torch.arange(B)).double(), atol=1e-5)
    assert problem.embedding.grad is None


@searches
@pytest.mark.quick
def test_planted_triggers_are_found(search):
    """Two of 24 tokens in two slots open the door: only they reach the goal, and everything points to them."""
    ids = torch.randint(6, V, (3, T), generator=torch.Generator().manual_seed(0))
    editable = torch.zeros_like(ids, dtype=torch.bool)
    editable[:, 2:4] = True
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        table = nn.functional.normalize(E, dim=1).to(dtype)
        trigger = table[torch.tensor([7, 9])]

        def embedded(x, text, trigger=trigger):
            near = (x[:, 2:4] * trigger).sum(2)
            return -(near + near**3).sum(1) / 2 + 0 * text

        problem = TokenProblem(
            TokenSpace.vocabulary(ids, editable, V, banned=[0]), embedded=embedded, embedding=table, goal=-1.95
        )
        patient = {"n_steps": 200} if hasattr(search, "n_steps") and not isinstance(search, NearestPGD) else {}
        patient |= {"n_samples": 4000} if isinstance(search, RandomSearch) else {}
        patient |= {"n_rounds": 20} if isinstance(search, NearestPGD) else {}
        result = replace(search, **patient).run(problem)
        assert result.success.all(), dtype
        assert (result.ids[:, 2:4] == torch.tensor([7, 9])).all()


@searches
def test_losses_that_are_no_numbers_never_win(search):
    problem, loss, _ = _problem()
    function = loss.function
    loss.function = lambda ids, text: torch.where(ids.sum(1) % 3 == 0, torch.nan, function(ids, text))
    result = search.run(replace(problem, embedded=lambda x, text: problem.modules[0](x, text)))
    finite = result.loss.isfinite()
    assert finite[(problem.space.ids.sum(1) % 3 != 0)].all()


# -- the judge, and losses that draw ---------------------------------------------------------------------------------


@searches
def test_the_judge_sees_the_original_first_and_decides(search):
    words = torch.tensor([11, 12, 13])

    def judge(ids, text):
        return torch.isin(ids[:, 1:], words).any(1) & (text != 0) | (text == 1)

    ids = torch.full((3, T), 20)
    editable = torch.zeros_like(ids, dtype=torch.bool)
    editable[:, 1:3] = True
    space = TokenSpace.vocabulary(ids, editable, V)
    seen = Watch(judge)
    table = nn.functional.normalize(E, dim=1)
    problem = TokenProblem(
        space,
        embedded=lambda x, text: -(x[:, 1:3] @ table[12]).sum(1) + 0 * text,
        embedding=table,
        judge=seen,
    )
    patient = {"n_steps": 60} if isinstance(search, Simplex) else {}
    result = replace(search, check_every=1, **patient).run(problem)
    first, text = seen.calls[0]
    assert torch.equal(first, ids)
    assert text.tolist() == [0, 1, 2]
    assert result.success.tolist() == [False, True, True]
    assert result.n_queries[1] == 1
    assert result.n_judged[1] == 1
    assert judge(result.ids, torch.arange(3))[2]
    assert sum(int((t == 2).sum()) for _, t in seen.calls) == int(result.n_judged[2])
    unreachable = replace(problem, goal=-3.0, judge=Watch(judge))
    result = search.run(unreachable)
    assert not result.success.any()
    assert not unreachable.judge.calls


@searches
def test_noisy_losses_are_compared_at_equal_draws(search):
    """A draw shifts all losses of a text alike: with fair comparisons it cannot mislead the search."""
    scorer = Scorer().eval()

    def noisy(x, text, draw):
        shift = torch.sin(1000.0 * (draw + 1) + 10.0 * text)
        return scorer(x if x.is_floating_point() else E[x], text) + 5 * shift

    space = _space()
    problem = TokenProblem(space, noisy, embedded=noisy, embedding=E, stochastic=True, n_draws=2, models=[scorer])
    result = search.run(problem, generator=1)
    value = scorer(E[result.ids], torch.arange(B))
    start = scorer(E[space.ids], torch.arange(B))
    assert (value <= start + 1e-5).all()
    assert (value < start - 0.05).sum() >= 3
    assert (result.n_queries % 2 == 0).all()


def test_draws_follow_the_steps():
    """Step s uses the draws ``s * n_draws ..``: the schedule of a diffusion model's times."""
    box = Watch(lambda x, text, draw: (x * (1 + draw)).sum((1, 2)) + 0 * text)
    problem = TokenProblem(_space("vocabulary"), embedded=box, embedding=E, stochastic=True, n_draws=3)
    Simplex(n_steps=4, check_every=2, padding=False).run(problem)
    steps = [call[2] // 3 for call in box.calls if call[0].requires_grad]
    assert sorted(set(steps)) == [0, 1, 2, 3]
    assert all(sum(c[2] == draw for c in box.calls) >= 1 for draw in range(12))


# -- exactness of the searches by queries -----------------------------------------------------------------------------


def _additive(seed):
    worth = _draw(B, T, V, seed=seed, dtype=torch.float64)

    def loss(ids, text):
        return worth[text].gather(2, ids[..., None])[..., 0].sum(1)

    return loss


@settings(deadline=None, derandomize=True, max_examples=10)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 3))
def test_greedy_beam_and_exhaustive_agree_on_sums(seed, budget):
    space = _space("synonyms", budget, seed)
    problem = TokenProblem(space, _additive(seed))
    best = Exhaustive().run(problem)
    random = RandomSearch(n_samples=30).run(problem, generator=seed)
    greedy = Greedy().run(problem)
    assert torch.equal(greedy.ids, best.ids)
    assert (best.loss <= random.loss).all()
    for order in ("best", "left"):
        every = Beam(width=None, order=order).run(problem)
        assert torch.equal(every.loss, best.loss)
        assert torch.equal(every.n_queries, best.n_queries)  # each text once
    with_room = TokenProblem(replace(space, budget=None), _additive(seed))
    assert torch.equal(Greedy(order="left").run(with_room).loss, Greedy().run(with_room).loss)


@settings(deadline=None, derandomize=True, max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_beams_of_any_width_know_all_texts_when_unbounded(seed):
    problem, *_ = _problem(_space(seed=seed))
    best = Exhaustive().run(problem)
    for order in ("best", "left"):
        every = Beam(width=None, order=order).run(problem)
        assert torch.equal(every.loss, best.loss)
        assert torch.equal(every.n_queries, best.n_queries)
        narrow, wide = (Beam(width=width, order=order).run(problem) for width in (1, 4))
        assert (best.loss <= wide.loss).all()
        assert narrow.n_queries.sum() <= wide.n_queries.sum() <= best.n_queries.sum()
    assert torch.equal(Beam(width=1).run(problem).ids, Greedy(patience=None).run(problem).ids)


def test_random_texts_use_the_whole_budget_and_reach_every_candidate():
    ids, editable = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[True, True, True, False]])
    space = TokenSpace.vocabulary(ids, editable, 6, banned=[5], budget=2)
    box = Watch(lambda x, text: text * 0.0)
    RandomSearch(n_samples=6000).run(TokenProblem(space, box))
    drawn = torch.cat([x for x, _ in box.calls[1:]])
    assert len(drawn) == 6000
    assert ((drawn != 0).sum(1) == 2).all()
    counts = torch.stack([(drawn[:, :3] == token).sum(0) for token in range(1, 5)]).double()
    assert (counts / 6000 - 2 / 3 / 4).abs().max() < 0.02


def test_later_sweeps_revise():
    """Each token alone looks wrong: only the second visit of the first place sees what the second became."""
    value = torch.tensor([[0.0, 1.0, 1.0], [2.0, 3.0, -1.0], [-0.5, 1.0, 3.0]])

    def loss(ids, text):
        return value[ids[:, 0], ids[:, 1]] + 0 * text

    space = TokenSpace.vocabulary(torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool), 3)
    one = Greedy(order="left").run(TokenProblem(space, loss))
    assert one.ids.tolist() == [[2, 0]]
    assert Beam(width=2, order="left").run(TokenProblem(space, loss)).loss == -0.5
    assert Beam(width=3, order="left").run(TokenProblem(space, loss)).loss == -1
    start = TokenSpace.vocabulary(torch.tensor([[2, 2]]), torch.ones(1, 2, dtype=torch.bool), 3)
    assert Greedy(order="left", n_sweeps=1).run(TokenProblem(start, loss)).loss == -1


def test_the_order_visits_what_matters_first():
    weight = torch.tensor([0.1, 3.0, 0.0, 1.0])
    table = torch.tensor([[0.0], [1.0], [2.0]])

    def embedded(x, text):
        return -(x[..., 0] * weight).sum(1) + 0 * text

    ids = torch.tensor([[1, 1, 1, 1]])
    space = TokenSpace.vocabulary(ids, torch.ones(1, 4, dtype=torch.bool), 3, budget=2)
    problem = TokenProblem(space, embedded=embedded, embedding=table)
    for search in (Greedy(order="gradient"), Greedy(order="deletion", blank=0)):
        assert search.run(problem).ids.tolist() == [[1, 2, 1, 2]]
    assert Greedy(order="left").run(problem).ids.tolist() == [[2, 2, 1, 1]]


def test_a_black_box_of_arrays_will_do():
    def score(ids, text):
        return np.abs(ids.numpy() - 3).sum(1).astype(np.float32)

    space = TokenSpace.vocabulary(torch.tensor([[0, 9]]), torch.ones(1, 2, dtype=torch.bool), 10)
    assert Greedy().run(TokenProblem(space, score)).ids.tolist() == [[3, 3]]


def test_lowering_goes_on_after_success_if_asked_to():
    problem = TokenProblem(_space(), _additive(0), goal=0.0)
    early, late = Greedy().run(problem), Greedy(stop_at_success=False).run(problem)
    assert (late.loss <= early.loss).all()
    assert torch.equal(late.loss, Greedy().run(replace(problem, goal=None)).loss)
    assert torch.equal(late.success, late.loss <= 0)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_search_that_leaves_its_space_is_stopped():
    class Careless(TokenSearch):
        def search(self, run):
            run.query(torch.tensor([0]), run.space.ids[:1] * 0)

    problem, loss, _ = _problem()
    with pytest.raises(ValueError, match="Careless proposed a text outside"):
        Careless().run(problem)
    assert len(loss.calls) == 1


def test_searches_that_need_gradients_say_so():
    blind = TokenProblem(_space(), _additive(0))
    for name in ("gcg", "pgd", "simplex", "projected"):
        with pytest.raises(ValueError, match="needs gradients"):
            SEARCHES[name]().run(blind)
    with pytest.raises(ValueError, match="order='gradient'"):
        Greedy(order="gradient").run(blind)
    flat = TokenProblem(_space(), embedded=lambda x, text: x.detach().sum((1, 2)), embedding=E)
    with pytest.raises(NotDifferentiableError, match="no gradient"):
        GCG().run(flat)


def test_too_many_texts_are_refused_before_any_query():
    problem, loss, _ = _problem(_space("vocabulary"))
    with pytest.raises(ValueError, match=r"limit=10: [\d,]+ texts"):
        Exhaustive(limit=10).run(problem)
    assert not loss.calls


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda s: TokenProblem(s), ValueError, "at least"),
        (lambda s: TokenProblem(s.ids, _additive(0)), TypeError, "TokenSpace"),
        (lambda s: TokenProblem(s, embedding=E), ValueError, "at least"),
        (lambda s: TokenProblem(s, _additive(0), embedding=E), ValueError, "belong together"),
        (lambda s: TokenProblem(s, embedded=Scorer(), embedding=E[:3]), ValueError, "3 rows"),
        (lambda s: TokenProblem(s, embedded=Scorer(), embedding=E.long()), ValueError, "floating point"),
        (lambda s: TokenProblem(s, _additive(0), goal=torch.zeros(2)), ValueError, "goal"),
        (lambda s: TokenProblem(s, _additive(0), n_draws=2), ValueError, "stochastic"),
        (lambda s: TokenProblem(s, _additive(0), models=[E]), TypeError, "models"),
        (lambda s: Greedy().run(s), TypeError, "TokenProblem"),
        (lambda s: Greedy().run(TokenProblem(s, _additive(0)), index=torch.zeros(2)), ValueError, "index"),
        (lambda s: Greedy().run(TokenProblem(s, lambda i, t: i)), ValueError, "loss returned"),
        (lambda s: Greedy().run(TokenProblem(s, _additive(0), judge=lambda i, t: t)), ValueError, "judge"),
        (lambda s: Greedy(order="right"), ValueError, "order"),
        (lambda s: Greedy(order="deletion"), ValueError, "blank"),
        (lambda s: Beam(width=0), ValueError, "width"),
        (lambda s: Beam(batch_size=0), ValueError, "batch_size"),
        (lambda s: RandomSearch(n_samples=0), ValueError, "n_samples"),
        (lambda s: GCG(top_k=0), ValueError, "top_k"),
        (lambda s: NearestPGD(step_size=0.0), ValueError, "step_size"),
        (lambda s: NearestPGD(metric="dot"), ValueError, "metric"),
        (lambda s: Simplex(forward="hard"), ValueError, "forward"),
        (lambda s: Simplex(clamp=0.0), ValueError, "clamp"),
        (lambda s: Projected(init="zeros"), ValueError, "init"),
    ],
)
def test_bad_arguments_are_one_clear_error(build, error, says):
    with pytest.raises(error, match=says):
        build(_space())
