"""From (prompt, chosen, rejected) to token rows: what preference training reads.

A reviser is the writer with an answer in its prompt, so both prompts come from one :class:`Templates`, in training and
in :func:`rl_robust.preference.self_revise`. Prompt and completion are tokenised apart and joined: the prompt's tokens
are then the same in every row, whatever the completion begins with. Every completion ends with the end-of-sequence
token. A triple that does not fit is left out whole and counted: an answer that is cut is another answer.

The defaults of the templates are ours; the paper does not print its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rl_robust.preference.logprobs import IGNORED, Reduction, batch_logprobs
from robust_core.checks import check_choice, check_count, check_number
from robust_core.models import frozen, model_device
from robust_core.training.batches import Source

__all__ = ["PreferenceData", "Prompt", "Templates", "TokenRow", "preference_data", "triple_rows"]

Prompt = str | Sequence[Mapping[str, str]]
"""Text, or the messages of a conversation, which the tokenizer's chat template renders."""


@dataclass(frozen=True)
class Templates:
    """How the two roles of one model are asked.

    Attributes:
        writer: text with ``{prompt}``.
        reviser: text with ``{prompt}`` and ``{completion}``, the answer to improve on.

    With messages, the last one is what the templates are applied to.
    """

    writer: str = "{prompt}"
    reviser: str = "{prompt}\n\nEXAMPLE ANSWER: {completion}\n\nWrite a better answer.\n\n"

    def __post_init__(self) -> None:
        needed = {"writer": (self.writer, ("{prompt}",)), "reviser": (self.reviser, ("{prompt}", "{completion}"))}
        for name, (text, marks) in needed.items():
            if any(text.count(mark) != 1 for mark in marks):
                raise ValueError(f"{name}={text!r}: {' and '.join(marks)} must stand in it exactly once")
        if "{completion}" in self.writer:
            raise ValueError(f"writer={self.writer!r} holds {{completion}}: the writer sees no answer")

    def render(self, prompt: str, completion: str | None = None) -> str:
        """Return the writer's text, or the reviser's if a completion is given. Braces in the texts are left alone."""
        if completion is None:
            return self.writer.replace("{prompt}", prompt)
        head, _, tail = self.reviser.partition("{prompt}")
        if "{completion}" in head:
            return head.replace("{completion}", completion) + prompt + tail
        return head + prompt + tail.replace("{completion}", completion)

    def tokens(self, tokenizer: Any, prompt: Prompt, completion: str | None = None) -> list[int]:
        """Return the token ids of a writer's prompt, or of a reviser's if a completion is given."""
        if isinstance(prompt, str):
            ids = list(tokenizer(self.render(prompt, completion))["input_ids"])
            while ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id:
                ids.pop()  # some tokenizers end every text; the answer is still to come
            return ids
        if not prompt:
            raise ValueError("a prompt of no messages; at least one is needed")
        last = {**prompt[-1], "content": self.render(prompt[-1]["content"], completion)}
        text = tokenizer.apply_chat_template([*prompt[:-1], last], tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class TokenRow:
    """One row of tokens: a prompt and the completion that is scored."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def _completion(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return (*ids, end) if not ids or ids[-1] != end else tuple(ids)


def triple_rows(
    tokenizer: Any, prompt: Prompt, chosen: str, rejected: str, *, templates: Templates
) -> tuple[TokenRow, ...]:
    """Return the six rows of a triple: (w|l), (l|l), (w|w), (l|w), w, l, where w is chosen and l rejected.

    Only the target is scored; what stands behind the bar is in the prompt of the reviser.
    """
    w, l = _completion(tokenizer, chosen), _completion(tokenizer, rejected)  # noqa: E741 - the paper's letter
    write, better_w, better_l = (
        tuple(templates.tokens(tokenizer, prompt, given)) for given in (None, chosen, rejected)
    )
    pairs = ((better_l, w), (better_l, l), (better_w, w), (better_w, l), (write, w), (write, l))
    return tuple(TokenRow(asked, answer) for asked, answer in pairs)


class PreferenceData(Source):
    """Token rows that :func:`robust_core.training.fit` reads; each batch is padded to its own longest row.

    Args:
        rows: for each sample, K rows.
        y: for each sample, the probability that the first completion is preferred.
        pad: token id of padding.
        dropped: reason -> number of samples that were left out.
        index: for each sample, its position in the data that the user gave; 0, 1, … when None.
        reference: (N, K) log-probabilities of the frozen reference.
    """

    in_memory = True

    def __init__(
        self,
        rows: Sequence[Sequence[TokenRow]],
        y: Sequence[float],
        *,
        pad: int = 0,
        dropped: Mapping[str, int] | None = None,
        index: Sequence[int] | None = None,
        reference: Tensor | None = None,
    ) -> None:
        if not rows or len(rows) != len(y) or len({len(sample) for sample in rows}) != 1:
            raise ValueError(f"{len(rows)} samples, {len(y)} values of y: as many of both are needed, of K rows each")
        self.rows, self.pad, self.dropped = [tuple(sample) for sample in rows], pad, dict(dropped or {})
        self.y = torch.tensor([check_number("y", value, low=0.0, high=1.0) for value in y], dtype=torch.float32)
        self.index = torch.arange(len(rows)) if index is None else torch.tensor(list(index))
        self.reference = reference

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_samples(self) -> int:
        """One more than the largest index."""
        return int(self.index.max()) + 1

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """Return the batch of some positions, see :mod:`rl_robust.preference.logprobs`."""
        chosen = [self.rows[i] for i in rows.tolist()]
        length = max(len(row) for sample in chosen for row in sample)
        shape = (len(chosen), len(chosen[0]), length)
        x, mask, labels = torch.full(shape, self.pad), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        for b, sample in enumerate(chosen):
            for k, row in enumerate(sample):
                x[b, k, : len(row)] = torch.tensor(row.prompt + row.completion)
                mask[b, k, : len(row)] = 1
                labels[b, k, len(row.prompt) : len(row)] = torch.tensor(row.completion)
        found = {"x": x, "attention_mask": mask, "labels": labels, "y": self.y[rows], "index": self.index[rows]}
        return found if self.reference is None else {**found, "reference": self.reference[rows]}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return one batch of samples of this data, for a loader of one's own (``collate_fn=data.collate``)."""
        return self.batch(torch.tensor([int(sample["position"]) for sample in samples]))

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return a handle that :meth:`collate` turns into a batch: rows are padded together, not one by one."""
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        return {"position": position % len(self)}

    def with_reference(
        self,
        model: nn.Module,
        *,
        reduction: Reduction,
        batch_size: int = 32,
        on_step: Callable[[int, int], object] | None = None,
    ) -> PreferenceData:
        """Return the same data with the log-probabilities of ``model``, so that training needs no second model.

        Args:
            model: the reference.
            reduction: the one of the objective.
            batch_size: samples for each pass.
            on_step: called with (samples done, samples).
        """
        parts, device = [], model_device(model)
        for start in range(0, len(self), check_count("batch_size", batch_size)):
            positions = torch.arange(start, min(start + batch_size, len(self)))
            batch = self.batch(positions)
            x, mask, labels = (batch[key].to(device) for key in ("x", "attention_mask", "labels"))
            with torch.no_grad(), frozen(model):
                parts.append(batch_logprobs(model, x, mask, labels, reduction=reduction).cpu())
            if on_step is not None:
                on_step(start + len(positions), len(self))
        return PreferenceData(
            self.rows,
            self.y.tolist(),
            pad=self.pad,
            dropped=self.dropped,
            index=self.index.tolist(),
            reference=torch.cat(parts),
        )


@dataclass(frozen=True)
class _Triple:
    prompt: Prompt
    chosen: str
    rejected: str
    p: float


def _text(name: str, value: Any, position: int) -> str:
    """Return a completion as text; data of conversations hold it as one message in a list."""
    if not isinstance(value, str) and isinstance(value, Sequence) and value:
        value = value[-1]["content"]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} of example {position} is {value!r}; a completion with some text is needed")
    return value


def _read(example: Mapping[str, Any], position: int) -> _Triple:
    missing = [key for key in ("prompt", "chosen", "rejected") if key not in example]
    if missing:
        raise ValueError(f"example {position} lacks {', '.join(missing)}; it holds {', '.join(map(str, example))}")
    chosen, rejected = (_text(key, example[key], position) for key in ("chosen", "rejected"))
    p = check_number(f"p of example {position}", float(example.get("p", 1.0)), low=0.0, high=1.0)
    return _Triple(example["prompt"], chosen, rejected, p)


def preference_data(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    templates: Templates | None = None,
    max_length: int | None = None,
    overflow: Literal["drop", "error"] = "drop",
    rows: Callable[..., tuple[TokenRow, ...]] = triple_rows,
) -> PreferenceData:
    """Return token rows of preferences.

    Args:
        examples: mappings with ``prompt``, ``chosen``, ``rejected``, as in the data sets of TRL, and optionally ``p``,
            the probability in [0, 1] that ``chosen`` is preferred (1 if missing).
        tokenizer: of Hugging Face, with an ``eos_token_id``.
        templates: how writer and reviser are asked.
        max_length: longest row in tokens; ``tokenizer.model_max_length`` when None.
        overflow: what happens to a triple of which a row is longer: ``"drop"`` leaves it out and counts it in
            ``dropped["overflow"]``.
        rows: (tokenizer, prompt, chosen, rejected, templates=) -> K rows, for another method than SRPO.

    Returns:
        The data. Triples with equal completions say nothing and are counted in ``dropped["equal"]``.

    Raises:
        ValueError: a missing column, an empty completion, p outside [0, 1], no end-of-sequence token, an overflow
            with ``overflow="error"``, or no triple left.
    """
    check_choice("overflow", overflow, ("drop", "error"))
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; a completion must have an end that can be learned")
    limit = check_count("max_length", int(tokenizer.model_max_length) if max_length is None else max_length)
    templates = templates or Templates()
    kept: list[tuple[int, float, tuple[TokenRow, ...]]] = []
    dropped = {"equal": 0, "overflow": 0}
    for position, example in enumerate(examples):
        triple = _read(example, position)
        if triple.chosen == triple.rejected:
            dropped["equal"] += 1
            continue
        found = rows(tokenizer, triple.prompt, triple.chosen, triple.rejected, templates=templates)
        longest = max(map(len, found))
        if longest > limit and overflow == "error":
            raise ValueError(f"example {position} needs {longest} tokens, max_length={limit}; overflow='drop' skips it")
        if longest > limit:
            dropped["overflow"] += 1
            continue
        kept.append((position, triple.p, found))
    if not kept:
        raise ValueError(f"no example is left (dropped: {dropped}); max_length={limit}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PreferenceData(
        [r for _, _, r in kept], [p for _, p, _ in kept], pad=pad, dropped=dropped, index=[i for i, _, _ in kept]
    )
