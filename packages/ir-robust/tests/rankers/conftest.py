"""Transformers of a few thousand weights, in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
PIECES = "wing body flow heat shock layer boundary hydro dynamic ##s the of in a it ' - . , s plate lift drag".split()


def tiny_tokenizer() -> Any:
    import transformers

    pieces = [*SPECIAL, *PIECES]
    found = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    found.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=64, **names)


def tiny_folder(place: Path, labels: int | None = None) -> Path:
    """Write a BERT with 2 layers of width 32, with a head of so many labels or none; return the folder."""
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(PIECES), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    if labels is not None:
        config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        kind = transformers.BertModel if labels is None else transformers.BertForSequenceClassification
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def make(labels: int) -> Path:
        if labels not in made:
            made[labels] = tiny_folder(tmp_path_factory.mktemp(f"labels{labels}"), labels)
        return made[labels]

    return make
