# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Gradients and steps of the searches that relax tokens, against slow references."""

import pytest
import torch
from torch import nn

from robust_core.attacks.tokens import (
    GCG,
    NearestPGD,
    Projected,
    SearchRun,
    Simplex,
    SoftTokens,
    TokenProblem,
    TokenSpace,
    insert_slots,
    one_hot_gradient,
    project_simplex,
)
from robust_core.attacks.tokens.gradient import options_of
from robust_core.attacks.tokens.options import Options
from robust_core.attacks.tokens.relaxed import adam_state, adam_step
from robust_core.testing.conformance import left_as_found

V, D, T, B = 12, 5, 4, 3


def _draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


E, W = _draw(V, D, seed=1), _draw(T, D, seed=2)


def linear(x, text):
    return (x * W).sum((1, 2)) + 0.1 * text


def smooth(x, text):
    each = torch.tanh((x * W).sum(2) / 2 + 0.1 * text[:, None])
    return each.sum(1) + (each[:, 1:] * each[:, :-1]).sum(1)


def _space(kind="vocabulary", budget=None):
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    editable = torch.tensor([[False, True, True, True], [False, True, False, True], [True, True, False, False]])
    if kind == "vocabulary":
        return TokenSpace.vocabulary(ids, editable, V, banned=[2, 5], budget=budget)
    table = torch.full((V, 4), -1)
    draw = torch.Generator().manual_seed(4)
    for word in range(V):
        n = word % 4 + 1
        table[word, :n] = torch.randperm(V, generator=draw)[:n]
    return TokenSpace.substitutes(ids, table, editable=editable, budget=budget)


def _run(search, space, embedded=smooth, table=E):
    problem = TokenProblem(space, embedded=embedded, embedding=table)
    run = SearchRun(search, problem, torch.arange(len(space)), torch.arange(len(space)), 0)
    run.begin()
    return run, options_of(run, torch.arange(len(space)), space.where)


# -- one-hot gradients and candidates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vocabulary", "synonyms"])
@pytest.mark.parametrize("embedded", [linear, smooth])
def test_one_hot_gradients_are_finite_differences(kind, embedded):
    space = _space(kind)
    run, options = _run(Simplex(), space, embedded)
    every = torch.arange(B)
    _, gradient = run.gradient(every, space.ids, space.where)
    score, valid = options.scores(gradient), options.valid
    u = torch.zeros(valid.shape, dtype=E.dtype).scatter(2, options.own[..., None], 1.0) * (space.where >= 0)[..., None]
    h = 1e-5
    for slot in range(u.shape[1]):
        for column in range(u.shape[2]):
            step = torch.zeros_like(u)
            step[:, slot, column] = h
            ahead, behind = (
                run.soft(every, space.where, options.mix(u + side * step), step=0, gradient=False)[0]
                for side in (1, -1)
            )
            there = valid[:, slot, column]
            assert torch.allclose(((ahead - behind) / (2 * h))[there], score[there, slot, column], atol=1e-6)
            assert not score[~there, slot, column].any()


@pytest.mark.parametrize("banned", [[2, 5], [0, V - 1], [0, 2, 3, 5, 6, 7, 9, 10]])
def test_scores_of_few_rows_are_products_whatever_part_of_the_vocabulary_is_listed(banned):
    """A run of tokens, almost all, a few; rows in one order of the product (few) and in the other."""
    ids = torch.full((9, T), 1)
    space = TokenSpace.vocabulary(ids, torch.ones_like(ids, dtype=torch.bool), V, banned=banned)
    for n in (1, 9):
        rows = torch.arange(n)
        options = Options(space, E, rows, space.where[rows])
        gradient = _draw(n, T, D, seed=n)
        score = options.scores(gradient)
        for column, token in enumerate(space.table[0].tolist()):
            assert torch.allclose(score[..., column], (gradient * E[token]).sum(2), atol=1e-12)
        mixed = options.mix(options.valid.double())
        assert torch.allclose(mixed, E[space.table[0]].sum(0) + (~torch.isin(1, space.table[0])) * E[1], atol=1e-12)


def test_one_hot_gradient_in_half_precision_does_not_vanish():
    gradient = 1e-9 * _draw(3, D, dtype=torch.float32)
    exact = one_hot_gradient(gradient.double(), E)
    for dtype in (torch.float16, torch.bfloat16):
        rough = one_hot_gradient(gradient, E.to(dtype)).double()
        assert torch.allclose(rough, exact, atol=0.03 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", ["vocabulary", "synonyms"])
def test_columns_hold_the_candidates_and_the_original(kind):
    space = _space(kind)
    _, options = _run(Simplex(), space)
    valid = options.valid
    for row in range(B):
        for slot, place in enumerate(space.where[row].tolist()):
            if place < 0:
                assert not valid[row, slot].any()
                continue
            own = int(space.ids[row, place])
            listed = [t for t in space.table[space.slots[row, place]].tolist() if t >= 0]
            columns = valid[row, slot].nonzero()[:, 0]
            chosen = torch.zeros(B, space.where.shape[1], dtype=torch.int64)
            tokens = []
            for column in columns:
                chosen[row, slot] = column
                tokens.append(int(options.tokens(chosen)[row, slot]))
                assert int(options.write(space.ids, chosen)[row, place]) == tokens[-1]
            assert sorted(tokens) == sorted({own, *listed})
            assert tokens[columns.tolist().index(int(options.own[row, slot]))] == own


@pytest.mark.parametrize("kind", ["vocabulary", "synonyms"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_is_nearest(kind, metric):
    space = _space(kind)
    _, options = _run(Simplex(), space)
    points = _draw(B, space.where.shape[1], D, seed=8)
    tokens = options.tokens(options.nearest(points, metric=metric))
    for row in range(B):
        for slot, place in enumerate(space.where[row].tolist()):
            if place < 0:
                continue
            listed = {int(space.ids[row, place]), *space.table[space.slots[row, place]].tolist()} - {-1}

            def far(token, point=points[row, slot]):
                if metric == "cosine":
                    return -float(torch.cosine_similarity(E[token], point, dim=0))
                return float((E[token] - point).norm())

            assert int(tokens[row, slot]) == min(listed, key=far)


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_is_torchs(decoupled):
    x = nn.Parameter(_draw(4, 3))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimiser = kind([x], lr=0.03, weight_decay=0.1)
    state = adam_state(x.detach().clone())
    for step in range(12):
        x.grad = _draw(4, 3, seed=step)
        state["x"] = adam_step(state, x.grad.clone(), step, lr=0.03, weight_decay=0.1, decoupled=decoupled)
        optimiser.step()
        assert torch.allclose(state["x"], x.detach(), atol=1e-12)


def test_a_straight_through_step_is_that_of_autograd():
    """Three steps by hand, with one-hot vectors, torch's Adam and the projection."""
    ids, editable = torch.tensor([[1, 0, 0, 2]]), torch.tensor([[False, True, True, False]])
    space = TokenSpace.vocabulary(ids, editable, V)
    search = Simplex(forward="argmax", init="random", lr=0.05)
    run, options = _run(search, space)
    state = search.begin(run, options)
    u = nn.Parameter(state["x"][0, :, :V].clone())
    optimiser = torch.optim.Adam([u], lr=0.05, weight_decay=0.1)
    for step in range(3):
        state = search.move(run, options, state, step)
        hot = nn.functional.one_hot(u.argmax(1), V).double().requires_grad_(True)
        x = torch.cat([E[ids[0, :1]], hot @ E, E[ids[0, 3:]]])[None]
        (gradient,) = torch.autograd.grad(smooth(x, torch.zeros(1)).sum(), hot)
        u.grad = gradient.clamp(-1, 1)
        optimiser.step()
        u.data = project_simplex(u.data)
        assert torch.allclose(state["x"][0, :, :V], u.data, atol=1e-9)
        assert not state["x"][0, :, V].any()  # the original is listed, and has no second column


def test_tokens_are_drawn_by_their_probability():
    n = 4000
    ids = torch.zeros(n, 2, dtype=torch.int64)
    space = TokenSpace.vocabulary(ids, torch.tensor([[True, True]]).expand(n, 2), 4, banned=[3])
    search = Simplex()
    run, options = _run(search, space, lambda x, text: x.sum((1, 2)) + 0 * text)
    share = torch.tensor([[0.5, 0.0, 0.5], [0.1, 0.2, 0.7]], dtype=torch.float64)
    state = {"x": torch.cat([share, torch.zeros(2, 1)], 1).expand(n, 2, 4)}
    drawn = search._drawn(run, options, state, 5)
    again = search._drawn(run, options, state, 6)
    assert not torch.equal(drawn, again)
    counts = torch.stack([(drawn == column).double().mean(0) for column in range(3)], 1)
    assert (counts - share).abs().max() < 0.03
    assert counts[0, 1] == 0


def test_projected_follows_the_published_loop():
    ids, editable = torch.tensor([[1, 0, 0, 2]]), torch.tensor([[False, True, True, False]])
    space = TokenSpace.vocabulary(ids, editable, V)
    search = Projected(n_steps=25, check_every=1, lr=0.1, init="own")
    result = search.run(TokenProblem(space, embedded=smooth, embedding=E))
    x = nn.Parameter(E[ids[0, 1:3]].clone())
    optimiser = torch.optim.AdamW([x], lr=0.1, weight_decay=0.1)
    losses = [float(smooth(E[ids], torch.zeros(1)))]
    unit = nn.functional.normalize(E, dim=1)
    for _ in range(25):
        near = E[(nn.functional.normalize(x.detach(), dim=1) @ unit.T).argmax(1)].clone().requires_grad_(True)
        loss = smooth(torch.cat([E[ids[0, :1]], near, E[ids[0, 3:]]])[None], torch.zeros(1))
        (x.grad,) = torch.autograd.grad(loss.sum(), near)
        optimiser.step()
        after = E[(nn.functional.normalize(x.detach(), dim=1) @ unit.T).argmax(1)]
        after = smooth(torch.cat([E[ids[0, :1]], after, E[ids[0, 3:]]])[None], torch.zeros(1))
        losses.append(min(losses[-1], loss.item(), float(after)))
    assert torch.allclose(result.trace[0], torch.tensor(losses, dtype=torch.float64), atol=1e-9)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [Simplex, Projected])
def test_a_judge_alone_sees_the_same_texts_and_no_loss_is_asked_for(kind):
    space, calls = _space(), []

    def noisy(x, text, draw):
        calls.append(x.requires_grad)
        return smooth(x, text) * (1 + draw % 3)

    results, seen = [], []
    for compare in (True, False):
        judged: list[tuple[int, list[int]]] = []

        def judge(ids, text, judged=judged):
            judged += zip(text.tolist(), ids.tolist(), strict=True)
            return (ids == 7).any(1) & (text == 0)

        calls.clear()
        problem = TokenProblem(space, embedded=noisy, embedding=E, judge=judge, stochastic=True)
        results.append(kind(n_steps=12, check_every=3, lr=0.05, compare=compare).run(problem, generator=1))
        seen.append(judged)
    both, alone = results
    assert all(calls)  # gradients, nothing else
    assert torch.equal(alone.n_queries, alone.n_gradients)
    assert torch.equal(alone.n_gradients, both.n_gradients)
    assert torch.equal(alone.success, both.success)
    assert alone.loss.isnan().all()
    for row in range(B):
        mine, theirs = ([ids for text, ids in texts if text == row] for texts in reversed(seen))
        assert mine == theirs[: len(mine)]  # who compares may show the best of the failures again, at the end
        assert alone.ids[row].tolist() == mine[-1]
    with pytest.raises(ValueError, match="compare=False"):
        kind(compare=False).run(TokenProblem(space, embedded=smooth, embedding=E))
    with pytest.raises(ValueError, match="no goal"):
        kind(compare=False).run(TokenProblem(space, embedded=smooth, embedding=E, judge=judge, goal=0.0))


def test_gcg_with_all_exchanges_takes_the_best_single_change():
    space = _space(budget=2)
    result = GCG(n_steps=3, n_candidates=10_000, top_k=V + 1).run(TokenProblem(space, embedded=smooth, embedding=E))
    for row in range(B):
        text = torch.tensor([row])
        present, best = space.ids[row].clone(), [float(smooth(E[space.ids[row]][None], text))]
        for _ in range(3):
            found = []
            for place in space.where[row].tolist():
                for token in range(V):
                    new = present.clone()
                    new[place] = token
                    inside = place >= 0 and bool(space.contains(text, new[None]))
                    if inside and not torch.equal(new, present):
                        found.append((float(smooth(E[new][None], text)), new))
            loss, present = min(found, key=lambda pair: pair[0])
            best.append(min(best[-1], loss))
        assert torch.allclose(result.trace[row], torch.tensor(best, dtype=torch.float64), atol=1e-9)


def test_gcg_with_one_candidate_a_slot_solves_linear_models():
    """There the gradient names the best token of every slot, and one exchange after the other installs it."""
    space = _space()
    result = GCG(n_steps=5, n_candidates=8, top_k=1).run(TokenProblem(space, embedded=linear, embedding=E))
    usable = torch.tensor([token for token in range(V) if token not in (2, 5)])
    for row in range(B):
        for place in space.where[row][space.where[row] >= 0].tolist():
            options = torch.cat([usable, space.ids[row, place, None]])
            assert int(result.ids[row, place]) == int(options[(E[options] @ W[place]).argmin()])


def test_few_important_slots_are_chosen_by_the_gradient():
    table = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    weight = torch.tensor([0.1, -3.0, 0.2, 1.0], dtype=torch.float64)
    space = TokenSpace.vocabulary(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool), 3, budget=2)
    problem = TokenProblem(space, embedded=lambda x, text: (x[..., 0] * weight).sum(1), embedding=table)
    for search in (NearestPGD(step_size=1.0, n_steps=3), Simplex(), Projected(metric="euclidean", n_steps=100)):
        assert search.run(problem).ids.tolist() == [[1, 2, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_steps_at_the_size_of_a_text_encoder(dtype):
    """77 places, 49 408 tokens of width 768, five free tokens in front: what attacks on diffusion models work on."""
    table = _draw(49_408, 768, dtype=torch.float32).to(dtype)
    ids = torch.full((1, 77), 49_407)
    ids[0, :4] = torch.tensor([49_406, 320, 1125, 539])
    prompt = insert_slots(ids, 5, fill=256, start=1, end=4, length=77)
    space = TokenSpace.vocabulary(*prompt, n_tokens=len(table), banned=[49_406, 49_407])
    target = table[[1000, 2000, 3000, 4000, 5000]]

    def denoise(x, text, draw):
        return ((x[:, 1:6] - target) ** 2).float().mean((1, 2)) * (1 + draw % 2) + 0 * text

    problem = TokenProblem(space, embedded=denoise, embedding=table, stochastic=True)
    for search in (
        Simplex(n_steps=2, check_every=1, padding=False),
        Projected(n_steps=2, check_every=1, padding=False),
        GCG(n_steps=2, n_candidates=32, padding=False),
    ):
        result = search.run(problem)
        assert result.n_gradients == 2
        assert result.ids[0, [0, 6, 7, 8, 9]].tolist() == [49_406, 320, 1125, 539, 49_407]
        assert (result.ids[0, 1:6] < 49_406).all()


# -- vectors as the attack ---------------------------------------------------------------------------------------------


def test_vectors_go_below_every_text_and_stay_in_their_places():
    space = _space()
    problem = TokenProblem(space, embedded=smooth, embedding=E)
    result = SoftTokens(n_steps=200, lr=0.1).run(problem)
    text = GCG(n_steps=20, n_candidates=10_000, top_k=V + 1).run(problem)
    assert (result.loss < text.loss).all()
    assert result.threat == "embedding"
    assert torch.allclose(smooth(result.embeddings, torch.arange(B)), result.loss)
    fixed = space.slots < 0
    assert torch.equal(result.embeddings[fixed], E[space.ids][fixed])
    assert (result.trace.diff(dim=1) <= 0).all()
    assert result.n_gradients.tolist() == [200] * B


def test_the_first_step_is_the_sign_whether_fast_or_not():
    problem = TokenProblem(_space(), embedded=smooth, embedding=E)
    start = SoftTokens(n_steps=0, init="own").run(problem)
    assert torch.equal(start.embeddings, E[problem.space.ids])
    assert start.n_gradients.tolist() == [0] * B
    given = SoftTokens(n_steps=0, init=start.vectors).run(problem)
    assert torch.equal(given.vectors, start.vectors)
    slow, fast = (SoftTokens(n_steps=1, lr=1e-4, init="own", fast=fast).run(problem) for fast in (False, True))
    assert torch.allclose(slow.vectors, fast.vectors, atol=1e-7)
    moved = (fast.vectors - start.vectors)[problem.space.where >= 0]
    assert torch.allclose(moved.abs(), torch.full_like(moved, 1e-4), rtol=1e-6)
    near = SoftTokens(n_steps=30, lr=0.1, init="own", eps=0.02).run(problem)
    assert (near.vectors - start.vectors).abs().max() <= 0.02 + 1e-12


def test_vectors_start_at_random_candidates_of_each_texts_own():
    problem = TokenProblem(_space(), embedded=smooth, embedding=E)
    start = SoftTokens(n_steps=0).run(problem, generator=7)
    for row, slot in (problem.space.where >= 0).nonzero().tolist():
        token = int((start.vectors[row, slot] == E).all(1).nonzero()[0, 0])
        assert token not in (2, 5) or token == int(problem.space.ids[row, problem.space.where[row, slot]])
    single = SoftTokens(n_steps=9, lr=0.1, batch_size=1).run(problem, generator=7)
    whole = SoftTokens(n_steps=9, lr=0.1).run(problem, generator=7)
    assert torch.equal(single.vectors, whole.vectors)
    assert not torch.equal(SoftTokens(n_steps=0).run(problem, generator=8).vectors, start.vectors)


def test_vectors_stop_at_the_goal_and_leave_models_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(D, 1, dtype=torch.float64), nn.Dropout())

        def forward(self, x, text):
            return self.part(x).sum((1, 2)) + 0 * text

    model = Model()
    problem = TokenProblem(_space(), embedded=model, embedding=E, goal=-1.0, models=[model])
    with left_as_found(model):
        result = SoftTokens(n_steps=100, lr=0.2).run(problem)
    assert result.success.all()
    assert (result.loss <= -1).all()
    assert (result.n_gradients < 100).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"n_steps": -1}, "n_steps"), ({"lr": 0.0}, "lr"), ({"init": "zero"}, "init"), ({"eps": -1.0}, "eps")],
)
def test_bad_settings_of_vectors_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        SoftTokens(**settings)


def test_vectors_need_gradients_and_fitting_starts():
    space = _space()
    with pytest.raises(ValueError, match="needs gradients"):
        SoftTokens().run(TokenProblem(space, lambda ids, text: ids.double().sum(1)))
    with pytest.raises(ValueError, match="init has shape"):
        SoftTokens(init=torch.zeros(1, 1, D)).run(TokenProblem(space, embedded=smooth, embedding=E))


@pytest.mark.parametrize("search", [GCG(n_steps=3, n_candidates=6), GCG(n_steps=3, n_candidates=6, monotone=True),
                                    NearestPGD(n_rounds=2), Simplex(n_steps=4, check_every=2)], ids=repr)  # fmt: skip
def test_a_surrogate_guides_and_the_loss_decides(search):
    space = TokenSpace.vocabulary(torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.bool), V)

    def true_loss(ids, text):
        return (E[ids] * W).sum((1, 2)) + 100.0

    def surrogate(x, text):
        return (x * W).sum((1, 2)) - 1000.0  # flatters: as a loss it would be a success at once

    problem = TokenProblem(space, loss=true_loss, embedded=surrogate, embedding=E, goal=-500.0)
    found = search.run(problem, generator=0)
    assert not found.success.any()
    assert torch.allclose(found.loss, true_loss(found.ids, None))
    assert torch.allclose(found.initial_loss, true_loss(space.ids, None))
