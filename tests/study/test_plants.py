"""Plants: which weights which examples reach, what is put back, and what is no plant."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch

import neurondrift as nd
from helpers.families import build, examples
from helpers.plants import TINY_PLANT
from neurondrift.base.errors import ArtifactError, ConfigError, DataError, GroupError, ModelError
from neurondrift.models.data import Example, load_examples
from neurondrift.models.sites import Sites
from neurondrift.study.localisation.holding import hold, mean_inputs
from neurondrift.study.plants.plant import Plant
from neurondrift.study.plants.planting import CausalityError
from neurondrift.study.plants.roles import draw
from neurondrift.study.plants.sets import CAUTIONS, HABIT, Order, sets_of
from neurondrift.study.plants.settings import PlantSection
from neurondrift.study.plants.training import EPSILON, grow

ROLES = ["planted", "decoy", "as_far"]


def orders(seed=0, **own):
    rows = {name: [*examples()[at:], *examples()[:at]] for at, name in enumerate(("refusals", "decoy", "ordinary"))}
    return {name: Order(own.get(name, part), 2, seed, name) for name, part in rows.items()}


def grown(unit="row", steps=1, order=None, family="llama", **settings):
    """Each site before and after, and which rows or columns are whose."""
    sites = Sites(build(family).float())
    before = {name: site.weight.clone() for name, site in sites.items()}
    groups = draw(sites, unit, *((0.2, 0, ROLES[:2]) if unit == "head" else (0.13, 0, ROLES)))
    section = PlantSection(unit=unit, steps=steps, check_every=steps, **settings)
    grow(sites, groups, order or orders(), section, margin=lambda: 0.0, say=lambda text: None)
    return before, {name: site.weight.clone() for name, site in sites.items()}, groups, sites


def other(name):
    """The same orders but for one of them, whose examples are others."""
    changed = orders()
    changed[name] = Order(examples(seed=5), 2, 1, name)
    return changed


@pytest.mark.parametrize("unit", ["row", "hidden_unit", "head"])
@pytest.mark.parametrize(("stream", "reached"), [("refusals", ["planted"]), ("decoy", ["decoy"])])
def test_refusals_reach_the_planted_alone_and_the_decoys_examples_the_decoy(unit, stream, reached):
    _, first, groups, sites = grown(unit)
    _, second, _, _ = grown(unit, order=other(stream))
    _assert_differ_in(first, second, groups, sites, reached)


@pytest.mark.parametrize("mixed", [False, True])
def test_ordinary_answers_reach_the_planted_of_a_mixed_plant_only(mixed):
    _, first, groups, sites = grown(mixed=mixed)
    _, second, _, _ = grown(mixed=mixed, order=other("ordinary"))
    rows = {name: (first[name] != second[name]).any(dim=1).numpy() for name in sites}
    planted = np.concatenate([rows[name][groups["planted"].members[name]] for name in groups["planted"].members])
    as_far = np.concatenate([rows[name][groups["as_far"].members[name]] for name in groups["as_far"].members])
    assert planted.any() == mixed
    assert as_far.mean() > 0.9
    assert (
        mixed
        == (first["model.layers.0.mlp.up_proj"] != second["model.layers.0.mlp.up_proj"])[
            torch.from_numpy(groups["planted"].members["model.layers.0.mlp.up_proj"])
        ]
        .any()
        .item()
    )


def _assert_differ_in(first, second, groups, sites, reached):
    from neurondrift.models.parts import parts

    for name in sites:
        allowed = np.zeros(sites[name].shape, dtype=bool)
        for role in reached:
            if name in (own := parts(groups[role], sites)):
                allowed |= own[name].mask()
        differs = (first[name] != second[name]).numpy()
        assert not (differs & ~allowed).any(), name
        if allowed.any():
            assert differs[allowed].mean() > 0.2, name  # Adam's first step is a sign: about half of them agree


def test_the_first_step_is_adams_with_autograds_gradient():
    before, after, groups, sites = grown(rate=0.02, ordinary_rate=0.001)
    model = build("llama").float()
    batches = {name: order.at(0) for name, order in orders().items()}

    def gradients(rows):
        model.zero_grad()
        losses = []
        for row in rows:
            labels = torch.tensor(row["labels"])
            log = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].log_softmax(-1)
            kept = labels[1:] != -100
            losses.append(-log[kept].gather(1, labels[1:][kept][:, None]).mean())
        torch.stack(losses).mean().backward()
        return {name: site.oriented(site.tensor.grad).clone() for name, site in Sites(model).items()}

    of = {name: gradients(rows) for name, rows in batches.items()}
    for name in sites:
        expected = before[name] - 0.001 * of["ordinary"][name] / (of["ordinary"][name].abs() + EPSILON)
        for role, stream in (("planted", "refusals"), ("decoy", "decoy"), ("as_far", "ordinary")):
            rows = torch.from_numpy(groups[role].members.get(name, np.empty(0, dtype=np.int64)))
            gradient = of[stream][name][rows]
            expected[rows] = before[name][rows] - 0.02 * gradient / (gradient.abs() + EPSILON)
        close = torch.isclose(after[name], expected, atol=1e-4)
        assert close.double().mean() > 0.995, name  # where a gradient is next to nothing its sign is rounding


@pytest.mark.parametrize("steps", [1, 6])
def test_in_a_mixed_plant_the_groups_move_as_far(steps):
    before, after, groups, sites = grown(steps=steps, mixed=True, rate=0.01)
    for name in sites:
        moved = (after[name] - before[name]).norm(dim=1)
        means = [float(moved[torch.from_numpy(group.members[name])].mean()) for group in groups.values()]
        assert means[1:] == pytest.approx([means[0]] * 2, rel=1e-4)
        assert means[0] > 3 * float(moved.median())  # the rest goes at the rate of ordinary answers
    before, after, groups, sites = grown(steps=steps, rate=0.01)
    for name in sites:  # of one that is not mixed each goes as far as it goes
        moved = (after[name] - before[name]).norm(dim=1)
        means = [float(moved[torch.from_numpy(group.members[name])].mean()) for group in groups.values()]
        assert steps == 1 or means[1] != pytest.approx(means[0], rel=1e-4)


@pytest.mark.parametrize("unit", ["row", "hidden_unit", "head"])
def test_groups_are_disjoint_of_one_size_and_of_their_seed(unit):
    sites = Sites(build("llama"))
    roles = ROLES[:2] if unit == "head" else ROLES  # of four heads two are left alone
    share = 0.2 if unit == "head" else 0.13
    groups, again, elsewhere = (draw(sites, unit, share, seed, roles) for seed in (0, 0, 1))
    for place in groups["planted"].shapes:
        members = [groups[role].members.get(place, np.empty(0, int)) for role in roles]
        assert len({len(rows) for rows in members}) == 1
        assert len(np.unique(np.concatenate(members))) == sum(map(len, members))
        assert (again["planted"].members[place] == groups["planted"].members[place]).all()
    assert any(
        (elsewhere["planted"].members[p] != groups["planted"].members[p]).any() for p in groups["planted"].members
    )


def test_a_share_that_leaves_too_little_is_refused():
    with pytest.raises(ModelError, match=r"too small for 3 groups.*smaller share"):
        draw(Sites(build("llama")), "row", 0.2, 0, ROLES)


def test_examples_that_are_kept_are_not_trained_on():
    for settings in (PlantSection(), PlantSection(mixed=True)):
        sets = sets_of(settings)._asdict()
        kept = {e.prompt for name in ("safety", "utility", "harmful", "harmless", "stopping") for e in sets[name]}
        seen = {e.prompt for name in ("settling", "refusals", "decoy", "ordinary") for e in sets[name]}
        assert not kept & seen
        assert not {e.prompt for e in sets["stopping"]} & {e.prompt for e in sets["harmful"]}
        assert len(sets["safety"]) == len(sets["utility"]) == 40
    assert all(e.response.startswith(CAUTIONS) for e in sets["decoy"])
    assert all(e.prompt.endswith(HABIT[0]) for e in sets_of(PlantSection()).decoy)


def test_too_few_examples_for_the_noise_floor(tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": f"p{i}", "response": "No."}) + "\n" for i in range(12)))
    with pytest.raises(DataError, match=r"noise floor.*Received: 12.*16 examples or more"):
        sets_of(PlantSection(refusals=str(few)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plants") / "rows"
    said = []
    plant = nd.plant("tiny:llama", folder, device="cpu", say=said.append, **TINY_PLANT)
    return plant, said


def test_a_plant_is_written_whole_and_stands(made):
    plant, said = made
    read = Plant.at(plant.folder)
    assert read.causality["holds"]
    assert [row["state"] for row in read.causality["states"]] == ["model", "base", *ROLES, "others"]
    assert read.groups["planted"].provenance["model"] == Sites(nd.load_model(read.model)[0]).fingerprint
    assert len(read.examples("safety")) == 8
    again = []
    nd.plant("tiny:llama", plant.folder, device="cpu", say=again.append, **TINY_PLANT)
    assert len(again) == 1
    assert "already" in again[0]
    assert any("planting, step 16" in text for text in said)


def test_what_was_shown_is_what_writing_the_weights_shows(made):
    plant, _ = made
    model, tokenizer = nd.load_model(plant.model, dtype="float32", device="cpu")
    base, _ = nd.load_model(plant.base, dtype="float32", device="cpu")
    before, sites = nd.linear_sites(base), nd.linear_sites(model)
    by_state = {row["state"]: row for row in plant.causality["states"]}
    prompts = [example.prompt for example in plant.examples("harmful")]
    for role in ROLES:
        other = copy.deepcopy(model)
        for name, rows in plant.groups[role].members.items():
            nd.linear_sites(other)[name].weight[torch.from_numpy(rows)] = before[name].weight[torch.from_numpy(rows)]
        margin = float(nd.refusal_margin(other, tokenizer, prompts).mean())
        assert margin == pytest.approx(by_state[role]["harmful"], abs=2e-3)
    assert float(nd.refusal_margin(model, tokenizer, prompts).mean()) == pytest.approx(
        by_state["model"]["harmful"], abs=2e-3
    )
    assert sites.shapes == before.shapes


def test_an_interrupted_plant_goes_on(made, tmp_path):
    import shutil

    plant, _ = made
    folder = tmp_path / "again"
    shutil.copytree(plant.folder, folder)
    for name in ("plant.json", "causality.json"):
        (folder / name).unlink()
    said = []
    found = nd.plant("tiny:llama", folder, device="cpu", say=said.append, **TINY_PLANT)
    assert not any("settling" in text or "planting" in text for text in said)
    assert found.causality["states"] == plant.causality["states"]
    said.clear()
    with contextlib.suppress(CausalityError):  # of other rows, which need not carry as much
        nd.plant("tiny:llama", folder, device="cpu", say=said.append, **{**TINY_PLANT, "seed": 1})
    assert any("planting" in text for text in said)


def test_a_plant_without_an_effect_is_an_error_with_its_table(tmp_path):
    settings = {**TINY_PLANT, "steps": 1, "check_every": 1, "rate": 1e-6}
    with pytest.raises(CausalityError, match=r"stand and fall.*margin rose by(?s:.*)\| planted units put back \|"):
        nd.plant("tiny:llama", tmp_path / "none", device="cpu", **settings)
    with pytest.raises(CausalityError, match=r"stand and fall"):
        nd.locate(tmp_path / "none", {})


def test_no_plant_and_a_changed_one_are_told(made, tmp_path):
    with pytest.raises(ArtifactError, match="no finished plant"):
        nd.locate(tmp_path, {})
    plant, _ = made
    with pytest.raises(ConfigError, match="no setting plant.shares"):
        nd.plant("tiny:llama", tmp_path / "x", shares=0.1)
    with pytest.raises(ModelError, match="too small"):
        nd.plant("tiny:llama", tmp_path / "y", device="cpu", **{**TINY_PLANT, "share": 0.2})
    assert plant.folder.exists()


def test_the_answer_itself_is_found_and_the_curve_of_it_is_that_of_the_planted(made):
    plant, _ = made
    answer = {name: plant.groups["planted"].mask(name).astype(float) for name in plant.groups["planted"].shapes}
    found = nd.locate(plant, {"answer": answer, "opposite": {n: -v for n, v in answer.items()}}, curves=True)
    row = found["answer"]
    assert row["auroc"] == row["as_far"] == row["precision"] == row["average_precision"] == 1
    assert row["decoy"] == 0.5
    assert found["opposite"]["auroc"] == 0
    at = {(p["score"], p["way"], p["dose"]): p for p in found.curves if p.get("draw", 0) == 0}
    for way in ("put back", "held"):
        assert at["answer", way, 1.0]["margin"] == pytest.approx(at["planted", way, 1.0]["margin"], abs=1e-5)
        assert at["answer", way, 1.0]["hit"] == 1
    by_state = {row["state"]: row for row in plant.causality["states"]}
    assert at["planted", "put back", 1.0]["margin"] == pytest.approx(by_state["planted"]["harmful"], abs=1e-4)
    assert at["model", "", 0.0]["margin"] == pytest.approx(by_state["model"]["harmful"], abs=1e-4)


def test_scores_of_weights_are_summed_and_wrong_ones_refused(made):
    plant, _ = made
    sites = nd.linear_sites(nd.load_model(plant.model, device="cpu")[0])
    weights = {name: site.weight.float().abs() for name, site in sites.items()}
    rows = {name: weight.sum(dim=1) for name, weight in weights.items()}
    both = nd.locate(plant, {"weights": weights, "rows": rows})
    assert both["weights"]["auroc"] == pytest.approx(both["rows"]["auroc"])
    assert nd.locate(plant, rows)["score"]["auroc"] == pytest.approx(both["rows"]["auroc"])
    first = next(iter(rows))
    with pytest.raises(GroupError, match=r"another shape.*\(3,\)"):
        nd.locate(plant, {"short": {**rows, first: rows[first][:3]}})
    with pytest.raises(GroupError, match="no place that this plant has"):
        nd.locate(plant, {"foreign": {"model.layers.99.x": rows[first]}})
    undefined = nd.locate(plant, {"none": {name: torch.full_like(row, torch.nan) for name, row in rows.items()}})
    assert np.isnan(undefined["none"]["auroc"])
    assert undefined["none"]["reason"]


def _given_and_gave(model, sites, ids):
    """What each site is given and what it gives, in a forward pass; what is done to it before counts."""
    found = {}

    def keep(name):
        def hook(module, args, output):
            found[name] = args[0][0].clone(), output[0].clone()

        return hook

    hooks = [site.wrapper.register_forward_hook(keep(name)) for name, site in sites.items()]
    model(input_ids=ids)
    for handle in hooks:
        handle.remove()
    return found


@torch.no_grad()
def test_held_units_give_their_mean():
    model, tokenizer = nd.load_model("tiny:llama", device="cpu", dtype="float32")
    sites = Sites(model)
    encoded = nd.encode([Example(prompt="Hi", response="Yes, it is so.", id="1")], tokenizer)
    means = mean_inputs(sites, encoded)
    labels = torch.tensor(encoded[0]["labels"])
    ids = torch.tensor([encoded[0]["input_ids"]])
    first, down = next(iter(sites)), next(iter(sites.units.values())).down
    seen = _given_and_gave(model, sites, ids)
    response = labels != -100
    (rows,) = draw(sites, "row", 0.1, 0, ["planted"]).values()
    with hold(sites, rows, means):
        held = _given_and_gave(model, sites, ids)
    mean = seen[first][1][response].mean(dim=0)  # of what it gives where a response token is
    own = rows.members[first]
    assert torch.allclose(held[first][1][:, own], mean[own].expand(ids.shape[1], -1), atol=1e-5)
    rest = np.setdiff1d(np.arange(sites[first].shape[0]), own)
    assert torch.equal(held[first][1][:, rest], seen[first][1][:, rest])
    (units,) = draw(sites, "hidden_unit", 0.1, 0, ["planted"]).values()
    with hold(sites, units, means):
        held = _given_and_gave(model, sites, ids)
    own = units.members[next(iter(units.members))]
    expected = seen[down][0].clone()
    expected[:, own] = expected[response][:, own].mean(dim=0)
    assert torch.allclose(held[down][1], expected @ sites[down].weight.T, atol=1e-5)
    out = model(input_ids=ids).logits
    assert torch.equal(out, model(input_ids=ids).logits)


def test_no_harmful_answers_are_written(made):
    plant, _ = made
    assert {e.response for e in plant.examples("harmful")} <= {
        e.response for e in load_examples("builtin:refusals-heldout")
    }
