"""Run under torchrun by importance/test_scores.py: every process scores its share and all get the sum. Not a test itself.

With `fsdp2` the model is cut among the processes, and each keeps the sums of some sites.
"""

import sys

import torch
import torch.distributed as dist

from helpers.families import build, examples
from neurondrift.importance.scores import score, write_scores

#: Families and methods of each strategy: every shape of accumulator, weights stored in-out, and experts.
CASES = {
    "ddp": [("llama", "snip"), ("qwen3", "wanda"), ("gpt2", "gradient"), ("qwen3_moe", "snip")],
    "fsdp2": [
        *[("llama", method) for method in ("snip", "wanda", "taylor", "magnitude")],
        *[("qwen3", "gradient"), ("gpt2", "fisher"), ("qwen3_moe", "snip")],
    ],
}


def model_of(family, strategy):
    model = build(family)
    if strategy == "fsdp2":
        from neurondrift.study.parallel.sharding import shard

        shard(model.requires_grad_(False), torch.device("cpu"))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for strategy, cases in CASES.items():
        for family, method in cases:
            checkpointed = method == "fisher"
            scores = score(
                model_of(family, strategy),
                examples(),
                method=method,
                batch_size=2,
                accumulate_on="cpu" if method == "wanda" else "auto",
                checkpoint_activations=checkpointed,
            )
            file = f"{sys.argv[1]}.{strategy}.{family}.{method}.{dist.get_rank()}"
            write_scores(file, scores, header={"model": "", "method": method, "data": ""})
    dist.destroy_process_group()
