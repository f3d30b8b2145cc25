"""Cross-encoders: a transformer reads query and document together and says one number.

    ranker = load_cross("path/to/folder")                       # any sequence classification model with 1 or 2 labels
    ranker = new_cross_encoder("path/to/MiniLM", layers=2)      # a fresh head on its first layers, to be trained
    fit_ranker(ranker, data, pairs, epochs=1, lr=2e-5, batch_size=16)

The score is the logit of one label, or the difference of "relevant" (the second) and "not relevant" of two: the raw
number by which the model was trained. ``activation="sigmoid"`` maps it into (0, 1), as certificates want it; nothing is
chosen silently, because published models differ. The document alone is cut where a pair is too long; a query beyond
``max_query`` tokens is cut before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ir_robust.rankers.base import TokenBatch
from ir_robust.rankers.huggingface import HuggingFaceRanker, load_encoder, quiet, word_places
from robust_core.checks import check_choice, check_count
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["CrossEncoderRanker", "load_cross", "new_cross_encoder"]


class CrossEncoderRanker(HuggingFaceRanker):
    """A sequence classification model as a ranker.

    Args:
        tokenizer: a fast one.
        model: with one or two labels.
        max_length: as of :class:`HuggingFaceRanker`.
        max_query: tokens of a query that are read, a quarter of ``max_length`` if None.
        activation: "none" or "sigmoid".
        batch_size: as of :class:`HuggingFaceRanker`.

    Raises:
        ValueError: a model with more labels, or lengths that leave no room for a document.
    """

    kind = "cross"

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        *,
        max_length: int | None = None,
        max_query: int | None = None,
        activation: str = "none",
        batch_size: int = 32,
    ) -> None:
        super().__init__(tokenizer, model, max_length=max_length, batch_size=batch_size)
        if model.config.num_labels not in (1, 2):
            raise ValueError(f"model: {model.config.num_labels} labels; a ranker has one, or two (no, yes)")
        self.max_query = check_count("max_query", self.max_length // 4 if max_query is None else max_query)
        if self.max_query > self.max_length - 5:
            raise ValueError(f"max_query={self.max_query}: leaves no room for documents in {self.max_length} tokens")
        self.activation = check_choice("activation", activation, ("none", "sigmoid"))
        self._types = getattr(model.config, "type_vocab_size", 0) > 1

    @property
    def config(self) -> Mapping[str, Any]:
        """The constructor's settings."""
        return {**super().config, "max_query": self.max_query, "activation": self.activation}

    def _cut(self, query: str) -> str:
        """The query's beginning, in ``max_query`` tokens."""
        found = self.tokenizer(query, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return query if len(found) <= self.max_query else query[: found[self.max_query - 1][1]]

    def _pairs(self, queries: Sequence[str], docs: Sequence[str], *, offsets: bool = False) -> Any:
        cut = {query: self._cut(query) for query in dict.fromkeys(queries)}
        return self.tokenizer(
            [cut[query] for query in queries],
            list(docs),
            truncation="only_second",
            max_length=self.max_length,
            padding=True,
            return_token_type_ids=True if self._types else None,  # BERT reads a pair as one text without them
            return_offsets_mapping=offsets,
            return_tensors="pt",
        )

    def inputs(self, queries: Sequence[str], docs: Sequence[str]) -> dict[str, Tensor]:
        """Return the network's arguments for pairs of texts."""
        return dict(self._pairs(queries, docs).to(self.device))

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return (B,) scores before the activation."""
        logits = self.model(**inputs).logits.float()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def _active(self, scores: Tensor) -> Tensor:
        return scores if self.activation == "none" else torch.sigmoid(scores)

    def _many(self, query: str, docs: Sequence[str]) -> Tensor:
        return self._active(self(**self.inputs([query] * len(docs), docs)))

    def tokens(self, query: str, docs: Sequence[str]) -> TokenBatch:
        """Return the pairs in tokens."""
        found = self._pairs([query] * len(docs), docs, offsets=True)
        offsets = found.pop("offset_mapping").tolist()
        word = [
            word_places(doc, offsets[i], [part == 1 for part in found.sequence_ids(i)]) for i, doc in enumerate(docs)
        ]
        inputs = {name: value.to(self.device) for name, value in found.items()}
        return TokenBatch(inputs.pop("input_ids"), torch.tensor(word, device=self.device), inputs)

    def score_embedded(self, batch: TokenBatch, embeddings: Tensor) -> Tensor:
        """Return (B,) scores with (B, T, D) embeddings in place of the batch's tokens."""
        return self._active(self(inputs_embeds=embeddings.to(self.token_embeddings.dtype), **batch.inputs))


def load_cross(folder: str | os.PathLike[str], **settings: Any) -> CrossEncoderRanker:
    """Return the cross-encoder in a folder of Hugging Face's form.

    Args:
        folder: local; nothing is downloaded.
        settings: of :class:`CrossEncoderRanker`.

    Raises:
        DataMissingError, UntrustedFileError, ValueError: see :func:`~ir_robust.rankers.huggingface.load_encoder`.
    """
    tokenizer, model = load_encoder(folder, "AutoModelForSequenceClassification")
    return CrossEncoderRanker(tokenizer, model, **settings)


def new_cross_encoder(
    folder: str | os.PathLike[str],
    *,
    layers: int | None = None,
    hidden: int | None = None,
    generator: Seed = None,
    **settings: Any,
) -> CrossEncoderRanker:
    """Return a cross-encoder to be trained, on the tokenizer and the weights of an encoder.

    Args:
        folder: of the encoder.
        layers: keep its first so many; all if None.
        hidden: if given, start from fresh weights of this width (a multiple of 32) and use the tokenizer alone.
        generator: seed of the fresh weights.
        settings: of :class:`CrossEncoderRanker`.
    """
    import transformers

    sizes: dict[str, Any] = {} if layers is None else {"num_hidden_layers": check_count("layers", layers)}
    seed = resolve_seed(generator)
    if hidden is None:
        with reseeded(seed):
            tokenizer, model = load_encoder(
                folder, "AutoModelForSequenceClassification", complete=False, num_labels=1, **sizes
            )
        return CrossEncoderRanker(tokenizer, model, **settings)
    if check_count("hidden", hidden, low=32) % 32:
        raise ValueError(f"hidden={hidden}: a multiple of 32 is needed")
    tokenizer, encoder = load_encoder(folder)
    sizes |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 32}
    config = type(encoder.config).from_dict({**encoder.config.to_dict(), **sizes, "num_labels": 1})
    with reseeded(seed), quiet():
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return CrossEncoderRanker(tokenizer, model, **settings)
