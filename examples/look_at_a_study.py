# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look at a study
#
# What `neurondrift run` leaves behind, read with pandas and drawn with matplotlib. Set `STUDY` to the folder of a
# finished study and run all cells. Every column is described in `docs/results.md`.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import neurondrift as nd

STUDY = Path(os.environ.get("STUDY", "."))
results = json.loads((STUDY / "results" / "statistical_results.json").read_text())

# %% [markdown]
# ## The answer, and whether the controls came out right
#
# A control that fails is the first caveat of everything below.

# %%
print(results["analysis"]["sentences"][0])
pd.DataFrame(results["analysis"]["controls"])

# %% [markdown]
# ## How far did each group move, beside comparable neurons?
#
# `matched` judges: controls of like site, norm, utility score and gradient scale. `norm` is the published comparison.
# The band is what counts as *as far*.

# %%
effects = pd.json_normalize(results["analysis"]["effects"])
effects = effects[effects["metric"] == results["analysis"]["primary_metric"]].reset_index(drop=True)
columns = ["group", "role", "judging", "verdict", "effect_matched.ratio", "effect_norm.ratio", "n_members"]
effects[columns]

# %%
band = results["analysis"]["band"]
figure, axes = plt.subplots(figsize=(8, 0.5 * len(effects) + 1.5))
axes.axvspan(1 / band, band, color="0.92", zorder=0)
axes.axvline(1, color="0.5", linewidth=1)
for shift, name in ((-0.12, "matched"), (0.12, "norm")):
    known = effects[effects[f"effect_{name}.ratio_ci95"].map(bool) & effects[f"effect_{name}.ratio"].notna()]
    low, high = np.array(known[f"effect_{name}.ratio_ci95"].tolist(), dtype=float).reshape(-1, 2).T
    middle = known[f"effect_{name}.ratio"].to_numpy(dtype=float)
    axes.errorbar(middle, known.index + shift, xerr=[middle - low, high - middle], fmt="o", capsize=3, label=name)
axes.set(yticks=effects.index, yticklabels=effects["group"], xscale="log", xlabel="drift / drift of comparable neurons")
axes.invert_yaxis()
axes.legend()
plt.show()

# %% [markdown]
# ## Did it lose refusals?

# %%
rates = pd.DataFrame(results["behaviour"]["rates"])
rates.pivot_table(index="step", columns="kind", values="rate").plot(marker="o", ylim=(-0.02, 1.02), ylabel="refused")
plt.show()

# %% [markdown]
# ## Drift over training
#
# Each group beside its random control of equal size, site and norm.

# %%
log = nd.DriftLog(STUDY / "drift")
folder = STUDY / "neuron_groups"
names = [path.name.partition(".")[0] for path in sorted(folder.glob("safety_*.matched.neurons.parquet"))]
groups = {f"{name}{kind}": folder / f"{name}{kind}.neurons.parquet" for name in names for kind in ("", ".matched")}
groups = {name: nd.load_group(path) for name, path in groups.items()}
drift = log.read(groups=groups, columns=["relative"]).groupby(["step", "group"], observed=True)["relative"].mean()
figure, axes = plt.subplots()
for name in names:
    (line,) = axes.plot(drift.xs(name, level="group"), label=name)
    axes.plot(drift.xs(f"{name}.matched", level="group"), color=line.get_color(), linestyle=":")
axes.set(xlabel="step", ylabel="mean ‖Δw‖/‖w₀‖", title="groups (lines) and their controls (dots)")
axes.legend()
plt.show()

# %% [markdown]
# ## Where did it move?
#
# A map of layers and modules at the last step. Untrained sites have no drift.

# %%
last = log.read(steps=log.steps()[-1:]).merge(log.initial(), on=["site", "row"])
table = last.groupby(["layer", "module_type"], observed=True)["relative"].mean().unstack()
figure, axes = plt.subplots(figsize=(1 + 0.8 * table.shape[1], 1.5 + 0.2 * len(table)))
image = axes.imshow(table.to_numpy(), aspect="auto")
axes.set(xticks=range(table.shape[1]), yticks=range(len(table)), yticklabels=table.index, ylabel="layer")
axes.set_xticks(range(table.shape[1]), table.columns, rotation=45, ha="right")
figure.colorbar(image, label="mean ‖Δw‖/‖w₀‖")
plt.show()

# %% [markdown]
# ## Which neurons carry the lost refusal margin?
#
# What each neuron's change contributed to the change of the margin of harmful requests, in nats: below zero took
# refusals away. The parts add up to the whole change, so a few large ones may be cancelled by many small ones.

# %%
parts = pd.read_parquet(STUDY / "attribution" / "neurons.parquet")
column = "budget_margin_harmful" if "budget_margin_harmful" in parts else "margin_harmful"
parts = parts[["site", "row", column]].sort_values(column)
share = parts[column].head(len(parts) // 100).sum()
print(f"{parts[column].sum():+.3f} nats in all, {share:+.3f} by the 1 % that took most")
parts.head(10)
