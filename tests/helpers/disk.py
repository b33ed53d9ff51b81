"""Models and adapters on disk, and the same with other names, missing parts or broken files."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from neurondrift.models.loading import byte_tokenizer

MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def rewrite(file, change):
    """The tensors of a safetensors file, as `change` makes them."""
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def rename(file, new):
    """The same tensors by other names."""
    rewrite(file, lambda tensors: {new(key): value for key, value in tensors.items()})


def configure(folder, **changes):
    """Change settings of an adapter's configuration."""
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def folder_with_tokenizer(model, folder):
    """The model saved with a tokenizer that it has rows for."""
    model.resize_token_embeddings(264)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def adapter(model, folder, **settings):
    """A LoRA of the model whose factors are not zero, saved; the model is wrapped by it."""
    defaults = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**defaults | settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder)
    return folder


def expert_factors(folder, names, *, rank=4, layers=2, experts=4, hidden=16, inner=24, leave_out=lambda key: False):
    """Add factors of single experts to an adapter, under the names that `names(layer, expert)` gives to gate, up and
    down, and target them."""
    torch.manual_seed(1)

    def change(tensors):
        for layer in range(layers):
            for expert in range(experts):
                sizes = ((hidden, inner), (hidden, inner), (inner, hidden))
                for key, (columns, rows) in zip(names(layer, expert), sizes, strict=True):
                    if not leave_out(key):
                        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns)
                        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank) * 0.05
        return tensors

    rewrite(Path(folder) / ADAPTER, change)
    leaves = sorted({key.rpartition(".")[2] for key in names(0, 0) if not leave_out(key)})
    known = json.loads((Path(folder) / "adapter_config.json").read_text())["target_modules"]
    configure(folder, target_modules=[*known, *leaves])
    return folder
