"""Which prompts an attacker may write, and what they read as.

Places for k tokens are made before, after or inside a prompt, or in place of its first k tokens; any token of the
vocabulary may stand there but the marks of start and end. What counts is never the tokens but the *decoded text*, read
anew by the pipeline (:meth:`Writing.texts`): tokens without an end of a word run into their neighbours, so that the
text may have other tokens than those that it was made of.

SDXL reads one prompt through two tokenizers of one vocabulary: the attacker writes both embeddings of a token at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from diffusion_unlearn.pipeline import Conditioning, TextToImage, UnsupportedPipelineError
from robust_core.attacks.tokens import TokenSpace, insert_slots
from robust_core.attacks.tokens.space import Position
from robust_core.checks import check_choice, check_count

__all__ = ["POSITIONS", "Writing"]

POSITIONS = ("prefix", "suffix", "middle", "spread", "replace")


@dataclass(frozen=True, eq=False)
class Writing:
    """Prompts with places to write in.

    Attributes:
        parts: the pipeline that reads them.
        space: the token texts that may be written.
        others: (B, T) tokens of the same texts for the second encoder of SDXL, which is filled up otherwise.
    """

    parts: TextToImage
    space: TokenSpace
    others: tuple[Tensor, ...] = ()

    @classmethod
    def around(
        cls,
        parts: TextToImage,
        prompts: Sequence[str],
        k: int,
        position: str = "prefix",
        *,
        vocabulary: Sequence[int] | None = None,
    ) -> Writing:
        """Return the prompts with ``k`` places each.

        Args:
            parts: the pipeline.
            prompts: B texts.
            k: places.
            position: ``"prefix"``, ``"suffix"``, ``"middle"``, ``"spread"`` (evenly) or ``"replace"`` (the first k).
            vocabulary: tokens that may be used; None means all but the marks.

        Raises:
            ValueError: a prompt with too many tokens to add k, or too few to replace k; a bad count or position.
            UnsupportedPipelineError: two tokenizers of different vocabularies.
        """
        check_choice("position", position, POSITIONS)
        check_count("k", k)
        first = parts.tokenizers[0]
        if any(t.get_vocab() != first.get_vocab() for t in parts.tokenizers[1:]):
            raise UnsupportedPipelineError("the two tokenizers have different vocabularies: no token means one in both")
        ids, *others = parts.ids(prompts)
        ends = [len(first(prompt).input_ids) - 1 for prompt in prompts]
        for prompt, end in zip(prompts, ends, strict=True):
            if position != "replace" and end + 1 + k > parts.max_tokens:
                raise ValueError(
                    f"prompt {prompt[:60]!r} has {end + 1} tokens, start and end included; with k={k} it needs "
                    f"{end + 1 + k} of {parts.max_tokens}: shorten it or lower k"
                )
            if position == "replace" and end - 1 < k:
                raise ValueError(f"prompt {prompt[:60]!r} has only {end - 1} tokens to replace; lower k={k}")
        marks = {first.bos_token_id, first.eos_token_id, *first.all_special_ids}
        # the filling may stay where it is, so it has to be a token that may be used
        usable = [i for i in (range(len(first)) if vocabulary is None else vocabulary) if i not in marks]
        if not usable:
            raise ValueError("vocabulary: no token is left but the marks of start and end")
        end = torch.tensor(ends, device=ids.device)
        moved = [
            insert_slots(row, k, cast(Position, position), fill=usable[0], start=1, end=end, length=parts.max_tokens)
            for row in (ids, *others)
        ]
        space = TokenSpace.vocabulary(*moved[0], n_tokens=len(first), allowed=usable, banned=sorted(marks))
        return cls(parts, space, tuple(slots.ids for slots in moved[1:]))

    @property
    def embedding(self) -> Tensor:
        """(V, D) what a token is to the encoders, side by side; single precision at least, as gradients need."""
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in self.parts.encoders]
        found = tables[0] if len(tables) == 1 else torch.cat([table.to(tables[0].device) for table in tables], 1)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def condition(self, embeddings: Tensor, text: Tensor) -> Conditioning:
        """Return what the predictor is told by embeddings (n, T, D) in place of those of texts ``text`` (n,)."""
        encoders = self.parts.encoders
        ids = [self.space.ids[text], *(row[text] for row in self.others)]
        tables = [encoder.get_input_embeddings().weight for encoder in encoders]
        given = list(embeddings.split([table.shape[1] for table in tables], 2))
        for number in range(1, len(given)):  # what stands behind the text is another filling there
            kept = (ids[number] != ids[0])[..., None]
            given[number] = torch.where(kept, tables[number].detach()[ids[number]].to(embeddings.dtype), given[number])
        return self.parts.encode(ids=ids, embeddings=given)

    def texts(self, ids: Tensor) -> list[str]:
        """Return the n texts that tokens (n, T) read as."""
        tokenizer = self.parts.tokenizers[0]
        found = []
        for row in ids.tolist():
            tokens = row[1:]
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in tokens else tokens
            found.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return found

    def written(self, ids: Tensor, text: Tensor) -> list[list[int]]:
        """Return the tokens in the places of texts ``text`` (n,), of token texts (n, T)."""
        open_ = self.space.slots[text] >= 0
        return [row[mask].tolist() for row, mask in zip(ids, open_, strict=True)]

    def reads_back(self, ids: Tensor) -> list[bool]:
        """Return whether the text of tokens (n, T), read anew, has these tokens."""
        texts = self.texts(ids)
        read = iter(self.parts.ids([t for t in texts if self.parts.fits(t)] or [""])[0])
        return [self.parts.fits(t) and torch.equal(next(read), row) for t, row in zip(texts, ids, strict=True)]
