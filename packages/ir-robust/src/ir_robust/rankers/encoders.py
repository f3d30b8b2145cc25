"""Bi-encoders and late interaction: query and document are read apart.

    ranker = load_bi("path/to/MiniLM")                          # transformers alone; reads the folder's own settings
    ranker = load_sentence_transformer("path/to/folder")        # any modules of that library; extra "sbert"
    ranker = load_colbert("path/to/colbert")

* :class:`BiEncoderRanker`: ``<e(q), e(d)>`` of pooled (mean or first token) and normalised hidden states.
* :class:`ColBERTRanker`: ``sum_i max_j <q_i, d_j>`` of projected, normalised tokens (Khattab and Zaharia 2020, arXiv
  2004.12832): queries filled up with masks to 32 tokens, marks for query and document, signs of documents left out. As
  in the authors' code masks are read from but not attended to.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ir_robust.rankers.base import TokenBatch
from ir_robust.rankers.huggingface import HuggingFaceRanker, load_encoder, quiet, refuse_pickles, word_places
from robust_core.checks import check_choice, check_count
from robust_core.errors import DataMissingError, UntrustedFileError, optional_import
from robust_core.io import load_tensors, read_json, save_tensors
from robust_core.random import Seed, resolve_seed

__all__ = [
    "BiEncoderRanker",
    "ColBERTRanker",
    "load_bi",
    "load_colbert",
    "load_sentence_transformer",
    "pool",
]

Head = Callable[[Tensor, Tensor], Tensor]
"""(hidden states (B, T, D), attention mask (B, T)) -> (B, E) embeddings."""


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """Return (B, D): the mean of the attended tokens, or the first token."""
    if how == "cls":
        return hidden[:, 0]
    there = mask[..., None].to(hidden.dtype)
    return (hidden * there).sum(1) / there.sum(1).clamp_min(1)


class _TwoSided(HuggingFaceRanker):
    """Query and document go through the same network, each alone.

    Arguments of ``forward`` begin with ``query_`` and ``doc_``; in a :class:`TokenBatch` both stand side by side.
    """

    def _sides(self, queries: Sequence[str], docs: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs of both sides; those of documents hold ``offset_mapping`` too."""
        raise TypeError(f"{type(self).__name__} states no _sides()")

    def compare(self, query: Mapping[str, Tensor], doc: Mapping[str, Tensor]) -> Tensor:
        """Return (B,) scores of (1 or B) queries and B documents."""
        raise TypeError(f"{type(self).__name__} states no compare()")

    def inputs(self, queries: Sequence[str], docs: Sequence[str]) -> dict[str, Tensor]:
        """Return the arguments of :meth:`forward` for pairs of texts."""
        query, doc = self._sides(queries, docs)
        doc.pop("offset_mapping")
        return {**{f"query_{k}": v for k, v in query.items()}, **{f"doc_{k}": v for k, v in doc.items()}}

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return (B,) scores."""
        query = {k.removeprefix("query_"): v for k, v in inputs.items() if k.startswith("query_")}
        return self.compare(query, {k.removeprefix("doc_"): v for k, v in inputs.items() if k.startswith("doc_")})

    def _many(self, query: str, docs: Sequence[str]) -> Tensor:
        asked, found = self._sides([query], docs)
        found.pop("offset_mapping")
        return self.compare(asked, found)

    def _doc_text(self, doc: str) -> tuple[str, int]:
        """What is tokenised for a document, and how many letters stand before the text."""
        return doc, 0

    def tokens(self, query: str, docs: Sequence[str]) -> TokenBatch:
        """Return query and documents in tokens, side by side."""
        asked, found = self._sides([query] * len(docs), docs)
        offsets, n = found.pop("offset_mapping").cpu(), asked["input_ids"].shape[1]
        word = torch.full((len(docs), n + offsets.shape[1]), -1)
        for i, doc in enumerate(docs):
            before = self._doc_text(doc)[1]
            places = offsets[i] - before
            word[i, n:] = torch.tensor(word_places(doc, places, (places[:, 0] >= 0).tolist()))
        both = {name: torch.cat([asked[name], found[name]], 1) for name in asked if name in found}
        side = torch.arange(word.shape[1], device=self.device) < n
        ids = both.pop("input_ids")
        return TokenBatch(ids, word.to(self.device), {**both, "query": side.expand_as(ids)})

    def score_embedded(self, batch: TokenBatch, embeddings: Tensor) -> Tensor:
        """Return (B,) scores with (B, T, D) embeddings in place of the batch's tokens."""
        n = int(batch.inputs["query"][0].sum()) if len(batch.ids) else 0
        embeddings = embeddings.to(self.token_embeddings.dtype)
        plain = {"input_ids": batch.ids, **{k: v for k, v in batch.inputs.items() if k != "query"}}
        query = {name: value[:, :n] for name, value in plain.items()}
        doc = {name: value[:, n:] for name, value in plain.items()}
        return self.compare({**query, "inputs_embeds": embeddings[:, :n]}, {**doc, "inputs_embeds": embeddings[:, n:]})

    def _hidden(self, side: Mapping[str, Tensor]) -> Tensor:
        """(B, T, D) last hidden states, from tokens or from embeddings."""
        names = ("attention_mask", "token_type_ids", "inputs_embeds" if "inputs_embeds" in side else "input_ids")
        return self.model(**{name: side[name] for name in names if name in side}).last_hidden_state


class BiEncoderRanker(_TwoSided):
    """One vector for each text.

    Args:
        tokenizer: a fast one.
        model: an encoder.
        pooling: "mean" or "cls".
        normalise: make embeddings of length 1, so that scores are cosines.
        query_prefix: put before queries, such as "query: " for E5.
        doc_prefix: put before documents.
        remember: texts whose embeddings are kept as long as no weight changes; 0 keeps none. The same documents come
            back for one query after the other.
        head: pools otherwise; then ``pooling`` and ``normalise`` do nothing. An ``nn.Module`` is trained as well.
        max_length: as of :class:`HuggingFaceRanker`.
        batch_size: as of :class:`HuggingFaceRanker`.
    """

    kind = "bi"

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        *,
        pooling: str = "mean",
        normalise: bool = True,
        query_prefix: str = "",
        doc_prefix: str = "",
        remember: int = 4096,
        head: Head | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(tokenizer, model, max_length=max_length, batch_size=batch_size)
        self.pooling, self.normalise = check_choice("pooling", pooling, ("mean", "cls")), normalise
        self.query_prefix, self.doc_prefix, self.head = query_prefix, doc_prefix, head
        self.remember = check_count("remember", remember, low=0)
        self._known: dict[str, Tensor] = {}
        self._state: tuple[Any, ...] = ()
        self.eval()

    @property
    def config(self) -> Mapping[str, Any]:
        """The constructor's settings."""
        own = {"pooling": self.pooling, "normalise": self.normalise, "remember": self.remember}
        return {**super().config, **own, "query_prefix": self.query_prefix, "doc_prefix": self.doc_prefix}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer and network as the library does.

        Raises:
            TypeError: the ranker has a head of its own.
        """
        if self.head is not None:
            raise TypeError("a ranker with a head of its own is saved by the library that it is from")
        super().save_pretrained(folder)

    def _doc_text(self, doc: str) -> tuple[str, int]:
        return f"{self.doc_prefix}{doc}", len(self.doc_prefix)

    def _sides(self, queries: Sequence[str], docs: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        asked = dict(self._tokens([f"{self.query_prefix}{query}" for query in queries], self.max_length))
        asked.pop("offset_mapping")
        return asked, dict(self._tokens([self._doc_text(doc)[0] for doc in docs], self.max_length))

    def embed(self, side: Mapping[str, Tensor]) -> Tensor:
        """Return (B, E) float32 embeddings of tokens or of token embeddings."""
        hidden = self._hidden(side).float()
        if self.head is not None:
            return self.head(hidden, side["attention_mask"])
        found = pool(hidden, side["attention_mask"], self.pooling)
        return F.normalize(found, dim=1) if self.normalise else found

    def _remembered(self, texts: Sequence[str]) -> Tensor:
        """(B, E) embeddings of texts with their prefixes; only those that are new go through the network."""
        state = tuple((p.data_ptr(), p._version, p.device, p.dtype) for p in self.parameters())
        if state != self._state:
            self._known, self._state = {}, state
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            self._known.update(zip(part, self.embed(self._tokens(part, self.max_length)), strict=True))
        found = torch.stack([self._known[text] for text in texts])
        if len(self._known) > self.remember:
            self._known = {}
        return found

    def _many(self, query: str, docs: Sequence[str]) -> Tensor:
        asked = self._remembered([f"{self.query_prefix}{query}"])
        return (asked * self._remembered([self._doc_text(doc)[0] for doc in docs])).sum(1)

    def compare(self, query: Mapping[str, Tensor], doc: Mapping[str, Tensor]) -> Tensor:
        """Return (B,) inner products."""
        return (self.embed(query) * self.embed(doc)).sum(1)


class ColBERTRanker(_TwoSided):
    """A vector for each token, and the best match of each of the query's.

    Args:
        tokenizer: a fast one, with a mask token.
        model: an encoder.
        projection: (E, D) weights; if None, random ones of E = ``dim``, to be trained.
        dim: numbers for each token.
        query_length: tokens to which queries are filled up or cut.
        marks: tokens that say "query" and "document"; left out where the vocabulary lacks them.
        skip_signs: leave documents' punctuation out of the maximum.
        generator: seed of a random projection.
        max_length: as of :class:`HuggingFaceRanker`.
        batch_size: as of :class:`HuggingFaceRanker`.
    """

    kind = "colbert"

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        projection: Tensor | None = None,
        *,
        dim: int = 128,
        query_length: int = 32,
        marks: Sequence[str] = ("[unused0]", "[unused1]"),
        skip_signs: bool = True,
        generator: Seed = None,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(tokenizer, model, max_length=max_length, batch_size=batch_size)
        width, draw = self.token_embeddings.shape[1], torch.Generator().manual_seed(resolve_seed(generator))
        fresh = torch.randn(check_count("dim", dim), width, generator=draw) / width**0.5
        weights = fresh if projection is None else projection.detach().clone()
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: has no mask token, with which queries are filled up")
        self.projection = nn.Parameter(weights)
        self.query_length = check_count("query_length", query_length, low=4)
        self.marks, self.skip_signs = tuple(marks), skip_signs
        vocabulary = tokenizer.get_vocab()
        self._marks = [vocabulary.get(mark) for mark in self.marks]
        signs = [vocabulary[sign] for sign in string.punctuation if sign in vocabulary] if skip_signs else []
        self.register_buffer("_signs", torch.tensor(signs, dtype=torch.int64), persistent=False)
        self.eval()

    @property
    def config(self) -> Mapping[str, Any]:
        """The constructor's settings."""
        own = {"query_length": self.query_length, "marks": list(self.marks), "skip_signs": self.skip_signs}
        return {**super().config, **own}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer and network as the library does, and the projection beside."""
        super().save_pretrained(folder)
        save_tensors(Path(folder) / "projection.safetensors", {"linear.weight": self.projection})

    def _marked(self, texts: Sequence[str], length: int, mark: int | None) -> dict[str, Tensor]:
        room = length if mark is None else length - 1
        found = dict(self._tokens(texts, room))
        if mark is not None:  # behind the first token, as the authors put it
            filling = {"input_ids": mark, "attention_mask": 1}
            for name, value in found.items():
                column = torch.full_like(value[:, :1], filling.get(name, 0))
                found[name] = torch.cat([value[:, :1], column, value[:, 1:]], 1)
        return found

    def _sides(self, queries: Sequence[str], docs: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        asked = self._marked(queries, self.query_length, self._marks[0])
        asked.pop("offset_mapping")
        missing = self.query_length - asked["input_ids"].shape[1]
        asked = {name: F.pad(value, (0, missing)) for name, value in asked.items()}
        blank = asked["attention_mask"] == 0
        asked["input_ids"] = asked["input_ids"].masked_fill(blank, self.tokenizer.mask_token_id)
        return asked, self._marked(docs, self.max_length, self._marks[1])

    def compare(self, query: Mapping[str, Tensor], doc: Mapping[str, Tensor]) -> Tensor:
        """Return (B,) sums of best matches."""
        asked, found = (F.normalize(self._hidden(side).float() @ self.projection.T, dim=2) for side in (query, doc))
        ids, signs = doc["input_ids"], self.get_buffer("_signs")
        there = (doc["attention_mask"] > 0) & ~torch.isin(ids, signs)
        matched = (asked @ found.transpose(1, 2)).masked_fill(~there[:, None], -torch.inf)
        return matched.amax(2).sum(1)  # the first token always counts: never the maximum of nothing


def _json(file: Path) -> dict[str, Any]:
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise UntrustedFileError(f"{file} holds no settings")
    return found


def load_bi(folder: str | os.PathLike[str], **settings: Any) -> BiEncoderRanker:
    """Return the bi-encoder in a folder; sentence-transformers' files say pooling and length where they are there.

    Args:
        folder: local; nothing is downloaded.
        settings: of :class:`BiEncoderRanker`; they win over the files.

    Raises:
        ValueError: the folder asks for a pooling that is neither mean nor first token; use
            :func:`load_sentence_transformer`.
    """
    place = Path(folder).expanduser()
    tokenizer, model = load_encoder(place)
    pooling = _json(place / "1_Pooling" / "config.json")
    if pooling and "pooling" not in settings:
        modes = {key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True}
        named = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
        chosen = {named.get(mode, mode) for mode in (modes - {"include_prompt"}) or {str(pooling.get("pooling_mode"))}}
        if len(chosen) != 1 or not chosen <= {"mean", "cls"}:
            raise ValueError(f"{place}: pooling {sorted(chosen)} is read by load_sentence_transformer alone")
        settings["pooling"] = chosen.pop()
    length = _json(place / "sentence_bert_config.json").get("max_seq_length")
    if length is not None:
        settings.setdefault("max_length", length)
    return BiEncoderRanker(tokenizer, model, **settings)


class _Head(nn.Module):
    """The modules of a sentence transformer behind its network."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": mask}
        for part in self.parts:
            features = part(features)
        return F.normalize(features["sentence_embedding"], dim=1)


def load_sentence_transformer(folder: Any, **settings: Any) -> BiEncoderRanker:
    """Return a sentence transformer as a ranker by cosine, whatever modules stand behind its network.

    Args:
        folder: local, or a ``SentenceTransformer``.
        settings: of :class:`BiEncoderRanker`; where they are silent, the model says length and prompts.

    Raises:
        MissingExtraError: sentence-transformers is not installed (extra ``sbert``).
        DataMissingError: no such folder.
        TypeError: its first module is no transformer.
    """
    if isinstance(folder, str | os.PathLike):
        place = Path(folder).expanduser()
        if not (place / "modules.json").is_file():
            raise DataMissingError(f"{place}: no folder of a sentence transformer (modules.json is missing)")
        refuse_pickles(place)
        library = optional_import("sentence_transformers", extra="sbert", package="ir-robust")
        with quiet():
            folder = library.SentenceTransformer(
                str(place), local_files_only=True, device="cpu", model_kwargs={"use_safetensors": True}
            )
    first, *rest = list(folder)
    if not hasattr(first, "auto_model"):
        raise TypeError(f"the first module is {type(first).__name__}; a transformer is needed")
    prompts = {name: text or "" for name, text in (folder.prompts or {}).items()}
    settings = {
        "query_prefix": prompts.get("query", ""),
        "doc_prefix": prompts.get("document", ""),
        "max_length": folder.max_seq_length,
        **settings,
    }
    return BiEncoderRanker(folder.tokenizer, first.auto_model, head=_Head(rest), **settings)


def load_colbert(folder: str | os.PathLike[str], **settings: Any) -> ColBERTRanker:
    """Return the late-interaction ranker in a folder: an encoder and a tensor ``linear.weight``.

    Args:
        folder: local; the projection stands in ``projection.safetensors`` or among the encoder's weights.
        settings: of :class:`ColBERTRanker`.

    Raises:
        DataMissingError: no projection.
    """
    place = Path(folder).expanduser()
    tokenizer, model = load_encoder(place)
    for file in (place / "projection.safetensors", *sorted(place.glob("model*.safetensors"))):
        found = load_tensors(file).get("linear.weight") if file.is_file() else None
        if found is not None:
            return ColBERTRanker(tokenizer, model, found.float(), **settings)
    raise DataMissingError(f"{place}: no tensor 'linear.weight', the projection of a late-interaction ranker")
