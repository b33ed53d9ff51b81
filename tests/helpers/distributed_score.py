"""Run under torchrun by importance/test_scores.py: every process scores its share and all get the sum. Not a test itself."""

import sys

import torch
import torch.distributed as dist

from helpers.families import build, examples
from neurondrift.importance.scores import score, write_scores

torch.set_num_threads(1)
dist.init_process_group("gloo")
scores = score(build("llama"), examples(), method=sys.argv[2], batch_size=2)
write_scores(f"{sys.argv[1]}.{dist.get_rank()}", scores, header={"model": "", "method": sys.argv[2], "data": ""})
dist.destroy_process_group()
