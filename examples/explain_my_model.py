"""Say what would have to change for another answer, and whether that will outlast the next training of the model."""

from torch import nn

from robust_core.data import load
from vision_robust.explain.robust_counterfactuals import (
    ClosestCounterfactual,
    MutableSpec,
    Recourse,
    Retraining,
    Score,
    TRexIterative,
    evaluate_counterfactuals,
    retrain_models,
)


def build() -> nn.Module:
    """Return the network; yours."""
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))


data, test = load("breast_cancer"), load("breast_cancer", "test")  # or load("applicants.csv")
plan = Retraining(build, epochs=10, mode="both", fraction=0.95)
model = plan.train(data, 0, 0)
recourse = Recourse(Score(model, target=1), MutableSpec.of_columns(data.columns))
rejected = test.x[~recourse.score.accepts(test.x)][:10]
found = {
    "closest": ClosestCounterfactual(recourse).generate(rejected),
    "T-Rex:I": TRexIterative(recourse, tau=0.75).generate(rejected),
}
print(evaluate_counterfactuals(found, recourse, retrain_models(plan, data, n=4), reference=data.x))
