"""A GGUF file as a model reference: the same numbers as the model that was written into it, wherever models are read."""

import gguf
import numpy as np
import pytest
import torch
import transformers

from neurondrift.base.errors import ArtifactError, ModelError
from neurondrift.drift.difference import diff
from neurondrift.models.checked.gguf import kept_folder
from neurondrift.models.loading import byte_tokenizer, describe_checkpoint, load_model

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    owner, _, kind = name.rpartition(".")
    if owner in WHOLE:
        return f"{WHOLE[owner]}.{kind}"
    _, _, layer, part = owner.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny Qwen2 and the GGUF file with its weights."""
    torch.manual_seed(0)
    tokens = [*sorted(byte_tokenizer().get_vocab().items(), key=lambda pair: pair[1]), ("he", 261)]
    config = transformers.Qwen2Config(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, rope_theta=10000.0,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny-qwen2.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([name for name, _ in tokens])
    writer.add_token_types([3 if name.startswith("<|") else 1 for name, _ in tokens])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for name, value in model.state_dict().items():
        writer.add_tensor(gguf_name(name), value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_the_model_that_was_written_into_it(written, cache):
    model, path = written
    for _ in range(2):  # made, then read from where it is kept
        loaded, tokenizer = load_model(path, dtype="float32")
        assert kept_folder(str(path), path).is_relative_to(cache)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        ids = torch.arange(10, 30)[None]
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert tokenizer.decode(tokenizer("xyz")["input_ids"]).endswith("xyz")
    assert describe_checkpoint(str(path))["parameters"] == sum(p.numel() for p in model.parameters())


def test_diff_reads_it_too(written, tmp_path):
    model, path = written
    changed = transformers.Qwen2ForCausalLM(model.config)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[5] += 0.5
    changed.save_pretrained(tmp_path / "tuned")
    diff(path, [tmp_path / "tuned"], tmp_path / "log")
    from neurondrift.drift.log import DriftLog

    table = DriftLog(tmp_path / "log").read()
    moved = table[table["l2"] > 0]
    assert [(row.site, row.row) for row in moved.itertuples()] == [("model.layers.1.mlp.up_proj", 5)]


def test_two_files_of_one_name_are_two_models(written, tmp_path):
    _, path = written
    other = tmp_path / path.name
    other.write_bytes(path.read_bytes()[:-4] + np.float32(7).tobytes())
    assert kept_folder(str(other), other) != kept_folder(str(path), path)
    assert not torch.equal(*(load_model(p, dtype="float32")[0].lm_head.weight for p in (path, other)))


@pytest.mark.parametrize("look", [load_model, describe_checkpoint], ids=["load", "describe"])
def test_what_is_no_gguf_file(written, tmp_path, look):
    _, path = written
    with pytest.raises(ModelError, match="There is no such file"):
        look(str(tmp_path / "nothing.gguf"))
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ArtifactError, match="no GGUF file, or only a part"):
        look(str(pointer))
    for size in (100, path.stat().st_size - 100):
        cut = tmp_path / f"cut-{size}.gguf"
        cut.write_bytes(path.read_bytes()[:size])
        with pytest.raises((ArtifactError, ModelError), match="cut off"):
            look(str(cut))


def test_a_folder_that_holds_one_says_how_to_name_it(written):
    _, path = written
    with pytest.raises(ModelError, match=r"(?s)no config.json.*tiny-qwen2.gguf"):
        load_model(path.parent)
