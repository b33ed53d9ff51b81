"""The dose-response out of sample: halves, rankings, permutations that are exact, and runs that are the interventions."""

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import neurondrift as nd
from neurondrift.base.errors import DataError
from neurondrift.groups.doses import nested, permuted
from neurondrift.models.sites import linear_sites

DOSES = [0.05, 0.1, 0.3]
FLAGS = {
    "align.enabled": False,
    "finetune.learning_rate": 0.05,
    "finetune.max_steps": 3,
    "model.dtype": "float32",
    "dose_response.doses": DOSES,
    "dose_response.draws": 3,
    "dose_response.uniform_draws": 2,
    "dose_response.bins": 4,
    "dose_response.harmful": 9,
    "dose_response.ordinary": 2,
    "evaluate.harmful": {"source": "builtin:refusals-heldout"},
    "score.safety": {"source": "builtin:refusals", "limit": 4},
}


def trained(root, **flags):
    """The tiny model with what two steps of a training have saved."""
    from neurondrift.study.folder import StudyFolder
    from neurondrift.study.settings import resolve
    from neurondrift.study.training import finetune

    settings = resolve(preset="smoke", flags=FLAGS | flags)
    folder = StudyFolder(root, settings)
    model, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    encoded = nd.encode(nd.load_examples("builtin:ordinary", limit=12), tokenizer, max_length=256)
    finetune(model, tokenizer, encoded, settings.finetune, seed=0, folder=folder.adapters(0), save_at=[1, 3])
    tokenizer.save_pretrained(str(folder.adapters(0) / "tokenizer"))
    return settings, folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("study"))


def scores(seed=0, sizes=(40, 30)):
    generator = np.random.default_rng(seed)
    return {f"s{k}": generator.normal(size=size).astype(np.float32) for k, size in enumerate(sizes)}


def test_permuted_rankings_hold_as_many_of_every_stratum_at_every_dose():
    own, norms = scores(), scores(1)
    doses = [0.05, 0.2, 0.5]
    groups = nested(own, doses)
    for small, large in itertools.pairwise(doses):
        assert all(np.isin(groups[small].members[site], groups[large].members[site]).all() for site in own)
    stratum = {site: np.argsort(np.argsort(values)) * 4 // len(values) for site, values in norms.items()}
    stratum = {
        site: np.concatenate([np.full(len(part), k) for k, part in enumerate(np.array_split(np.arange(len(v)), 4))])[
            np.argsort(np.argsort(v))
        ]
        for site, v in norms.items()
    }
    seen = []
    for draw in range(20):
        made = permuted(own, norms, bins=4, seed=0, draw=draw)
        assert all(np.array_equal(np.sort(made[site]), np.sort(own[site])) for site in own)
        drawn = nested(made, doses)
        for dose in doses:
            for site in own:
                counts = [
                    np.bincount(stratum[site][group[dose].members[site]], minlength=4) for group in (groups, drawn)
                ]
                assert np.array_equal(*counts)
        seen.append(tuple(drawn[0.2].members["s0"]))
    assert len(set(seen)) > 15
    again = permuted(own, norms, bins=4, seed=0, draw=3)
    assert all(np.array_equal(again[site], permuted(own, norms, bins=4, seed=0, draw=3)[site]) for site in own)
    anywhere = nested(permuted(own, norms, bins=1, seed=0, draw=0), doses)
    assert [len(anywhere[dose]) for dose in doses] == [len(groups[dose]) for dose in doses]


def test_a_ranking_that_says_nothing_is_found_no_more_often_than_its_level():
    """What an outcome is: the sum of something that depends on the stratum and on chance. The p of the mean over doses
    is uniform; it is small for a ranking that knows the outcome."""
    from neurondrift.statistics.null import empirical_p

    def p_of(own, norms, worth, draws=19):
        def outcome(ranking):
            return np.mean(
                [sum(worth[s][g.members[s]].sum() for s in own) for g in nested(ranking, [0.1, 0.3]).values()]
            )

        return empirical_p(outcome(own), [outcome(permuted(own, norms, bins=4, seed=9, draw=k)) for k in range(draws)])

    ps = []
    for trial in range(120):
        norms = scores(3 * trial)
        worth = {site: values + 5 * norms[site] for site, values in scores(3 * trial + 1).items()}
        ps.append(p_of(scores(3 * trial + 2), norms, worth))
    assert np.mean(np.array(ps) <= 0.05) < 0.12 and 0.4 < np.mean(ps) < 0.65
    norms, worth = scores(1), scores(2)
    assert p_of(worth, norms, worth) == 0.05


@pytest.mark.parametrize("method", ["snip", "taylor", "cohens_d", "provenance"])
def test_any_score_of_a_study_ranks(study, tmp_path, method):
    """Also those that need other texts, or the model from before."""
    from neurondrift.study.experiments.dose_response import halves, ranked

    torch.manual_seed(0)
    base, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    for parameter in base.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings, folder = study
    of_score = settings.score.model_copy(update={"method": method})
    of_model = settings.model.model_copy(update={"base": str(tmp_path / "base")})
    scored = settings.model_copy(update={"score": of_score, "model": of_model})
    prompts = halves(settings, settings.dose_response)
    rankings, _ = ranked(scored, folder, settings.dose_response, prompts.ranking, 0)
    model, _ = nd.load_model("tiny:llama", dtype="float32")
    assert rankings["safety_score"].keys() == rankings["norm"].keys()
    for name, values in rankings["safety_score"].items():
        assert values.shape == (linear_sites(model)[name].shape[0],)
        assert np.isfinite(values).all() or np.isnan(values).all()  # where nothing differs, a contrast is undefined
    told = [values for values in rankings["safety_score"].values() if np.isfinite(values).all() and np.ptp(values) > 0]
    assert len(told) > len(rankings["norm"]) / 2


def test_the_whole_is_made_written_and_reported(study):
    from neurondrift.report.change.doses import section
    from neurondrift.report.figures.draw import draw_figures
    from neurondrift.report.text import render_section, render_tables
    from neurondrift.study.experiments.dose_response import dose_response, halves, ranked, results_file, table_file
    from neurondrift.study.experiments.intervene import subject_of
    from neurondrift.study.settings import InterveneSection

    settings, folder = study
    options = settings.dose_response
    found = dose_response(settings, folder, options, say=lambda line: None)
    assert json.loads(results_file(folder).read_text()) == found
    prompts = halves(settings, options)
    texts = [{example.prompt for example in half} for half in prompts[:2]]
    assert len(texts[0]) == 4 and len(texts[1]) == 5 and not texts[0] & texts[1]
    rows = pq.read_table(table_file(folder)).to_pylist()
    assert {row["id"] for row in rows if row["kind"] == "harmful"} == {example.id for example in prompts.outcome}
    runs = {(row["arm"], row["null"], row["draw"], row["dose"], row["intervention"]) for row in rows}
    assert len(runs) == 2 + (3 + 3 + 2) * len(DOSES) * 2
    rankings, _ = ranked(settings, folder, options, prompts.ranking, 0)
    subject, _ = subject_of(settings, folder, InterveneSection(), 0)
    texts = [example.prompt for example in prompts.outcome]

    def margin():
        return float(nd.refusal_margin(subject.after, subject.tokenizer, texts).double().mean())

    ends = found["references"]
    assert ends["after"]["harmful"] == pytest.approx(margin(), abs=1e-4)
    with subject.after.disable_adapter():
        assert ends["before"]["harmful"] == pytest.approx(margin(), abs=1e-4)
    for arm, ranking in rankings.items():
        for effect in [e for e in found["effects"] if e["arm"] == arm]:
            group = nested(ranking, DOSES)[effect["dose"]]
            assert effect["members"] == len(group)
            with (nd.rewind if effect["intervention"] == "rewind" else nd.patch)(subject.after, group):
                assert effect["margin"] == pytest.approx(margin(), abs=2e-4)
            assert set(effect["random"]) == ({"matched", "uniform"} if arm == "budget" else {"uniform"})
    assert {one["draws"] for one in found["overall"]} == {3, 2}
    assert found["tests"] == 2 and sum("p_holm" in one for one in found["overall"]) == 2
    norms = {name: torch.linalg.norm(delta(site), dim=1).numpy() for name, site in linear_sites(subject.after).items()}
    for name, values in rankings["norm"].items():
        assert np.allclose(values, norms[name], rtol=1e-4)
    text = "\n".join(render_tables(section(found)))
    assert "Mean over doses" in text and max(map(len, text.splitlines())) <= 100
    assert "another model" in "\n".join(render_section(section(found, "another")))
    names = {path.name for path in draw_figures({"dose_response": found}, folder.results / "figures")}
    lost = ends["before"]["harmful"] > ends["after"]["harmful"]
    assert ("out_of_sample_doses.png" in names) == lost


def delta(site):
    from neurondrift.interventions.acting.contexts import adapter_delta

    return adapter_delta(site)


def test_the_budget_is_minus_what_each_neuron_contributed(study):
    from neurondrift.study.experiments.dose_response import halves, ranked
    from neurondrift.study.folder import saved_step

    settings, folder = study
    options = settings.dose_response
    prompts = halves(settings, options)
    model, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    steps = [saved_step(folder.adapters(0), step) for step in (1, 3)]
    function = {"m": nd.Margin(model, tokenizer, prompts.ranking)}
    for ranking, parts in (("budget", nd.budget(model, function, snapshots=steps, tolerance=None)["m"]),):
        own, attributed = ranked(settings, folder, options.model_copy(update={"ranking": ranking}), prompts.ranking, 0)
        assert list(own["budget"]) == list(parts.rows)
        for name, values in parts.rows.items():
            assert np.allclose(own["budget"][name], -values.numpy(), atol=1e-6)
        assert attributed["attributed"] == pytest.approx(parts.attributed, rel=1e-5)


def test_too_few_prompts_are_an_error(study):
    from neurondrift.study.experiments.dose_response import halves

    settings, _ = study
    with pytest.raises(DataError, match="too few harmful prompts"):
        halves(settings, settings.dose_response.model_copy(update={"harmful": 3}))


def test_a_model_that_was_trained_whole_is_rewound_and_patched_by_the_one_from_before(tmp_path):
    from neurondrift.study.experiments.dose_response import dose_response, halves, ranked
    from neurondrift.study.folder import saved_step

    few = {"dose_response.doses": [0.2], "dose_response.draws": 1, "dose_response.uniform_draws": 1}
    settings, folder = trained(tmp_path, **few, **{"finetune.method": "full", "finetune.learning_rate": 0.005})
    options = settings.dose_response
    found = dose_response(settings, folder, options, say=lambda line: None)
    prompts = halves(settings, options)
    rankings, _ = ranked(settings, folder, options, prompts.ranking, 0)
    before, tokenizer = nd.load_model("tiny:llama", dtype="float32")
    after, _ = nd.load_model(str(saved_step(folder.adapters(0), 3)), dtype="float32")
    group = nested(rankings["budget"], [0.2])[0.2]
    texts = [example.prompt for example in prompts.outcome]
    initial = {name: site.weight.clone() for name, site in linear_sites(before).items()}
    for name, context in (
        ("rewind", nd.rewind(after, group, initial=initial.__getitem__)),
        ("patch", nd.patch(after, group, donor=before)),
    ):
        (effect,) = [e for e in found["effects"] if e["arm"] == "budget" and e["intervention"] == name]
        with context:
            expected = float(nd.refusal_margin(after, tokenizer, texts).double().mean())
        assert effect["margin"] == pytest.approx(expected, abs=2e-4)
        assert abs(effect["margin"] - found["references"]["after"]["harmful"]) > 1e-5
