"""Splitters on ids, verifiers of answers, and roll-outs of a small random transformer."""

import pytest
import torch

from rl_robust.preference.characters import character_tokenizer, small_gpt2
from rl_robust.preference.per_step_text import (
    TransformersSampler,
    boxed_expression,
    each_token,
    exact_number,
    newline,
    sentence,
    verify_text,
)
from rl_robust.preference.per_step_values import Problem, estimate_step_values


class _Words:
    """A tokenizer of whole pieces."""

    eos_token_id = 0
    pieces = ("<eos>", "a", "b", "\n", "\n\n", ".", " c", " 3.", "14", "x\n")

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[i] for i in ids if i or not skip_special_tokens)


@pytest.mark.quick
def test_steps_end_after_newlines_and_sentences() -> None:
    split = newline(_Words())
    assert split((1, 3, 2, 4, 1, 0)) == [2, 4, 6]
    assert split((1, 3, 3, 2)) == [3, 4]  # a run of newlines ends one step
    assert split((1, 9, 2, 3, 0)) == [2, 5]  # nothing is left after the last newline: no step of its own
    assert sentence(_Words())((1, 5, 6, 5, 0)) == [2, 5]
    assert sentence(_Words())((1, 7, 8, 5, 6)) == [4, 5]  # 3.14 is no end
    assert each_token(eos=0)((1, 2, 0)) == [1, 3]
    assert each_token(eos=0)((0,)) == [1]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so 3 + 4 = 7\n#### 7", "7", True),
        ("The answer is: $1,234.50.", "1234.5", True),
        ("The answer is 12 because 3 x 4", "12", False),
        ("1/3", "2/6", True),
        ("0.333", "1/3", False),
        ("no number", "1", False),
        ("1/0", "1", False),
        ("-5", "5", False),
    ],
)
def test_numbers_are_compared_as_numbers(text: str, answer: str, right: bool) -> None:
    assert exact_number(text, answer) is right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"thus \boxed{\dfrac{1}{2}}", r"\frac12", True),
        (r"\boxed{3} or \boxed{ \left( 1, 2 \right) }", "(1,2)", True),
        (r"\boxed{\sqrt{2}}", r"\boxed{\sqrt{2}}", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{45^\circ}", "45", True),
        (r"\boxed{x+1}", "x-1", False),
        ("5", "5", False),
        (r"\boxed{5", "5", False),
    ],
)
def test_boxes_are_normalised(text: str, answer: str, right: bool) -> None:
    assert boxed_expression(text, answer) is right


def test_an_answer_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no number"):
        exact_number("5", "five")


def test_a_transformer_is_rolled_out_from_its_own_seeds() -> None:
    tokenizer = character_tokenizer("0123456789+=\n")
    model = small_gpt2(tokenizer)
    sampler = TransformersSampler(model, tokenizer.eos_token_id, max_new_tokens=5)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in ("1+1=", "2+3=")]
    state = torch.get_rng_state()
    both = sampler(prompts, 4, seeds=[1, 2])
    assert sampler(prompts[1:], 4, seeds=[2]) == both[1:]
    assert torch.equal(state, torch.get_rng_state())
    assert all(len(row) <= 5 and tokenizer.eos_token_id not in row[:-1] for rows in both for row in rows)
    values = estimate_step_values(
        sampler,
        [Problem(prompt, str(i)) for i, prompt in enumerate(prompts)],
        [rows[:2] for rows in both],
        verifier=verify_text(tokenizer, lambda text, answer: answer in text),
        splitter=each_token(eos=tokenizer.eos_token_id),
        n_rollouts=4,
        k=2,
    )
    assert [len(row) for row in values] == [2, 2]
    with pytest.raises(ValueError, match="nothing can follow"):
        sampler([(1, tokenizer.eos_token_id)], 2, seeds=[0])
