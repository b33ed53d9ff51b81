"""The rank level of a study that was fine-tuned: shares, files, the report's section, mistakes."""

import json

import numpy as np
import pytest

from helpers.oracles import stored_inputs
from helpers.studies import smoke
from neurondrift.cli.__main__ import main
from neurondrift.models.adapters import effective_weight
from neurondrift.models.data import encode, load_examples
from neurondrift.models.loading import attach_adapter
from neurondrift.models.sites import linear_sites
from neurondrift.report.page import render_page
from neurondrift.report.text import render_text
from neurondrift.study.base_model import load_base
from neurondrift.study.experiments import subspaces
from neurondrift.study.folder import StudyFolder
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import SubspacesSection


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A study of the tiny model that was fine-tuned with two seeds, but neither evaluated nor analysed."""
    folder = tmp_path_factory.mktemp("study")
    study = smoke(seeds=[0, 1])
    StudyRun(study, folder).run(["align", "score", "groups", "finetune"])
    return study, StudyFolder(folder, study)


@pytest.fixture(scope="module")
def measured(tuned):
    study, folder = tuned
    said = []
    asked = SubspacesSection(rank=3, utility_rank=5, limit=6, draws=2)
    subspaces.of_study(study.model_copy(update={"subspaces": asked}), folder)
    subspaces.show(folder, say=said.append)
    return json.loads((folder.results / "subspaces.json").read_text()), "\n".join(said)


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
    for counted in (c["refusals"] for c in conditions):
        assert counted["n"] + counted["incoherent"] + counted["undecided"] == counted["asked"]
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
    assert "greater than or equal to 0" in capsys.readouterr().err
