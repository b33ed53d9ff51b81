"""What a change of the margin comes from: against dense float64 autograd on every family, and its identities."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import neurondrift as nd
from helpers.adapters import adapt, lora_on, shake
from helpers.attribution import PROMPTS, TOKENIZER, built, margins, mean_loss, merged, moved, path_oracle, with_bytes
from helpers.families import FAMILIES, examples, save
from neurondrift.attribution import paths
from neurondrift.attribution.changes import change_along, change_from
from neurondrift.attribution.openings import Openings
from neurondrift.base.errors import ConfigError, DataError, ModelError
from neurondrift.models.sites import linear_sites

SHORT = Openings(refusal=("I can't", "No"), compliance=("The", "Sure"))


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def close(found, expected, *, rtol=2e-3):
    """Equal up to float32 sums of terms as large as the largest."""
    assert set(found) == set(expected)
    largest = max((float(values.abs().max()) for values in expected.values()), default=0.0)
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values.double(), rtol=rtol, atol=1e-4 * largest)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_fine_tuning_equals_dense_autograd(family, tmp_path):
    before = built(family)
    after = moved(before, 0.002)
    save(before, tmp_path)
    rows, units, rest = path_oracle(before, after, mean_loss, points=2)
    kept = state(after)
    loss = nd.ResponseLoss(after, examples())
    found = nd.path_attribution(after, {"loss": loss}, initial=tmp_path, points=2, batch_size=3, tolerance=None)["loss"]
    close(found.rows, rows)
    close(found.units, units)
    assert set(found.elsewhere) == set(rest)
    for name, value in rest.items():
        assert found.elsewhere[name] == pytest.approx(value, rel=5e-3, abs=1e-6)
    assert found.values == pytest.approx((float(mean_loss(before)), float(mean_loss(after))), abs=1e-5)
    assert found.attributed == pytest.approx(sum(float(r.sum()) for r in rows.values()) + sum(rest.values()), abs=1e-5)
    assert all(torch.equal(kept[name], value) for name, value in after.state_dict().items())  # bit for bit


@pytest.mark.parametrize("family", list(FAMILIES))
def test_lora_in_factors_equals_the_dense_change(family, tmp_path):
    base = with_bytes(family)
    save(base, tmp_path)
    adapted = adapt(with_bytes(family), scale=0.05).eval()
    dense = merged(adapted, base)
    kept = state(adapted)
    found, expected = (
        nd.path_attribution(
            model,
            {"harmful": nd.Margin(model, TOKENIZER, PROMPTS, SHORT)},
            initial=initial,
            points=1,
            tolerance=None,
        )["harmful"]
        for model, initial in ((adapted, None), (dense, tmp_path))
    )
    moved_sites = {name: values for name, values in expected.rows.items() if name in found.rows}
    close(found.rows, moved_sites)
    close(found.units, {name: values for name, values in expected.units.items() if name in found.units})
    assert all(not values.any() for name, values in expected.rows.items() if name not in found.rows)
    assert found.values == pytest.approx(expected.values, abs=2e-4)
    assert not found.elsewhere
    assert all(torch.equal(kept[name], value) for name, value in adapted.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_the_sum_is_the_change_of_the_margin(family, tmp_path):
    before = with_bytes(family)
    after = moved(before, 0.01)
    save(before, tmp_path)
    functions = {
        "harmful": nd.Margin(after, TOKENIZER, PROMPTS, SHORT),
        "harmless": nd.Margin(after, TOKENIZER, ["a", "bc"], SHORT),
    }
    found = nd.path_attribution(after, functions, initial=tmp_path)
    for name, prompts in (("harmful", PROMPTS), ("harmless", ["a", "bc"])):
        with torch.no_grad():
            true = float((margins(after, SHORT, prompts) - margins(before, SHORT, prompts)).mean())
        assert found[name].change == pytest.approx(true, abs=1e-4)
        assert found[name].attributed == pytest.approx(true, rel=0.02, abs=1e-4)
        parts = sum(float(v.sum()) for v in found[name].rows.values()) + sum(found[name].elsewhere.values())
        assert parts == pytest.approx(found[name].attributed, rel=1e-4, abs=1e-5)


def test_more_points_are_taken_where_the_sum_misses_and_those_there_are_kept(tmp_path, monkeypatch):
    before = with_bytes("llama")
    after = moved(before, 0.05)
    save(before, tmp_path)
    functions = {"harmful": nd.Margin(after, TOKENIZER, PROMPTS, SHORT)}
    seen = []
    at_point = paths._at_point
    monkeypatch.setattr(paths, "_at_point", lambda *args: seen.append(1) or at_point(*args))
    found = nd.path_attribution(after, functions, initial=tmp_path, points=3, tolerance=0.005)["harmful"]
    assert found.points[0] == 9 and len(seen) == found.points[0]
    again = nd.path_attribution(after, functions, initial=tmp_path, points=found.points[0], tolerance=None)["harmful"]
    close(found.rows, again.rows)
    with pytest.raises(ModelError, match="do not add up"):
        nd.path_attribution(after, functions, initial=tmp_path, points=1, tolerance=1e-9)


@pytest.mark.parametrize("in_tree", [True, False])
def test_batch_size_and_layout_do_not_matter(in_tree, tmp_path):
    before = with_bytes("qwen2")
    after = moved(before)
    save(before, tmp_path)
    function = nd.Margin(after, TOKENIZER, PROMPTS, SHORT)
    expected = nd.path_attribution(after, {"m": function}, initial=tmp_path, points=1, batch_size=1, tolerance=None)
    function.in_tree = in_tree
    found = nd.path_attribution(after, {"m": function}, initial=tmp_path, points=1, batch_size=50, tolerance=None)
    close(found["m"].rows, expected["m"].rows)
    close(found["m"].units, expected["m"].units)


def test_a_planted_row_carries_the_change(tmp_path):
    """Only one neuron, and the embeddings, move: it has all of what the embeddings have not."""
    before = with_bytes("llama")
    save(before, tmp_path)
    after = moved(before, 0.0)
    name = "model.layers.1.self_attn.o_proj"
    linear_sites(after)[name].weight[5] += 0.05
    function = nd.Margin(after, TOKENIZER, PROMPTS, SHORT)
    found = nd.path_attribution(after, {"m": function}, initial=tmp_path)["m"]
    assert found.change != 0
    assert float(found.rows[name][5]) == pytest.approx(found.change, rel=0.02)
    assert all(float(values.abs().sum()) == 0 for site, values in found.rows.items() if site != name)
    assert not found.elsewhere


def test_what_an_adapter_trains_elsewhere_counts(tmp_path):
    base = with_bytes("llama")
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm", "gate_proj"])
    adapted = get_peft_model(base, settings).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape)
    functions = {"m": nd.Margin(adapted, TOKENIZER, PROMPTS, SHORT)}
    found = nd.path_attribution(adapted, functions)["m"]
    assert found.attributed == pytest.approx(found.change, rel=0.02)
    kinds = {name.split(".")[-2] for name in found.elsewhere}  # PEFT takes every name that ends in "norm"
    assert kinds == {"norm", "input_layernorm", "post_attention_layernorm", "lm_head"}
    assert {name.rpartition(".")[2] for name in found.rows} == {"q_proj", "gate_proj"}
    torch.testing.assert_close(
        nd.refusal_margin(adapted, TOKENIZER, PROMPTS, SHORT).mean().item(), found.values[1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("method", ["dora", "16 bits"])
def test_other_adapters_and_dtypes_are_complete(method):
    base = with_bytes("llama")
    adapted = adapt(base, scale=0.1).eval() if method == "16 bits" else lora_on(base, use_dora=True).eval()
    if method == "dora":
        shake(adapted, 0.02)
    if method == "16 bits":
        adapted = adapted.to(torch.bfloat16)
    functions = {"m": nd.Margin(adapted, TOKENIZER, PROMPTS, SHORT)}
    found = nd.path_attribution(adapted, functions, tolerance=0.02 if method == "dora" else None)["m"]
    assert found.missed < (0.02 if method == "dora" else 0.3)


def steps(folder, kind):
    """A base model and three saved steps of a training of it."""
    base = with_bytes("llama")
    base.save_pretrained(folder / "base")
    for step in (10, 20, 30):
        target = folder / "run" / f"checkpoint-{step}"
        if kind == "full":
            moved(base, step / 3000).save_pretrained(target)
        else:
            adapt(with_bytes("llama"), scale=step / 300, modules_to_save=["norm"]).save_pretrained(target)
    return base


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_budget_along_saved_steps_sums_to_the_change(kind, tmp_path):
    base = steps(tmp_path, kind)
    kept = state(base)
    functions = {"m": nd.Margin(base, TOKENIZER, PROMPTS, SHORT)}
    found = nd.budget(base, functions, snapshots=[tmp_path / "run"])["m"]
    assert len(found.values) == 4 and len(found.steps) == 3
    assert found.attributed == pytest.approx(found.change, rel=0.02, abs=1e-4)
    assert all(torch.equal(kept[name], value) for name, value in base.state_dict().items())
    for at, step in enumerate((10, 20, 30)):
        where = tmp_path / "run" / f"checkpoint-{step}"
        if kind == "full":
            after = type(base).from_pretrained(where)
        else:
            from peft import PeftModel

            after = PeftModel.from_pretrained(with_bytes("llama"), where)
        margin = nd.refusal_margin(after.eval(), TOKENIZER, PROMPTS, SHORT).mean()
        assert found.values[at + 1] == pytest.approx(float(margin), abs=1e-4)


def test_a_straight_budget_is_the_path(tmp_path):
    base = with_bytes("llama")
    for at, share in enumerate((0.5, 1.0)):
        moved(base, share * 0.01).save_pretrained(tmp_path / f"checkpoint-{at + 1}")
    functions = {"m": nd.Margin(base, TOKENIZER, PROMPTS, SHORT)}
    along = change_along(base, [tmp_path])
    assert along.steps == [-1, 1, 2]
    path = nd.path_attribution(along, functions, points=2, tolerance=None)["m"]
    budget = nd.budget(along, functions, points=1, tolerance=None)["m"]
    close(budget.rows, path.rows)
    close(budget.units, path.units)
    assert budget.values[0] == path.values[0] and budget.values[-1] == path.values[-1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model, functions: nd.path_attribution(model, functions), ModelError, "does not tell what has changed"),
        (
            lambda model, functions: nd.path_attribution(adapt(model, scale=0.1), {}),
            ConfigError,
            "nothing to attribute",
        ),
        (
            lambda model, functions: nd.path_attribution(adapt(model, scale=0.1), functions, points=0),
            ConfigError,
            "one point or more",
        ),
        (lambda model, functions: nd.budget(model, functions), ConfigError, "nothing to compare"),
        (
            lambda model, functions: nd.budget(adapt(model, scale=0.1), functions, snapshots=["x"]),
            ModelError,
            "has an adapter on it",
        ),
        (lambda model, functions: nd.budget(model, functions, snapshots=["/nowhere"]), ModelError, "nowhere"),
    ],
)
def test_mistakes_are_told(make, error, message):
    model = with_bytes("llama")
    with pytest.raises(error, match=message):
        make(model, {"m": nd.Margin(model, TOKENIZER, PROMPTS, SHORT)})


def test_a_number_that_is_not_finite_is_named():
    adapted = adapt(with_bytes("llama"), scale=0.1)
    linear_sites(adapted)["model.layers.0.mlp.up_proj"].weight.fill_(float("nan"))
    with pytest.raises(DataError, match="is nan"):
        nd.path_attribution(adapted, {"loss": nd.ResponseLoss(adapted, examples())})


def test_initial_weights_of_sites_alone_leave_the_rest_unmoved(tmp_path):
    before = with_bytes("llama")
    after = moved(before)
    sites = linear_sites(before)
    functions = {"m": nd.Margin(after, TOKENIZER, PROMPTS, SHORT)}
    change = change_from(after, lambda name: sites[name].weight)
    found = nd.path_attribution(change, functions)["m"]
    assert not found.elsewhere and set(change.unknown) >= {"model.norm.weight", "lm_head.weight"}
    assert found.attributed == pytest.approx(found.change, rel=0.02)
