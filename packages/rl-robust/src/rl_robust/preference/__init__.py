"""Preference training of language models (extra ``preference``).

:mod:`~rl_robust.preference.srpo` trains a model to answer and to improve answers; :func:`self_revise` lets it;
:class:`PairwiseObjective` has DPO and IPO; :mod:`~rl_robust.preference.tabular` is the exact small world. The models
are the user's: nothing here imports ``transformers``, so any module with the call of a causal language model will do.
"""

from rl_robust.preference.collate import PreferenceData, Templates, TokenRow, preference_data, triple_rows
from rl_robust.preference.logprobs import Reference, batch_logprobs, sequence_logprobs, without_dropout
from rl_robust.preference.pairwise import PairwiseObjective, dpo_loss, ipo_loss
from rl_robust.preference.revise import self_revise
from rl_robust.preference.srpo import SRPOLogRatios, SRPOObjective, improvement_loss, srpo_loss, writer_loss
from rl_robust.preference.tabular import bradley_terry, fit_tabular, revise_tabular, srpo_closed_form, win_probability

__all__ = [
    "PairwiseObjective",
    "PreferenceData",
    "Reference",
    "SRPOLogRatios",
    "SRPOObjective",
    "Templates",
    "TokenRow",
    "batch_logprobs",
    "bradley_terry",
    "dpo_loss",
    "fit_tabular",
    "improvement_loss",
    "ipo_loss",
    "preference_data",
    "revise_tabular",
    "self_revise",
    "sequence_logprobs",
    "srpo_closed_form",
    "srpo_loss",
    "triple_rows",
    "win_probability",
    "without_dropout",
    "writer_loss",
]
