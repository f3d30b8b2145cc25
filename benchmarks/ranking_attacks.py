"""Word substitution on rankers beside TextAttack: one model, one table of synonyms, one search, one process.

    ROBUST_DATA=… python benchmarks/ranking_attacks.py [--docs 20] [--json FILE]    # Cranfield, counter-fitted words

Wants an environment that holds ``textattack`` beside ``ir-robust``. TextAttack reads NLTK's list of stop words when it
is imported; where that cannot be had, a file ``nltk_data/corpora/stopwords/english`` of a few words will do: it is not
used here.

Both search greedily for the word whose exchange raises the score most, up to three words, with the same substitutes, on
the same documents, and stop where the document would win. TextAttack is given our table as its transformation, its own
beam search of width 1, and batches as large as ours. What counts is texts scored in a second of CPU time of the
process, all included; rounds alternate, and the median stands. "Bare" is the model alone on as many texts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import numpy as np
import torch

from ir_robust.attacks import WordBudget, WordSubstitution
from ir_robust.collection import load_collection
from ir_robust.rankers import BM25Index
from ir_robust.rankers.bag import BagRanker
from ir_robust.rankers.base import Vocabulary, scores_of
from ir_robust.rankers.vectors import WordVectors, vocabulary_of
from ir_robust.synonyms import SynonymGraph
from robust_core.attacks.tokens import Greedy
from robust_core.claim import versions

MOST, BATCH = 3, 256


def bag(texts: list[str]) -> BagRanker:
    words = vocabulary_of(texts)
    table = torch.randn(len(words) + 2, 64, generator=torch.Generator().manual_seed(0))
    table[:2] = 0
    return BagRanker(WordVectors(Vocabulary(words), table), dim=32)


def cross_encoder(texts: list[str]) -> Any:
    """A BERT of two layers with random weights: what an attack costs does not depend on them."""
    import tempfile
    from pathlib import Path

    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    from ir_robust.rankers import CrossEncoderRanker

    with tempfile.TemporaryDirectory() as folder:
        made = BertWordPieceTokenizer()
        made.train_from_iterator(texts, vocab_size=4000, show_progress=False)
        made.save_model(folder)
        tokenizer = BertTokenizerFast(str(Path(folder) / "vocab.txt"), model_max_length=128)
    config = BertConfig(vocab_size=4000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=128, max_position_embeddings=128, num_labels=1)  # fmt: skip
    return CrossEncoderRanker(tokenizer, BertForSequenceClassification(config), batch_size=BATCH)


def with_textattack(ranker: Any, graph: SynonymGraph, query: str, doc: str, bar: float) -> int:
    import textattack
    from textattack.constraints.overlap import MaxWordsPerturbed
    from textattack.constraints.pre_transformation import RepeatModification
    from textattack.goal_functions import GoalFunction
    from textattack.search_methods import BeamSearch

    class Scores(textattack.models.wrappers.ModelWrapper):
        model = torch.nn.Identity()

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.from_numpy(scores_of(ranker, query, list(texts), batch_size=BATCH))[:, None]

    class Climb(GoalFunction):
        def _is_goal_complete(self, output: torch.Tensor, _: Any) -> bool:
            return float(output[0]) > bar

        def _get_score(self, output: torch.Tensor, _: Any) -> float:
            return float(output[0])

        def _goal_function_result_type(self) -> Any:
            return textattack.goal_function_results.TextToTextGoalFunctionResult

        def _process_model_outputs(self, inputs: Any, outputs: Any) -> Any:
            return outputs

    class Synonyms(textattack.transformations.WordSwap):
        def _get_replacement_words(self, word: str) -> list[str]:
            return [w for w in graph.substitutes(word.lower()) if w != word.lower()]

    goal = Climb(Scores(), model_batch_size=BATCH)
    attack = textattack.Attack(goal, [RepeatModification(), MaxWordsPerturbed(max_num_words=MOST)], Synonyms(),
                               BeamSearch(beam_width=1))  # fmt: skip
    start = textattack.shared.AttackedText(doc)
    first, _ = goal.init_attack_example(start, torch.zeros(1))
    attack.search_method(first)
    return goal.num_queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_collection("cranfield")
    texts = [*data.docs.values(), *data.queries.values()]
    root = os.environ["ROBUST_DATA"]
    graph = SynonymGraph.from_json(f"{root}/synonyms/counterfitted_neighbors.json", words=vocabulary_of(texts))
    run = BM25Index(data.docs).retrieve(data, depth=30)
    jobs = [(data.queries[qid], data.docs[list(run[qid])[20]]) for qid in list(data.judged())[: options.docs]]
    found: dict[str, Any] = {"about": __doc__.splitlines()[0], "versions": versions(), "docs": len(jobs), "models": {}}
    for name, ranker in (("bag of embeddings", bag(texts)), ("cross-encoder, 2 layers", cross_encoder(texts))):
        far = np.full(30, 1e9)
        rates: dict[str, list[float]] = {"ours": [], "textattack": []}
        for _ in range(options.rounds):
            attack = WordSubstitution(graph, WordBudget(share=1.0, most=MOST), Greedy(patience=None))
            for who in ("ours", "textattack"):
                begin, asked = time.process_time(), 0
                for query, doc in jobs:
                    if who == "ours":
                        asked += attack(ranker, query, doc, far, 1)[1]
                    else:
                        asked += with_textattack(ranker, graph, query, doc, 1e9)
                rates[who].append(asked / (time.process_time() - begin))
        begin = time.process_time()
        for query, doc in jobs:
            scores_of(ranker, query, [doc] * BATCH, batch_size=BATCH)
        rates["bare"] = [len(jobs) * BATCH / (time.process_time() - begin)]
        medians = {who: statistics.median(values) for who, values in rates.items()}
        found["models"][name] = {"texts_a_second": medians, "ratio": medians["ours"] / medians["textattack"]}
        print(f"{name}: {medians['ours']:.0f} against {medians['textattack']:.0f} texts a second, "
              f"{found['models'][name]['ratio']:.1f} x")  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
