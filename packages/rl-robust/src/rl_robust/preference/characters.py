"""A tokenizer of single characters and a small transformer, made here: experiments in seconds, nothing downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from robust_core.errors import optional_import
from robust_core.random import Seed, reseeded, resolve_seed

__all__ = ["character_tokenizer", "small_gpt2"]


def character_tokenizer(characters: Iterable[str], *, max_length: int = 512) -> Any:
    """Return a Hugging Face tokenizer whose tokens are characters, with tokens for padding, unknown and the end.

    Args:
        characters: those that have a token.
        max_length: longest row in tokens.

    Raises:
        MissingExtraError: ``transformers`` is not installed.
    """
    transformers = optional_import("transformers", extra="preference", package="rl-robust")
    tokenizers = optional_import("tokenizers", extra="preference", package="rl-robust")
    special = ["<pad>", "<unk>", "<end>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(set(characters))])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def small_gpt2(
    tokenizer: Any, *, width: int = 32, n_layers: int = 2, n_heads: int = 2, n_positions: int = 128, generator: Seed = 0
) -> Any:
    """Return a GPT-2 of random weights without dropout, for a tokenizer.

    Args:
        tokenizer: of Hugging Face.
        width: of the hidden state.
        n_layers: transformer blocks.
        n_heads: attention heads; they divide ``width``.
        n_positions: longest row.
        generator: seed of the weights.

    Raises:
        MissingExtraError: ``transformers`` is not installed.
    """
    transformers = optional_import("transformers", extra="preference", package="rl-robust")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=width, n_layer=n_layers, n_head=n_heads, n_positions=n_positions,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with reseeded(resolve_seed(generator)):
        return transformers.GPT2LMHeadModel(config)
