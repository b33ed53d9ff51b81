"""One tiny random model of every supported family, made from its configuration, and examples for it."""

import torch
import transformers as t

COMMON = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
MIXTURE = COMMON | dict(num_experts_per_tok=2)
GPT2 = dict(
    vocab_size=64,
    n_embd=16,
    n_layer=2,
    n_head=4,
    n_positions=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
OPT = dict(
    vocab_size=64,
    hidden_size=16,
    ffn_dim=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    word_embed_proj_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    init_std=0.2,
)
NEOX = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
HEAD = dict(head_dim=4)
GPT_OSS = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    pad_token_id=0,
)

FAMILIES = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**COMMON)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**COMMON)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**COMMON)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**COMMON, **HEAD)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**COMMON, **HEAD)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**COMMON, **HEAD)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**COMMON)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**NEOX)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**MIXTURE, num_local_experts=4)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**MIXTURE, **HEAD, num_experts=4, moe_intermediate_size=12)
    ),
}


def build(family: str, seed: int = 0):
    """The family's tiny model with biases that are not zero, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family]()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def gpt_oss(**settings):
    """A tiny GPT-OSS, whose experts are stored in-out; no member of `FAMILIES`."""
    torch.manual_seed(0)
    return t.GptOssForCausalLM(t.GptOssConfig(**GPT_OSS | settings)).eval()


def save(model, folder, **options):
    """Save the model, and give the folder back."""
    model.save_pretrained(str(folder), **options)
    return folder


def examples(count: int = 7, seed: int = 0):
    """Random token ids of different lengths; the last third to half of each is the response."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 6 + 3 * index
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        prompt = length // 2 + index % 2
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows
