"""Attacks on tokens: one engine for every search over texts that lowers a loss.

The space says what may be written (:class:`TokenSpace`), the problem what is wanted (:class:`TokenProblem`: a loss of
ids, a loss of embeddings, or both), a search finds it::

    space = TokenSpace.substitutes(ids, synonyms, budget=3)
    problem = TokenProblem(space, loss=lambda ids, text: -ranker(ids, text), goal=-top_score)
    result = Greedy().run(problem)

Word substitution attacks on rankers and prompts that revive erased concepts differ in the space and the loss only.

| search | needs | idea |
|---|---|---|
| :class:`Exhaustive` | queries | all texts; refused above a stated number |
| :class:`RandomSearch` | queries | the control |
| :class:`Greedy`, :class:`Beam` | queries (gradients for one order) | one change at a time |
| :class:`GCG` | gradients and queries | exchanges that the one-hot gradient proposes |
| :class:`NearestPGD` | gradients and queries | PGD on embeddings, nearest candidates (PRADA) |
| :class:`Simplex` | gradients | probabilities of tokens (UnlearnDiffAtk, Geisler et al.) |
| :class:`Projected` | gradients | vectors, projected onto tokens (PEZ, P4D) |
| :class:`SoftTokens` | gradients | vectors themselves: a stronger threat, reported apart |
"""

from robust_core.attacks.tokens.discrete import Beam, Exhaustive, Greedy, RandomSearch, count_texts
from robust_core.attacks.tokens.engine import SearchRun, TokenSearch
from robust_core.attacks.tokens.gradient import GCG, NearestPGD
from robust_core.attacks.tokens.options import one_hot_gradient
from robust_core.attacks.tokens.problem import TokenAttackResult, TokenProblem
from robust_core.attacks.tokens.relaxed import Projected, Simplex
from robust_core.attacks.tokens.simplex import project_entropy, project_simplex
from robust_core.attacks.tokens.soft import SoftTokenResult, SoftTokens
from robust_core.attacks.tokens.space import Slots, TokenSpace, insert_slots, stack_tokens

__all__ = [
    "GCG",
    "SEARCHES",
    "Beam",
    "Exhaustive",
    "Greedy",
    "NearestPGD",
    "Projected",
    "RandomSearch",
    "SearchRun",
    "Simplex",
    "Slots",
    "SoftTokenResult",
    "SoftTokens",
    "TokenAttackResult",
    "TokenProblem",
    "TokenSearch",
    "TokenSpace",
    "count_texts",
    "insert_slots",
    "one_hot_gradient",
    "project_entropy",
    "project_simplex",
    "stack_tokens",
]

SEARCHES: dict[str, type[TokenSearch]] = {
    "exhaustive": Exhaustive,
    "random": RandomSearch,
    "greedy": Greedy,
    "beam": Beam,
    "gcg": GCG,
    "pgd": NearestPGD,
    "simplex": Simplex,
    "projected": Projected,
}
"""The searches by name, for command lines and settings."""
