"""Interventions undo themselves bit for bit, add up, and are judged against a null that is calibrated."""

import numpy as np
import pytest
import torch
from families import build
from peft import LoraConfig, get_peft_model

import neurondrift as nd
from neurondrift.base.errors import GroupError, ModelError
from neurondrift.groups.group import Group
from neurondrift.groups.selection import random_group
from neurondrift.interventions.contexts import adapter_delta, save_model
from neurondrift.models.sites import fingerprint, linear_sites, mlp_units

FAMILIES = ("llama", "gpt2")
GRANULARITIES = ("neuron", "weight", "unit")
IDS = torch.arange(3, 43).view(2, 20)


def adapted(family, *, dtype=torch.float32, targets=None, seed=1):
    """A tiny model with a LoRA adapter whose two factors are random."""
    model = build(family).to(dtype)
    kinds = sorted({site.module_type for site in linear_sites(model).values()})
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=targets or kinds, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return tuned


def shapes_of(model, granularity="weight"):
    if granularity == "unit":
        return {name: (unit.count, 1) for name, unit in mlp_units(linear_sites(model)).items()}
    return {name: site.shape for name, site in linear_sites(model).items()}


def some(model, granularity, fraction=0.3, seed=0):
    return random_group(shapes_of(model, granularity), fraction=fraction, seed=seed, granularity=granularity)


def everything(model, granularity):
    return some(model, granularity, fraction=1.0)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.clone()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(before, model):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def delta_now(model):
    return {name: adapter_delta(site) for name, site in linear_sites(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaving_restores_every_bit_also_after_an_exception(family, granularity, dtype):
    model = adapted(family, dtype=dtype)
    group = some(model, granularity)
    before, answers = bits(model), logits(model)
    contexts = [
        lambda: nd.prune(model, group),
        lambda: nd.prune(model, group, mode="mean"),
        lambda: nd.rewind(model, group),
        lambda: nd.transplant(model, group),
    ]
    for context in contexts:
        with context():
            assert not torch.equal(logits(model), answers)
        assert same_bits(before, model)
        assert torch.equal(logits(model), answers)
        with pytest.raises(KeyboardInterrupt), context():
            raise KeyboardInterrupt
        assert same_bits(before, model)
        assert torch.equal(logits(model), answers)
    with nd.rewind(model, group), nd.prune(model, some(model, "weight", seed=5)):
        pass
    assert same_bits(before, model)
    assert torch.equal(logits(model), answers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_everything_transplanted_is_the_tuned_model_and_everything_rewound_the_original(family, granularity):
    model = adapted(family)
    group = everything(model, granularity)
    tuned = logits(model)
    with model.disable_adapter():
        original = logits(model)
    assert not torch.equal(tuned, original)
    with nd.transplant(model, group) as applied:
        assert torch.equal(logits(model), tuned)
    assert applied == (len(group), len(group), 0)
    with nd.rewind(model, group):
        assert torch.equal(logits(model), original)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_group_and_its_complement_add_up_to_the_change_exactly(family, granularity):
    model = adapted(family)
    group = some(model, granularity)
    if granularity == "unit":  # units do not cover attention: their complement is one of weights
        group = nd.weights_of_units(group, mlp_units(linear_sites(model)), shapes_of(model))
    whole = delta_now(model)
    rest = group.complement()
    with nd.transplant(model, group):
        first, answers = delta_now(model), logits(model)
    with nd.transplant(model, rest):
        second = delta_now(model)
    with nd.rewind(model, rest):
        assert all(torch.equal(delta, first[name]) for name, delta in delta_now(model).items())
        assert torch.equal(logits(model), answers)  # rewind(complement) = transplant(group), to the bit
    for name, delta in whole.items():
        assert torch.equal(first[name] + second[name], delta)
        assert not ((first[name] != 0) & (second[name] != 0)).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("what", ["prune", "mean", "rewind", "transplant"])
def test_contexts_are_the_dense_model_in_float64(family, granularity, what):
    """The oracle: a plain model whose weights are written by hand, W₀ + M ∘ Δ in float64."""
    model, plain = adapted(family), build(family).double()
    group = some(model, granularity)
    dense = (
        nd.weights_of_units(group, mlp_units(linear_sites(model)), shapes_of(model)) if granularity == "unit" else group
    )
    sites, targets = linear_sites(model), linear_sites(plain)
    for name, site in sites.items():
        layer = site.wrapper
        change = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()) * 5 / 3
        mask = torch.from_numpy(dense.mask(name)).expand(2, -1).T if granularity == "neuron" else dense.mask(name)
        mask = torch.as_tensor(mask)[:, :1].expand(site.shape) if granularity == "neuron" else torch.as_tensor(mask)
        now = site.weight.double() + change
        if what == "prune":
            now = now.masked_fill(mask, 0)
        elif what == "mean":
            if granularity == "weight":
                filled = now.mean().expand(site.shape)
            elif granularity == "unit" and name.endswith(("down_proj", "mlp.c_proj")):
                filled = now.mean(1, keepdim=True).expand(site.shape)
            else:
                filled = now.mean(0).expand(site.shape)
            now = torch.where(mask, filled, now)
        else:
            keep = mask if what == "transplant" else ~mask
            now = site.weight.double() + change * keep
        targets[name].weight.copy_(now)
    context = nd.prune(model, group, mode="mean") if what == "mean" else getattr(nd, what)(model, group)
    with context:
        assert torch.allclose(logits(model).double(), logits(plain), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fully_tuned_models_by_the_other_models_weights(family):
    before, after = build(family, seed=0), build(family, seed=1)
    initial = {name: site.weight.clone() for name, site in linear_sites(before).items()}
    tuned = {name: site.weight.clone() for name, site in linear_sites(after).items()}
    group, bits_before, bits_after = some(before, "weight"), bits(before), bits(after)
    with nd.rewind(after, group, initial=initial.__getitem__), nd.transplant(before, group, tuned=tuned.__getitem__):
        for name, site in linear_sites(after).items():
            mask = torch.from_numpy(group.mask(name))
            assert torch.equal(site.weight, torch.where(mask, initial[name], tuned[name]))
            planted = linear_sites(before)[name].weight
            assert torch.equal(planted, torch.where(mask, tuned[name], initial[name]))
    assert same_bits(bits_before, before)
    assert same_bits(bits_after, after)
    with nd.rewind(after, everything(after, "neuron"), initial=initial.__getitem__):
        assert all(torch.equal(site.weight, initial[name]) for name, site in linear_sites(after).items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_one_in_the_context(family, granularity, tmp_path):
    model = adapted(family)
    group = some(model, granularity)
    with nd.rewind(model, group):
        expected = logits(model)
        save_model(model, tmp_path / "saved")
    read = type(build(family)).from_pretrained(tmp_path / "saved").eval()
    assert read.dtype == torch.float32
    assert torch.allclose(logits(read), expected, atol=1e-5)
    with model.disable_adapter(), nd.prune(model, group):
        expected = logits(model)
        save_model(model, tmp_path / "pruned")
    assert torch.allclose(logits(type(read).from_pretrained(tmp_path / "pruned").eval()), expected, atol=1e-6)


def test_the_masked_adapter_is_saved_by_peft_itself(tmp_path):
    model = adapted("llama")
    with nd.transplant(model, some(model, "neuron")):
        expected = logits(model)
        model.save_pretrained(tmp_path)
    from peft import PeftModel

    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval()), expected)


def test_members_outside_the_trained_sites_are_counted_or_refused():
    model = adapted("llama", targets=["q_proj", "v_proj"])
    group = some(model, "neuron")
    inside = sum(len(rows) for name, rows in group.members.items() if name.endswith(("q_proj", "v_proj")))
    with nd.rewind(model, group) as applied:
        assert applied == (len(group), inside, len(group) - inside)
    outside = group.with_members({n: r for n, r in group.members.items() if n.endswith("o_proj")}, {})
    nothing = r"No member of the group lies in a trained site: rewind can do nothing"
    with pytest.raises(GroupError, match=nothing), nd.rewind(model, outside):
        pass
    with nd.prune(model, outside) as applied:
        assert applied.outside == 0


def test_mistakes_are_named():
    model = adapted("llama")
    group = some(model, "neuron")
    foreign = Group(granularity="neuron", members=group.members, shapes=group.shapes, provenance={"model": "feed"})
    for context in (nd.prune, nd.rewind, nd.transplant):
        with pytest.raises(GroupError, match="made from another model"), context(model, foreign):
            pass
    own = Group(
        granularity="neuron", members=group.members, shapes=group.shapes, provenance={"model": fingerprint(model)}
    )
    with nd.rewind(model, own):
        pass
    with pytest.raises(ModelError, match="no active adapter"), nd.rewind(build("llama"), group):
        pass
    for site, row, message in (("nowhere", 0, "no site nowhere"), ("model.layers.0.mlp.up_proj", 24, "beyond the end")):
        wrong = Group(granularity="neuron", members={site: np.array([row])})
        with pytest.raises(GroupError, match=message), nd.prune(model, wrong):
            pass
    with pytest.raises(GroupError, match="no such way"), nd.prune(model, group, mode="median"):
        pass
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"), nd.rewind(model, group):
        pass


# --- the null -------------------------------------------------------------------------------------------


def test_the_empirical_p_counts_the_group_itself_and_is_calibrated():
    from neurondrift.statistics.null import empirical_p

    assert empirical_p(5.0, [0.0] * 19) == 1 / 20
    assert empirical_p(0.0, [0.0] * 19) == 1.0
    assert empirical_p(-1.0, [0.0, 0.5, -0.5, 0.2]) == 1 / 5  # two-sided
    assert np.isnan(empirical_p(1.0, []))
    generator = np.random.default_rng(0)
    outcomes = generator.binomial(32, 0.8, size=(1500, 20))  # ties, as rates of few prompts have
    p = np.array([empirical_p(row[0], row[1:]) for row in outcomes])
    for level in (0.05, 0.1, 0.25, 0.5):
        assert (p <= level + 1e-9).mean() <= level + 3 * np.sqrt(level / 1500)
    smooth = generator.normal(size=(1500, 20))
    p = np.array([empirical_p(row[0], row[1:]) for row in smooth])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.02)


def test_the_comparison_is_its_definition_and_its_interval_covers():
    from neurondrift.statistics.null import compare_with_null, share_of_change

    generator = np.random.default_rng(1)
    group, null = generator.random(12) < 0.3, generator.random((7, 12)) < 0.8
    weights = generator.integers(1, 9, size=12)
    found = compare_with_null(group, null, weights_P=weights)
    means = np.average(null, axis=1, weights=weights)
    assert found.value == pytest.approx(np.average(group, weights=weights))
    assert found.effect == pytest.approx(found.value - means.mean())
    assert found.null_sd == pytest.approx(means.std(ddof=1))
    assert (found.null_low, found.null_high) == pytest.approx((means.min(), means.max()))
    assert found.direction == "lower" and found.p_floor == 1 / 8 and found.draws == 7 and found.n == 12
    assert found.ci95[0] < found.effect < found.ci95[1]
    covered = 0
    for trial in range(200):
        chance = generator.beta(2, 2, size=40)  # prompts differ; group and draws share them
        group, null = generator.random(40) < chance * 0.5, generator.random((20, 40)) < chance
        low, high = compare_with_null(group, null, resamples=400, rng_seed=trial).ci95
        covered += low <= -0.25 <= high
    assert 0.90 <= covered / 200 <= 0.985
    assert share_of_change(0.9, 0.8, start=0.7, end=0.9) == pytest.approx((1.0, 0.5))
    assert np.isnan(share_of_change(0.9, 0.8, start=0.7, end=0.7)).all()


def drawn_until_settled(group, null):
    """The p-value and the number of draws of a null that may stop early."""
    from neurondrift.statistics.null import empirical_p, is_settled

    planned = len(null)
    made = next((k for k in range(planned) if is_settled(group, null[:k], planned=planned)), planned)
    return empirical_p(group, null[:made]), made


@pytest.mark.parametrize("planned", [19, 20, 39, 99])
@pytest.mark.parametrize("prompts", [4, 32])
def test_a_null_that_stops_early_finds_nothing_that_the_whole_null_does_not(planned, prompts):
    from neurondrift.statistics.null import empirical_p

    generator = np.random.default_rng(planned)
    chance = generator.beta(8, 3, size=(600, 1))  # groups and draws are exchangeable, and tied as shares of prompts are
    outcomes = generator.binomial(prompts, chance, size=(600, 1 + planned)) / prompts
    whole = np.array([empirical_p(row[0], row[1:]) for row in outcomes])
    stopped, made = np.array([drawn_until_settled(row[0], row[1:]) for row in outcomes]).T
    assert (stopped[made < planned] > 0.1).all()
    assert (stopped[made == planned] == whole[made == planned]).all()
    for level in (0.05, 0.1):
        assert not ((stopped <= level) & (whole > level)).any()
        assert (stopped <= level).mean() <= (whole <= level).mean() <= level + 3 * np.sqrt(level / 600)
    assert made.min() >= 2
    assert made.mean() < planned / 2
    strong = [drawn_until_settled(0.25, row[1:] * 0.1 + 0.9) for row in outcomes]
    assert strong == [(1 / (1 + planned), planned)] * 600


def test_when_a_null_is_settled():
    from neurondrift.statistics.null import empirical_p, is_settled

    assert not is_settled(0.5, [], planned=20)
    assert not is_settled(0.5, [0.5], planned=20)
    assert is_settled(0.5, [0.5, 0.5], planned=20) and not is_settled(0.5, [0.5, 0.5], planned=29)
    assert is_settled(0.6, [0.5, 0.7], planned=20)
    assert not is_settled(0.9, [0.5, 0.6, 0.5, 0.6], planned=20)
    for planned in range(1, 200):  # the least p-value that a stopped null can have: h as extreme, one draw left
        needed = next(h for h in range(1, 300) if is_settled(0.0, [0.0] * h, planned=planned))
        assert needed >= 2 and (1 + needed) / (1 + planned) > 0.1
        assert needed == 2 or needed / (1 + planned) <= 0.1 + 1e-9
    assert empirical_p(0.0, [0.0, 0.0]) == 1


def test_what_is_undefined_says_why():
    from neurondrift.base.errors import DataError
    from neurondrift.statistics.null import compare_with_null

    same = compare_with_null([1, 0, 1], [[1, 0, 1]] * 4)
    assert same.effect == 0 and np.isnan(same.ci95).all() and "no prompt tells" in same.reason and same.p == 1
    one = compare_with_null([1, 0, 1], [[1, 1, 1]])
    assert np.isnan(one.null_sd) and "no spread" in one.reason and one.p_floor == one.p == 1
    none = compare_with_null([1, 0, 1], [])
    assert np.isnan(none.p) and "no random group" in none.reason
    with pytest.raises(DataError, match="do not fit"):
        compare_with_null([1, 0], [[1, 0, 1]])


# --- doses, plan, runs ----------------------------------------------------------------------------------


def test_doses_lie_within_each_other_and_take_the_most_important_of_each_site(tmp_path):
    from neurondrift.groups.doses import digest, dose_of, importance_of, read_importance, write_importance

    generator = np.random.default_rng(0)
    shapes = {"a": (40, 3), "b": (20, 5), "c": (9, 2)}
    scores = {
        site: generator.random(shape).astype(np.float32) * (100 if site == "b" else 1) for site, shape in shapes.items()
    }
    group = random_group(shapes, fraction=0.5, seed=3, granularity="neuron")
    importance = importance_of(group, scores)
    for site, rows in group.members.items():
        assert importance[site] == pytest.approx(scores[site][rows].sum(axis=1), rel=1e-6)
    doses = {share: dose_of(group, importance, share) for share in (0.1, 0.25, 0.5, 1.0)}
    assert doses[1.0] is group
    assert [len(dose) for dose in doses.values()] == [round(share * len(group)) for share in doses]
    for small, large in ((0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        assert len(doses[small] - doses[large]) == 0
    half = doses[0.5]
    for site, rows in group.members.items():  # no site is favoured because its scores are larger
        assert abs(len(half.members[site]) - len(rows) / 2) <= 1
        kept = np.isin(rows, half.members[site])
        assert importance[site][kept].min() >= importance[site][~kept].max()
    write_importance(tmp_path / "g.parquet", group, importance)
    read = read_importance(tmp_path / "g.parquet", group)
    assert all(np.array_equal(read[site], importance[site]) for site in importance)
    with pytest.raises(nd.UserError, match="another group"):
        read_importance(tmp_path / "g.parquet", half)
    with pytest.raises(nd.UserError, match="was not kept"):
        read_importance(tmp_path / "none.parquet", group)
    with pytest.raises(GroupError, match="no share"):
        dose_of(group, importance, 1.5)
    weights = random_group(shapes, fraction=0.2, seed=1, granularity="weight")
    order = importance_of(weights, scores)
    assert np.array_equal(order["a"], scores["a"].reshape(-1)[weights.members["a"]])
    assert digest(weights) != digest(group) == digest(doses[1.0])


def test_a_group_that_its_controls_cannot_match_names_the_site():
    from neurondrift.interventions.trials import Draws, plan
    from neurondrift.models.sites import magnitudes_of

    model = adapted("llama")
    group = everything(model, "neuron")
    arguments = {"doses": [1.0], "magnitudes": magnitudes_of(model, "neuron"), "bins": 5, "seed": 0, "importance": {}}
    with pytest.raises(GroupError, match=r"big is larger than its controls can match .*layers\.0.*too few candidates"):
        plan({"big": group}, interventions=["prune"], draws=Draws(), **arguments)
    with pytest.raises(nd.UserError, match="no such intervention"):
        plan({"big": group}, interventions=["melt"], draws=Draws(), **arguments)
    with pytest.raises(nd.UserError, match="at least one random group"):
        plan({"big": group}, interventions=["prune"], draws=Draws(whole=0), **arguments)
    units = some(model, "unit")
    norms = magnitudes_of(model, "unit")
    trials = plan({"u": units}, interventions=["prune"], draws=Draws(whole=2), **arguments | {"magnitudes": norms})
    assert [trial.draw for trial in trials] == [None, None, None, 0, 1]
    name, unit = next(iter(mlp_units(linear_sites(model)).items()))
    weights = linear_sites(model)
    by_hand = weights[unit.down].weight[:, 3].square().sum()
    by_hand = by_hand + sum(weights[site].weight[offset + 3].square().sum() for site, offset in unit.ups)
    assert norms[name][3] == pytest.approx(by_hand.sqrt().item(), rel=1e-6)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What interventions need of a study that is fine-tuned: the tiny model's groups, importances and an adapter."""
    from neurondrift.groups.doses import importance_of, write_importance
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.settings import resolve
    from neurondrift.study.training import finetune, total_steps

    root = tmp_path_factory.mktemp("study")
    settings = resolve(
        preset="smoke",
        flags={
            "align.enabled": False,
            "finetune.learning_rate": 0.05,
            "finetune.max_steps": 3,
            "model.dtype": "float32",
        },
    )
    folder = StudyFolder(root, settings)
    (root / "study.toml").write_text(settings.to_toml())
    model, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    generator = np.random.default_rng(0)
    scores = {name: generator.random(site.shape).astype(np.float32) for name, site in linear_sites(model).items()}
    for name in ("safety_top", "safety_set_difference"):
        group = nd.select_top(
            scores,
            fraction=0.1 if name == "safety_top" else 0.2,
            granularity="neuron",
            provenance={"model": fingerprint(model)},
        )
        group.save(folder.group_file(name, "neuron"))
        write_importance(folder.importance_file(name, "neuron"), group, importance_of(group, scores))
    encoded = nd.encode(nd.load_examples("builtin:ordinary", limit=12), tokenizer, max_length=256)
    steps = total_steps(len(encoded), settings.finetune)
    finetune(model, tokenizer, encoded, settings.finetune, seed=0, folder=folder.adapters(0), save_at=[steps])
    tokenizer.save_pretrained(str(folder.adapters(0) / "tokenizer"))
    return settings, folder


def test_all_four_interventions_on_a_study_are_resumed_and_reported(study):
    import json

    import pyarrow.parquet as pq

    from neurondrift.interventions.trials import Draws
    from neurondrift.report.figures.draw import draw_figures
    from neurondrift.report.tables.causes import section
    from neurondrift.report.text import render_section, render_tables
    from neurondrift.study.experiments.intervene import Options, intervene, results_file

    settings, folder = study
    small = {"harmful": 3, "ordinary": 2, "answers": 2, "max_new_tokens": 4}
    options = Options(draws=Draws(whole=2, dose=1, freeze=1), doses=(0.5, 1.0), **small)
    lines = []
    found = intervene(settings, folder, options, say=lines.append)
    assert json.loads(results_file(folder).read_text()) == found
    made = {(e["intervention"], e["group"], e["dose"]): e for e in found["effects"]}
    assert len(made) == 2 * (3 * 2 + 1)  # freeze is run on whole groups only
    assert all(e["draws"] == {"freeze": 1}.get(e["intervention"], 2 if e["dose"] == 1 else 1) for e in made.values())
    assert set(made["prune", "safety_top", 1.0]["measures"]) == {"harmful", "ordinary", "answers"}
    assert set(made["prune", "safety_top", 0.5]["measures"]) == {"harmful"}
    references = found["references"]
    assert references["before"]["answers"]["perplexity"] != references["after"]["answers"]["perplexity"]
    rows = pq.read_table(folder.results / "interventions.parquet").to_pylist()
    runs = {row["key"] for row in rows}
    assert len(runs) == 2 + 2 * (3 * (3 + 2) + 2)
    assert sum(row["kind"] == "harmful" for row in rows) == 3 * len(runs)
    again = []
    assert intervene(settings, folder, options, say=again.append)["effects"] == found["effects"]
    assert all("0 made now" in line for line in again[1:])
    more = Options(draws=Draws(whole=3, dose=1, freeze=1), doses=(1.0,), interventions=("rewind",), **small)
    third = []
    intervene(settings, folder, more, say=third.append)
    assert [line.split()[:5] for line in third[1:]][2] == ["rewind", "8", "runs,", "2", "made"]
    text = "\n".join(render_tables(section(found)))
    assert "random groups" in text and "by dose" in text and "held-out answers" in text
    assert max(map(len, text.splitlines())) <= 100
    results = {"interventions": found, "study": {"model_fingerprint": found["model_fingerprint"]}}
    names = {path.name for path in draw_figures(results, folder.results / "figures")}
    assert {"intervention_doses.png", "intervention_doses.svg"} <= names
    assert "another model" in "\n".join(render_section(section(found, "another")))
    from neurondrift.study.stages.reporting import weights_digest

    assert found["training_step"] == 3
    assert found["adapter"] == weights_digest(folder.adapters(0) / "step=000003")


def test_a_null_stops_goes_on_and_is_reported(tmp_path, monkeypatch):
    from contextlib import nullcontext

    from neurondrift.interventions import trials
    from neurondrift.interventions.contexts import Applied
    from neurondrift.interventions.outcomes import summarise
    from neurondrift.models.sites import magnitudes_of
    from neurondrift.report.conclusion import intervention_findings
    from neurondrift.report.figures.doses import intervention_doses
    from neurondrift.report.tables.causes import section
    from neurondrift.report.text import render_section

    model, made = adapted("llama"), []
    groups = {"safety_top": some(model, "neuron", fraction=0.1)}
    refusals = {"before": 9, "after": 5, "rewind": 9, "transplant": 7}  # of 10 prompts

    def acted(subject, trial, mode):
        made.append(trial)
        return nullcontext((model, Applied(1, 1, 0)))

    def measure(of, tokenizer, bench, *, whole):
        trial = made[-1]
        count = 5 if trial.intervention == "rewind" and trial.draw is not None else refusals[trial.intervention]
        blank = {"refused": None, "loss": None, "tokens": None}
        rows = [blank | {"kind": "harmful", "id": str(i), "refused": i < count} for i in range(10)]
        rows.append(blank | {"kind": "ordinary", "id": "o", "refused": False})
        return [*rows, blank | {"kind": "answers", "id": "a", "loss": 1.0, "tokens": 3}]

    monkeypatch.setattr(trials, "acted", acted)
    monkeypatch.setattr(trials, "measure", measure)
    subject = trials.Subject(before=model, after=model, tokenizer=None)
    bench = trials.Bench(sets={}, answers=[])

    def run(stop_early):
        made.clear()
        told = []
        draws = trials.Draws(stop_early=stop_early)
        planned = trials.plan(
            groups,
            interventions=["rewind", "transplant"],
            doses=[1.0],
            draws=draws,
            magnitudes=magnitudes_of(model, "neuron"),
            bins=2,
            seed=0,
            importance={},
        )
        log = trials.RunLog(tmp_path / "runs.parquet")  # read again, as a command that goes on does
        results = trials.run_trials(
            planned, subject, bench, log, inputs="", stops=draws.stops, done=lambda *event: told.append(event)
        )
        assert [trial for trial, _, _ in told] == planned
        assert [trial for trial, _, fresh in told if fresh] == made
        found = intervention_findings(summarise(results, trials.planned_draws(planned), resamples=50))
        return found, {effect["intervention"]: effect for effect in found["effects"]}

    found, effects = run("all")
    assert len(made) == 2 + 21 + 3
    assert made[2].draw is None and [trial.draw for trial in made[23:]] == [None, 0, 1]  # the group before its draws
    transplant, rewind = effects["transplant"], effects["rewind"]
    assert (transplant["draws"], transplant["draws_planned"], transplant["stopped_early"]) == (2, 20, True)
    assert (rewind["draws"], rewind["draws_planned"], rewind["stopped_early"]) == (20, 20, False)
    assert rewind["measures"]["harmful"]["p"] == rewind["measures"]["harmful"]["p_floor"] == 1 / 21
    assert transplant["measures"]["harmful"]["p_floor"] == 1 / 21  # it could have been reached
    assert transplant["measures"]["answers"]["p_floor"] == 1 / 3
    assert "p = 1, stopped after 2 of 20 draws" in found["conclusion"]
    shown = {"model_fingerprint": "m", **found}
    text = "\n".join(render_section(section(shown)))
    assert "2 of 20" in text and "not adjusted for stopping" in text
    drawn = intervention_doses({"interventions": shown})
    assert [t.get_text() for ax in drawn.axes for t in ax.texts if "draws" in t.get_text()] == ["2 of 20 draws"]

    assert run("all") == (found, effects) and not made
    whole, effects = run("freeze")  # neither is freeze: the stopped null goes on
    assert [(trial.intervention, trial.draw) for trial in made] == [("transplant", k) for k in range(2, 20)]
    assert not any(effect["stopped_early"] for effect in effects.values())
    assert "not adjusted" not in "\n".join(render_section(section({"model_fingerprint": "m", **whole})))
    assert run("all")[0] == found and not made  # more runs lie there, and change nothing
    assert "no evidence" in paragraph([transplant], found["references"])


def test_a_run_is_the_same_whatever_is_answered_together(study):
    from neurondrift.behaviour.evaluate import judge_answers
    from neurondrift.interventions.trials import answer_losses, measure
    from neurondrift.study.experiments.intervene import Options, _bench, _subject

    settings, folder = study
    subject, _ = _subject(settings, folder, Options(), 0)
    bench = _bench(settings, Options(harmful=5, ordinary=4, answers=3, max_new_tokens=6))
    rows = measure(subject.after, subject.tokenizer, bench, whole=True)
    alone = []
    for kind, examples in bench.sets.items():
        for example in examples:
            judging = {**bench.judging, "batch_size": 1}
            alone += judge_answers(subject.after, subject.tokenizer, {kind: [example]}, **judging)
    assert [(row["kind"], row["id"], row["refused"]) for row in rows[:9]] == [
        (row["kind"], row["id"], row["refused"]) for row in alone
    ]
    together = judge_answers(subject.after, subject.tokenizer, bench.sets, **bench.judging)
    assert [row["response"] for row in together] == [row["response"] for row in alone]
    assert measure(subject.after, subject.tokenizer, bench, whole=False) == rows[:5]
    assert [(row["loss"], row["tokens"]) for row in rows[9:]] == answer_losses(subject.after, subject.tokenizer, bench)


def test_freezing_leaves_the_base_as_it_was_and_the_group_unmoved(study):
    from neurondrift.groups.group import load_group
    from neurondrift.models.parts import parts_of
    from neurondrift.study.experiments.intervene import Options, _subject

    settings, folder = study
    subject, _ = _subject(settings, folder, Options(), 0)
    group = load_group(folder.group_file("safety_top", "neuron"))
    base = {name: site.weight.clone() for name, site in linear_sites(subject.before).items()}
    changes = []
    for _ in range(2):
        with subject.train_frozen(group) as (trained, applied):
            assert applied.acted_on == len(group)
            changes.append(delta_now(trained))
            for name, part in parts_of(group, linear_sites(trained)).items():
                assert not changes[-1][name][part.index].any()
            assert any(delta.any() for delta in changes[-1].values())
    assert all(torch.equal(changes[0][name], changes[1][name]) for name in base)  # the second starts from the same base
    for name, site in linear_sites(subject.train_frozen.base).items():
        assert torch.equal(site.weight, base[name])


def test_the_command_on_an_adapter_made_elsewhere(study, tmp_path, capsys):
    from neurondrift.cli.__main__ import main

    _, folder = study
    arguments = ["intervene", "--preset", "smoke", "--model", "tiny:llama", "--dtype", "float32"]
    arguments += ["--adapter", str(folder.adapters(0) / "step=000003"), "--output-dir", str(tmp_path / "out")]
    file = str(folder.group_file("safety_top", "neuron"))
    small = ["--draws", "1", "--prompts", "2", "--ordinary", "1", "--tokens", "2", "--doses", "1"]
    main([*arguments, "--group", file, *small, "--json", str(tmp_path / "found.json")])
    assert "random groups" in capsys.readouterr().out
    assert (tmp_path / "found.json").exists() and (tmp_path / "out/results/interventions.parquet").exists()
    for extra, message in (
        ([], "needs groups"),
        (["--group", file, "--intervention", "freeze", *small], "trains again"),
        (["--group", "nothing"], "no such group"),
        (["--group", file, "--doses", "2"], "takes shares"),
        (["--group", file, "--granularity", "weight"], "is of neurons"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *extra])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def paragraph(effects, references):
    from neurondrift.interventions.outcomes import causes
    from neurondrift.report.conclusion import intervention_sentences

    found = [cause._asdict() for cause in causes(effects, references)]
    return " ".join(intervention_sentences(effects, references, found))


def test_the_paragraph_says_what_the_runs_show():
    references = {"before": {"harmful": {"rate": 0.9}}, "after": {"harmful": {"rate": 0.5, "n": 20}}}

    def effect(what, value, null, p, direction, draws=20):
        measure = {"value": value, "null_mean": null, "p": p, "direction": direction, "p_floor": 1 / (1 + draws)}
        start, end = (0.9, 0.5) if what == "transplant" else (0.5, 0.9)
        share = {"group": (value - start) / (end - start), "null": (null - start) / (end - start)}
        return {
            "intervention": what, "group": "safety_top", "dose": 1, "draws": draws,
            "measures": {"harmful": measure}, "share": share,
        }  # fmt: skip

    strong = paragraph([effect("rewind", 0.8, 0.54, 1 / 21, "higher")], references)
    assert "from 0.90 to 0.50" in strong
    assert "brings 0.75 of the lost refusals back (matched random groups 0.10; p = 0.048, 20 draws)" in strong
    assert "is a cause of the loss" in strong
    weak = paragraph([effect("transplant", 0.86, 0.87, 0.5, "lower")], references)
    assert "loses 0.10 of them (matched random groups 0.08" in weak and "no evidence" in weak
    against = paragraph([effect("rewind", 0.3, 0.54, 1 / 21, "lower")], references)
    assert "worked against the loss" in against
    few = paragraph([effect("freeze", 0.8, 0.5, 0.33, "higher", draws=2)], references)
    assert "Too few draws" in few
    references["after"]["harmful"]["rate"] = 0.9
    assert "none were lost" in paragraph([effect("rewind", 0.9, 0.9, 1.0, "equal")], references)
