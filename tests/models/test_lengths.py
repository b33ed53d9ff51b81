"""Texts that are longer than a model has positions: one message, wherever a batch goes into a model.

`length` of docs/models.md asks the same of every class of transformers.
"""

import copy
import re

import pytest
import torch
import transformers as t
from torch import nn

import neurondrift as nd
from helpers.families import COMMON, build, examples
from neurondrift.attribution.margin import Margin
from neurondrift.base.errors import DataError
from neurondrift.behaviour.capability import perplexity
from neurondrift.behaviour.classifiers import FORMS, _Loaded
from neurondrift.cli.__main__ import main
from neurondrift.importance.directions import bases
from neurondrift.interventions.measures import Bench, answer_losses
from neurondrift.models.architecture.conventions import _WithinTables, goes_through
from neurondrift.models.batches import context_length, make_batches, positions_of
from neurondrift.models.data import Example
from neurondrift.models.loading import byte_tokenizer
from neurondrift.study.settings import AlignSection, FinetuneSection
from neurondrift.study.training import align, finetune

SHORT = Example(prompt="Say hello.", response="Hello there.", id="short")
LONG = Example(prompt="Count from one on.", response="one two three four five " * 40, id="counting-7")
MESSAGE = r"Example counting-7 is longer than the model has positions\. Received: '(300|982) tokens'\. Allowed: 128\."


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A GPT-2 of 128 positions that reads bytes."""
    torch.manual_seed(0)
    size = dict(n_embd=16, n_layer=2, n_head=2, n_positions=128, vocab_size=len(tokenizer))
    marks = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    return t.GPT2LMHeadModel(t.GPT2Config(**size, **marks)).eval()


def encoded(tokenizer):
    return nd.encode([SHORT, LONG], tokenizer, max_length=300)


def bench():
    return Bench(sets={}, answers=[SHORT, LONG], max_length=300)


DOORS = {
    "score": lambda model, tokenizer, folder: nd.score(model, encoded(tokenizer)),
    "perplexity": lambda model, tokenizer, folder: perplexity(model, tokenizer, [SHORT, LONG], max_length=300),
    "held-out answers": lambda model, tokenizer, folder: answer_losses(model, tokenizer, bench()),
    "directions": lambda model, tokenizer, folder: bases(model, encoded(tokenizer), rank=2),
    "response loss": lambda model, tokenizer, folder: nd.ResponseLoss(model, encoded(tokenizer)).batches(2),
    "provenance": lambda model, tokenizer, folder: nd.provenance(
        moved(model), encoded(tokenizer), encoded(tokenizer), initial=model
    ),
    "functional drift": lambda model, tokenizer, folder: nd.functional_drift(
        moved(model), encoded(tokenizer), encoded(tokenizer), shared=1, initial=model
    ),
    "finetune": lambda model, tokenizer, folder: finetune(
        model, tokenizer, encoded(tokenizer), FinetuneSection(), seed=0, folder=folder, save_at=[]
    ),
    "align": lambda model, tokenizer, folder: align(model, encoded(tokenizer), AlignSection(), seed=0, scratch=folder),
}


def moved(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.transformer.h:
            block.mlp.c_fc.weight.add_(0.01)
    return other


@pytest.mark.parametrize("door", DOORS)
def test_the_message_is_the_same_wherever_a_batch_goes_in(door, model, tokenizer, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=MESSAGE) as told:
        DOORS[door](model, tokenizer, tmp_path)
    for setting in ("score.max_length", "finetune.max_length", "evaluate.max_length", "--max-length"):
        assert setting in told.value.fix
    assert "at most 128" in told.value.fix
    assert before.keys() == model.state_dict().keys() and not model.training  # nothing is wrapped or left changed
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_prompts_and_what_a_judge_is_asked_have_no_max_length(model, tokenizer):
    prompt = Example(prompt="why " * 40, response="", id="whys")
    with pytest.raises(DataError, match=r"Prompt whys with the openings is longer than the model has positions"):
        Margin(model, tokenizer, [SHORT, prompt])
    judge = _Loaded(model, tokenizer, FORMS["harmbench"], "hf:judge")
    with pytest.raises(DataError, match=r"What the judge hf:judge is asked of the prompt 'why why.*has positions"):
        judge.scores([("why", "because"), ("why " * 40, "because")], batch_size=2, advance=lambda count: None)


def bert(**settings):
    return t.BertLMHeadModel(t.BertConfig(**COMMON | settings | dict(is_decoder=True))).eval()


KINDS = {  # how positions are looked up
    "gpt2": lambda: build("gpt2"),
    "opt": lambda: build("opt"),  # an embedding that counts from 2
    "bert": bert,  # slices
    "roberta": lambda: t.RobertaForCausalLM(t.RobertaConfig(**COMMON | dict(is_decoder=True, pad_token_id=1))).eval(),
    "gptj": lambda: t.GPTJForCausalLM(
        t.GPTJConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4)
    ).eval(),
    "ctrl": lambda: t.CTRLLMHeadModel(
        t.CTRLConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, dff=24)
    ).eval(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_tokens_as_there_are_positions_go_through_in_every_way_of_padding(kind):
    model = KINDS[kind]()
    most = context_length(model)
    assert most == (62 if kind == "roberta" else 64)
    rows = [{"input_ids": [5] * length, "labels": [-100] * 3 + [5] * (length - 3)} for length in (most - 3, 9)]
    for multiple in (1, 16, 100):  # 61 tokens, rounded up to no more than the model takes
        (batch,) = make_batches(
            rows, model=model, batch_size=2, pad_token_id=model.config.pad_token_id or 0, multiple=multiple
        )
        assert most - 3 <= batch.input_ids.shape[1] <= most
        assert torch.isfinite(nd.ResponseLoss(model, rows)(model, batch)).all()
    row = {"input_ids": [5] * (most + 1), "labels": [5] * (most + 1)}
    with pytest.raises(DataError, match=f"Example 1 is longer .* Received: '{most + 1} tokens'. Allowed: {most}"):
        nd.score(model, [rows[0], row])
    assert positions_of(model) == (None if kind in ("gptj", "ctrl") else most)  # theirs are no embeddings


def test_models_that_compute_their_positions_take_longer_texts():
    model = build("llama")
    row = {"input_ids": [5, 6, 7, 8] * 20, "labels": [-100] * 70 + [5, 6, 7, 8] * 2 + [5, 6]}
    assert context_length(model) == 64 < len(row["input_ids"]) and positions_of(model) is None
    (batch,) = make_batches([row], model=model, batch_size=1, pad_token_id=0)
    labels = torch.tensor([row["labels"]])
    expected = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
    assert torch.allclose(nd.ResponseLoss(model, [row])(model, batch)[0], expected, rtol=1e-5)
    assert nd.score(model, [row, examples(1)[0]])


@pytest.mark.parametrize(
    "look_up",
    [
        lambda table, at: nn.functional.embedding(at, table),
        lambda table, at: table[at],
        lambda table, at: table.index_select(0, at),
        lambda table, at: table.gather(0, at[:, None].expand(-1, 2)),
    ],
)
def test_a_look_up_beyond_a_table_is_seen_before_a_gpu_sees_it(look_up):
    table = torch.zeros(4, 2)
    with _WithinTables():
        assert look_up(table, torch.tensor([0, 3])).shape == (2, 2)
        assert table[torch.tensor([True, False, True, False])].shape == (2, 2)
        with pytest.raises(IndexError, match="a look-up at 4 in a table of 4"):
            look_up(table, torch.tensor([0, 4]))


def test_asking_leaves_a_model_as_it_was():
    model = build("gpt2").train()
    assert goes_through(model, 64) and not goes_through(model, 65) and goes_through(model, 10)
    assert all(module.training for module in model.modules())


def test_commands_end_with_the_message_and_verify_says_it_before(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "long.jsonl"
    rows = [f'{{"id": "{x.id}", "prompt": "{x.prompt}", "response": "{x.response}"}}' for x in (SHORT, LONG)]
    data.write_text("\n".join(rows))
    study = tmp_path / "study.toml"
    sets = f'safety = "{data}"\nutility = "{data}"\nstyle = "none"\nmax_length = 300\ngradient_examples = 1'
    study.write_text(
        f'preset = "smoke"\n[model]\nreference = "{tmp_path / "model"}"\n[score]\n{sets}\n[align]\nenabled = false\n'
    )
    folder = ["--output-dir", str(tmp_path / "out")]
    alone = ["evaluate", str(tmp_path / "model"), "--answers", str(data), "--harmful", "none", "--ordinary", "none"]
    for command in (
        ["score", "--config", str(study), *folder],
        ["verify", "--config", str(study), *folder],
        [*alone, "--borderline", str(data), "--max-new-tokens", "2", *folder],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        told = capsys.readouterr().err
        assert ended.value.code == 2 and re.search(MESSAGE, told) and "Traceback" not in told, command
    assert not (tmp_path / "out" / "answers.parquet").exists()  # said before anything is asked
    main([*alone, "--borderline", str(data), "--max-new-tokens", "2", "--max-length", "126", *folder])
