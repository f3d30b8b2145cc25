"""Train one model by 19 peers of which 2 lie: which rule withstands, what is proved of it. Your model, your data."""

from dataclasses import replace
from pathlib import Path

from optim_robust.collab.experiment import Experiment, run_simulated
from optim_robust.collab.recipe import Recipe, guarantee

# yours: Recipe(model="my_module:build", data="own.npz", ...); the same recipe runs on real processes with
# optim_robust.collab.launch.launch(recipe.team, 19, steps=60, liars={18: Liar("alie")}, kills={17: 20})
recipe = Recipe(honest=17, f=2, data="digits", aggregator="nna", beta=0.9, batch_size=10)
print(guarantee(recipe))

runs = {}
for rule in ("nna", "trimmed-mean", "mean"):
    chosen = replace(recipe, aggregator=rule)
    runs[rule] = run_simulated(chosen, chosen.team(), "sign-flip", steps=60)
    print(f"{rule}: {runs[rule].accuracy[-1][1]:.0%} right under sign flips")

found = Experiment(recipe, "sign-flip", recipe.team(), runs, seconds=0.0, command="this file", device="cpu")
found.save(Path("report"))
print("wrote report/report.html")
