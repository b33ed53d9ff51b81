"""Frozen means bit-equal: in every family, granularity and way of training, whatever the optimizer does."""

import copy

import numpy as np
import pytest
import torch
from families import build, examples
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from neurondrift.base.errors import FreezeError, GroupError
from neurondrift.drift.meter import measure_drift
from neurondrift.groups.group import Group, load_group
from neurondrift.groups.selection import random_group
from neurondrift.interventions.freezing import FreezeCallback, freeze
from neurondrift.models.batches import make_batches, token_losses
from neurondrift.models.loading import attach_adapter
from neurondrift.models.masked_lora import FILE, lora_factors
from neurondrift.models.parts import parts, row_marks, weights_of_units
from neurondrift.models.sites import fingerprint, linear_sites, mlp_units

FAMILIES = ["llama", "gpt2", "qwen3_moe"]
GRANULARITIES = ["neuron", "weight", "unit"]


def group_of(model, granularity, seed=0, fraction=0.2):
    sites = linear_sites(model)
    about = {"model": fingerprint(model)}
    if granularity == "unit":
        shapes = {name: (unit.count, 1) for name, unit in mlp_units(sites).items()}
        chosen = random_group(shapes, fraction=fraction, seed=seed, granularity="neuron", provenance=about)
        return Group(granularity="unit", members=chosen.members, shapes=shapes, provenance=about)
    shapes = {name: site.shape for name, site in sites.items()}
    return random_group(shapes, fraction=fraction, seed=seed, granularity=granularity, provenance=about)


def mask_of(model, group):
    """Site name -> bool `[out, in]`, built independently of the code under test."""
    sites = linear_sites(model)
    shapes = {name: site.shape for name, site in sites.items()}
    if group.granularity == "unit":
        group = weights_of_units(group, mlp_units(sites), shapes)
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for name, members in group.members.items():
        if group.granularity == "weight":
            masks[name].view(-1)[torch.from_numpy(members)] = True
        else:
            masks[name][torch.from_numpy(members)] = True
    return masks


def lora(model, **settings):
    torch.manual_seed(0)
    given = {"r": 3, "target_modules": "all-linear"} | settings
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))


def with_experts(model):
    """LoRA on attention and on the 3-D parameters of the experts."""
    return lora(
        model,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )


def effective(model):
    """Site name -> W₀ + Δ in float64, Δ as the layers' own factors give it; and Δ."""
    total, change = {}, {}
    for name, site in linear_sites(model).items():
        delta = torch.zeros(site.shape)
        for each in lora_factors(site):
            delta = delta + each.delta()
        total[name], change[name] = site.weight.double() + delta.double(), delta
    return total, change


def weights(model):
    return {name: site.weight.clone() for name, site in linear_sites(model).items()}


def loss_of(model, rows):
    (batch,) = make_batches(rows, batch_size=len(rows), pad_token_id=0)
    return token_losses(model, batch).losses.mean()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
}


def train(model, group, *, steps=4, optimizer="adamw", accumulation=1, clip=1.0):
    """A plain loop under `with freeze`; losses before and after."""
    rows = examples(6)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[optimizer](trained)
    model.train()
    with torch.no_grad():
        before = loss_of(model, rows)
    with freeze(model, group) as frozen:
        for _ in range(steps):
            for part in range(accumulation):
                (loss_of(model, rows[part::accumulation]) / accumulation).backward()
            torch.nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return frozen, float(before), float(loss_of(model, rows))


def check_frozen(model, before, group, trained=None):
    masks, (after, change) = mask_of(model, group), effective(model)
    free_moved = 0
    for name, old in before.items():
        mask = masks[name]
        assert torch.equal(after[name][mask], old.double()[mask]), name
        assert not change[name][mask].any(), name
        if trained is None or any(word in name for word in trained):
            free_moved += int((after[name] != old.double())[~mask].sum())
    assert free_moved > 0
    return masks


# --- each granularity, each way of training -----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_leaves_frozen_weights_bit_equal(family, granularity, optimizer):
    model = build(family)
    group, before = group_of(model, granularity), weights(model)
    frozen, first, last = train(model, group, optimizer=optimizer, accumulation=2)
    masks = check_frozen(model, before, group)
    assert last < first
    for name, site in linear_sites(model).items():
        # Everything that is free moved: weight decay reaches every weight that is not zero.
        assert bool((site.weight != before[name])[~masks[name]].all()) or site.expert is not None, name
    report = frozen.report
    assert report.weights == sum(int(mask.sum()) for mask in masks.values())
    assert report.outside == 0 and report.members == len(group)
    rows = {name: (site.weight != before[name]).any(dim=1) for name, site in linear_sites(model).items()}
    assert report.moved == sum(int(moved.sum()) for moved in rows.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_leaves_frozen_weights_of_the_effective_model_bit_equal(family, granularity, optimizer):
    model = build(family)
    group, before = group_of(model, granularity), weights(model)
    wrapped = lora(model, use_rslora=family == "gpt2")
    frozen, first, last = train(wrapped, group, optimizer=optimizer, accumulation=2)
    check_frozen(wrapped, before, group)
    assert last < first
    _, change = effective(wrapped)
    assert frozen.report.moved == sum(int((delta != 0).any(dim=1).sum()) for delta in change.values())
    assert frozen.report.weights == sum(int(mask.sum()) for mask in mask_of(wrapped, group).values())
    assert all(torch.equal(site.weight, before[name]) for name, site in linear_sites(wrapped).items())


@pytest.mark.parametrize("granularity", ["neuron", "unit"])
def test_lora_on_experts(granularity):
    model = build("qwen3_moe")
    group, before = group_of(model, granularity), weights(model)
    wrapped = with_experts(model)
    _, first, last = train(wrapped, group)
    masks = check_frozen(wrapped, before, group)
    assert last < first
    # What PEFT itself adds, asked of its own function.
    for name, site in linear_sites(wrapped).items():
        if site.expert is not None:
            layer = lora_factors(site)[0].layer
            delta = layer.get_delta_weight("default").detach()[site.expert]
            assert not delta[masks[name]].any()
            assert torch.allclose(delta, effective(wrapped)[1][name])


def test_single_weights_of_experts_under_lora_are_refused():
    model = build("qwen3_moe")
    with pytest.raises(FreezeError, match=r"Single weights of .*ParamWrapper.*whole neurons and hidden units"):
        freeze(with_experts(model), group_of(model, "weight"))


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_the_drift_of_frozen_neurons_is_exactly_zero(granularity):
    model = build("llama")
    group = group_of(model, "neuron")
    if granularity == "weight":  # single weights of half a row, and whole rows
        name, site = next(iter(linear_sites(model).items()))
        width = site.shape[1]
        entries = np.concatenate([np.arange(3 * width, 4 * width), np.arange(5 * width, 5 * width + width // 2)])
        group = Group(granularity="weight", members={name: entries}, shapes={name: site.shape})
    before = weights(model)
    wrapped = lora(model)
    train(wrapped, group)
    drift = measure_drift(wrapped)
    masks = mask_of(wrapped, group)
    total, _ = effective(wrapped)
    for name, measured in drift.items():
        frozen = masks[name].all(dim=1)
        assert not measured.l2[frozen].any() and not measured.cosine_distance[frozen].any()
        expected = (total[name] - before[name].double()).norm(dim=1)
        assert torch.allclose(measured.l2.double(), expected, rtol=1e-4)
        assert (measured.l2[~frozen] > 0).all()


# --- the masked pass against plain autograd -----------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_and_gradients_are_those_of_the_masked_model(family, dropout):
    """Oracle: torch's own autograd through W₀ + M ∘ (s B A), as a reparametrisation of every site."""
    model = build(family)
    group = group_of(model, "weight", fraction=0.4)
    wrapped = lora(model, lora_dropout=dropout)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_()
    freeze(wrapped, group)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    masks = mask_of(wrapped, group)
    rows = examples(4)
    wrapped.train()
    torch.manual_seed(7)
    loss = loss_of(wrapped, rows)
    loss.backward()
    found = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    wrapped.zero_grad()
    for name, site in linear_sites(wrapped).items():
        layer = site.wrapper
        layer.lora_variant.clear()
        keep = (~masks[name]).float()

        def masked(x, layer=layer, keep=keep):
            delta = keep * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
            return layer.base_layer(x) + layer.scaling["default"] * (layer.lora_dropout["default"](x) @ delta.T)

        layer.forward = masked
    torch.manual_seed(7)
    expected = loss_of(wrapped, rows)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-5), name
            assert found[name].abs().max() > 0


def test_an_empty_mask_changes_nothing():
    """A mask on one weight of a site gives PEFT's own output but for that weight's contribution."""
    model = build("llama")
    wrapped = lora(model, init_lora_weights=False)
    site = next(iter(linear_sites(wrapped).values()))
    layer, x = site.wrapper, torch.randn(5, site.shape[1])
    plain = layer(x)
    (factors,) = lora_factors(site)
    dense = factors.delta()
    from neurondrift.models.masked_lora import hold_weights

    hold_weights(factors, torch.tensor([2 * site.shape[1] + 1]), site.name)
    expected = plain.clone()
    expected[:, 2] -= x[:, 1] * dense[2, 1]
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_autocast_in_bfloat16_is_near_float32_and_still_exact_where_frozen():
    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    wrapped = lora(model)
    freeze(wrapped, group).release()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    gradients = []
    for enabled in (False, True):
        wrapped.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(wrapped, examples(4))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.requires_grad]))
    assert all(p.grad.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)
    one, two = gradients
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99
    check_frozen(wrapped, before, group)


def test_merging_a_masked_adapter_merges_the_masked_change_and_undoes_it():
    for family in ("llama", "gpt2"):
        model = build(family)
        group, before = group_of(model, "weight"), weights(model)
        wrapped = lora(model)
        train(wrapped, group)
        total, _ = effective(wrapped)
        for safe in (False, True):
            wrapped.merge_adapter(safe_merge=safe)
            for name, site in linear_sites(wrapped).items():
                assert torch.allclose(site.weight.double(), total[name], atol=1e-6)
                mask = mask_of(wrapped, group)[name]
                assert torch.equal(site.weight[mask], before[name][mask])
            wrapped.unmerge_adapter()
        assert all(torch.allclose(s.weight, before[n], atol=1e-6) for n, s in linear_sites(wrapped).items())


# --- which weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_columns_and_entries_cover_the_group_once(family):
    model = build(family)
    sites = linear_sites(model)
    shapes = {name: site.shape for name, site in sites.items()}
    units = group_of(model, "unit")
    some = group_of(model, "weight") | weights_of_units(units, mlp_units(sites), shapes)
    for group in (units, some, group_of(model, "neuron")):
        masks = mask_of(model, group)
        for name, part in parts(group, sites).items():
            seen = torch.zeros(shapes[name], dtype=torch.bool)
            for index in part.indices(torch.device("cpu")):
                seen[index] = True
            assert torch.equal(seen, masks[name])
            assert part.weights == int(seen.sum())
            if group is units:
                assert not len(part.entries)
    wide = parts(weights_of_units(units, mlp_units(sites), shapes), sites)
    assert all(not len(part.entries) for part in wide.values())  # units as weights need no mask either


def test_marks_of_rows_notice_one_bit():
    weight = torch.randn(50, 30)
    weight[0, 0] = 0.0
    changed = weight.clone()
    changed[0, 0] = -0.0
    changed[7, 3] = torch.nextafter(changed[7, 3], torch.tensor(9.0))
    assert torch.nonzero(row_marks(weight) != row_marks(changed)).flatten().tolist() == [0, 7]
    assert torch.equal(row_marks(weight.bfloat16().T), row_marks(weight.bfloat16().T.contiguous()))


# --- leaks --------------------------------------------------------------------------------------------------


def test_the_gradient_norm_is_that_of_the_free_weights():
    """Clipping by a norm that frozen entries enter would slow the others down."""
    for granularity in GRANULARITIES:
        model = build("llama")
        group = group_of(model, granularity)
        masks = mask_of(model, group)
        plain = copy.deepcopy(model)
        loss_of(plain, examples(4)).backward()
        squares = sum(float(p.grad.square().sum()) for p in plain.parameters())
        squares -= sum(
            float(site.oriented(site.tensor.grad)[masks[name]].square().sum())
            for name, site in linear_sites(plain).items()
        )
        freeze(model, group)
        loss_of(model, examples(4)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert float(norm) == pytest.approx(squares**0.5, rel=1e-5)


def test_a_gradient_that_is_not_finite_does_not_reach_frozen_weights():
    model = build("llama")
    group, before = group_of(model, "neuron"), weights(model)
    frozen = freeze(model, group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (loss_of(model, examples(4)) * float("nan")).backward()
    optimizer.step()
    frozen.restore()
    masks = mask_of(model, group)
    for name, site in linear_sites(model).items():
        assert torch.equal(site.weight[masks[name]], before[name][masks[name]])
        assert site.weight[~masks[name]].isnan().all()


def test_without_the_freeze_the_same_training_does_move_them():
    """The test of the tests: the checks above fail where nothing is held, or where only the gradient is."""
    model = build("llama")
    group, before = group_of(model, "neuron"), weights(model)
    frozen = freeze(model, group)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loss_of(model, examples(4)).backward()
    optimizer.step()  # no restore(): weight decay leaks
    with pytest.raises(FreezeError, match="have moved while training"):
        frozen.verify()
    with pytest.raises(AssertionError):
        check_frozen(model, before, group)
    frozen.restore()
    assert frozen.verify().moved > 0
    frozen.release()


def test_nothing_that_moves_is_an_error():
    model = build("llama")
    with pytest.raises(FreezeError, match="Nothing moved"), freeze(model, group_of(model, "neuron")):
        pass
    wrapped = lora(build("llama"))
    with pytest.raises(FreezeError, match="Nothing moved"):
        freeze(wrapped, group_of(wrapped, "weight")).verify()


def test_hooks_are_gone_afterwards():
    model = build("llama")
    with pytest.raises(ValueError, match="stop"), freeze(model, group_of(model, "neuron")):
        raise ValueError("stop")
    before = weights(model)
    loss_of(model, examples(4)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all((site.weight != before[name]).all() for name, site in linear_sites(model).items())


# --- mistakes -----------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    model = build("llama")
    name, site = next(iter(linear_sites(model).items()))
    with pytest.raises(GroupError, match="made from another model"):
        freeze(model, group_of(build("llama", seed=1), "neuron"))
    with pytest.raises(GroupError, match="made from another model"):
        freeze(model, group_of(build("llama", seed=1), "unit"))
    narrow = Group(granularity="weight", members={name: np.array([1])}, shapes={name: (site.shape[0], 3)})
    with pytest.raises(GroupError, match=rf"another shape of {name}.*\(16, 3\).*\(16, 16\)"):
        freeze(model, narrow)
    with pytest.raises(GroupError, match="beyond the end"):
        freeze(model, Group(granularity="neuron", members={name: np.array([16])}))
    with pytest.raises(GroupError, match="has no MLP nowhere"):
        freeze(model, Group(granularity="unit", members={"nowhere": np.array([1])}))
    with pytest.raises(GroupError, match="hidden unit beyond the end"):
        freeze(model, Group(granularity="unit", members={"model.layers.0.mlp": np.array([24])}))
    with pytest.raises(GroupError, match="no members"):
        freeze(model, Group(granularity="neuron", members={}))
    with pytest.raises(FreezeError, match="every weight that is trained"):
        freeze(model, group_of(model, "neuron", fraction=1.0))
    with pytest.raises(FreezeError, match=r"lies in a site that is trained.*target_modules"):
        freeze(lora(model, target_modules=["v_proj"]), Group(granularity="neuron", members={name: np.array([1])}))


def test_adapters_that_cannot_be_held_are_refused():
    group = group_of(build("llama"), "neuron")
    with pytest.raises(FreezeError, match="cannot be held exactly.*DoraLinearVariant.*rsLoRA"):
        freeze(lora(build("llama"), use_dora=True), group)
    with pytest.raises(FreezeError, match="already|before training has begun"):
        freeze(lora(build("llama"), init_lora_weights=False), group)
    from peft import IA3Config

    other = get_peft_model(
        build("llama"), IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(FreezeError, match="cannot be held exactly"):
        freeze(other, group)


def test_members_outside_the_trained_sites_are_counted():
    model = build("llama")
    group = group_of(model, "neuron")
    frozen, *_ = train(lora(model, target_modules=["q_proj", "up_proj"]), group)
    inside = sum(len(members) for name, members in group.members.items() if name.endswith(("q_proj", "up_proj")))
    report = frozen.report
    assert (report.members, report.outside) == (inside, len(group) - inside)
    assert (report.sites, report.trained_sites) == (4, 4)
    assert f"{report.outside} members lie outside the trained sites" in str(report)
    assert f"{report.moved} of {report.others} other neurons moved" in str(report)


# --- saving and loading -------------------------------------------------------------------------------------


def test_a_masked_adapter_survives_saving(tmp_path):
    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    wrapped = lora(model)
    train(wrapped, group)
    wrapped.eval()
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    wrapped.save_pretrained(tmp_path / "one")
    wrapped.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    again = attach_adapter(build("llama"), tmp_path / "two").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, expected)
        plain = PeftModel.from_pretrained(build("llama"), str(tmp_path / "two")).eval()
        assert not torch.allclose(plain(input_ids=ids).logits, expected)  # what PEFT alone would load
    check_frozen(again, before, group)
    again.save_pretrained(tmp_path / "three")  # a loaded adapter keeps its mask when it is saved again
    third = attach_adapter(build("llama"), tmp_path / "three").eval()
    with torch.no_grad():
        assert torch.equal(third(input_ids=ids).logits, expected)
    with pytest.raises(FreezeError, match="belongs to another model"):
        other = attach_adapter(build("gpt2"), lora_folder(tmp_path / "gpt2"))
        from neurondrift.models.masked_lora import reapply_masks

        reapply_masks(other, tmp_path / "one")


def lora_folder(folder):
    lora(build("gpt2")).save_pretrained(folder)
    return folder


def test_the_drift_between_folders_sees_the_mask(tmp_path):
    from neurondrift.drift.difference import diff
    from neurondrift.drift.log import DriftLog

    model = build("llama")
    group = group_of(model, "weight", fraction=0.5)
    model.save_pretrained(tmp_path / "base")
    wrapped = lora(model)
    train(wrapped, group)
    wrapped.save_pretrained(tmp_path / "adapter")
    diff(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "drift", threads=1)
    found = DriftLog(tmp_path / "drift").read()
    for name, measured in measure_drift(wrapped).items():
        here = found[found["site"] == name].sort_values("row")
        assert np.allclose(here["l2"], measured.l2, rtol=1e-6)
        assert np.allclose(here["cosine_distance"], measured.cosine_distance, rtol=1e-5)


def test_neurons_and_units_need_no_file(tmp_path):
    for granularity in ("neuron", "unit"):
        model = build("llama")
        group, before = group_of(model, granularity), weights(model)
        wrapped = lora(model)
        train(wrapped, group)
        wrapped.save_pretrained(tmp_path / granularity)
        assert not (tmp_path / granularity / FILE).exists()
        plain = PeftModel.from_pretrained(build("llama"), str(tmp_path / granularity))
        check_frozen(plain, before, group)


def test_training_on_from_a_saved_masked_adapter(tmp_path):
    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    wrapped = lora(model)
    train(wrapped, group, steps=1)
    wrapped.save_pretrained(tmp_path)
    again = attach_adapter(build("llama"), tmp_path, trainable=True)
    train(again, group, steps=2)
    check_frozen(again, before, group)
    more = group_of(model, "weight", seed=5)
    with pytest.raises(FreezeError, match="before training has begun"):
        freeze(again, more)  # these have moved already


# --- in a Trainer -------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def trainer(model, folder, *callbacks, **settings):
    def collate(rows):
        (batch,) = make_batches(rows, batch_size=len(rows), pad_token_id=0)
        return {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}

    given = {
        "max_steps": 3,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch_fused",
    } | settings
    arguments = TrainingArguments(
        str(folder),
        seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **given,
    )
    return Trainer(
        model=model, args=arguments, train_dataset=examples(12), data_collator=collate, callbacks=list(callbacks)
    )


@pytest.mark.parametrize(
    ("method", "granularity"),
    [("lora", "neuron"), ("lora", "weight"), ("lora", "unit"), ("full", "neuron"), ("full", "weight")],
)
def test_in_a_trainer_with_a_resume_nothing_leaks(method, granularity, tmp_path):
    def fresh():
        return lora(build("llama")) if method == "lora" else build("llama")

    group, before = group_of(build("llama"), granularity), weights(build("llama"))
    straight, resumed = fresh(), fresh()
    callback = FreezeCallback(group)
    trainer(straight, tmp_path / "straight", callback).train()
    check_frozen(straight, before, group)
    assert callback.report.moved > 0
    with pytest.raises(Killed):
        trainer(fresh(), tmp_path / "t", FreezeCallback(group), KillAt(3)).train()
    again = FreezeCallback(group)
    trainer(resumed, tmp_path / "t", again).train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-2"))
    check_frozen(resumed, before, group)
    assert again.report == callback.report
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_that_was_made_without_the_freeze_is_refused(method, tmp_path):
    def fresh():
        return lora(build("llama")) if method == "lora" else build("llama")

    with pytest.raises(Killed):
        trainer(fresh(), tmp_path, KillAt(3)).train()
    model = fresh()
    run = trainer(model, tmp_path, FreezeCallback(group_of(model, "neuron")))
    with pytest.raises(FreezeError, match="checkpoint has moved frozen weights"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_added_to_a_trainer_later_and_from_a_file(tmp_path):
    model = lora(build("llama"))
    group, before = group_of(model, "neuron"), weights(model)
    group.save(tmp_path / "group.parquet")
    run = trainer(model, tmp_path / "t", save_strategy="no")
    run.add_callback(FreezeCallback(tmp_path / "group.parquet"))
    run.train()
    check_frozen(model, before, group)


def test_in_trls_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = build("llama")
    group, before = group_of(model, "weight"), weights(model)
    rows = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in examples(8)])
    from neurondrift.models.loading import byte_tokenizer

    callback = FreezeCallback(group)
    run = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=2,
            learning_rate=0.02,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    run.train()
    check_frozen(run.model, before, group)
    assert callback.report.sites == 4


# --- in a study ---------------------------------------------------------------------------------------------


def small_study(**settings):
    from neurondrift.study.settings import resolve

    cheap = {
        "align.enabled": False,
        "score.safety": {"source": "builtin:refusals", "limit": 4},
        "score.utility": {"source": "builtin:ordinary-align", "limit": 4},
        "score.max_length": 192,
        "finetune.data": {"source": "builtin:ordinary", "limit": 8},
        "finetune.max_length": 192,
    }
    return resolve(preset="smoke", flags=cheap | {f"finetune.{name}": value for name, value in settings.items()})


def test_a_study_freezes_a_group_and_its_files_say_so(tmp_path):
    from neurondrift.drift.log import DriftLog
    from neurondrift.models.loading import load_model
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.runner import StudyRun

    def run(**settings):
        study, lines = small_study(**settings), []
        StudyRun(study, tmp_path, say=lines.append).run(["score", "groups", "finetune"])
        return StudyFolder(tmp_path, study), lines

    folder, lines = run(freeze="safety_top")
    group = load_group(folder.group_file("safety_top", "neuron"))
    frozen_weights = sum(len(rows) * group.shapes[site][1] for site, rows in group.members.items())
    assert f"froze {frozen_weights:,} weights ({len(group)} neurons) in 21 of 21 trained sites" in lines[-1]
    final = DriftLog(folder.drift(0)).read(steps=[2])
    frozen = np.zeros(len(final), dtype=bool)
    for site in group.members:
        frozen |= ((final["site"] == site) & final["row"].isin(group.rows(site))).to_numpy()
    assert frozen.sum() == len(group)
    assert not final.loc[frozen, ["l2", "relative", "cosine_distance"]].to_numpy().any()
    assert (final.loc[~frozen, "l2"] > 0).all()

    folder, lines = run(freeze="matched:random", freeze_granularity="unit")
    assert "units) in" in lines[-1]
    control, own = load_group(folder.frozen_group), load_group(folder.group_file("random", "unit"))
    assert len(control) == len(own) > 0 and not len(control & own)
    base, _ = load_model("tiny:llama", dtype="float32", device="cpu")
    before = weights(base)
    check_frozen(attach_adapter(base, folder.adapters(0) / "step=000002"), before, control)


def test_what_is_frozen_is_part_of_the_stages_key(tmp_path):
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.runner import StudyRun

    def keys(**settings):
        run = StudyRun(small_study(**settings), tmp_path)
        return run.key("groups"), run.key("finetune", 0)

    file = tmp_path / "group.parquet"
    group_of(build("llama"), "neuron", seed=0).save(file)
    first = keys(freeze=str(file))
    assert first == keys(freeze=str(file))
    group_of(build("llama"), "neuron", seed=1).save(file)
    assert keys(freeze=str(file))[1] != first[1]
    plain, named, unit = keys(), keys(freeze="random"), keys(freeze="random", freeze_granularity="unit")
    assert plain[0] == named[0] != unit[0]
    assert len({plain[1], named[1], unit[1], first[1]}) == 4
    for setting, name in (("random", "random"), ("matched:utility_top", "utility_top.matched")):
        folder = StudyFolder(tmp_path, small_study(freeze=setting, freeze_granularity="weight"))
        assert folder.frozen_group == tmp_path / "neuron_groups" / f"{name}.weights.parquet"
    assert StudyFolder(tmp_path, small_study(freeze=str(file))).frozen_group == file


def test_mistakes_in_the_setting_are_named(tmp_path):
    from neurondrift.base.errors import ArtifactError, ConfigError
    from neurondrift.study.settings import resolve

    with pytest.raises(ConfigError, match=r"finetune.freeze does not fit.*safety_set_difference.*'safety'"):
        resolve(preset="smoke", flags={"finetune.freeze": "safety"})
    with pytest.raises(ConfigError, match=r"finetune.freeze_granularity does not fit"):
        resolve(preset="smoke", flags={"finetune.freeze_granularity": "row"})
    with pytest.raises(ArtifactError, match="group file is missing"):
        FreezeCallback(tmp_path / "nothing.parquet")
