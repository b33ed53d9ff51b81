"""The margin against one forward for each opening, in either layout, on every family; openings and their errors."""

import pytest
import torch

import neurondrift as nd
from helpers.attribution import PROMPTS, TOKENIZER, margins, moved, with_bytes
from helpers.families import FAMILIES, build
from neurondrift.attribution.margin import Margin, values_of
from neurondrift.attribution.openings import Openings, openings_for, own_openings, tree_of
from neurondrift.base.errors import ConfigError, DataError
from neurondrift.models.architecture import saying
from neurondrift.models.data import Message

SHORT = Openings(refusal=("I can't", "I won't", "Sorry"), compliance=("The", "Sure", "1"))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_equals_one_forward_for_each_opening(family):
    model = with_bytes(family)
    function = Margin(model, TOKENIZER, PROMPTS, SHORT)
    assert function.in_tree
    with torch.no_grad():
        expected = margins(model.double(), SHORT)
    model.float()
    found = nd.refusal_margin(model, TOKENIZER, PROMPTS, SHORT, batch_size=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_documented_list_batches_and_layouts_do_not_matter(attention):
    model = with_bytes("llama")
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = margins(model, openings_for()).double()
    function = Margin(model, TOKENIZER, PROMPTS)
    assert function.in_tree
    for size in (1, 2, 50):
        torch.testing.assert_close(values_of(model, function, batch_size=size), expected, atol=2e-5, rtol=0)
    function.in_tree = False
    for size in (1, 50):
        torch.testing.assert_close(values_of(model, function, batch_size=size), expected, atol=2e-5, rtol=0)


def windowed():
    import transformers as t

    from helpers.families import COMMON

    torch.manual_seed(0)
    sizes = COMMON | dict(vocab_size=264, sliding_window=4)
    return t.MistralForCausalLM(t.MistralConfig(**sizes)).eval()


def with_alibi():
    import transformers as t

    torch.manual_seed(0)
    sizes = dict(vocab_size=264, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.2)
    return t.BloomForCausalLM(t.BloomConfig(**sizes)).eval()


def recurrent():
    import transformers as t

    torch.manual_seed(0)
    sizes = dict(vocab_size=264, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=4)
    return t.MambaForCausalLM(t.MambaConfig(**sizes)).eval()


@pytest.mark.parametrize("make", [windowed, with_alibi, recurrent])
def test_what_takes_no_mask_of_its_own_is_asked_branch_by_branch_and_says_so_once(make, caplog):
    saying.say_once.cache_clear()
    model = make()
    with torch.no_grad():
        expected = margins(model, SHORT)
    found = nd.refusal_margin(model, TOKENIZER, PROMPTS, SHORT, batch_size=2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    nd.refusal_margin(model, TOKENIZER, PROMPTS, SHORT)
    assert sum("one row for each branch" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("in_tree", [True, False])
def test_the_margin_is_differentiable(in_tree):
    model = with_bytes("qwen2").double()
    function = Margin(model, TOKENIZER, PROMPTS, SHORT)
    function.in_tree = in_tree
    total = sum(function(model, batch).sum() for batch in function.batches(16))
    parameter = model.model.layers[0].mlp.down_proj.weight
    (found,) = torch.autograd.grad(total, parameter)
    (expected,) = torch.autograd.grad(margins(model, SHORT).sum(), parameter)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-6)  # norms are in float32, whatever the model is


def test_the_model_is_left_as_it_was():
    model = with_bytes("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nd.refusal_margin(model, TOKENIZER, PROMPTS, SHORT)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_examples_count_with_their_earlier_turns():
    model = with_bytes("llama")
    earlier = (
        nd.Example(id="1", prompt="And you?", response="", messages=(Message("user", "a"), Message("assistant", "b"))),
    )
    first, second = (nd.refusal_margin(model, TOKENIZER, prompts, SHORT) for prompts in (earlier, ["And you?"]))
    assert first != second


def test_the_tree_holds_each_inner_token_once_and_every_opening():
    tree = tree_of(Openings(refusal=("ab", "ac", "abd"), compliance=("xyz", "xy!")), TOKENIZER)
    spell = {
        node: TOKENIZER.decode([tree.tokens[n - 1] for n in tree.chain(node)]) for node in range(1, tree.inner + 1)
    }
    assert sorted(spell.values()) == ["a", "x", "xy"]
    said = []
    for path in tree.paths:
        edges = [tree.edges[at] for at in path.nonzero()[:, 0]]
        node, token = max(edges)
        said.append(spell[node] + TOKENIZER.decode([token]))
    assert said == ["ab", "ac", "xyz", "xy!"]  # "abd" begins with "ab", which has its probability
    assert tree.is_refusal.tolist() == [True, True, False, False]


def test_own_openings_are_those_of_the_answers():
    answers = ["I can't do that", "I can't help", "No way", "Here you go", "Here you are", "Sure thing", "No way"]
    own = own_openings(answers, [True, True, True, False, False, False, True])
    assert own == Openings(refusal=("I can't", "No way"), compliance=("Here you", "Sure thing"))
    with pytest.raises(DataError, match="no openings of both kinds"):
        own_openings(answers, [False] * 7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: Margin(model, TOKENIZER, []), DataError, "no prompts"),
        (lambda model: Margin(model, TOKENIZER, [" "]), DataError, "is empty"),
        (
            lambda model: Margin(build("gpt2"), TOKENIZER, ["x" * 400], SHORT),
            DataError,
            "longer than the model has positions",
        ),
        (lambda model: Margin(model, TOKENIZER, ["x"], "xx"), ConfigError, "no list of openings"),
        (lambda model: Openings(refusal=(), compliance=("a",)), ConfigError, "no refusal openings"),
        (
            lambda model: Margin(model, TOKENIZER, ["x"], Openings(refusal=("ab",), compliance=("a",))),
            ConfigError,
            "begins with an opening of the other kind",
        ),
    ],
)
def test_mistakes_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make(build("llama"))


BEGINNING = ["Tell me: Hi", "Tell me: How is it?", "Tell me: x", "Tell me: 12 + 5"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3", "opt"])
def test_what_prompts_begin_with_is_computed_once_and_changes_nothing(family):
    model = with_bytes(family)
    function = Margin(model, TOKENIZER, BEGINNING, SHORT)
    expected = values_of(model, function)
    for batch_size in (2, 32):
        torch.testing.assert_close(function.quick_values(model, batch_size=batch_size), expected, atol=1e-4, rtol=0)
    assert function._is_quick
    other = moved(model, scale=0.05)  # another state of the same architecture
    torch.testing.assert_close(function.quick_values(other), values_of(other, function), atol=1e-4, rtol=0)
    assert not torch.allclose(function.quick_values(other), expected, atol=1e-3)


def test_prompts_with_nothing_in_common_go_the_long_way():
    model = with_bytes("llama")
    function = Margin(model, TOKENIZER, ["Hi", "x y"], SHORT, chat_template=False)
    assert torch.equal(function.quick_values(model), values_of(model, function))
    assert function._is_quick is False
