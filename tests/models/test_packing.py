"""Without padding: the same losses and gradients as padded, whatever the family, and nothing computed for padding."""

import pytest
import torch
import transformers as t

from helpers.families import COMMON, FAMILIES, build, examples, gpt_oss
from neurondrift.models.architecture.packing import draws, packs
from neurondrift.models.batches import batches_without_padding, make_batches, response_losses, token_losses

RECURRENT = {
    "mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)
    ),
    "falcon_alibi": lambda: t.FalconForCausalLM(
        t.FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    ),
}
# Windows longer than the rows that a model is asked with: the mask is right, or nothing tells.
WINDOWED = {
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**COMMON, sliding_window=9)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**COMMON, head_dim=4, sliding_window=9)),
}


def rows_that_begin_alike(count=6):
    """As `examples`, with the same three tokens before each."""
    return [
        {"input_ids": [9, 8, 7, *row["input_ids"]], "labels": [-100] * 3 + row["labels"]} for row in examples(count)
    ]


def made(kind):
    torch.manual_seed(0)
    if kind == "gpt_oss":
        return gpt_oss()
    if kind in FAMILIES:
        return build(kind)
    return (WINDOWED[kind.removesuffix("-windowed")] if kind.endswith("-windowed") else RECURRENT[kind])().eval()


def gradients(model, batches, count):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = token_losses(model, batch).losses.sum() / count
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ALL = [*FAMILIES, "gpt_oss", *(f"{name}-windowed" for name in WINDOWED), *RECURRENT]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("kind", ALL)
def test_losses_and_gradients_equal_the_padded_ones(kind, share):
    model, rows = made(kind), rows_that_begin_alike()
    (padded,) = make_batches(rows, model=model, batch_size=len(rows), pad_token_id=0)
    dense = batches_without_padding(model, rows, batch_size=len(rows), pad_token_id=0, share=share)
    count = int((padded.labels[:, 1:] != -100).sum())
    assert sum(int((batch.labels[:, 1:] != -100).sum()) for batch in dense) == count
    loss, expected = gradients(model, [padded], count)
    found_loss, found = gradients(model, dense, count)
    assert found_loss == pytest.approx(loss, rel=2e-6)
    assert found.keys() == expected.keys()
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_computed_for_padding(kind):
    model, rows = made(kind), rows_that_begin_alike()
    rows.append(rows[2])  # two of one length
    tokens = sum(len(row["input_ids"]) for row in rows)
    dense = batches_without_padding(model, rows, batch_size=len(rows), pad_token_id=0)
    packed = kind not in RECURRENT
    assert len(dense) == (1 if packed else len(rows) - 1)
    assert all(bool(batch.attention_mask.all()) for batch in dense)
    assert sum(batch.input_ids.numel() for batch in dense) == tokens - 3 * (len(rows) - 1) * packed


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_losses_of_each_example_are_its_own(kind):
    model, rows = made(kind), rows_that_begin_alike()
    for batch in batches_without_padding(model, rows, batch_size=4, pad_token_id=0):
        with torch.no_grad():
            losses_B = response_losses(model, batch)
        for name, loss in zip(batch.names, losses_B.tolist(), strict=True):
            (alone,) = make_batches([rows[int(name)]], model=model, batch_size=1, pad_token_id=0)
            with torch.no_grad():
                assert loss == pytest.approx(float(response_losses(model, alone)), rel=1e-5)


def test_a_beginning_that_predicts_a_target_is_not_shared():
    rows = [{"input_ids": [5, 6, 7, last, 9], "labels": [-100, -100, -100, last, 9]} for last in (11, 12, 13)]
    (batch,) = batches_without_padding(build("llama"), rows, batch_size=3, pad_token_id=0)
    assert batch.layout.shared == 2  # the third token predicts the first target of each


def test_the_attention_of_a_model_is_as_it_was_afterwards():
    model = build("llama")
    before = model.config._attn_implementation
    (batch,) = batches_without_padding(model, examples(), batch_size=8, pad_token_id=0)
    token_losses(model, batch)
    assert model.config._attn_implementation == before != "neurondrift_packed"
    with pytest.raises(IndexError):
        token_losses(model, batch.to("cpu").__class__(**{**vars(batch), "input_ids": batch.input_ids + 64}))
    assert model.config._attn_implementation == before


def test_rows_do_not_share_what_dropout_draws():
    model = build("gpt2")
    rows = rows_that_begin_alike()
    model.train()
    assert draws(model, model)
    (batch,) = batches_without_padding(model, rows, batch_size=8, pad_token_id=0)
    assert batch.layout.shared == 0
    assert not draws(build("llama"), build("llama"))


def test_models_whose_attention_is_their_own_are_told():
    assert packs(made("llama"), made("llama"))
    assert not packs(made("mamba"), made("mamba"))
    assert not packs(made("falcon_alibi"), made("falcon_alibi"))


def test_batches_of_about_one_length_where_a_pass_has_a_price():
    from neurondrift.models.batches import _alike, _sorted_rows

    encoded = [{"input_ids": [1] * n, "labels": [-100, *[1] * (n - 1)]} for n in (10, 10, 9, 4, 4, 3)]
    rows = _sorted_rows(encoded, build("llama"))

    def lengths(price):
        return [[len(row.ids) for row in group] for group in _alike(rows, price)]

    assert lengths(0) == [[10, 10], [9], [4, 4], [3]]
    assert lengths(2) == [[10, 10, 9], [4, 4, 3]]
    assert lengths(100) == [[10, 10, 9, 4, 4, 3]]


def test_a_training_that_computes_blocks_anew_has_rows_of_one_length():
    model, rows = build("llama"), rows_that_begin_alike()
    model.activation_checkpointing_enable()
    parts = batches_without_padding(model, rows, batch_size=8, pad_token_id=0)
    assert len(parts) == len(rows) and all(batch.layout is None for batch in parts)
    (scored,) = batches_without_padding(model, rows, batch_size=8, pad_token_id=0, share=False)
    assert scored.layout is not None  # scoring computes anew in its own hands
