"""What verify foretells: the tokens that stages really compute, and a pace that is timed."""

import math

import pytest
import torch

from helpers.families import build
from neurondrift.base import processes
from neurondrift.base.errors import ModelError
from neurondrift.importance.scores import score
from neurondrift.models.data import encode, load_examples
from neurondrift.models.loading import byte_tokenizer, load_model
from neurondrift.study.cost import work
from neurondrift.study.cost.devices import ALONE, H100, Devices, pace_on
from neurondrift.study.cost.estimate import estimate, skeleton_of
from neurondrift.study.cost.memory import bytes_of_stages
from neurondrift.study.cost.pace import Pace, measured
from neurondrift.study.cost.shape import Shape, shape_of
from neurondrift.study.settings import resolve
from neurondrift.study.stages.alignment import alignment_examples
from neurondrift.study.stages.finetuning import _threads_as_begun
from neurondrift.study.stages.scoring import purposes
from neurondrift.study.training import align, finetune

NOTHING = Pace(*(0.0 for _ in Pace._fields))
CPU = torch.device("cpu")
#: Of the tiny Llama.
SHAPE = Shape(parameters=74_000, blocks=64_000, layers=3, vocabulary=300, hidden=32, widths=600, cached=192)


def at(devices: Devices = ALONE, **seconds: float) -> work.On:
    """A pace that counts: seconds for what is named, nothing for all else."""
    return work.On(NOTHING._replace(**seconds), SHAPE, devices)


@pytest.fixture
def counted():
    """The tiny model, and how many tokens have gone through its blocks with gradients."""
    model, tokenizer = load_model("tiny:llama", dtype="float32", device="cpu")
    tokens = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: tokens.append(args[0].numel()) if torch.is_grad_enabled() else None
    )
    return model, tokenizer, tokens


def test_the_tokens_of_training_are_those_that_are_computed(counted, tmp_path):
    model, tokenizer, tokens = counted
    study = resolve(preset="smoke", flags={"align.max_steps": 12, "finetune.max_steps": 12})
    align(
        model,
        encode(alignment_examples(study), tokenizer, max_length=study.align.max_length),
        study.align,
        seed=0,
        scratch=tmp_path,
    )
    foretold = work._alignment(study, at(train=1.0, adapt=1.0), tokenizer)
    assert foretold == pytest.approx(sum(tokens), rel=0.1)
    tokens.clear()
    encoded = encode(load_examples(study.finetune.data), tokenizer, max_length=study.finetune.max_length)
    finetune(model, tokenizer, encoded, study.finetune, seed=0, folder=tmp_path / "a", save_at=[], resumable=False)
    rows = work.rows_of(study.finetune.data, tokenizer, study.finetune.max_length)
    foretold = work._training(at(adapt=1.0), rows, 12, study.finetune.batch_size, 100)
    assert foretold == pytest.approx(sum(tokens), rel=0.1)


def test_the_tokens_of_scores_are_those_that_are_computed(counted):
    model, tokenizer, tokens = counted
    study = resolve(preset="smoke")
    for purpose in purposes(study).values():
        score(model, encode(purpose.examples, tokenizer, max_length=purpose.max_length), method="taylor")
    assert work._scoring(study, at(score=1.0), tokenizer) == pytest.approx(sum(tokens), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_pace_is_timed_from_one_block(family):
    model = build(family)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    pace = measured(skeleton, device=CPU, dtype=torch.float32, rank=2)
    assert all(math.isfinite(value) and value >= 0 for value in pace)
    assert pace.train > 0 and pace.adapt > 0 and pace.score > 0 and pace.read > 0 and pace.order > 0


def test_more_blocks_take_more_time():
    """One block is timed, of three and of thirty."""
    study = resolve(preset="smoke")
    paces = []
    for blocks in (3, 30):
        model, _ = load_model("tiny:llama", dtype="float32", device="cpu")
        model.config.num_hidden_layers = blocks
        with torch.device("meta"):
            skeleton = type(model)(model.config)
        paces.append(measured(skeleton, device=CPU, dtype=torch.float32, rank=2))
    assert paces[1].train > 3 * paces[0].train
    first, second = (work.seconds_of_stages(study, work.On(pace, SHAPE), byte_tokenizer()) for pace in paces)
    assert list(first) == ["align", "score", "groups", "finetune", "evaluate", "attribute", "analyze, report"]
    assert second["score"] > first["score"]


def test_a_model_without_blocks_that_run_by_themselves_is_told():
    import transformers as t

    with torch.device("meta"):
        skeleton = t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(ModelError, match="cannot be run by itself"):
        measured(skeleton, device=CPU, dtype=torch.float32, rank=2)


def test_the_estimate_names_every_stage():
    study = resolve(preset="smoke")
    assert next(skeleton_of(study).parameters()).is_meta
    cost = estimate(study, 74_000, device="cpu", dtype="float32", tokenizer=byte_tokenizer())
    assert all(seconds >= 0 for seconds in cost.stages.values()) and sum(cost.stages.values()) > 1
    rows = work.rows_of(study.finetune.data, byte_tokenizer(), study.finetune.max_length)
    assert rows.size == 24 and rows.beginning == 1  # the mark of the user's turn


def test_threads_are_left_to_others(monkeypatch):
    before, said = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "_cores", lambda: [0, 1, 2, 3])
    try:
        for usual, taken, expected in ((4, 0.3, 4), (4, 1.0, 3), (4, 3.9, 1), (4, 9.0, 1), (2, 1.0, 2), (2, 3.0, 1)):
            torch.set_num_threads(usual)
            monkeypatch.setattr(processes, "cores_taken", lambda taken=taken: taken)
            said.clear()
            with processes.leaving_busy_cores(said.append):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == usual
            assert len(said) == (expected < usual)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with processes.leaving_busy_cores(said.append):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_resumed_training_takes_the_threads_that_it_began_with(tmp_path):
    before = torch.get_num_threads()
    try:
        for now, expected in ((3, 3), (1, 3), (2, 3)):
            torch.set_num_threads(now)
            with _threads_as_begun(tmp_path):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == now
        (tmp_path / "threads.json").write_text("-1")
        with _threads_as_begun(tmp_path):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_another_process_does_is_seen():
    import subprocess
    import sys

    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert processes.cores_taken(0.5) > 0.2
        finally:
            other.kill()


def test_processes_share_what_stages_share():
    """Four processes take a fourth of the tokens, what each does by itself in full, and what they exchange beside it."""
    study = resolve(preset="smoke", flags={"align.batch_size": 4, "finetune.batch_size": 4})
    on, four = at(train=1.0, adapt=1.0, score=1.0), Devices(4, link=float("inf"))
    tokenizer = byte_tokenizer()
    for stage in (work._alignment, work._scoring):
        one, shared = (stage(study, each, tokenizer) for each in (on, on._replace(devices=four)))
        assert shared == pytest.approx(one / 4, rel=0.12), stage
    exchanged = at(devices=Devices(4, link=1.0))
    trained = 8 * SHAPE.widths * SHAPE.layers
    assert trained == SHAPE.trained(8)
    rows = work.rows_of(study.finetune.data, tokenizer, study.finetune.max_length)
    assert work._training(exchanged, rows, 12, 4, trained) == 12 * 2 * 3 / 4 * 4 * trained
    cut = exchanged._replace(devices=Devices(4, is_cut=True, link=1.0), itemsize=2)
    assert work._training(cut, rows, 12, 4, trained) == 12 * 3 / 4 * (8 * trained + 2 * 2 * SHAPE.parameters)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_sizes_of_a_model_are_read_without_numbers(family):
    model = build(family)
    with torch.device("meta"):
        shape = shape_of(type(model)(model.config))
    assert shape == shape_of(model)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters()) > shape.blocks > 0
    cache = model(input_ids=torch.arange(5)[None] + 3, use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape.cached == kept / 5


def test_what_a_token_leaves_behind_is_about_what_is_kept():
    """Numbers that autograd keeps for the backward pass, beside the weights themselves."""
    model = build("llama")
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=torch.arange(tokens)[None] % 60 + 3)
    shape = shape_of(model)
    assert output.last_hidden_state.requires_grad
    assert sum(kept.values()) / 4 / tokens == pytest.approx(shape.widths * shape.layers, rel=0.5)


def test_memory_of_parts_and_of_all():
    study = resolve(preset="smoke", flags={"finetune.method": "full"})
    large = SHAPE._replace(parameters=10**10, blocks=9 * 10**9)
    alone = bytes_of_stages(study, large, None, itemsize=2)
    cut = bytes_of_stages(study, large, None, itemsize=2, devices=Devices(8, is_cut=True))
    assert 16e10 < alone["finetune"] < 17e10 and 2e10 < cut["finetune"] < 10e10
    assert alone["score"] - bytes_of_stages(study, large, None, itemsize=2, room=3e10)["score"] == 3.6e10
    assert cut["evaluate"] == alone["evaluate"] > 2e10


def test_a_model_that_fits_may_be_cut_to_train_all_of_it():
    full, adapted = (resolve(preset="smoke", flags={"finetune.method": how}) for how in ("full", "lora"))
    large, eight = SHAPE._replace(parameters=10**10, blocks=9 * 10**9), Devices(8, cut_to_train=True)
    for study, is_cut in ((full, True), (adapted, False)):
        found = bytes_of_stages(study, large, None, itemsize=2, devices=eight)
        assert found["score"] == bytes_of_stages(study, large, None, itemsize=2, devices=Devices(8))["score"]
        alike = bytes_of_stages(study, large, None, itemsize=2, devices=Devices(8, is_cut=is_cut))
        assert found["finetune"] == alike["finetune"]


def test_scores_of_seven_billion_weights_take_what_they_took_on_a_gpu():
    """benchmarks/README.md: 128 examples of 256 tokens in 28.5 s, and 53.3 GB, on an H100."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
        )
        shape = shape_of(LlamaForCausalLM(config))
    pace = pace_on(shape, H100)
    assert 128 * (256 * pace.score + pace.score_row) == pytest.approx(28.5, rel=0.1)
    weights, sums, left = 2 * shape.parameters, 4 * shape.blocks, 8 * 256 * shape.widths * shape.layers * 2
    assert weights + sums + left == pytest.approx(53.3e9, rel=0.1)


def test_the_estimate_of_two_processes():
    study = resolve(preset="smoke", flags={"parallel.strategy": "fsdp2"})
    cost = estimate(study, 74_000, device="cpu", dtype="float32", tokenizer=byte_tokenizer(), processes=2)
    assert cost.is_cut and cost.peak == max(cost.memory.values())
    assert list(cost.memory) == ["align", "score", "finetune", "evaluate", "attribute"]
