"""Drift of single weights: the histogram against numpy, every step of a training against the dense Δ."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from helpers.adapters import adapt, lora
from helpers.families import build
from helpers.groups import group_of
from helpers.training import trainer
from neurondrift.base.errors import GroupError
from neurondrift.drift.bins import WeightDrift, aligned, bin_edges, pooled, weight_drifts
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.kernels import Tallies
from neurondrift.drift.log import DriftLog
from neurondrift.drift.meter import DriftMeter, WeightMeter
from neurondrift.groups.group import Group
from neurondrift.groups.selection import random_group
from neurondrift.models.parts import weights_of_units
from neurondrift.models.sites import fingerprint, linear_sites, mlp_units

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0)


def summarise(values):
    """The summary of float32 values, as Δ of a weight of one row."""
    delta = torch.from_numpy(values)[None]
    absolute, _ = Tallies().dense(delta, torch.ones_like(delta), np.arange(len(values)), [len(values)])[0]
    return WeightDrift("group", "site", "absolute", len(values), *absolute)


def check(summary, values):
    """A summary against numpy in float64 on the same values (NaN where undefined)."""
    values = np.asarray(values, dtype=np.float64)
    known = values[np.isfinite(values)]
    assert summary.count == len(values)
    assert summary.undefined == len(values) - len(known)
    assert summary.zeros == int((known == 0).sum())
    assert summary.zeros + int(summary.bins.sum()) == summary.defined
    assert summary.mean == pytest.approx(known.mean(), rel=1e-6)
    assert summary.variance == pytest.approx(known.var(), rel=1e-5)
    for q in QUANTILES:
        true = np.quantile(known, q, method="inverted_cdf")
        assert summary.quantile(q) == pytest.approx(true, rel=0.0079), q


def test_bins_cover_every_positive_float32_and_are_narrow():
    tiny, huge = np.float32(1.4e-45), np.finfo(np.float32).max
    values = np.array([tiny, 1e-40, 1e-30, 1.0, 1.015, huge, 0.0, np.nan, np.inf], dtype=np.float32)
    summary = summarise(values)
    assert (summary.count, summary.zeros, summary.undefined, int(summary.bins.sum())) == (9, 1, 2, 6)
    edges = bin_edges(summary.first_bin, len(summary.bins) + 1)
    for value in values[:6]:
        index = np.searchsorted(edges, value, side="right") - 1
        assert summary.bins[index] >= 1
        assert edges[index] <= value < edges[index + 1]
    normal = edges[edges > np.finfo(np.float32).tiny]
    assert 1 + 1 / 128 < (normal[1:] / normal[:-1]).min() < (normal[1:] / normal[:-1]).max() <= 1 + 1 / 64


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_moments_and_quantiles_equal_numpy(spread):
    generator = np.random.default_rng(0)
    values = np.exp(generator.normal(-9, spread, 20_000)).astype(np.float32)
    values[:37] = 0
    values[40:51] = np.nan
    check(summarise(values), values)


def test_pooling_equals_summarising_together():
    generator = np.random.default_rng(1)
    parts = [np.exp(generator.normal(m, 1, n)).astype(np.float32) for m, n in ((-3, 500), (2, 90), (0, 7))]
    parts += [np.zeros(4, dtype=np.float32), np.full(3, np.nan, dtype=np.float32)]
    check(pooled(summarise(part) for part in parts), np.concatenate(parts))


def test_aligned_histograms_are_those_of_each_site_on_common_bins():
    generator = np.random.default_rng(2)
    arms = [
        {site: np.exp(generator.normal(m, 0.5, 80)).astype(np.float32) for site, m in sites}
        for sites in ((("a", -3), ("b", 1)), (("b", 4), ("c", -1)))
    ]
    arms[0]["a"][:5] = 0
    edges, counts = aligned([{site: summarise(values) for site, values in arm.items()} for arm in arms])
    for arm, array in zip(arms, counts, strict=True):
        assert array.shape == (3, len(edges))
        for row, site in enumerate("abc"):
            values = arm.get(site, np.zeros(0))
            assert array[row, 0] == (values == 0).sum()
            np.testing.assert_array_equal(array[row, 1:], np.histogram(values[values > 0], bins=edges)[0])
    still = {"a": summarise(np.zeros(3, dtype=np.float32))}
    edges, counts = aligned([still, still])
    assert len(edges) == 2 and counts[0].tolist() == [[3, 0]]


def test_nothing_defined_is_nan_not_zero():
    summary = summarise(np.full(3, np.nan, dtype=np.float32))
    assert (summary.count, summary.undefined, summary.zeros) == (3, 3, 0)
    assert all(math.isnan(value) for value in (summary.mean, summary.variance, summary.quantile(0.5)))
    still = summarise(np.zeros(3, dtype=np.float32))
    assert (still.mean, still.variance, still.quantile(0.5), still.zeros) == (0, 0, 0, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_groups_drift_equals_dense_float64(family):
    model = adapt(build(family), scale=1e-3)
    sites = linear_sites(model)
    first = next(name for name in DriftMeter(model).sites)
    sites[first].weight[0] = 0.0  # w0 of a whole row: |Δ| is defined, |Δ|/|w0| is not
    meter = DriftMeter(model)
    group = group_of(model, "weight")
    weights = WeightMeter({"random": group}, meter.sites, every_site=sites)
    assert weights.outside["random"] + weights.members["random"] == len(group)
    assert weights.outside["random"] == sum(
        len(flat) for site, flat in group.members.items() if site not in meter.sites
    )
    found = {(part.site, part.metric): part for part in weights.measure(meter)}
    assert {site for site, _ in found} == set(meter.sites)
    undefined = 0
    for name, site in meter.sites.items():
        layer = site.wrapper
        delta = layer.get_delta_weight("default").detach().double()
        delta = (delta.T if site.transposed else delta).reshape(-1)[group.members[name]].abs().numpy()
        base = site.weight.double().reshape(-1)[group.members[name]].abs().numpy()
        check(found[name, "absolute"], delta)
        with np.errstate(divide="ignore", invalid="ignore"):
            check(found[name, "relative"], delta / base)
        undefined += found[name, "relative"].undefined
    assert undefined == int((group.rows(first) == 0).sum()) > 0


def test_every_step_of_a_training_equals_the_dense_delta_of_its_adapter(tmp_path):
    """Against numpy on the adapters that the Trainer saved: nothing of the instrument takes part."""
    model = lora()
    group, units = (
        group_of(model, "weight"),
        Group(
            granularity="unit",
            members={"model.layers.1.mlp": np.array([0, 5, 7])},
            provenance={"model": fingerprint(model)},
        ),
    )
    callback = DriftCallback(tmp_path / "drift", every=1, groups={"random": group, "units": units})
    trainer(model, tmp_path / "t", callback, steps=4, save=1).train()
    log = DriftLog(tmp_path / "drift")
    sites = linear_sites(build("llama"))
    shapes = {name: site.shape for name, site in sites.items()}
    members = {"random": group, "units": weights_of_units(units, mlp_units(sites), shapes)}
    compared = 0
    for step in (1, 2, 3, 4):
        saved = PeftModel.from_pretrained(build("llama"), tmp_path / "t" / f"checkpoint-{step}")
        now = linear_sites(saved)
        for part in weight_drifts(log.weights(steps=[step])):
            layer = now[part.site].wrapper
            a, b = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
            flat = members[part.group].members[part.site]
            delta = (layer.scaling["default"] * (b @ a)).reshape(-1)[flat].abs().numpy()
            base = sites[part.site].weight.double().reshape(-1)[flat].abs().numpy()
            check(part, delta if part.metric == "absolute" else delta / base)
            compared += 1
    trained = [site for site in shapes if site.endswith(("q_proj", "up_proj"))]
    assert compared == 4 * 2 * (len(trained) + 1)
    step_0 = weight_drifts(log.weights(steps=[0]))
    assert all(part.zeros == part.count and part.mean == 0 for part in step_0)
    assert log.metadata()["groups"]["units"] == {"granularity": "unit", "members": 3 * 16, "outside": 2 * 3 * 16}


def test_full_fine_tuning_follows_weights(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    from neurondrift.models.disk.initial import CheckpointWeights

    sites = linear_sites(model)
    meter = DriftMeter(model, initial=CheckpointWeights(tmp_path, sites))
    before = {name: site.weight.clone() for name, site in sites.items()}
    for site in sites.values():
        site.weight.mul_(1.001)
    group = group_of(model, "weight")
    for part in WeightMeter({"g": group}, meter.sites, every_site=sites).measure(meter):
        flat = group.members[part.site]
        base = before[part.site].double().reshape(-1)[flat]
        delta = (sites[part.site].weight.double().reshape(-1)[flat] - base).abs()
        check(part, (delta if part.metric == "absolute" else delta / base.abs()).numpy())


def test_a_group_that_does_not_fit_is_refused(tmp_path):
    model = lora()
    foreign = random_group({"model.layers.0.mlp.up_proj": (24, 16)}, fraction=0.1, granularity="weight", seed=0,
                           provenance={"model": "another"})  # fmt: skip
    with pytest.raises(GroupError, match="made from another model"):
        trainer(model, tmp_path / "t", DriftCallback(tmp_path / "d", every=6, groups=[foreign])).train()
    beyond = Group(granularity="weight", members={"model.layers.0.mlp.up_proj": np.array([24 * 16])},
                   shapes={"model.layers.0.mlp.up_proj": (99, 16)})  # fmt: skip
    with pytest.raises(GroupError, match="beyond the end of model.layers.0.mlp.up_proj"):
        trainer(lora(), tmp_path / "t", DriftCallback(tmp_path / "d", every=6, groups=[beyond])).train()


def test_bfloat16_bases_are_read_exactly():
    base = get_peft_model(build("llama").to(torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))
    site = next(iter(DriftMeter(base).sites.values()))
    generator = torch.Generator().manual_seed(0)
    for factor in (site.wrapper.lora_A, site.wrapper.lora_B):
        factor["default"].weight.data = torch.randn(factor["default"].weight.shape, generator=generator) * 1e-3
    meter = DriftMeter(base)
    group = group_of(base, "weight", fraction=0.5)
    for part in WeightMeter({"g": group}, meter.sites, every_site=linear_sites(base)).measure(meter):
        layer, flat = meter.sites[part.site].wrapper, group.members[part.site]
        if part.site == site.name and part.metric == "relative":
            product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            delta = (product * layer.scaling["default"]).detach().reshape(-1)[flat].abs()
            check(part, (delta / meter.sites[part.site].weight.double().reshape(-1)[flat].abs()).numpy())
            break
    else:
        raise AssertionError("the site was not measured")
