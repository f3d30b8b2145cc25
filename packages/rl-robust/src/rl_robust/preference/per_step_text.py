r"""Between texts and token ids: where steps end, whether an answer is right, and roll-outs of ``transformers`` models.

Splitters cut token ids, never text: prefix and continuation are then the tokens of the whole. Verifiers normalise both
answers first, for an answer that is right but written otherwise would turn good steps into pits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from rl_robust.preference.per_step_values import Ids, Problem, Splitter, Verifier
from robust_core.checks import check_count, check_number
from robust_core.models import frozen, model_device
from robust_core.random import reseeded

__all__ = [
    "TransformersSampler",
    "boxed_expression",
    "each_token",
    "exact_number",
    "newline",
    "sentence",
    "split_after",
    "verify_text",
]

# -- splitters -------------------------------------------------------------------------------------------------


def split_after(ends_step: Callable[[Ids, int], bool], *, eos: int | None = None) -> Splitter:
    """Return the splitter that ends a step after position i where ``ends_step(ids, i)``.

    An end of sequence joins the step before it: alone it is no step.
    """

    def splitter(ids: Ids) -> list[int]:
        last = len(ids) - 1 if len(ids) > 1 and ids[-1] == eos else len(ids)
        ends = [i + 1 for i in range(last) if ends_step(ids, i) and i + 1 < last]
        return [*ends, len(ids)]

    return splitter


def each_token(*, eos: int | None = None) -> Splitter:
    """Return the splitter for which every token is a step."""
    return split_after(lambda ids, i: True, eos=eos)


def newline(tokenizer: Any) -> Splitter:
    r"""Return the splitter that ends a step with its last token of a run of newlines (``"\n"``, ``"\n\n"``)."""
    text = _pieces(tokenizer)

    def ends(ids: Ids, i: int) -> bool:
        return text(ids[i]).rstrip(" ").endswith("\n") and i + 1 < len(ids) and text(ids[i + 1]).strip(" \n") != ""

    return split_after(ends, eos=tokenizer.eos_token_id)


def sentence(tokenizer: Any) -> Splitter:
    """Return the splitter that ends a step with ``.``, ``!`` or ``?`` before white space, and with newlines."""
    text = _pieces(tokenizer)

    def ends(ids: Ids, i: int) -> bool:
        here, following = text(ids[i]), text(ids[i + 1]) if i + 1 < len(ids) else ""
        stop = here.rstrip("\"')").endswith((".", "!", "?")) and following[:1].isspace()
        return stop or (here.endswith("\n") and following.strip() != "")

    return split_after(ends, eos=tokenizer.eos_token_id)


def _pieces(tokenizer: Any) -> Callable[[int], str]:
    """Return id -> its text, remembered: a vocabulary is small, responses are many."""
    known: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in known:
            known[token] = tokenizer.decode([token])
        return known[token]

    return text


# -- verifiers -------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?")


def _number(text: str) -> Fraction | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    top, _, bottom = found[-1].replace(",", "").replace(" ", "").partition("/")
    top = top.rstrip(".")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / (int(bottom) if bottom else 1)


def exact_number(text: str, answer: str) -> bool:
    """Say whether the last number after ``####`` or "answer is" (or of the whole text) equals that of ``answer``.

    Thousands' commas, currency, trailing dots and simple fractions are understood; equality is exact.
    """
    said = re.split(r"####|answer\s+is:?", text, flags=re.IGNORECASE)[-1]
    wanted = _number(answer)
    if wanted is None:
        raise ValueError(f"answer={answer!r} holds no number")
    return _number(said) == wanted


def _boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}``, braces matched; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def _expression(text: str) -> str:
    for old, new in (("\\left", ""), ("\\right", ""), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\!", ""),
                     ("\\,", ""), ("\\$", ""), ("$", ""), ("^\\circ", ""), ("^{\\circ}", ""), ("\\%", "")):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", re.sub(r"\s+", "", text).rstrip("."))
    return text


def boxed_expression(text: str, answer: str) -> bool:
    r"""Say whether the last ``\boxed{...}`` equals ``answer`` (itself boxed or bare), both normalised.

    Spaces, sizes of brackets, kinds of fractions, units of degree, percent and dollar are taken out; numbers are
    compared as numbers, everything else as text. A text without a box is wrong.
    """
    said = _boxed(text)
    if said is None:
        return False
    a, b = _expression(said), _expression(_boxed(answer) or answer)
    if _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b):
        return _number(a) == _number(b)
    return a == b


def verify_text(tokenizer: Any, check: Callable[[str, str], bool]) -> Verifier:
    """Return the verifier of token ids that decodes a response and asks ``check(text, problem.answer)``."""

    def verifier(problem: Problem, ids: Ids) -> bool:
        return check(tokenizer.decode(list(ids), skip_special_tokens=True), problem.answer)

    return verifier


# -- roll-outs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformersSampler:
    """Continuations drawn by ``model.generate``, one call for each prefix, seeded by it alone.

    Attributes:
        model: a causal language model of ``transformers``.
        eos: token id of the end of sequence.
        pad: token id of padding; ``eos`` when None.
        max_new_tokens: longest continuation.
        temperature: above 0; the one at which the solutions themselves were sampled.
        top_p: share of the probability that is sampled from; 1 is the model itself.
    """

    model: Any
    eos: int
    pad: int | None = None
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        check_number("temperature", self.temperature, low=0.0, open_low=True)
        check_number("top_p", self.top_p, low=0.0, high=1.0, open_low=True)

    def __call__(self, prefixes: Sequence[Ids], n: int, *, seeds: Sequence[int]) -> list[list[list[int]]]:
        """Return ``n`` continuations of each prefix, cut after the end of sequence."""
        return [self._one(prefix, n, seed) for prefix, seed in zip(prefixes, seeds, strict=True)]

    @torch.no_grad()
    def _one(self, prefix: Ids, n: int, seed: int) -> list[list[int]]:
        if not prefix:
            raise ValueError("a prefix of no tokens; a prompt of at least one is needed")
        if self.eos == prefix[-1] and len(prefix) > 1:
            raise ValueError(f"a prefix ends with the end of sequence {self.eos}: nothing can follow")
        device = model_device(self.model)
        ids = torch.tensor([prefix], device=device)
        pad = self.eos if self.pad is None else self.pad
        with reseeded(seed, device), frozen(self.model):
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=n,
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=0,
                eos_token_id=self.eos, pad_token_id=pad,
            )  # fmt: skip
        return [self._cut(row) for row in out[:, len(prefix) :].tolist()]

    def _cut(self, row: list[int]) -> list[int]:
        return row[: row.index(self.eos) + 1] if self.eos in row else row
