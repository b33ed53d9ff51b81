"""ActSVD against a dense SVD of stored activations; the identities of projections; removal; shares; errors."""

import json

import numpy as np
import pytest
import torch
from families import build, examples

from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.cli.__main__ import main
from neurondrift.importance import directions
from neurondrift.importance.directions import (
    bases,
    outside,
    overlap,
    plan_moments,
    projection,
    random_directions,
    safety_only,
    safety_only_directions,
    share_of_change,
)
from neurondrift.interventions.removal import remove_rank
from neurondrift.models.adapters import effective_weight
from neurondrift.models.data import encode, load_examples
from neurondrift.models.loading import attach_adapter
from neurondrift.models.sites import is_router, linear_sites
from neurondrift.report.page import render_page
from neurondrift.report.text import render_text
from neurondrift.statistics.descriptive import RatioOfSums, share
from neurondrift.study.base_model import load_base
from neurondrift.study.experiments.subspaces import Settings, write_subspaces
from neurondrift.study.folder import StudyFolder
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import resolve

RANK = 3
ORACLES = ["llama", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"]


def stored_inputs(model, rows):
    """Site name -> the inputs of every response token [N, I], by plain hooks, one example at a time, unpadded.

    The inputs of an expert are recorded by running the experts module by hand on what the module was given.
    """
    sites = linear_sites(model)
    seen = {name: [] for name in sites}
    for row in rows:
        response = torch.tensor(row["labels"]) != -100
        response[0] = False
        handles = []

        def plain(name, response=response):
            return lambda module, args, output: seen[name].append(args[0].reshape(len(response), -1)[response])

        def experts(prefix, response=response):
            def hook(module, args, output):
                states, index, _ = args
                for expert in range(module.num_experts):
                    chosen = (index == expert).any(dim=1)
                    taken = states[chosen & response]
                    seen[f"{prefix}.gate_up_proj.{expert}"].append(taken)
                    gate, up = (taken @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                    seen[f"{prefix}.down_proj.{expert}"].append(module.act_fn(gate) * up)

            return hook

        prefixes = {}
        for name, site in sites.items():
            if site.expert is None:
                handles.append(site.owner.register_forward_hook(plain(name)))
            else:
                prefixes[name.rsplit(".", 2)[0]] = site.owner
        handles += [module.register_forward_hook(experts(prefix)) for prefix, module in prefixes.items()]
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


@pytest.mark.parametrize("wanted", [RANK, 1])
@pytest.mark.parametrize("family", ORACLES)
def test_equals_a_dense_svd_of_wx(family, wanted):
    model, rows = build(family), examples()
    inputs = stored_inputs(model, rows)
    found = bases(model, rows, rank=wanted, batch_size=3)
    assert list(found) == list(linear_sites(model))
    compared = 0
    for name, site in linear_sites(model).items():
        weight = site.weight.double().numpy()
        basis = found[name]
        assert basis.tokens == len(inputs[name])
        if basis.tokens == 0:
            assert basis.directions.shape[1] == 0
            continue
        outputs = weight @ inputs[name].T
        left, values, right = np.linalg.svd(outputs, full_matrices=False)
        u = basis.directions.numpy()
        rank = u.shape[1]
        assert rank == min(wanted, np.linalg.matrix_rank(outputs, tol=1e-6 * values[0]))
        np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-10)
        np.testing.assert_allclose(basis.lengths.numpy(), values[:rank], rtol=1e-4)
        np.testing.assert_allclose(basis.energy, (outputs**2).sum(), rtol=1e-4)
        # The best rank-r approximation of W X, and the weight that gives it.
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.linalg.norm(u @ (u.T @ outputs) - best) < 1e-4 * np.linalg.norm(best), name
        dense = left[:, :rank] @ (left[:, :rank].T @ weight)
        assert np.linalg.norm(u @ (u.T @ weight) - dense) < 1e-4 * np.linalg.norm(dense), name
        compared += 1
    assert compared > len(found) / 2


def test_moments_are_of_inputs_or_outputs_whichever_is_smaller():
    sites = linear_sites(build("llama"))
    shapes = {site.module_type: site.shape for site in sites.values()}
    assert shapes["up_proj"] == (24, 16)
    assert shapes["down_proj"] == (16, 24)
    for kind, of_outputs in (("up_proj", False), ("down_proj", True), ("q_proj", True), ("k_proj", True)):
        site = next(site for site in sites.values() if site.module_type == kind)
        moments = directions._Moments(site=site, factor=None)
        assert moments.of_outputs is of_outputs
        assert len(moments.matrix) == min(site.shape)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_batch_size_padding_and_passes_do_not_matter(family, monkeypatch):
    model, rows = build(family), examples()
    reference = bases(model, rows, rank=RANK, batch_size=1)
    monkeypatch.setattr(directions, "KEPT_TOKENS", 5)
    sites = linear_sites(model)
    size = sum(directions.moment_bytes(site) for site in sites.values())
    monkeypatch.setattr("neurondrift.importance.scores.free_memory", lambda device: size // 2)
    assert len(plan_moments(sites)) > 2
    assert [name for part in plan_moments(sites) for name in part] == list(sites)
    for batch_size, side in [(3, "right"), (8, "left")]:
        other = bases(model, rows, rank=RANK, batch_size=batch_size, padding_side=side)
        assert list(other) == list(reference)
        for name in reference:
            one, two = reference[name], other[name]
            assert one.tokens == two.tokens
            assert torch.allclose(one.lengths, two.lengths, rtol=1e-5)
            if one.directions.shape[1]:
                assert overlap(one.directions, two.directions) > 1 - 1e-6, (name, batch_size, side)


def test_few_tokens_give_fewer_directions():
    model = build("llama")
    rows = [{"input_ids": [1, 5, 9, 12], "labels": [-100, -100, 9, 12]}]
    for basis in bases(model, rows, rank=5).values():
        assert basis.tokens == 2
        assert basis.directions.shape[1] == 2
        assert basis.explained == pytest.approx(1)


def subspace_pair(seed=0, out=20, safety=4, utility=6):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 11, dtype=torch.float64, generator=generator)
    return weight, random_directions(out, safety, generator), random_directions(out, utility, generator)


def apply(change, weight):
    return change.left @ (change.right @ weight)


def test_the_projection_identities_of_the_paper():
    weight, safety, utility = subspace_pair()
    kept = apply(projection(safety), weight)
    assert torch.allclose(kept + (weight - kept), weight, atol=1e-14)
    assert torch.allclose(apply(projection(safety), kept), kept, atol=1e-13)  # a projection
    assert float((kept * (weight - kept)).sum()) == pytest.approx(0, abs=1e-12)  # orthogonal
    delta = apply(safety_only(safety, utility), weight)
    dense = (torch.eye(20, dtype=torch.float64) - utility @ utility.T) @ safety @ safety.T @ weight
    assert torch.allclose(delta, dense, atol=1e-13)
    assert float((utility.T @ delta).norm()) < 1e-13 * float(delta.norm())  # Π_u ΔW = 0
    assert int(torch.linalg.matrix_rank(delta)) <= 4
    # W - ΔW = Π_u W + (I - Π_u)(I - Π_s) W: utility's part is untouched.
    assert torch.allclose(utility.T @ (weight - delta), utility.T @ weight, atol=1e-13)
    span = safety_only_directions(safety, utility)
    assert span.shape == (20, 4)
    assert torch.allclose(span @ (span.T @ delta), delta, atol=1e-13)


def test_no_utility_is_plain_actsvd_and_all_utility_leaves_nothing():
    weight, safety, utility = subspace_pair()
    nothing = torch.zeros(20, 0, dtype=torch.float64)
    assert torch.equal(apply(safety_only(safety, nothing), weight), apply(projection(safety), weight))
    around = torch.linalg.qr(torch.cat([safety, utility], dim=1)).Q  # contains the safety subspace
    assert float(apply(safety_only(safety, around), weight).norm()) < 1e-13 * float(weight.norm())
    assert safety_only_directions(safety, around).shape == (20, 0)
    assert overlap(safety, around) == pytest.approx(1)
    half = torch.linalg.qr(torch.cat([safety[:, :1], utility], dim=1)).Q  # contains one safety direction
    assert safety_only_directions(safety, half).shape == (20, 3)
    assert float(outside(safety, half)[:, 0].norm()) < 1e-13


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removal_takes_the_directions_out_and_gives_every_bit_back(family, dtype):
    model, rows = build(family).to(dtype), examples()
    found = bases(model, rows, rank=RANK)
    sites = linear_sites(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = {name: site.weight.double().clone() for name, site in sites.items()}
    with remove_rank(model, {name: projection(basis.directions) for name, basis in found.items()}):
        for name, basis in found.items():
            u = basis.directions
            expected = weights[name] - u @ (u.T @ weights[name])
            assert torch.equal(sites[name].weight, expected.to(dtype)), name
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with (
        pytest.raises(RuntimeError, match="within"),
        remove_rank(model, {name: projection(basis.directions) for name, basis in found.items()}),
    ):
        raise RuntimeError("within")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_the_outputs_lose_what_was_removed():
    """At response tokens of the first site nothing is left along U; its rank-r part was all of it."""
    model, rows = build("llama"), examples()
    name = next(iter(linear_sites(model)))
    basis = bases(model, rows, rank=RANK)[name]
    with remove_rank(model, {name: projection(basis.directions)}):
        again = bases(model, rows, rank=RANK)[name]
    assert again.energy == pytest.approx(basis.energy * (1 - basis.explained), rel=1e-4)
    assert overlap(basis.directions, again.directions) < 1e-6


def test_share_of_a_change_inside_is_one_and_of_a_random_one_r_over_out():
    generator = torch.Generator().manual_seed(0)
    u = random_directions(64, 8, generator)
    inside = u @ torch.randn(8, 5, dtype=torch.float64, generator=generator)
    factor = torch.randn(5, 30, dtype=torch.float64, generator=generator)
    share = share_of_change(u, inside, factor @ factor.T)
    assert share.inside / share.total == pytest.approx(1)
    assert share.total == pytest.approx(float((inside @ factor).square().sum()))
    shares = []
    for _ in range(400):
        b = torch.randn(64, 5, dtype=torch.float64, generator=generator)
        low_rank, dense = share_of_change(u, b, factor @ factor.T), share_of_change(u, b @ factor)
        assert low_rank.inside == pytest.approx(dense.inside)
        assert low_rank.total == pytest.approx(dense.total)
        shares.append(dense.inside / dense.total)
    assert np.mean(shares) == pytest.approx(8 / 64, abs=4 * np.std(shares) / 20)


def test_the_share_in_outputs_needs_no_activations():
    model, rows = build("llama"), examples()
    inputs = stored_inputs(model, rows)
    sites = linear_sites(model)
    generator = torch.Generator().manual_seed(1)
    factors = {name: torch.randn(2, site.shape[1], generator=generator) for name, site in sites.items()}
    found = bases(model, rows, rank=RANK, factors=factors, batch_size=4)
    for name, basis in found.items():
        b = torch.randn(sites[name].shape[0], 2, dtype=torch.float64, generator=generator)
        changed = b @ factors[name].double() @ torch.from_numpy(inputs[name].T)  # Δ X
        share = share_of_change(basis.directions, b, basis.inner)
        assert share.total == pytest.approx(float(changed.square().sum()), rel=1e-4)
        assert share.inside == pytest.approx(float((basis.directions.T @ changed).square().sum()), rel=1e-4)


def test_random_directions_are_orthonormal_and_repeatable():
    one, two = (random_directions(12, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.allclose(one.T @ one, torch.eye(4, dtype=torch.float64), atol=1e-14)


def test_errors_name_what_is_wrong():
    model, rows = build("llama"), examples(3)
    with pytest.raises(ConfigError, match=r"site model\.layers\.0\.self_attn\.k_proj \[8, 16\].*9.*1 to 8"):
        bases(model, rows, rank=9)
    with pytest.raises(ConfigError, match="at least 1"):
        bases(model, rows, rank=0)
    with pytest.raises(DataError, match="Example 0 has no response token"):
        bases(model, [{"input_ids": [3, 4], "labels": [-100, -100]}], rank=2)
    with pytest.raises(DataError, match="no examples"):
        bases(model, [], rank=2)
    u = random_directions(16, 2, torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="no such site.*'nowhere'"), remove_rank(model, {"nowhere": projection(u)}):
        pass
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fits, does_not = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    with (
        pytest.raises(ModelError, match=f"do not fit the outputs of {does_not}"),
        remove_rank(model, {fits: projection(u), does_not: projection(u)}),
    ):
        pass
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    router = build("mixtral")
    assert any(is_router(site.owner) for site in linear_sites(router).values())
    with pytest.raises(ConfigError, match=r"gate .*1 to 4"):
        bases(router, rows, rank=5)


# --- shares over sites ----------------------------------------------------------------------------------


def test_shares_are_ratios_with_a_right_gradient():
    generator = np.random.default_rng(0)
    whole = generator.lognormal(size=(2, 30)) * 1e-9
    part = whole * generator.uniform(0.1, 0.3, size=(2, 30))
    whole[:, 4] = part[:, 4] = 0  # a site that did not change
    found = share(part, whole, resamples=500, rng_seed=0)
    assert found.of_sum.value == pytest.approx((part.sum(axis=1) / whole.sum(axis=1)).mean())
    known = np.delete(part / np.where(whole > 0, whole, 1), 4, axis=1)
    assert found.of_sites.value == pytest.approx(known.mean())
    assert found.of_sites.sites == 29
    for one in found:
        low, high = one.interval(0.95)
        assert 0.1 < low < one.value < high < 0.3
    statistic = RatioOfSums(2)
    totals = generator.uniform(1, 2, size=5)
    for column in range(5):
        step = np.eye(5)[column] * 1e-6
        slope = (statistic(totals + step) - statistic(totals - step)) / 2e-6
        np.testing.assert_allclose(statistic.gradient(totals)[column], slope, atol=1e-8)
    with pytest.raises(ValueError, match="no site"):
        share(part * 0, whole * 0, resamples=500, rng_seed=0)


def test_the_interval_of_a_share_covers_the_truth():
    """200 draws of 40 sites: the 95 % interval misses the true share about 5 % of the time."""
    misses = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        whole = generator.lognormal(sigma=0.5, size=(1, 40))
        part = whole * generator.beta(2, 8, size=(1, 40))  # mean share 0.2, independent of the size
        low, high = share(part, whole, resamples=300, rng_seed=seed).of_sum.interval(0.95)
        misses += not low <= 0.2 <= high
    assert 1 <= misses <= 22


# --- a study --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A study of the tiny model that was fine-tuned with two seeds, but neither evaluated nor analysed."""
    folder = tmp_path_factory.mktemp("study")
    study = resolve(preset="smoke", flags={"evaluate.max_new_tokens": 4, "seeds": [0, 1]})
    StudyRun(study, folder).run(["align", "score", "groups", "finetune"])
    return study, StudyFolder(folder, study)


@pytest.fixture(scope="module")
def measured(tuned):
    study, folder = tuned
    said = []
    path = write_subspaces(study, folder, Settings(rank=3, utility_rank=5, limit=6, draws=2), say=said.append)
    return json.loads(path.read_text()), "\n".join(said)


def test_shares_of_a_study_equal_the_dense_computation(tuned, measured):
    study, folder = tuned
    found, _ = measured
    base, tokenizer = load_base(study, folder)
    sites = linear_sites(base)
    encoded = encode(
        load_examples(study.score.safety.model_copy(update={"limit": 6})), tokenizer, max_length=study.score.max_length
    )
    inputs = stored_inputs(base, encoded)
    u, x = {}, {}
    for name, site in sites.items():
        outputs = site.weight.double().numpy() @ inputs[name].T
        u[name], x[name] = np.linalg.svd(outputs, full_matrices=False)[0][:, :3], inputs[name].T
    expected = {"weights": [], "safety_outputs": []}
    for seed in study.seeds:
        model, _ = load_base(study, folder)
        step = max(folder.adapters(seed).glob("step=*"))
        tuned_sites = linear_sites(attach_adapter(model, step))
        sums = {key: np.zeros(2) for key in expected}
        for name in u:
            delta = (effective_weight(tuned_sites[name]) - tuned_sites[name].weight.double()).numpy()
            for key, change in (("weights", delta), ("safety_outputs", delta @ x[name])):
                sums[key] += [np.square(u[name].T @ change).sum(), np.square(change).sum()]
        for key, (inside, whole) in sums.items():
            expected[key].append(inside / whole)
    for key, values in expected.items():
        row = next(r for r in found["shares"] if r["subspace"] == "safety" and r["measure"] == key)
        np.testing.assert_allclose(row["of_sum"]["per_seed"], values, rtol=1e-3)
        assert row["of_sum"]["value"] == pytest.approx(np.mean(values), rel=1e-3)
    assert found["trained_sites"] == len(sites) == len(found["sites"])


def test_what_a_study_writes(tuned, measured):
    found, said = measured
    assert [(r["measure"], r["subspace"]) for r in found["shares"]] == [
        (measure, subspace)
        for measure in ("weights", "safety_outputs", "utility_outputs")
        for subspace in ("safety", "utility", "safety_only")
    ]
    for row in found["shares"]:
        assert 0 <= row["of_sum"]["value"] <= 1
        assert row["of_sum"]["ci95"][0] <= row["of_sum"]["value"] <= row["of_sum"]["ci95"][1]
        assert row["random"]["low"] <= row["random"]["mean"] <= row["random"]["high"]
        # 20 random subspaces scatter about r / out, their expectation
        assert row["random"]["mean"] == pytest.approx(row["expected"], abs=4 * row["random"]["sd"] / 20**0.5 + 1e-9)
    assert all(row["rank"]["safety"] == 3 and row["rank"]["utility"] == 5 for row in found["sites"])
    conditions = found["behaviour"]["conditions"]
    assert [(c["removed"], c["draw"]) for c in conditions] == [
        ("none", None),
        ("safety", None),
        ("utility", None),
        ("safety_only", None),
        ("random", 0),
        ("random", 1),
    ]
    assert len({c["perplexity"] for c in conditions}) == len(conditions)
    assert set(found["behaviour"]["p_random"].values()) <= {1 / 3, 2 / 3, 1.0}
    assert "Share of the change of the weights that lies in each subspace" in said
    assert all(len(line) <= 100 or "written to" in line for line in said.splitlines())


def test_the_section_stands_in_the_report_only_beside_its_own_model(measured):
    found, _ = measured
    about = {"name": "x", "model_fingerprint": found["study"]["model_fingerprint"]}
    for render in (render_text, lambda results: render_page(results, [])):
        assert "rank level" not in render({"study": about}).lower()
        text = render({"study": about, "subspaces": found})
        assert "rank level" in text.lower()
        assert "Refusals of harmful requests after directions are removed" in text
        other = render({"study": about | {"model_fingerprint": "0"}, "subspaces": found})
        assert "of another model: run neurondrift subspaces" in other
        assert "after directions are removed" not in other


def test_mistakes_of_a_study_end_with_exit_code_2(tuned, tmp_path, capsys):
    _, folder = tuned
    with pytest.raises(SystemExit) as ended:
        main(["subspaces", "--output-dir", str(folder.root)])  # rank 32
    assert ended.value.code == 2
    assert "k_proj [16, 32]" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["subspaces", "--preset", "smoke", "--output-dir", str(tmp_path), "--rank", "2"])
    assert ended.value.code == 2
    assert "no fine-tuned model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["subspaces", "--output-dir", str(folder.root), "--draws", "-1"])
    assert ended.value.code == 2
    assert "cannot be negative" in capsys.readouterr().err
