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
from neurondrift.study.cost.pace import Pace, measured
from neurondrift.study.settings import resolve
from neurondrift.study.stages.alignment import alignment_examples
from neurondrift.study.stages.finetuning import _threads_as_begun
from neurondrift.study.stages.scoring import purposes
from neurondrift.study.training import align, finetune
from neurondrift.study.verify import _skeleton, estimate

NOTHING = Pace(*(0.0 for _ in Pace._fields))
CPU = torch.device("cpu")


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
    foretold = work._alignment(study, NOTHING._replace(train=1.0), tokenizer, 0)
    assert foretold == pytest.approx(sum(tokens), rel=0.1)
    tokens.clear()
    encoded = encode(load_examples(study.finetune.data), tokenizer, max_length=study.finetune.max_length)
    finetune(model, tokenizer, encoded, study.finetune, seed=0, folder=tmp_path / "a", save_at=[], resumable=False)
    foretold = work._training(
        NOTHING._replace(adapt=1.0),
        work.rows_of(study.finetune.data, tokenizer, study.finetune.max_length),
        12,
        study.finetune.batch_size,
        False,
        0,
    )
    assert foretold == pytest.approx(sum(tokens), rel=0.1)


def test_the_tokens_of_scores_are_those_that_are_computed(counted):
    model, tokenizer, tokens = counted
    study = resolve(preset="smoke")
    for purpose in purposes(study).values():
        score(model, encode(purpose.examples, tokenizer, max_length=purpose.max_length), method="taylor")
    assert work._scoring(study, NOTHING._replace(score=1.0), tokenizer) == pytest.approx(sum(tokens), rel=0.02)


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
    first, second = (work.seconds_of_stages(study, pace, byte_tokenizer(), parameters=74_000) for pace in paces)
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
    assert next(_skeleton(study).parameters()).is_meta
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
