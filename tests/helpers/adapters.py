"""Adapters on the tiny models: LoRA of several makings, every method of PEFT; and what a layer really applies."""

import copy
import inspect
import warnings

import peft
import torch
from peft import LoraConfig, get_peft_model

from helpers.families import build
from neurondrift.models.adapters import low_rank_delta
from neurondrift.models.sites import linear_sites

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def lora_on(model, **settings):
    """A new LoRA of the model: on every linear layer, unless the settings say otherwise."""
    torch.manual_seed(0)
    given = {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(model, LoraConfig(**given))


def lora():
    """The tiny Llama with a new LoRA on two kinds of site."""
    return lora_on(build("llama"), r=2, target_modules=["q_proj", "up_proj"], task_type=None)


def adapt(model, *, scale, rank=4, seed=0, **settings):
    """A LoRA adapter on every plain linear site, with factors such that the relative drift is about `scale`."""
    kinds = sorted(
        {
            site.module_type
            for site in linear_sites(model).values()
            if site.expert is None and isinstance(site.owner, torch.nn.Module)
        }
    )
    kinds = [
        kind
        for kind in kinds
        if any(
            type(s.owner).__name__ in ("Linear", "Conv1D")
            for s in linear_sites(model).values()
            if s.module_type == kind
        )
    ]
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, target_modules=kinds, **settings))
    generator = torch.Generator().manual_seed(seed)
    for site in linear_sites(wrapped).values():
        delta = low_rank_delta(site)
        if delta is None:
            continue
        layer = site.wrapper
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data = torch.randn(a.shape, generator=generator)
        b.data = torch.randn(b.shape, generator=generator)
        current = low_rank_delta(site)
        size = (current.b.double() @ current.a.double()).norm() / site.weight.double().norm()
        b.data *= scale / size
    return wrapped


def random_lora(family, *, dtype=torch.float32, targets=None, seed=1, model=None, scale=0.2):
    """A tiny model (or the one that is given) with a LoRA adapter whose two factors are random."""
    model = build(family).to(dtype) if model is None else model
    kinds = sorted({site.module_type for site in linear_sites(model).values()})
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=targets or kinds, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
    return tuned


def kinds(model):
    """Module types that PEFT can wrap as linear layers."""
    return sorted(
        {s.module_type for s in linear_sites(model).values() if type(s.owner).__name__ in ("Linear", "Conv1D")}
    )


def answer(layer, width):
    """The weight `[out, in]` that a layer applies: its answers to unit vectors."""
    layer = copy.deepcopy(layer).double().eval()
    with torch.no_grad():
        units = torch.eye(width, dtype=torch.float64)[None]
        return (layer(units) - layer(torch.zeros_like(units)))[0].T


def shake(model, scale, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def unchanged(model, before):
    after = state(model)
    return all(
        torch.equal(after[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in before.items()
    )


METHODS = {
    "AdaLoraConfig": {"total_step": 10, "init_r": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 4},
    "DeloraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 20},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "HRAConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "OFTConfig": {"oft_block_size": 4},
    "OSFConfig": {},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 4},
    "ShiraConfig": {"r": 2},
    "VBLoRAConfig": {"vector_length": 4, "num_vectors": 16},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 20},
}


def adapted(method, model=None, **settings):
    config = getattr(peft, method)
    known = inspect.signature(config).parameters
    settings = {"target_modules": ["q_proj", "down_proj"]} | METHODS.get(method, {}) | settings
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            model or build("llama"), config(**{key: value for key, value in settings.items() if key in known})
        )
    return model.eval()
