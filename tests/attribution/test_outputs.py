"""Functional drift against dense float64 moments of stored inputs, on every family, and its identities."""

import copy

import numpy as np
import pytest
import torch

import neurondrift as nd
from helpers.adapters import adapt
from helpers.attribution import built, merged, moved
from helpers.families import FAMILIES, examples, save
from neurondrift.attribution import outputs
from neurondrift.attribution.changes import change_from
from neurondrift.attribution.inputs.spread import Moments, leading, leading_of, spread_of
from neurondrift.attribution.outputs import SILENT, UNMOVED, UNSEEN
from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.models.data import IGNORED
from neurondrift.models.sites import linear_sites, mlp_units

SAFETY, UTILITY = examples(6, seed=1), examples(7, seed=2)


def one_earlier(rows):
    """The same examples, labelled so that a position counts that predicts a response token."""
    labels = [[*row["labels"][1:], IGNORED] for row in rows]
    # `stored_inputs` leaves the first position out, which predicts a response where the prompt is one token long.
    return [{"input_ids": row["input_ids"], "labels": own} for row, own in zip(rows, labels, strict=True)]


def oracle(before, after, shared):
    """Rows and units: E|D̃x|² on safety, ordinary text and the halves of the latter, float64."""
    from helpers.oracles import stored_inputs

    sets = [SAFETY, UTILITY, UTILITY[::2], UTILITY[1::2]]
    inputs = [stored_inputs(after, one_earlier(rows)) for rows in sets]
    first, last = linear_sites(before), linear_sites(after)
    rows, columns = {}, {}
    for name, site in last.items():
        delta = (site.weight.double() - first[name].weight.double()).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            moments = [x[name].T @ x[name] / np.float64(len(x[name])) for x in inputs]
        width = delta.shape[1]
        projector = np.eye(width)
        both = (moments[0] + moments[1]) / 2
        if shared and np.isfinite(both).all():
            basis = np.linalg.eigh(both)[1][:, -shared:]
            projector -= basis @ basis.T
        moments = [projector @ moment @ projector for moment in moments]
        rows[name] = np.stack([np.einsum("oi,ij,oj->o", delta, m, delta) for m in moments], axis=1)
        norm = (delta**2).sum(axis=0)
        columns[name] = np.stack([norm * np.diag(m) for m in moments], axis=1)
    units = {}
    for name, unit in mlp_units(last).items():
        units[name] = columns[unit.down] + sum(rows[site][unit.rows(offset)] for site, offset in unit.ups)
    return rows, units


def agree(found, expected, compared):
    for name, measure in found.items():
        if np.isnan(expected[name][:, :2]).any():
            assert measure.safety.isnan().all() and UNSEEN in measure.reasons
            continue
        safety, utility, even, odd = expected[name].T
        some = max(safety.max(), utility.max())
        np.testing.assert_allclose(measure.safety, safety, rtol=2e-3, atol=1e-4 * some)
        np.testing.assert_allclose(measure.utility, utility, rtol=2e-3, atol=1e-4 * some)
        kept = np.minimum(np.minimum(safety, utility), np.minimum(even, odd)) > 1e-2 * some  # False where NaN
        np.testing.assert_allclose(measure.log_ratio[kept], np.log(safety / utility)[kept], atol=0.02)
        np.testing.assert_allclose(measure.floor[kept], np.log(even / odd)[kept], atol=0.02)
        middle = np.sort((safety + utility) / 2)[(len(safety) - 1) // 2]
        np.testing.assert_allclose(measure.shrunk, np.log((safety + middle) / (utility + middle)), atol=5e-3)
        compared.append(name)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_fine_tuning_equals_dense_moments(family, shared, tmp_path):
    before = built(family)
    after = moved(before, 0.05)
    save(before, tmp_path)
    rows, units = oracle(before, after, shared)
    found = nd.functional_drift(after, SAFETY, UTILITY, initial=tmp_path, shared=shared, batch_size=3)
    compared = []
    agree(found.rows, rows, compared)
    agree(found.units, units, compared)
    assert set(found.rows) == set(rows) and set(found.units) == set(units)
    assert len(compared) > len(rows) / 2


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_lora_in_factors_equals_the_dense_change(family, tmp_path):
    base = built(family)
    save(base, tmp_path)
    adapted = adapt(built(family), scale=0.1).eval()
    found = nd.functional_drift(adapted, SAFETY, UTILITY, shared=3)
    expected = nd.functional_drift(merged(adapted, base), SAFETY, UTILITY, initial=tmp_path, shared=3)
    assert set(found.rows) == set(expected.rows)
    for kind in ("rows", "units"):
        for name, measure in getattr(found, kind).items():
            other = getattr(expected, kind)[name]
            largest = float(other.safety.max())
            torch.testing.assert_close(measure.safety, other.safety, rtol=2e-3, atol=1e-3 * largest)
            torch.testing.assert_close(measure.utility, other.utility, rtol=2e-3, atol=1e-3 * largest)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_batch_size_and_passes_do_not_matter(family, tmp_path, monkeypatch):
    before = built(family)
    after = moved(before, 0.05)
    save(before, tmp_path)
    expected = nd.functional_drift(after, SAFETY, UTILITY, initial=tmp_path, shared=3, batch_size=1)
    monkeypatch.setattr("neurondrift.attribution.inputs.spread.KEPT_TOKENS", 5)
    names = list(linear_sites(after))
    monkeypatch.setattr(outputs, "_passes", lambda sites: [names[:5], names[5:]])
    found = nd.functional_drift(after, SAFETY, UTILITY, initial=tmp_path, shared=3, batch_size=50)
    for name, measure in expected.rows.items():
        torch.testing.assert_close(found.rows[name].safety, measure.safety, rtol=1e-3, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(found.rows[name].utility, measure.utility, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_sites_with_one_input_have_its_moments_once(tmp_path):
    before = built("llama")
    save(before, tmp_path)
    change = change_from(moved(before), tmp_path)
    inputs = outputs._Inputs(sites=change.sites)
    from neurondrift.models.batches import make_batches

    for batch in make_batches(SAFETY, batch_size=3, pad_token_id=0):
        inputs.see(change.sites.model, batch, 0)
    kinds = {tuple(sorted(name.rpartition(".")[2] for name in names)) for names in inputs.groups().values()}
    assert kinds == {("k_proj", "q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert len(inputs.groups()) == 8


def test_what_did_not_move_is_undefined_with_a_reason(tmp_path):
    before = built("llama")
    save(before, tmp_path)
    after = copy.deepcopy(before)
    name, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    linear_sites(after)[name].weight[3] += 0.1
    found = nd.functional_drift(after, SAFETY, UTILITY, initial=tmp_path, shared=0)
    up = found.rows[name]
    assert up.safety[3] > 0 and up.log_ratio[3].isfinite()
    assert up.safety.isnan().sum() == up.log_ratio.isnan().sum() == up.shrunk.isnan().sum() == 23
    assert up.unmoved == 23 and up.reasons == {UNMOVED: 23}
    assert found.rows[down].safety.isnan().all()
    unit = found.units["model.layers.0.mlp"]
    torch.testing.assert_close(unit.safety, up.safety, equal_nan=True)  # nothing else of any unit moved


def test_a_change_that_moves_no_output_has_no_ratio():
    base = built("llama")
    adapted = adapt(base, scale=0.1).eval()
    name = "model.layers.0.self_attn.q_proj"
    layer = linear_sites(adapted)[name].wrapper
    layer.lora_A["default"].weight.data.zero_()
    found = nd.functional_drift(adapted, SAFETY, UTILITY, shared=0).rows[name]
    assert found.log_ratio.isnan().all() and set(found.reasons) <= {UNMOVED, SILENT}


def test_a_planted_row_that_reacts_to_safety_text_alone_is_found(tmp_path):
    """Rows moved along the direction that tells the two texts apart, others along a common one."""
    before = built("llama")
    save(before, tmp_path)
    after = copy.deepcopy(before)
    from helpers.oracles import stored_inputs

    name = "model.layers.0.self_attn.q_proj"
    safety, utility = (torch.from_numpy(stored_inputs(after, one_earlier(rows))[name]) for rows in (SAFETY, UTILITY))
    second = utility.T @ utility / len(utility) + 1e-3 * torch.eye(16)
    whitened = torch.linalg.solve(second, safety.T @ safety / len(safety))
    direction = torch.linalg.eig(whitened).eigenvectors.real[:, torch.linalg.eig(whitened).eigenvalues.real.argmax()]
    weight = linear_sites(after)[name].weight
    generator = torch.Generator().manual_seed(0)
    weight += 0.01 * torch.randn(weight.shape, generator=generator)
    planted = [2, 7]
    weight[planted] = linear_sites(before)[name].weight[planted] + 0.04 * (direction / direction.norm()).float()
    found = nd.functional_drift(after, SAFETY, UTILITY, initial=tmp_path, shared=0).rows[name]
    assert sorted(found.log_ratio.argsort()[-2:].tolist()) == planted


@pytest.mark.parametrize("size", [40, 300])
def test_the_leading_directions_are_those_of_all_eigenvectors(size):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(2, -4, size, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    matrix = (vectors * scale) @ vectors.T
    found = leading(matrix, 8)
    torch.testing.assert_close(found.T @ found, torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0)
    assert (found.T @ vectors[:, :8]).square().sum() > 8 - 1e-5
    rows = (vectors * scale.sqrt()).T.float()
    assert (leading_of(rows, 8).T @ vectors[:, :8]).square().sum() > 8 - 1e-5


@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("counts", [(30, 20, 25), (500, 300, 301), (30, 0, 25)])
def test_tokens_and_their_sums_tell_the_same(size, counts):
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(3, size, generator=generator) * 30  # a few directions hold nearly all
    parts = [
        torch.randn(n, size, generator=generator) + torch.randn(n, 3, generator=generator) @ common for n in counts
    ]
    found = []
    for summed in (False, True):
        moments = Moments(size, torch.device("cpu"))
        for part, tokens in enumerate(parts):
            for some in tokens.split(64):
                moments.add(some, part)
        if summed:
            moments.sum_up()
        found.append(spread_of(moments, 8))
    assert bool(found[0].sums) == (sum(counts) > 3 * size) and found[1].sums
    few, many = torch.randn(5, size, generator=generator), torch.randn(70, size, generator=generator)
    for spread in found:
        rest = torch.eye(size, dtype=torch.float64) - spread.basis @ spread.basis.T
        assert sum(float((part.double() @ rest).square().sum()) for part in parts) < 2 * size * sum(counts)
        for at, tokens in enumerate(parts):
            wide = tokens.double() @ rest
            moments_II = wide.T @ wide / (len(tokens) or float("nan"))
            for one, expected in (
                (spread.rests[at], moments_II),
                (spread.diagonals[at], moments_II.diagonal()),
                (spread.along(few)[at], few.double() @ moments_II @ few.double().T),
                (spread.squares(many)[at], ((many.double() @ moments_II) * many.double()).sum(dim=1)),
            ):
                largest = float(expected.abs().nan_to_num().max())
                close = 5e-3 if spread.sums else 1e-5  # of sums in float32 little is left without the few directions
                torch.testing.assert_close(one.double(), expected, rtol=close, atol=close * largest, equal_nan=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: nd.functional_drift(m, SAFETY, UTILITY), ModelError, "does not tell what has changed"),
        (lambda m: nd.functional_drift(adapt(m, scale=0.1), SAFETY, UTILITY[:1]), DataError, "split in two"),
        (lambda m: nd.functional_drift(adapt(m, scale=0.1), [], UTILITY), DataError, "no examples"),
        (lambda m: nd.functional_drift(adapt(m, scale=0.1), SAFETY, UTILITY, shared=-1), ConfigError, "negative"),
        (lambda m: nd.functional_drift(adapt(m, scale=0.1), SAFETY, UTILITY, shared=16), ConfigError, "no more inputs"),
    ],
)
def test_mistakes_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make(built("llama"))
