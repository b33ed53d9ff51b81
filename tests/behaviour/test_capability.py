"""lm-evaluation-harness through its Python interface, on a local task; the perplexity is in test_evaluate.py."""

import importlib.util
import json

import pytest
import torch

from neurondrift.base.errors import ConfigError
from neurondrift.behaviour.capability import capability, check_tasks
from neurondrift.models.loading import load_model

TASK = """task: tiny_yes_no
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(INSTALLED, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_extra_is_named():
    with pytest.raises(ConfigError, match=r"need lm-evaluation-harness.*neurondrift\[harness\]"):
        capability(None, None, ["boolq"])


@pytest.mark.skipif(not INSTALLED, reason="lm-evaluation-harness (extra harness) is not installed")
def test_accuracy_is_that_of_plain_log_likelihoods(tmp_path):
    from lm_eval.tasks import TaskManager
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model("tiny:llama", dtype="float32", device="cpu")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    documents = [{"question": f"Is {n} even? Answer:", "label": n % 2} for n in range(12)]
    data = tmp_path / "task.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=data))
    manager = TaskManager(include_path=str(tmp_path))
    found = {row["metric"]: row for row in capability(model, tokenizer, ["tiny_yes_no"], manager=manager, batch_size=5)}
    right = 0
    for document in documents:
        scores = []
        for choice in ("yes", "no"):
            start = tokenizer(document["question"])["input_ids"]
            ids = tokenizer(document["question"] + " " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(start), len(ids))))
        right += scores.index(max(scores)) == document["label"]
    assert found["acc"]["value"] == pytest.approx(right / len(documents))
    assert found["acc"]["task"] == "tiny_yes_no" and found["acc"]["n"] == 12
    with pytest.raises(ConfigError, match=r"knows no such task.*no_such_task.*boolq"):
        check_tasks(["tiny_yes_no", "no_such_task"], manager=manager)
