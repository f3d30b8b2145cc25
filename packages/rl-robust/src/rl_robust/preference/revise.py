"""Let a model improve its own answers: y_0 from the writer, y_{k+1} from the reviser that sees y_k (SRPO, sec. 2).

Works with any causal language model of Hugging Face, however it was trained; give a baseline the same templates, and
as many generations: n revisions cost n + 1 answers, so compare with the best of n + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_robust.preference.collate import Prompt, Templates
from robust_core.checks import check_count
from robust_core.models import frozen, model_device
from robust_core.random import Seed, derive, reseeded, resolve_seed

__all__ = ["self_revise"]


def self_revise(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    n_revisions: int = 1,
    *,
    templates: Templates | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    generator: Seed = None,
    on_step: Callable[[int, int], object] | None = None,
    **generation: Any,
) -> list[list[str]]:
    """Return, for each prompt, the n + 1 answers y_0, ..., y_n. Only the last answer is shown to the reviser.

    Args:
        model: a causal language model of Hugging Face (or with a ``generate`` like theirs).
        tokenizer: its tokenizer.
        prompts: texts, or lists of messages.
        n_revisions: n, at least 0.
        templates: those of training.
        batch_size: prompts for each call of ``generate``. Greedy answers do not depend on it, sampled ones do.
        max_new_tokens: longest answer.
        generator: seed of sampling (``do_sample=True``); the global generators are left as found.
        on_step: called with (calls of generate done, calls).
        **generation: passed on to ``model.generate``.

    Raises:
        ValueError: a prompt with its answer does not fit into the model's context.
    """
    check_count("n_revisions", n_revisions, low=0)
    check_count("batch_size", batch_size)
    check_count("max_new_tokens", max_new_tokens)
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; give a list of prompts")
    templates, seed, device = templates or Templates(), resolve_seed(generator), model_device(model)
    stages: list[list[str]] = [[] for _ in prompts]
    starts = range(0, len(prompts), batch_size)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, **generation}
    for stage in range(n_revisions + 1):
        for call, start in enumerate(starts):
            rows = range(start, min(start + batch_size, len(prompts)))
            asked = [templates.tokens(tokenizer, prompts[i], stages[i][-1] if stage else None) for i in rows]
            with frozen(model), torch.no_grad(), reseeded(derive(seed, "revise", stage, start), device):
                answers = _generate(model, tokenizer, asked, settings, device)
            for i, answer in zip(rows, answers, strict=True):
                stages[i].append(answer)
            if on_step is not None:
                on_step(stage * len(starts) + call + 1, (n_revisions + 1) * len(starts))
    return stages


def _generate(
    model: Any, tokenizer: Any, asked: list[list[int]], settings: dict[str, Any], device: torch.device | None
) -> list[str]:
    """Answer token prompts, padded on the left so that every answer begins right after its prompt."""
    length = max(map(len, asked))
    if min(map(len, asked)) == 0:
        raise ValueError("a prompt has no tokens; give it some text, or a template with some")
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(room, int) and length + settings["max_new_tokens"] > room:
        raise ValueError(
            f"a prompt of {length} tokens and {settings['max_new_tokens']} new ones exceed the model's {room}; "
            "lower max_new_tokens or shorten the prompts (an answer that is revised is never cut)"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids: Tensor = torch.tensor([[pad] * (length - len(row)) + row for row in asked], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in asked], device=device)
    words = {"pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id, **settings}
    out = model.generate(input_ids=ids, attention_mask=mask, **words)
    return [str(text) for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]
