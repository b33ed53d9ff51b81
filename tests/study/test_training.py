"""Alignment and fine-tuning: steps as the Trainer counts them, frozen groups, and the same base again and again."""

import pytest
import torch

from helpers.families import build, examples
from helpers.groups import group_of
from helpers.training import Killed
from neurondrift.base.errors import ModelError
from neurondrift.interventions.acting.freezing import FreezeCallback
from neurondrift.models.batches import make_batches, response_losses, token_losses
from neurondrift.models.loading import attach_adapter
from neurondrift.models.sites import linear_sites
from neurondrift.study.folder import saved_step
from neurondrift.study.sections.finetuning import evaluated_steps, snapshot_steps, total_steps
from neurondrift.study.settings import AlignSection, FinetuneSection
from neurondrift.study.training import align, detach_adapter, finetune

SMALL = FinetuneSection(max_steps=3, batch_size=2, lora_r=2, lora_alpha=4, learning_rate=0.02, weight_decay=0.1)


@pytest.mark.parametrize(
    ("count", "settings", "expected"),
    [
        (10, {"batch_size": 4}, 3),
        (10, {"batch_size": 4, "epochs": 2}, 6),
        (10, {"batch_size": 4, "gradient_accumulation": 2}, 2),
        (10, {"batch_size": 4, "max_steps": 7}, 7),
    ],
)
def test_steps_are_those_of_the_trainer(count, settings, expected, tmp_path):
    section = FinetuneSection(**settings, lora_r=1, target_modules=["q_proj"], drift_interval=100)
    assert total_steps(count, section) == expected
    seen = []
    finetune(
        build("llama"), None, examples(count), section, seed=0, folder=tmp_path, save_at=[expected], advance=seen.append
    )
    assert sum(seen) == expected
    assert (saved_step(tmp_path, expected) / "adapter_model.safetensors").exists()


def test_snapshots_and_evaluations_cover_before_between_and_after():
    assert snapshot_steps(75, 25) == [0, 25, 50, 75]
    assert snapshot_steps(70, 25) == [0, 25, 50, 70]
    assert evaluated_steps(75, 25, 4) == [0, 25, 50, 75]
    assert evaluated_steps(1000, 10, 4) == [0, 330, 670, 1000]
    assert evaluated_steps(3, 10, 4) == [0, 3]


def test_gradient_accumulation_is_the_same_step(tmp_path):
    """Four examples at once and in two halves: the loss is the mean over the tokens of all four."""
    weights = []
    for size, accumulation in ((4, 1), (2, 2)):
        section = FinetuneSection(
            batch_size=size,
            gradient_accumulation=accumulation,
            max_steps=1,
            lora_r=2,
            target_modules=["q_proj"],
            learning_rate=0.1,
        )
        model, _ = finetune(build("llama"), None, examples(4), section, seed=0, folder=tmp_path / str(size), save_at=[])
        weights.append(
            model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.detach().clone()
        )
    assert weights[0].abs().max() > 0
    assert torch.allclose(weights[0], weights[1], atol=1e-4)


def test_alignment_lowers_the_loss_and_needs_float32(tmp_path):
    model, rows = build("llama"), examples(8)
    (batch,) = make_batches(rows, model=model, batch_size=8, pad_token_id=0)
    with torch.no_grad():
        before = response_losses(model, batch).mean()
    align(
        model,
        rows,
        AlignSection(max_steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=0),
        seed=0,
        scratch=tmp_path,
    )
    with torch.no_grad():
        assert response_losses(model, batch).mean() < before - 0.1
    with pytest.raises(ModelError, match=r"needs them in float32.*bfloat16"):
        align(build("llama").to(torch.bfloat16), rows, AlignSection(), seed=0, scratch=tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_alignment_by_lora_is_the_adapter_merged_in_float32(family, tmp_path):
    """The same adapter as fine-tuning with the same settings finds, added to the weights; nothing else has changed."""
    adapter = {"lora_r": 2, "lora_alpha": 8, "max_steps": 3, "batch_size": 3, "learning_rate": 0.02, "warmup_steps": 1}
    rows, model, untouched = examples(8), build(family), build(family)
    align(model, rows, AlignSection(method="lora", **adapter), seed=0, scratch=tmp_path)
    tuned, _ = finetune(
        build(family), None, rows, FinetuneSection(**adapter), seed=0, folder=tmp_path / "tuned", save_at=[]
    )
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    factors = adapter_of(tuned)
    expected = dict(untouched.named_parameters())
    for name, site in linear_sites(untouched).items():
        (a,) = (value for key, value in factors.items() if f"{name}.lora_A." in key)
        (b,) = (value for key, value in factors.items() if f"{name}.lora_B." in key)
        change = 4 * b @ a
        assert torch.linalg.matrix_rank(change) <= 2 and change.abs().max() > 1e-3
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + (change.T if site.transposed else change)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name


def test_how_a_study_aligns_is_written_only_where_it_is_an_adapter():
    assert not {"method", "lora_r"} & AlignSection().model_dump().keys()
    assert AlignSection(method="lora").model_dump()["lora_r"] == 16


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_own_with_the_schedule_and_the_clipping_of_adamw(momentum, tmp_path):
    """Three steps by hand from the same adapter and the same batches: v ← μv + g, w ← w − ηv, η falling to 0.

    In float64: steps so long make more of float32's rounding than the bound, on some processors.
    """
    update = {"optimiser": "sgd", "momentum": momentum, "learning_rate": 5.0, "weight_decay": 0.0, "max_steps": 3}
    section = SMALL.model_copy(update=update)
    rows = examples(2)  # one batch, the same at every step but for the order of its rows
    trained, _ = finetune(build("llama").double(), None, rows, section, seed=0, folder=tmp_path / "a", save_at=[])
    nothing = section.model_copy(update={"learning_rate": 1e-30, "max_steps": 1})
    model, _ = finetune(build("llama").double(), None, rows, nothing, seed=0, folder=tmp_path / "b", save_at=[])
    assert all(not value.abs().gt(1e-20).any() for name, value in adapter_of(model).items() if "lora_B" in name)
    moving = [p for p in model.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in moving]
    (batch,) = make_batches(rows, model=model, batch_size=2, pad_token_id=0)
    for step in range(3):
        gradients = torch.autograd.grad(token_losses(model, batch).losses.mean(), moving)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for p, v, g in zip(moving, velocity, gradients, strict=True):
                v.mul_(momentum).add_(g * min(1.0, 1 / (float(norm) + 1e-6)))  # as torch clips
                p.sub_(5.0 * (1 - step / 3) * v)
    for name, value in adapter_of(model).items():
        assert torch.allclose(value, adapter_of(trained)[name], rtol=0, atol=1e-12), name
    assert any(value.abs().max() > 1e-3 for name, value in adapter_of(trained).items() if "lora_B" in name)


def test_unknown_modules_to_adapt_are_named(tmp_path):
    section = FinetuneSection(target_modules=["q_proj", "qq_proj"])
    with pytest.raises(ModelError, match=r"no modules of this name.*qq_proj.*down_proj"):
        finetune(build("llama"), None, examples(4), section, seed=0, folder=tmp_path, save_at=[])


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def masks(group):
    return {
        name: torch.from_numpy(group.mask(name)) if group.granularity == "weight" else group.rows(name)
        for name in group.members
    }


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_frozen_group_stands_still_in_every_saved_step(optimiser, method, granularity, tmp_path):
    model, base = build("llama"), build("llama")
    group = group_of(base, granularity)
    section = SMALL.model_copy(update={"method": method, "optimiser": optimiser, "drift_interval": 2})

    class Tokenizer:
        def save_pretrained(self, folder):
            pass

    finetune(model, Tokenizer(), examples(8), section, seed=0, folder=tmp_path, save_at=[2, 3], freeze=group)
    original = {name: site.weight for name, site in linear_sites(base).items()}
    for step in (2, 3):
        folder = saved_step(tmp_path, step)
        if method == "full":
            saved = type(base).from_pretrained(folder)
        else:
            saved = attach_adapter(build("llama"), folder).merge_and_unload()
        moved = 0
        for name, site in linear_sites(saved).items():
            still = masks(group)[name]
            assert torch.equal(site.weight[still], original[name][still])
            moved += int((site.weight != original[name]).sum())
        assert moved > 1000
        assert (folder / "frozen_group.parquet").exists() == (method == "lora" and granularity == "weight")


def test_freezing_keeps_training_reproducible_and_no_freeze_changes_nothing(tmp_path):
    group = group_of(build("llama"), "neuron")
    runs = [
        adapter_of(
            finetune(
                build("llama"), None, examples(8), SMALL, seed=0, folder=tmp_path / str(i), save_at=[], freeze=held
            )[0]
        )
        for i, held in enumerate([group, group, None, None])
    ]
    assert same(runs[0], runs[1])
    assert same(runs[2], runs[3])
    assert not same(runs[0], runs[2])


def test_a_killed_run_goes_on_frozen(tmp_path):
    def kill(n):
        seen.append(n)
        if sum(seen) == 3:
            raise Killed

    group = group_of(build("llama"), "weight")
    section = SMALL.model_copy(update={"max_steps": 4, "drift_interval": 2})
    straight, _ = finetune(
        build("llama"), None, examples(8), section, seed=0, folder=tmp_path / "a", save_at=[], freeze=group
    )
    seen = []
    with pytest.raises(Killed):
        finetune(
            build("llama"),
            None,
            examples(8),
            section,
            seed=0,
            folder=tmp_path / "b",
            save_at=[],
            freeze=group,
            advance=kill,
        )
    callback = FreezeCallback(group)
    resumed, _ = finetune(
        build("llama"), None, examples(8), section, seed=0, folder=tmp_path / "b", save_at=[], callbacks=[callback]
    )
    assert same(adapter_of(straight), adapter_of(resumed))
    assert callback.report.moved > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_adapter_comes_off_and_leaves_the_base_as_it_was(family, tmp_path):
    base, untouched = build(family), build(family)
    before = list(base.state_dict())
    modules = {name: type(module) for name, module in base.named_modules()}
    group = group_of(base, "weight")
    found = []
    for index, held in enumerate([None, group, None]):
        model, _ = finetune(
            base, None, examples(8), SMALL, seed=0, folder=tmp_path / str(index), save_at=[], freeze=held
        )
        found.append(adapter_of(model))
        assert detach_adapter(model) is base
        assert list(base.state_dict()) == before
        assert {name: type(module) for name, module in base.named_modules()} == modules
        assert all(torch.equal(base.state_dict()[name], value) for name, value in untouched.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in base.parameters())
        assert not hasattr(base, "peft_config")
    assert same(found[0], found[2])  # as from a fresh load, bit for bit
    assert not same(found[0], found[1])
    fresh, _ = finetune(build(family), None, examples(8), SMALL, seed=0, folder=tmp_path / "fresh", save_at=[])
    assert same(found[0], adapter_of(fresh))
    section = SMALL.model_copy(update={"method": "full"})
    finetune(base, None, examples(8), section, seed=0, folder=tmp_path / "full", save_at=[])
    assert not torch.equal(
        next(iter(linear_sites(base).values())).weight, next(iter(linear_sites(untouched).values())).weight
    )


def test_what_cannot_be_detached_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no adapter to take off"):
        detach_adapter(build("llama"))
    model, _ = finetune(build("llama"), None, examples(8), SMALL, seed=0, folder=tmp_path, save_at=[])
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged into the base model"):
        detach_adapter(model)


def test_a_killed_run_logs_as_if_it_had_never_been_stopped(tmp_path):
    """Killed between two lines of the log, behind a checkpoint: the loss since the last line is not forgotten."""
    section = SMALL.model_copy(update={"max_steps": 6, "drift_interval": 2})
    given = {"seed": 0, "save_at": []}
    _, straight = finetune(build("llama"), None, examples(8), section, folder=tmp_path / "a", **given)
    seen = []

    def kill(n):
        seen.append(n)
        if sum(seen) == 3:
            raise Killed

    with pytest.raises(Killed):
        finetune(build("llama"), None, examples(8), section, folder=tmp_path / "b", advance=kill, **given)
    _, resumed = finetune(build("llama"), None, examples(8), section, folder=tmp_path / "b", **given)
    assert [line["step"] for line in straight] == [5]
    assert resumed == straight
