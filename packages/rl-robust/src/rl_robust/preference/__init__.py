"""Preference training of language models (extra ``preference``).

:mod:`~rl_robust.preference.srpo` trains a model to answer and to improve answers; :func:`self_revise` lets it;
:class:`PairwiseObjective` has DPO and IPO; :mod:`~rl_robust.preference.tabular` is the exact small world;
:mod:`~rl_robust.preference.per_step` trains against the steps that lost the answer. The models are the user's: nothing
here imports ``transformers`` before a folder is read (:mod:`~rl_robust.preference.folders`), so any module with the
call of a causal language model will do.
"""

from rl_robust.preference.collate import PreferenceData, Templates, TokenRow, preference_data, triple_rows
from rl_robust.preference.judging import implicit_accuracy, log_ratios, win_rate
from rl_robust.preference.logprobs import Reference, batch_logprobs, sequence_logprobs, without_dropout
from rl_robust.preference.pairwise import PairwiseObjective, dpo_loss, ipo_loss
from rl_robust.preference.per_step import AdvantageWeightedNLL, PerStepDPO, advantage_optimum, train_per_step
from rl_robust.preference.per_step_pairs import (
    AdvantageData,
    NoPairsError,
    PrefixPairs,
    advantage_data,
    build_pairs,
    own_correct,
)
from rl_robust.preference.per_step_run import Diagnosis, diagnose, draw_responses, estimate_values
from rl_robust.preference.per_step_text import (
    TransformersSampler,
    boxed_expression,
    exact_number,
    split_after,
    verify_text,
)
from rl_robust.preference.per_step_values import (
    Problem,
    StepValues,
    best_of_k,
    estimate_step_values,
    first_pit,
    one_by_one,
    step_advantages,
)
from rl_robust.preference.revise import self_revise
from rl_robust.preference.srpo import SRPOLogRatios, SRPOObjective, improvement_loss, srpo_loss, writer_loss
from rl_robust.preference.tabular import bradley_terry, fit_tabular, revise_tabular, srpo_closed_form, win_probability

__all__ = [
    "AdvantageData",
    "AdvantageWeightedNLL",
    "Diagnosis",
    "NoPairsError",
    "PairwiseObjective",
    "PerStepDPO",
    "PreferenceData",
    "PrefixPairs",
    "Problem",
    "Reference",
    "SRPOLogRatios",
    "SRPOObjective",
    "StepValues",
    "Templates",
    "TokenRow",
    "TransformersSampler",
    "advantage_data",
    "advantage_optimum",
    "batch_logprobs",
    "best_of_k",
    "boxed_expression",
    "bradley_terry",
    "build_pairs",
    "diagnose",
    "dpo_loss",
    "draw_responses",
    "estimate_step_values",
    "estimate_values",
    "exact_number",
    "first_pit",
    "fit_tabular",
    "implicit_accuracy",
    "improvement_loss",
    "ipo_loss",
    "log_ratios",
    "one_by_one",
    "own_correct",
    "preference_data",
    "revise_tabular",
    "self_revise",
    "sequence_logprobs",
    "split_after",
    "srpo_closed_form",
    "srpo_loss",
    "step_advantages",
    "train_per_step",
    "triple_rows",
    "verify_text",
    "win_probability",
    "win_rate",
    "without_dropout",
    "writer_loss",
]
