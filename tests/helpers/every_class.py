"""A tiny model of every causal and image-text-to-text class of transformers, and what is asked of each.

Classes are found by enumeration; their configurations are made small by overriding the sizes that they have in
common (`SIZES`), and a few of their own (`OWN`). What cannot be built so is left out, with the reason.
"""

import contextlib
import copy
import io
import logging
import re
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as hf_logging

import neurondrift as nd
from neurondrift.base.errors import DataError, UserError
from neurondrift.behaviour.generate import answer
from neurondrift.behaviour.requests import Decoding, Request
from neurondrift.drift.difference import diff
from neurondrift.models.architecture.classes import configuration
from neurondrift.models.architecture.conventions import check_causal, logits_of
from neurondrift.models.architecture.saying import kinds_of
from neurondrift.models.batches import context_length, make_batches, positions_of, response_losses
from neurondrift.models.checked.weights import load_weights
from neurondrift.models.sites import linear_sites

H = 32
SIZES = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embed_dim", "dim_model", "dim", "lru_width", "emb_dim"], H),
    **dict.fromkeys(["embedding_size", "word_embed_proj_dim", "text_hidden_size", "out_hidden_size"], H),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "d_ff", "dff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"], 48
    ),
    **dict.fromkeys(["intermediate_size_mlp", "ffn_hidden_size", "mlp_dim", "d_inner", "feed_forward_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "depth"], 2),
    **dict.fromkeys(["num_encoder_layers", "num_decoder_layers", "num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "v_head_dim", "d_kv", "rotary_dim", "index_head_dim"], 8),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 64),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 64),
    **dict.fromkeys(["pad_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "decoder_start_token_id"], 1),
    **dict.fromkeys(["eos_token_id", "sep_token_id"], 2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 16),
    **dict.fromkeys(["expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "expert_intermediate_size"], 16),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"], 1),
    **dict.fromkeys(["first_k_dense_replace"], 1),
    **dict.fromkeys(["num_nextn_predict_layers", "num_mtp_layers"], 0),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "o_lora_rank"], 8),
    **dict.fromkeys(["index_n_heads", "o_groups"], 2),
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 4),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["mamba_d_ssm"], 64),
    **dict.fromkeys(["linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input", "laurel_rank", "adapter_rank"], 8),
    **dict.fromkeys(["num_kv_shared_layers"], 0),
    **dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "resid_pdrop"], 0.0),
    **dict.fromkeys(
        [
            "dropout",
            "attention_dropout",
            "hidden_dropout",
            "embd_pdrop",
            "activation_dropout",
            "layerdrop",
            "decoder_layerdrop",
        ],
        0.0,
    ),
    **dict.fromkeys(["image_size"], 16),
    **dict.fromkeys(["patch_size"], 8),
    **dict.fromkeys(["use_mamba_kernels", "use_cross_attention", "add_cross_attention"], False),
    **dict.fromkeys(["is_decoder"], True),
    **dict.fromkeys(["image_token_id", "image_token_index"], 60),  # `rows` has none of these
    **dict.fromkeys(["video_token_id", "video_token_index"], 61),
    **dict.fromkeys(["audio_token_id", "audio_token_index"], 62),
    **dict.fromkeys(["vision_start_token_id", "vision_end_token_id", "image_start_token_id", "image_end_token_id"], 63),
}
NEEDED: dict[str, dict] = {}
MROPE = [2, 1, 1]  # half of head_dim
SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=MROPE))
OWN: dict[str, dict] = {
    **dict.fromkeys(["qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text"], SECTIONS),
    **dict.fromkeys(["glm4v_moe_text", "glm_ocr_text", "qwen2_5_omni_text", "qwen3_omni_moe_text"], SECTIONS),
    **dict.fromkeys(["hunyuan_vl_text", "paddleocr_vl_text"], SECTIONS),
    **dict.fromkeys(["qwen3_5_text", "qwen3_5_moe_text"], SECTIONS | dict(num_hidden_layers=4)),
    **{key: {"num_hidden_layers": 4} for key in ("qwen3_next", "olmo_hybrid", "kimi_linear", "qwen4_exp_text")},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "bamba": dict(attn_layer_indices=[1]),
    "mamba2": dict(num_heads=8, head_dim=8),
    "falcon": dict(num_kv_heads=1),
    "zamba2": dict(layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_hidden_layers=4),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "minimax": dict(block_size=8),
    # Their configurations have no default of it; those on the hub name it.
    **{key: {"vision_start_token_id": 63} for key in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
}


def types() -> list[tuple[str, str]]:
    """(model type, class) of both mappings, one of each pair, in alphabetical order."""
    both = [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    pairs = set()
    for mapping in both:
        for kind, names in mapping.items():
            pairs |= {(kind, name) for name in ([names] if isinstance(names, str) else names)}
    return sorted(pairs)


def has(config, key: str) -> bool:
    """Whether a configuration has a setting; one that differs between layers counts as had."""
    computed = getattr(type(config), key, None)
    if isinstance(computed, property) and computed.fset is None:
        return False
    try:
        return hasattr(config, key)
    except Exception:
        return True


def settings(config_class) -> dict:
    """The overrides that a configuration class takes, nested ones included."""
    default = config_class(**NEEDED.get(config_class.model_type, {}))
    chosen = {key: value for key, value in SIZES.items() if has(default, key)}
    known = {alias for alias, name in (getattr(config_class, "attribute_map", None) or {}).items() if name in chosen}
    chosen = {key: value for key, value in chosen.items() if key not in known}
    if "kv_lora_rank" in chosen and "num_key_value_heads" in chosen:  # latent attention has no groups of heads
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        chosen["rope_parameters"] = rope | {"mrope_section": list(MROPE)}
    for name in getattr(config_class, "sub_configs", None) or {}:
        nested = getattr(default, name, None)
        if nested is not None and hasattr(nested, "model_type"):
            chosen[name] = settings(type(nested)) | {"model_type": nested.model_type}
    return chosen | copy.deepcopy(OWN.get(config_class.model_type, {}))  # configurations write into what they are given


def build(kind: str, name: str, seed: int = 0):
    """A tiny model of a class, in evaluation mode, with weights that are not near zero."""
    config_class = getattr(transformers, name).config_class or CONFIG_MAPPING[kind]
    config = config_class(**settings(config_class) | copy.deepcopy(OWN.get(kind, {})))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config).float()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim > 1 and not key.endswith(("A_log", "decay")):
                    parameter.normal_(std=0.2)
                elif key.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()


def rows(count: int = 4) -> list[dict]:
    """Random tokens of different lengths; the second half of each is the response."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(3, 60, (6 + 3 * index,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return made


def expected_scores(model) -> dict[str, torch.Tensor]:
    """SNIP by plain autograd, one example at a time."""
    sites = linear_sites(model)
    sums = {name: torch.zeros(site.shape) for name, site in sites.items()}
    model.requires_grad_(True)
    for row in rows():
        model.zero_grad(set_to_none=True)
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100).backward()
        for name, site in sites.items():
            if site.tensor.grad is not None:
                sums[name] += site.oriented(site.tensor.grad).abs()
    model.zero_grad(set_to_none=True)
    return {name: sums[name] / len(rows()) * site.weight.abs() for name, site in sites.items()}


@contextlib.contextmanager
def float64_for_float32():
    """What a model's code turns into float32 is float64 within the block: gated delta rules and others compute in
    float32 whatever their dtype, and round there by up to 1e-4, so that only float64 tells an error from rounding."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def wider(tensor, *args, **settings):
        args = [torch.float64 if one is torch.float32 else one for one in args]
        return to(
            tensor, *args, **{key: torch.float64 if one is torch.float32 else one for key, one in settings.items()}
        )

    torch.Tensor.to, torch.Tensor.float = wider, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, single


def scores_hold(model) -> None:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    try:
        with float64_for_float32():
            found = nd.score(copy.deepcopy(model).double(), rows(), method="snip", batch_size=3)
            wanted = expected_scores(copy.deepcopy(model).double())
    except (RuntimeError, TypeError):  # a state that is made in float32
        found = nd.score(model, rows(), method="snip", batch_size=3)
        wanted = expected_scores(model)
    assert list(found) == list(wanted), "other sites"
    floor = 1e-6 * max(float(values.norm()) for values in wanted.values())
    for name, values in wanted.items():
        missed = float((found[name] - values).norm())
        assert missed <= 1e-5 * float(values.norm()) + floor, (
            f"{name}: off by {missed / float(values.norm() + 1e-30):.1e}"
        )


def drift_holds(model) -> None:
    base = {name: site.weight.clone() for name, site in linear_sites(model).items()}
    names = [name for name, site in linear_sites(model).items() if site.expert is None and is_linear(site.owner)]
    try:
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=4, target_modules=names))
    except ValueError:  # PEFT refuses some layers of Mamba's
        names = [name for name in names if not name.endswith("out_proj")]
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=4, target_modules=names))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert list(linear_sites(wrapped)) == list(base), "other names under PEFT"
    found = nd.measure_drift(wrapped)
    merged = linear_sites(wrapped.merge_and_unload())
    # PEFT may train the experts too, where it takes the names of linear layers for those of older checkpoints.
    assert set(found) == {name for name, site in merged.items() if not torch.equal(site.weight, base[name])}, (
        "other sites"
    )
    for name, drift in found.items():
        wanted = (merged[name].weight.double() - base[name].double()).norm(dim=1)
        assert torch.allclose(drift.l2.double(), wanted, rtol=1e-4, atol=1e-6), name


def is_linear(module) -> bool:
    return isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)


def moved(model):
    """The model with every site moved a little."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for site in linear_sites(tuned).values():
            site.weight.add_(0.01 * torch.randn(site.shape, generator=generator))
    return tuned


def diff_holds(model) -> None:
    """What `diff` reads of two folders is what `load_model` makes of them, and of one class the sites of the model."""
    folder = Path(tempfile.mkdtemp())
    try:
        tuned = moved(model)
        model.save_pretrained(folder / "a")
        tuned.save_pretrained(folder / "b")
        frame = diff(folder / "a", [folder / "b"], folder / "log", threads=1).log.read(steps=[1])
        before, after = (loaded(folder / name) for name in "ab")
        if type(before) is type(model):
            before, after = model, tuned
        wanted = nd.compare_models(before, after)
        assert set(frame["site"]) == set(wanted), "other sites"
        assert list(dict.fromkeys(frame["site"])) == list(wanted), "the same sites in another order"
        for name, drift in wanted.items():
            values = torch.tensor(frame["l2"][frame["site"] == name].to_numpy())
            assert torch.allclose(values, drift.l2, rtol=1e-6, atol=0), name
    finally:
        shutil.rmtree(folder)


def loaded(folder: Path):
    """The model that `load_model` makes of a folder; only its tokenizer is not there."""
    return load_weights(str(folder), configuration(str(folder)), dtype=torch.float32)


class Numbers:
    """A tokenizer of 64 tokens: a text is its numbers."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(part) for part in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def answers_hold(model) -> None:
    prompts = [row["input_ids"] for row in rows()]
    requests = [Request(prompt="", text=" ".join(map(str, ids))) for ids in prompts]
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # forced tokens are no part of decoding
    found = answer(model, Numbers(), requests, decoding=Decoding(max_new_tokens=6), batch_size=3)
    for ids, text in zip(prompts, found, strict=True):
        assert text == " ".join(map(str, expected_answer(model, torch.tensor([ids]), 6))), "other answers"


@torch.no_grad()
def expected_answer(model, given: torch.Tensor, count: int) -> list[int]:
    """The greedy answer to one prompt by transformers' `generate`, as long as it gives the logits of the model's plain
    forward pass; if not, by plain forward passes over everything so far. `generate` counts positions from 0 for models
    of RoBERTa's kind, which count them from `padding_idx` + 1 wherever they are trained and scored."""
    length = given.shape[1]
    settings = dict(do_sample=False, max_new_tokens=count, output_logits=True, return_dict_in_generate=True)
    made = model.generate(given, attention_mask=torch.ones_like(given), **settings)
    plain = logits_of(model, made.sequences[:, :-1])[:, length - 1 :]
    by_generate = torch.stack(made.logits, dim=1).float()
    if (by_generate - plain).norm() > 1e-3 * plain.norm():
        for _ in range(count):
            given = torch.cat([given, logits_of(model, given)[:, -1:].argmax(-1)], dim=1)
        return given[0, length:].tolist()
    return made.sequences[0, length:].tolist()


@torch.no_grad()
def length_holds(model) -> None:
    """A text as long as the model has positions has the loss of a plain forward pass, and so has a longer one; or it is
    one clear error, where torch cannot do it either."""
    check_causal(model)
    most = context_length(model)
    refuses = []
    for length in [most, most + 1] if most < 10**9 else [80]:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, 60, (1, length), generator=generator)
        row = {"input_ids": ids[0].tolist(), "labels": [-100] * (length - 3) + ids[0, -3:].tolist()}
        try:
            wanted = F.cross_entropy(logits_of(model, ids)[0, -4:-1], ids[0, -3:])
        except (IndexError, RuntimeError):
            wanted = None
        refuses.append(wanted is None)
        refused = ""
        try:
            (batch,) = make_batches([row], model=model, batch_size=1, pad_token_id=0)
            found = response_losses(model, batch)[0]
        except DataError as error:
            refused = str(error)
        if refused:
            assert wanted is None and "Example 0 is longer than the model has positions" in refused, refused
            continue
        assert wanted is not None and abs(found - wanted) <= 1e-3 * wanted, f"another loss of {length} tokens"
    assert not refuses[0], "shorter texts are refused too"
    assert positions_of(model) in (None, most) and (refuses[-1] or positions_of(model) is None), "other positions"


CHECKS = {
    "scores": scores_hold,
    "drift": drift_holds,
    "diff": diff_holds,
    "answers": answers_hold,
    "length": length_holds,
}
HOLDS, LEFT_OUT = "holds", "left out"


class TookTooLong(Exception):
    pass


@contextlib.contextmanager
def within(seconds: int):
    """An error where the block takes longer, on a processor of its own: what else the machine does is not counted."""

    def stop(*_):
        raise TookTooLong(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def quietly():
    """No warnings and no output of transformers."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def check(kind: str, name: str) -> dict[str, str]:
    """Check -> `holds`, the message of a clear error, or what is wrong, and what of its blocks is left out; `built` alone
    where it cannot be built."""
    began = time.perf_counter()
    with quietly():
        try:
            with within(6):
                model = build(kind, name)
                with torch.no_grad():
                    model(input_ids=torch.tensor([rows()[0]["input_ids"]]))
        except Exception as error:
            return {"built": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
        seconds = time.perf_counter() - began
        result = {"built": f"{seconds:.1f} s", LEFT_OUT: kinds_of(linear_sites(model).left_out)}
        for check_name, holds in CHECKS.items():
            try:
                with within(40):
                    holds(copy.deepcopy(model))
                result[check_name] = HOLDS
            except UserError as error:
                result[check_name] = re.sub(re.escape(tempfile.gettempdir()) + r"/\w+/", "", str(error))
            except AssertionError as error:
                result[check_name] = f"WRONG: {error}".splitlines()[0][:200]
            except Exception as error:
                result[check_name] = f"FAULT: {type(error).__name__}: {error}".splitlines()[0][:200]
    return result
