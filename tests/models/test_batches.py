"""The loss of a batch is the plain one, however it is computed."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from helpers.families import FAMILIES, build, examples
from neurondrift.models import batches
from neurondrift.models.batches import make_batches, response_losses, token_losses


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_of_full_logits(family):
    model, rows = build(family), examples()
    (batch,) = make_batches(rows, model=model, batch_size=len(rows), pad_token_id=0, multiple=16)
    assert batch.input_ids.shape[1] % 16 == 0
    with torch.no_grad():
        found = dict(zip(batch.names, response_losses(model, batch).tolist(), strict=True))
        for index, row in enumerate(rows):
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
            expected = F.cross_entropy(logits[:-1], torch.tensor(row["labels"])[1:])
            assert found[str(index)] == pytest.approx(expected.item(), rel=1e-4)


def test_gradients_equal_those_of_full_logits():
    rows = examples()
    one, two = build("llama"), build("llama")
    (batch,) = make_batches(rows, model=one, batch_size=len(rows), pad_token_id=0)
    token_losses(one, batch).losses.mean().backward()
    two(input_ids=batch.input_ids, labels=batch.labels, attention_mask=batch.attention_mask).loss.backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "LoRA"])
def test_gradients_under_gradient_checkpointing_are_the_same(adapted):
    rows, gradients = examples(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build("llama")
        if adapted:
            model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable()
        (batch,) = make_batches(rows, model=model, batch_size=len(rows), pad_token_id=0)
        token_losses(model, batch).losses.mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, two in zip(*gradients, strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_cross_entropy_in_parts_equals_torch(dtype, tolerance, rows_at_once, monkeypatch):
    monkeypatch.setattr(batches, "LOGITS_AT_ONCE_CPU", rows_at_once * 50)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 50, generator=generator)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    targets, weights = torch.randint(50, (7,), generator=generator), torch.rand(7, generator=generator)
    before = logits.detach().clone()
    found = batches._CrossEntropy.apply(logits, targets)
    assert torch.equal(logits, before)
    expected = F.cross_entropy(exact, targets, reduction="none")
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=1e-5)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad.dtype == dtype
    assert (logits.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()
