"""The benchmark as a whole, on a hand-made collection of eight subjects."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ir_robust.attacks import WordBudget
from ir_robust.attacks.spam import TermSpamming
from ir_robust.collection import Collection
from ir_robust.formats import ordered, read_run
from ir_robust.measures import per_query
from ir_robust.perturb import DropWords, Shuffle, Typos
from ir_robust.rankers import BM25Index, BM25Ranker, rerank
from ir_robust.ranking_robustness import (
    DocumentAttackTask,
    PerCorpus,
    QueryAttackTask,
    RobustnessBenchmark,
    RobustnessReport,
    Trained,
    UnseenCorpusTask,
    UnseenQueryTypeTask,
    VarianceTask,
    length_types,
)
from ir_robust.ranking_robustness.models import assign_folds
from ir_robust.text import Words
from robust_core.random import derive

SUBJECTS = [
    "wing lift camber chord sweep", "boundary layer laminar transition suction", "shock wave bluntness supersonic cone",
    "panel flutter membrane stiffness vibration", "heat transfer ablation surface temperature",
    "jet nozzle thrust mixing exhaust", "propeller slipstream rotor blade hover",
    "buckling cylinder shell pressure load",
]  # fmt: skip
FILLER = "study results theory given method shown report large small found".split()


def collection(subjects: int = 8, name: str = "made") -> Collection:
    docs, queries, qrels = {}, {}, {}
    for s, subject in enumerate(SUBJECTS[:subjects]):
        terms = subject.split()
        for d in range(4):
            words = [terms[(d + i) % 5] for i in range(2 + d % 3)] + [FILLER[(s + d + i) % 10] for i in range(6)]
            docs[f"d{s}{d}"] = " ".join(words).capitalize() + "."
        for q in range(3):
            qid = f"q{s}{q}"
            queries[qid] = " ".join(terms[q : q + 2 + q] + ([FILLER[s]] if q == 1 else []))
            qrels[qid] = {f"d{s}{d}": 1 + (d == q) for d in range(3)} | {f"d{(s + 1) % subjects}0": 0}
    return Collection(docs, queries, qrels, name)


DATA = collection()
BM25 = PerCorpus(lambda docs: BM25Ranker(BM25Index(docs)), "BM25, English stop words, no stemming")


def overlap(query, docs):
    terms = set(Words.of(query).words)
    return [sum(w in terms for w in Words.of(d).words) / (1 + len(Words.of(d))) for d in docs]


def chance(query, docs):
    return [derive(0, query, doc) / 2**63 for doc in docs]


def tasks(**attack):
    return [
        VarianceTask(),
        UnseenQueryTypeTask(length_types(DATA.queries), least=5),
        UnseenCorpusTask({"small": collection(4, "small")}),
        QueryAttackTask((Typos(1), Shuffle()), n_draws=2),
        DocumentAttackTask(TermSpamming(WordBudget(share=0.0, insertions=3)), ranks=(4, 12), k=3, **attack),
    ]


def figures(report):
    return {name: entry for name, entry in report.document["figures"].items()}


@pytest.fixture(scope="module")
def report():
    benchmark = RobustnessBenchmark(tasks(), ("nDCG@3", "AP@100"), depth=20, n_boot=100, generator=1)
    return benchmark.run({"bm25": BM25, "overlap": overlap, "chance": chance}, DATA, command="made by hand")


@pytest.mark.quick
def test_figures_are_those_of_the_runs_by_hand(report):
    run = BM25Index(DATA.docs).retrieve(DATA, depth=20)
    mine = per_query(rerank(overlap, DATA, run), DATA.qrels, ["nDCG@3"])["nDCG@3"]
    values = np.array([mine[qid] for qid in sorted(mine)])
    assert report["variance/overlap/nDCG@3/mean"].value == pytest.approx(values.mean())
    assert report["variance/overlap/nDCG@3/variance"].value == pytest.approx(values.var())
    np.testing.assert_allclose(report.arrays["variance/overlap/clean/nDCG@3"], [values])
    assert report.document["details"]["queries"] == sorted(mine)
    # words in another order say the same to a bag of words
    assert report["query attack/bm25/shuffled/nDCG@3/drop"].value == 0
    assert report["query attack/bm25/1 typo/nDCG@3/drop"].value < 0


def test_a_random_ranker_varies_less_and_is_not_called_robust_for_it(report):
    v = {model: report[f"variance/{model}/nDCG@3/variance"].value for model in report.models}
    assert report["variance/chance/nDCG@3/mean"].value < 0.6 * report["variance/bm25/nDCG@3/mean"].value
    assert report.tasks[0]["best"] != "chance"
    assert v["chance"] > 0
    hollow = [flag for flag in report.document["flags"] if "chance is best" in flag]
    won = [task for task in report.tasks if task["best"] == "chance"]
    assert len(hollow) == len(won)


def test_no_figure_depends_on_order(report):
    benchmark = RobustnessBenchmark(tasks()[::-1], ("nDCG@3", "AP@100"), depth=20, n_boot=100, generator=1)
    turned = dataclasses.replace(
        DATA,
        queries={qid: DATA.queries[qid] for qid in sorted(DATA.queries, reverse=True)},
        qrels={qid: DATA.qrels[qid] for qid in sorted(DATA.qrels, reverse=True)},
    )
    again = benchmark.run({"chance": chance, "overlap": overlap, "bm25": BM25}, turned)
    assert figures(again) == figures(report)
    verdicts = lambda r: {t["name"]: (t["best"], t["clear"]) for t in r.tasks}  # noqa: E731
    assert verdicts(again) == verdicts(report)


def test_every_model_gets_the_same_queries_and_fixed_candidates():
    asked = {"a": [], "b": []}

    def model(name):
        return lambda query, docs: (asked[name].append((query, tuple(docs))), overlap(query, docs))[1]

    task = QueryAttackTask((Typos(2), DropWords(1)), n_draws=2)
    RobustnessBenchmark([task], ["nDCG@3"], depth=10, n_boot=5).run({"a": model("a"), "b": model("b")}, DATA)
    assert asked["a"] == asked["b"]
    assert len(asked["a"]) == 24 * 5
    lists = {docs for _, docs in asked["a"]}
    assert len(lists) <= 24  # one for each query, whatever was done to it
    assert len({query for query, _ in asked["a"]}) > 24 * 2


def test_the_first_stage_is_asked_again_if_that_is_meant():
    task = QueryAttackTask((Typos(3),))
    found = {}
    for mode in ("fixed", "retrieved"):
        bench = RobustnessBenchmark([task], ["nDCG@3"], candidates=mode, depth=4, n_boot=5)
        result = bench.run({"overlap": overlap}, DATA)
        found[mode] = next(k for k in result.kept if k.condition.startswith("query")).lists
        assert result.document["details"]["candidates"] == mode
    clean = BM25Index(DATA.docs).retrieve(DATA, depth=4)
    assert all(set(found["fixed"][qid]) == set(clean[qid]) for qid in clean)
    assert any(set(found["retrieved"][qid]) != set(clean[qid]) for qid in clean)
    with pytest.raises(ValueError, match="leave run out"):
        RobustnessBenchmark([task], candidates="retrieved").run({"overlap": overlap}, DATA, run=clean)


class Sealed:
    """Refuses the queries it was trained on."""

    def __init__(self, data, kinds):
        self.seen = set(data.queries.values())
        self.kinds = kinds

    def score(self, query, docs):
        assert query not in self.seen
        return overlap(query, docs)


def test_recipes_never_see_what_tests_them():
    kinds, trainings = length_types(DATA.queries), []

    def fit(data, run, seed):
        assert set(data.qrels) == set(data.queries) == set(run)
        assert len(data.docs) == len(DATA.docs)
        trainings.append((frozenset(data.queries), frozenset(kinds[qid] for qid in data.queries), seed))
        return Sealed(data, kinds)

    some = [VarianceTask(), UnseenQueryTypeTask(kinds, least=5)]
    bench = RobustnessBenchmark(some, ["nDCG@3"], depth=10, folds=3, n_trainings=2, n_boot=5)
    result = bench.run({"mine": Trained(fit)}, DATA)
    assert len(trainings) == 2 * 3 * (1 + len(set(kinds.values())))
    assert len({seed for *_, seed in trainings}) == len(trainings)
    assert all(0 <= seed < 2**31 for *_, seed in trainings)
    alone = [kind for _, kind, _ in trainings if len(kind) == 1]
    assert len(alone) == 12
    assert result.arrays["query type/mine/" + min(kinds.values()) + "/nDCG@3"].shape[0] == 6
    assert f"query type/mine/{min(kinds.values())}/nDCG@3/known" in result.document["figures"]


def test_a_training_collection_of_its_own_replaces_the_folds():
    train = collection(4, "train")
    fits = []

    def fit(data, run, seed):
        fits.append(set(data.queries))
        return overlap

    def adapt(ranker, docs):
        fits.append(len(docs))
        return ranker

    bench = RobustnessBenchmark(
        [VarianceTask(), UnseenCorpusTask({"home": train}, reference=True)], ["nDCG@3"], depth=10, folds=2, n_boot=5
    )
    bench.run({"mine": Trained(fit, adapt)}, DATA, train=train)
    assert fits[:2] == [set(train.queries), len(DATA.docs)]
    assert all(isinstance(entry, set) for entry in fits[2:])  # at home nothing is adapted


def test_drop_rates_are_those_of_the_values():
    """A ranker that is perfect on the words it knows and upside down on others."""
    known = {text: qid for qid, text in DATA.queries.items()}
    numbers = {text: docno for docno, text in DATA.docs.items()}

    def oracle(query, docs):
        qid = known.get(query)
        sign = 1 if qid else -1
        grades = DATA.qrels[qid or "q00"]
        return [sign * grades.get(numbers[d], -1) for d in docs]

    result = RobustnessBenchmark([QueryAttackTask((Typos(1),))], ["nDCG@3"], depth=None, n_boot=50).run(
        {"oracle": oracle}, DATA
    )
    home, away = (result.arrays[f"query attack/oracle/{what}/nDCG@3"][0] for what in ("home", "1 typo"))
    assert (home == 1).all()
    assert (away < 1).all()
    assert result["query attack/oracle/1 typo/nDCG@3/drop"].value == pytest.approx(away.mean() - 1)
    low, high = result["query attack/oracle/headline"].interval or (0.0, 0.0)
    assert low <= away.mean() - 1 <= high


def test_the_worst_of_many_is_no_better_than_any():
    worst = RobustnessBenchmark([QueryAttackTask((Typos(1),), worst_of=4)], ["nDCG@3", "AP@100"], depth=10, n_boot=5)
    mean = RobustnessBenchmark([QueryAttackTask((Typos(1),), n_draws=4)], ["nDCG@3", "AP@100"], depth=10, n_boot=5)
    rows = [b.run({"o": overlap}, DATA).arrays["query attack/o/1 typo/nDCG@3"] for b in (worst, mean)]
    assert rows[0].shape == (1, 24)
    assert rows[1].shape == (4, 24)
    assert (rows[0] <= rows[1].min(axis=0)).all()


def test_targets_are_irrelevant_stand_in_the_window_and_climb(report):
    task = tasks()[-1]
    ranks = report.arrays["document attack/overlap/TermSpamming/rank"]
    assert ((ranks[:, 0] >= 4) & (ranks[:, 0] <= 12)).all()
    assert len(ranks) == 48
    climbed = report["document attack/overlap/TermSpamming/boost"].value
    assert climbed == pytest.approx((ranks[:, 0] - ranks[:, 1]).mean())
    assert climbed > 0
    top = report["document attack/overlap/TermSpamming/top 3"]
    assert top.value == pytest.approx((ranks[:, 1] <= 3).mean())
    assert top.interval[0] <= top.value <= top.interval[1]
    assert report["document attack/overlap/TermSpamming/nDCG@3/drop"].value < 0
    before = next(k for k in report.kept if k.model == "overlap" and k.condition == "clean").run()
    after = next(k for k in report.kept if k.model == "overlap" and k.condition == "attack TermSpamming").run()
    for qid, scores in before.items():
        edited = {d for d in scores if scores[d] != after[qid][d]}
        window = ordered(scores)[3:12]
        assert len(edited) <= task.n_targets
        assert edited <= set(window)
        assert all(DATA.qrels[qid].get(d, 0) <= 0 for d in edited)
    values = per_query(after, DATA.qrels, ["nDCG@3"])["nDCG@3"]
    stored = report.arrays["document attack/overlap/TermSpamming/nDCG@3"][0]
    np.testing.assert_allclose(stored, [values[qid] for qid in sorted(values)])


def test_one_budget_for_all_attacks_and_checks_of_readers():
    length = {"longer by": lambda before, after: len(Words.of(after)) - len(Words.of(before))}
    task = DocumentAttackTask(
        {"head": TermSpamming(), "tail": TermSpamming(place="tail")}, WordBudget(share=0.0, insertions=2),
        ranks=(4, 8), k=3, n_targets=1, checks=length,
    )  # fmt: skip
    result = RobustnessBenchmark([task], ["nDCG@3"], depth=10, n_boot=5).run({"o": overlap}, DATA)
    for attack in ("head", "tail"):
        assert result[f"document attack/o/{attack}/longer by of edited"].value == 2
    with pytest.raises(ValueError, match="below the top 10"):
        DocumentAttackTask(TermSpamming(), ranks=(10, 30))


def test_a_drawn_share_of_queries_is_attacked_and_measured():
    """What is drawn is the same for every model, and the drop is that of these queries."""
    task = DocumentAttackTask(TermSpamming(), ranks=(4, 8), k=3, n_queries=7)
    result = RobustnessBenchmark([task], ["nDCG@3"], depth=10, n_boot=5).run({"o": overlap, "c": chance}, DATA)
    home, away = (result.arrays[f"document attack/o/{what}/nDCG@3"] for what in ("home", "TermSpamming"))
    assert home.shape == away.shape == (1, 7)
    drop = result["document attack/o/TermSpamming/nDCG@3/drop"].value
    assert drop == pytest.approx(away.mean() / home.mean() - 1)
    asked = {k.model: set(k.scores) for k in result.kept if k.condition.startswith("attack")}
    assert asked["o"] == asked["c"]
    assert len(asked["o"]) == 7


def test_equal_scores_go_by_falling_number():
    """As in trec_eval; any other order would measure the order of a file."""
    result = RobustnessBenchmark([VarianceTask()], ["nDCG@3"], depth=None, n_boot=5).run(
        {"none": lambda query, docs: [0.0] * len(docs)}, DATA
    )
    falling = {qid: {d: float(i) for i, d in enumerate(sorted(DATA.docs))} for qid in DATA.queries}
    values = per_query(falling, DATA.qrels, ["nDCG@3"])["nDCG@3"]
    np.testing.assert_allclose(result.arrays["variance/none/clean/nDCG@3"][0], [values[q] for q in sorted(values)])


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    calls = []

    def model(query, docs):
        calls.append(query)
        return overlap(query, docs)

    def fit(data, run, seed):
        calls.append("fit")
        return model

    def bench():
        return RobustnessBenchmark(tasks(), ["nDCG@3"], depth=10, folds=2, n_boot=5)

    rankers = {"mine": Trained(fit), "plain": model}
    whole = bench().run(rankers, DATA)
    asked = len(calls)
    calls.clear()

    def stop(what, done, total):
        if what.startswith("attack") and done > 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        bench().run(rankers, DATA, resume=tmp_path, on_step=stop)
    first = len(calls)
    calls.clear()
    found = bench().run(rankers, DATA, resume=tmp_path)
    assert figures(found) == figures(whole)
    assert len(calls) < asked - first + 24 * 3
    calls.clear()
    stored = sorted(tmp_path.glob("*.json"))
    stored[0].write_text("{")
    assert figures(bench().run(rankers, DATA, resume=tmp_path)) == figures(whole)
    assert 0 < len(calls) <= 26
    calls.clear()
    RobustnessBenchmark(tasks(), ["nDCG@3"], depth=9, folds=2, n_boot=5).run(rankers, DATA, resume=tmp_path)
    assert len(calls) > asked / 2  # other lists, other numbers


def test_a_report_is_saved_read_and_measured_again(report, tmp_path):
    folder = report.save(tmp_path / "report")
    again = RobustnessReport.load(folder)
    assert again.to_markdown() == report.to_markdown()
    assert again.document == report.document
    run = read_run(folder / "runs" / "clean" / "overlap-0.trec")
    values = per_query(run, DATA.qrels, ["nDCG@3"])["nDCG@3"]
    assert np.mean(list(values.values())) == pytest.approx(report["variance/overlap/nDCG@3/mean"].value)
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert all(task["title"] in page for task in report.tasks)
    assert "made by hand" in page
    assert page == again.html()
    with pytest.raises(ValueError, match="holds no rankings"):
        again.save_runs(tmp_path)
    with pytest.raises(KeyError, match="no figure"):
        report["variance/nobody"]


def test_the_table_has_a_column_for_each_task_and_counts_wins(report):
    rows = report.table()
    assert [row["model"] for row in rows] == ["bm25", "overlap", "chance"]
    assert list(rows[0])[1:-1] == [task["title"] for task in report.tasks]
    assert len(rows[0]) == 7
    assert sum(int(row["best in"]) for row in rows) == 5
    assert sum(cell.count("★") + cell.count("☆") for row in rows for cell in row.values()) == 5
    assert {len(task["paired"]) for task in report.tasks} == {3}
    odd = RobustnessBenchmark([VarianceTask()], ["nDCG@3"], depth=5, n_boot=5).run({"a|b": overlap}, DATA)
    assert "a\\|b" in odd.to_markdown()


def test_folds_are_even_and_belong_to_queries():
    folds = assign_folds([f"q{i}" for i in range(23)], 5, 0)
    sizes = [list(folds.values()).count(i) for i in range(5)]
    assert max(sizes) - min(sizes) <= 1
    assert assign_folds([f"q{i}" for i in range(22, -1, -1)], 5, 0) == folds
    assert assign_folds([f"q{i}" for i in range(23)], 5, 1) != folds


def test_types_by_length():
    kinds = length_types({"a": "one", "b": "one two", "c": "one two three", "d": "one two three four"})
    assert kinds == {"a": "1-2 words", "b": "1-2 words", "c": "3-4 words", "d": "3-4 words"}
    with pytest.raises(ValueError, match="same number of words"):
        length_types({"a": "one", "b": "two"})
    task = UnseenQueryTypeTask(lambda text: text[:1], least=2)
    assert task.types({"a": "one", "b": "two"}, ["a", "b"]) == {"a": "o", "b": "t"}


def without(data, **changes):
    return dataclasses.replace(data, **changes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RobustnessBenchmark([]), "tasks"),
        (lambda: RobustnessBenchmark([VarianceTask(), VarianceTask()]), "each name once"),
        (lambda: RobustnessBenchmark([VarianceTask()], ["nDCG@0x"]), "measure"),
        (lambda: RobustnessBenchmark([VarianceTask()], candidates="some"), "candidates"),
        (lambda: RobustnessBenchmark([VarianceTask()], depth=0), "depth"),
        (lambda: RobustnessBenchmark([VarianceTask()]).run({}, DATA), "rankers"),
        (lambda: RobustnessBenchmark([VarianceTask()]).run({"a:b": overlap, "a;b": overlap}, DATA), "stay apart"),
        (lambda: RobustnessBenchmark([VarianceTask()]).run({"o": overlap}, without(DATA, qrels={})), "no query"),
        (lambda: RobustnessBenchmark([VarianceTask()]).run({"o": overlap}, DATA, run={"q00": {"d00": 1.0}}), "23 of"),
        (lambda: RobustnessBenchmark([VarianceTask()]).run({"o": overlap}, DATA, run={"zz": {"d00": 1.0}}), "'zz'"),
        (lambda: RobustnessBenchmark([VarianceTask()]).run(
            {"o": overlap}, without(DATA, qrels={"q00": {"nope": 1}})), "judged documents"),
        (lambda: RobustnessBenchmark([VarianceTask()]).run({"n": lambda q, d: [math.nan] * len(d)}, DATA), "nan"),
        (lambda: RobustnessBenchmark([UnseenQueryTypeTask({})]).run({"o": overlap}, DATA), "have no type"),
        (lambda: RobustnessBenchmark([UnseenQueryTypeTask(lambda text: "x")]).run({"o": overlap}, DATA), "no type and"),
        (lambda: RobustnessBenchmark([QueryAttackTask((lambda q: "?",))]).run({"o": overlap}, DATA), "left no word"),
        (lambda: QueryAttackTask(()), "operators"),
        (lambda: UnseenCorpusTask({}), "corpora"),
        (lambda: RobustnessBenchmark([VarianceTask()], folds=25).run({"t": Trained(lambda *a: overlap)}, DATA), None),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(call, words):
    if words is None:
        assert call() is not None  # no more folds than queries are made
        return
    with pytest.raises(ValueError, match=words):
        call()


def test_queries_without_anything_relevant_are_left_out_once_for_all():
    qrels = dict(DATA.qrels) | {"q00": {"d00": 0}}
    result = RobustnessBenchmark([VarianceTask()], ["nDCG@3"], depth=5, n_boot=5).run(
        {"a": overlap, "b": chance}, without(DATA, qrels=qrels)
    )
    assert result.document["n"] == 23
    assert result.document["details"]["left_out"] == 1
    assert any("left out" in flag for flag in result.document["flags"])
    with pytest.raises(TypeError, match="ranker"):
        RobustnessBenchmark([VarianceTask()]).run({"a": 3}, DATA)
