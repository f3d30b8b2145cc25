"""The claim of CertDR: its attack is the best there is, its data must be there, its full scale runs on such data."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ir_robust.attacks import WordBudget
from ir_robust.certdr import PerturbationTable, SynonymGraph
from ir_robust.claims import certdr as claim
from ir_robust.rankers import BagRanker, random_vectors, scores_of
from ir_robust.text import Words
from robust_core.errors import DataMissingError

WORDS = "wing body flow heat shock layer boundary plate lift drag".split()
TABLE = PerturbationTable(SynonymGraph.from_pairs([("wing", "plate"), ("flow", "layer"), ("layer", "boundary")]))


def test_the_attack_on_an_additive_ranker_is_the_best_there_is() -> None:
    ranker = BagRanker(random_vectors(WORDS, 12, generator=3), dim=8, generator=1)
    doc, budget = "The Wing: flow in a layer, heat and flow.", WordBudget(0.25)
    old = Words.of(doc)
    choices = itertools.product(*((word, *TABLE.substitutes(word)) for word in old.words))
    texts = [
        old.replaced({i: w for i, w in enumerate(new) if w != old.words[i]}).text
        for new in choices
        if sum(a != b for a, b in zip(new, old.words, strict=True)) <= 2
    ]
    for query in ("heat", "lift of a wing", "shock"):
        found = claim.attacked(ranker, TABLE, query, doc, budget)
        assert found in texts
        assert scores_of(ranker, query, [found])[0] == pytest.approx(scores_of(ranker, query, texts).max(), abs=1e-6)


def test_missing_data_is_named_and_nothing_takes_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ROBUST_DATA", raising=False)
    with pytest.raises(DataMissingError, match="ROBUST_DATA is not there"):
        claim.run(0, "quick")
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    with pytest.raises(DataMissingError, match=r"counterfitted_neighbors\.json"):
        claim.run(0, "quick")


def encoder(place: Path) -> None:
    """Write a BERT of a few thousand weights."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    found: Any = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, model_max_length=512, mask_token="[MASK]", **names
    )
    config = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng(devices=[]):
        transformers.BertModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)


def test_two_steps_at_full_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    encoder(tmp_path / "models" / "bert-base-uncased")
    (tmp_path / "synonyms").mkdir()
    lists = {"wing": ["plate"], "plate": ["wing"], "flow": ["layer"], "layer": ["flow"]}
    (tmp_path / "synonyms" / "counterfitted_neighbors.json").write_text(json.dumps(lists))
    folder = tmp_path / "msmarco"
    (folder / "qrels").mkdir(parents=True)
    texts = [f"{WORDS[i % 10]} {WORDS[(i + 3) % 10]} flow wing" for i in range(20)]
    docs = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": f"{WORDS[i % 10]} flow"} for i in range(202)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    rows = [f"q{i}\td{i % 20}\t1" for i in range(202)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows))
    claim._fixed.cache_clear()
    setting = claim._setting(0, "full")
    claim._fixed.cache_clear()
    assert (len(setting.test), len(setting.train)) == (200, 2)
    ranker = claim._trained(setting)
    assert ranker.max_query == 64
    found = claim.attacked(ranker, setting.table, "wing flow", texts[0], WordBudget(0.5))
    assert scores_of(ranker, "wing flow", [found])[0] >= scores_of(ranker, "wing flow", texts[:1])[0]
