"""Every measure as a score: against plain passes and autograd, and what all of them have in common."""

import copy
from typing import get_args

import numpy as np
import pytest
import torch

import neurondrift as nd
from helpers.adapters import adapt
from helpers.attribution import TOKENIZER, built, moved, with_bytes
from helpers.families import FAMILIES, save
from neurondrift.attribution.changes import change_from
from neurondrift.attribution.measures.contrasts import CONSTANT, prompt_tokens
from neurondrift.attribution.measures.material import Material
from neurondrift.attribution.measures.patching import POINTS, pairs_of
from neurondrift.attribution.measures.registry import MEASURES, UNITS, measures, take
from neurondrift.attribution.measures.scores import UNMOVED
from neurondrift.base.errors import ArtifactError, ConfigError, DataError, ModelError
from neurondrift.groups.selection import select_top
from neurondrift.importance.methods import METHODS
from neurondrift.models.data import IGNORED, Example, encode
from neurondrift.models.parts import compounds
from neurondrift.models.sites import linear_sites
from neurondrift.study.sections.scoring import OfChange, OfNeurons, OfWeights, TwoSided

OPENINGS = nd.Openings(refusal=("I can't", "No"), compliance=("I will", "Sure", "S"))


def examples(texts, answer):
    return [Example(id=str(i), prompt=text, response=answer) for i, text in enumerate(texts)]


SAFETY = examples(["Harm a", "Break it", "How do I hurt b?", "c!"], "No.")
UTILITY = examples(["Help a", "Where is it", "Tea", "What do I make?", "d?"], "Yes, so.")


def material(model, **more):
    given = {"safety": SAFETY, "utility": UTILITY, "openings": OPENINGS, "batch_size": 3} | more
    return Material(model=model, tokenizer=TOKENIZER, **given)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model, the folder that it was before, and what it is scored on."""
    before = with_bytes("llama")
    folder = save(before, tmp_path_factory.mktemp("before"))
    return moved(before, 0.02), folder


def test_the_registry_holds_every_method_and_what_settings_offer():
    assert set(METHODS) < set(MEASURES)
    assert set(MEASURES) == {n for kind in (OfWeights, OfNeurons, TwoSided, OfChange) for n in get_args(kind)}
    assert {name for name, one in MEASURES.items() if one.two_sided} == set(get_args(TwoSided))
    assert {name for name, one in MEASURES.items() if one.weights} == set(get_args(OfWeights))
    assert {name for name, one in MEASURES.items() if one.base} == set(get_args(OfChange))
    for name, method in METHODS.items():
        assert MEASURES[name].needs == method.needs


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe"])
def test_every_score_covers_every_member_in_order_alone_and_together(family, unit, tmp_path):
    before = with_bytes(family)
    after = moved(before, 0.02)
    found = material(after, base=save(before, tmp_path))
    sites = linear_sites(after)
    sizes = {name: shape[0] for name, shape in sites.shapes.items()}
    if unit != "row":
        sizes = {name: one.count for name, one in compounds(sites, unit).items()}
    together = dict(measures(found, unit=unit))
    assert list(together) == list(MEASURES)
    for name, values in together.items():
        assert {site: len(own) for site, own in values.items()} == sizes and list(values) == list(sizes)
        assert all(own.dtype == torch.float32 and own.device.type == "cpu" for own in values.values())
        assert values.undefined == sum(values.reasons.values()), name
    again = material(after, base=tmp_path, batch_size=50)
    for name in ("snip_ratio", "path_attribution", "functional_drift_shrunk", "cohens_d", "attribution_patching"):
        for site, own in take(name, again, unit).items():
            some = float(together[name][site].nan_to_num().abs().max())
            torch.testing.assert_close(own, together[name][site], rtol=1e-2, atol=1e-2 * some + 1e-6, equal_nan=True)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_rows_and_columns_of_a_head_are_those_of_no_other(family):
    model = built(family)
    sites = linear_sites(model)
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))

    def given(name):
        seen = []
        handle = sites[name].owner.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        handle.remove()
        return seen[0]

    found = compounds(sites, "head")
    assert len(found) == 2
    one = next(iter(found.values()))
    assert one.count == 4 and one.count * one.size == sites[one.down].shape[1]
    before = given(one.down)
    kept = {site: sites[site].weight.clone() for site, _, _ in one.ups}
    for head in range(one.count):
        for site, part in one.parts(np.array([head]), sites.shapes).items():
            if site != one.down:
                sites[site].weight[torch.from_numpy(part.rows)] += 0.5
        changed = (given(one.down) - before).abs().amax(dim=(0, 1)).reshape(one.count, one.size).amax(dim=1) > 1e-6
        assert changed.tolist() == [other == head for other in range(one.count)], site
        for site, weight in kept.items():
            sites[site].weight.copy_(weight)


def dense_gradients(model, rows):
    """Each example's gradient of every site, float64 `[out, in]`."""
    double = copy.deepcopy(model).double()
    sites = linear_sites(double)
    found = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        log = double(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        kept = labels[1:] != -100
        loss = -log[kept].gather(1, labels[1:][kept][:, None]).mean()
        gradients = torch.autograd.grad(loss, [site.tensor for site in sites.values()])
        found.append({name: site.oriented(g) for (name, site), g in zip(sites.items(), gradients, strict=True)})
    return found, double


def of_members(one, tensors, member, of=lambda values: values.sum()):
    """A sum over all weights of one member, each once, from `[out, in]` of each site."""
    total = 0.0
    for site, offset, step in one.ups:
        total += of(tensors[site][one.rows(offset, step)[member]])
    return total + of(tensors[one.down][:, one.size * member : one.size * (member + 1)])


@pytest.mark.parametrize("unit", ["hidden_unit", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_of_units_and_heads_are_those_of_their_weights(family, unit):
    model = with_bytes(family)
    gradients, double = dense_gradients(model, encode(SAFETY, TOKENIZER))
    weights = {name: site.weight for name, site in linear_sites(double).items()}
    snip = {name: w.abs() * sum(g[name].abs() for g in gradients) / len(gradients) for name, w in weights.items()}
    square = {name: sum(g[name] ** 2 for g in gradients) / len(gradients) for name in weights}
    found = material(model)
    for name, one in compounds(linear_sites(model), unit).items():
        columns = [weights[one.down] * g[one.down] for g in gradients]
        for member in range(one.count):
            own = slice(one.size * member, one.size * (member + 1))
            expected = {
                "snip": of_members(one, snip, member),
                "magnitude": of_members(one, weights, member, lambda values: values.abs().sum()),
                "gradient": of_members(one, square, member).sqrt(),
                "taylor": sum(product[:, own].sum().abs() for product in columns) / len(columns),
            }
            for score, value in expected.items():
                assert float(take(score, found, unit)[name][member]) == pytest.approx(float(value), rel=1e-3), score


def test_ratios_are_scores_on_safety_text_over_those_on_ordinary_text():
    model = with_bytes("llama")
    both = [nd.score(model, encode(part, TOKENIZER), method="wanda") for part in (SAFETY, UTILITY)]
    found = nd.measure("wanda_ratio", model, TOKENIZER, SAFETY, UTILITY)
    for name, ratio in found.items():
        torch.testing.assert_close(ratio, both[0][name].sum(1) / both[1][name].sum(1), rtol=1e-4, atol=0)


def last_tokens(model, part):
    """Outputs and inputs of every site, and what leaves every block, at the last token of each prompt, float64."""
    double = copy.deepcopy(model).double()
    sites = linear_sites(double)
    seen = {}
    for name, site in sites.items():
        site.owner.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0][0, -1], output[0, -1])})
        )
    for layer, block in enumerate(double.model.layers):
        block.register_forward_hook(
            lambda module, args, output, layer=layer: seen.update(
                {layer: (output[0] if isinstance(output, tuple) else output)[0, -1]}
            )
        )
    rows = []
    for example in part:
        ids = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": example.prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        with torch.no_grad():
            double(input_ids=torch.tensor([ids]), use_cache=False)
        rows.append(dict(seen))
    return rows


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_contrasts_equal_those_of_plain_passes(family):
    model = with_bytes(family)
    both = [last_tokens(model, part) for part in (SAFETY, UTILITY)]
    found = material(model)
    sites = linear_sites(model)

    def means(pick):
        return [torch.stack([pick(row) for row in part]) for part in both]

    def cohen(first, second):
        scatter = sum(((part - part.mean(0)) ** 2).sum(0) for part in (first, second))
        return (first.mean(0) - second.mean(0)).abs() / (scatter / (len(first) + len(second) - 2)).sqrt()

    scored = {name: take(name, found) for name in ("activation_contrast", "cohens_d", "refusal_direction")}
    assert scored["cohens_d"].reasons == {CONSTANT: scored["cohens_d"].undefined}
    for name, site in sites.items():
        first, second = means(lambda row, name=name: row[name][1])
        difference = (first.mean(0) - second.mean(0)).abs().float()
        torch.testing.assert_close(scored["activation_contrast"][name], difference, rtol=1e-3, atol=1e-5)
        varies = ~scored["cohens_d"][name].isnan()
        kept = varies & (difference > 1e-4)
        torch.testing.assert_close(
            scored["cohens_d"][name][kept], cohen(first, second).float()[kept], rtol=1e-2, atol=1e-3
        )
        apart = [part.mean(0) for part in means(lambda row, name=name: row[name][0])]
        direction = (apart[0] - apart[1]).float()
        if direction.norm() > 1e-4:
            cosine = torch.nn.functional.cosine_similarity(site.weight, direction[None]).abs()
            torch.testing.assert_close(scored["refusal_direction"][name], cosine, rtol=1e-3, atol=1e-4)
    for unit in ("hidden_unit", "head"):
        for name, one in compounds(sites, unit).items():
            first, second = means(lambda row, one=one: row[one.down][0])
            difference = (first.mean(0) - second.mean(0)).reshape(one.count, one.size).norm(dim=1).float()
            torch.testing.assert_close(take("activation_contrast", found, unit)[name], difference, rtol=1e-3, atol=1e-5)
            layer = sites[one.down].layer
            residual = [part.mean(0) for part in means(lambda row, layer=layer: row[layer])]
            direction = (residual[0] - residual[1]).float()
            writes = sites[one.down].weight.T.reshape(one.count, one.size, -1)
            along = (writes @ (direction / direction.norm())).square().sum(dim=1)
            cosine = (along / writes.square().sum(dim=(1, 2))).sqrt()
            torch.testing.assert_close(take("refusal_direction", found, unit)[name], cosine, rtol=1e-3, atol=1e-4)


def test_two_sided_scores_are_the_same_with_both_texts_exchanged():
    model = with_bytes("llama")
    for name, one in MEASURES.items():
        if not one.base and one.needs != "nothing":
            first, second = (
                take(name, material(model, safety=a, utility=b)) for a, b in ((SAFETY, UTILITY), (UTILITY, SAFETY))
            )
            alike = all(
                torch.allclose(own, second[site], rtol=1e-4, atol=1e-6, equal_nan=True) for site, own in first.items()
            )
            assert alike == one.two_sided, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attribution_patching_equals_plain_autograd_along_the_embeddings(family):
    model = with_bytes(family)
    found = material(model)
    pairs = pairs_of(found)
    tokens = [prompt_tokens(found, part) for part in ("safety", "utility")]
    assert pairs and all(len(tokens[0][one]) == len(tokens[1][other]) for one, other in pairs)
    double = copy.deepcopy(model).double()
    sites = linear_sites(double)
    embed = double.get_input_embeddings()
    seen = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad() if output.requires_grad else None
            seen[name] = args[0], output
            return output

        return hook

    for name, site in sites.items():
        site.owner.register_forward_hook(keep(name))

    def openings_from(prompt):
        """One forward for each opening: the log-probability of each, and what was seen."""
        for texts in (OPENINGS.refusal, OPENINGS.compliance):
            for text in texts:
                if not any(other != text and text.startswith(other) for other in texts):
                    own = TOKENIZER(text, add_special_tokens=False)["input_ids"]
                    inputs = torch.cat([prompt, embed(torch.tensor(own)).detach()])[None]
                    log = double(inputs_embeds=inputs, use_cache=False).logits[0].log_softmax(-1)
                    at = len(prompt) - 1
                    yield texts is OPENINGS.refusal, sum(log[at + k, t] for k, t in enumerate(own)), dict(seen)

    rows = {name: 0.0 for name in sites}
    columns = {one.down: 0.0 for unit in UNITS[1:] for one in compounds(sites, unit).values()}
    for one, other in pairs:
        ends = [embed(torch.tensor(part[at])).detach() for part, at in zip(tokens, (one, other), strict=True)]
        with torch.no_grad():
            states = [[kept for _, _, kept in openings_from(end)] for end in ends]
        for j in range(POINTS):
            share = (j + 0.5) / POINTS
            mixed = (share * ends[0] + (1 - share) * ends[1]).requires_grad_(True)
            logs = list(openings_from(mixed))
            sides = [torch.stack([log for is_refusal, log, _ in logs if is_refusal is side]) for side in (True, False)]
            (sides[0].logsumexp(0) - sides[1].logsumexp(0)).backward()
            for (_, _, kept), first, second in zip(logs, *states, strict=True):
                for name, site in sites.items():
                    gradient = kept[name][1].grad[0]
                    apart = [(first[name][k] - second[name][k])[0].detach() for k in (0, 1)]
                    rows[name] += (apart[1] * gradient).sum(0) / POINTS / len(pairs)
                    if name in columns:
                        columns[name] += (apart[0] * (gradient @ site.weight)).sum(0) / POINTS / len(pairs)
    for name, values in take("attribution_patching", found).items():
        torch.testing.assert_close(values, rows[name].float(), rtol=1e-2, atol=1e-5)
    for unit in UNITS[1:]:
        for name, one in compounds(linear_sites(model), unit).items():
            expected = columns[one.down].reshape(one.count, one.size).sum(1).float()
            torch.testing.assert_close(take("attribution_patching", found, unit)[name], expected, rtol=1e-2, atol=1e-5)


def test_measures_of_a_change_of_heads_are_those_of_their_dense_change(llama):
    after, folder = llama
    found = material(after, base=folder)
    before = with_bytes("llama")
    first, last = linear_sites(before), linear_sites(after)
    delta = {name: last[name].weight.double() - first[name].weight.double() for name in last}
    asked = [encode(part, TOKENIZER) for part in (SAFETY, UTILITY)]
    gradients = []
    for part in asked:
        of_examples, _ = dense_gradients(before, part)
        gradients.append({name: sum(g[name] for g in of_examples) / len(of_examples) for name in delta})
    for name, one in compounds(last, "head").items():
        for head in range(one.count):
            length = of_members(one, delta, head, lambda d: (d**2).sum())
            assert float(take("change_length", found, "head")[name][head]) == pytest.approx(length.sqrt().item(), 1e-4)
            cosines = []
            for part in gradients:
                dot = of_members(one, {n: delta[n] * part[n] for n in delta}, head)
                cosines.append(-dot / (length * of_members(one, part, head, lambda g: (g**2).sum())).sqrt())
            expected = float(cosines[0] - cosines[1])
            assert float(take("provenance", found, "head")[name][head]) == pytest.approx(expected, abs=2e-3)
    path = found.path("safety")
    whole = sum(float(path.rows[name].sum()) for name in path.rows)
    assert whole + sum(path.elsewhere.values()) == pytest.approx(path.attributed, rel=1e-3)


def test_functional_drift_of_a_head_is_what_its_change_does_to_outputs(llama):

    from helpers.oracles import stored_inputs

    after, folder = llama
    sets = [encode(part, TOKENIZER) for part in (SAFETY, UTILITY)]
    # What predicts a response token stands one place before it.
    shown = [[{**row, "labels": [*row["labels"][1:], IGNORED]} for row in rows] for rows in sets]
    inputs = [stored_inputs(after, rows) for rows in shown]
    before, last = linear_sites(with_bytes("llama")), linear_sites(after)
    found = nd.functional_drift(after, *sets, initial=folder, shared=0)
    for name, one in compounds(last, "head").items():
        for part, side in zip(inputs, ("safety", "utility"), strict=True):
            for head in range(one.count):
                power = 0.0
                for site in one.sites:
                    delta = (last[site].weight.double() - before[site].weight.double()).numpy()
                    own = one.parts(np.array([head]), last.shapes)[site]
                    moved_by = part[site][:, own.columns] @ delta[:, own.columns].T if site == one.down else None
                    moved_by = part[site] @ delta[own.rows].T if moved_by is None else moved_by
                    power += (moved_by**2).sum(axis=1).mean()
                assert float(getattr(found.heads[name], side)[head]) == pytest.approx(power, rel=2e-3)


def test_an_adapter_has_its_base_and_a_change_is_as_good(llama, tmp_path):
    base = with_bytes("llama")
    adapted = adapt(with_bytes("llama"), scale=0.1).eval()
    own = material(adapted)
    assert own.has_base and not material(base).has_base
    save(base, tmp_path)
    for name in ("change_length", "functional_drift_shrunk", "path_attribution"):
        given = take(name, material(change_from(adapted)))
        for site, values in take(name, own).items():
            torch.testing.assert_close(values, given[site], equal_nan=True)
    after, folder = llama
    alone, through = material(after, base=folder), material(change_from(after, folder))
    for name in ("snip", "cohens_d", "attribution_patching", "taylor"):
        for site, values in take(name, alone).items():
            torch.testing.assert_close(values, take(name, through)[site], equal_nan=True)


def test_a_base_that_is_the_model_itself_gives_no_number_and_says_why(tmp_path):
    model = with_bytes("llama")
    found = material(model, base=save(model, tmp_path))
    for unit in UNITS:
        for name in ("functional_drift_ratio", "functional_drift_shrunk", "path_attribution", "provenance"):
            values = take(name, found, unit)
            assert all(bool(own.isnan().all()) for own in values.values())
            assert values.reasons == {UNMOVED: sum(map(len, values.values()))}
        assert all(bool((own == 0).all()) for own in take("change_length", found, unit).values())
    with pytest.raises(nd.UserError, match="all are undefined"):
        select_top(take("provenance", found), fraction=0.1, granularity="neuron", undefined="leave out")


def test_what_is_missing_is_said_before_anything_is_computed(llama, tmp_path):
    after, folder = llama
    with pytest.raises(ConfigError, match="no such score"):
        take("snips", material(after))
    with pytest.raises(ConfigError, match="no such unit"):
        take("snip", material(after), "layer")
    with pytest.raises(ConfigError, match=r"provenance needs the model from before .* name it as the base"):
        next(measures(material(after), ["snip", "provenance"]))
    with pytest.raises(DataError, match="two examples or more"):
        nd.measure("functional_drift_ratio", after, TOKENIZER, SAFETY, UTILITY[:1], base=folder)
    with pytest.raises(DataError, match="two prompts or more"):
        take("cohens_d", material(after, harmful=["one"]))
    with pytest.raises(DataError, match="No harmful prompt has as many tokens"):
        take("attribution_patching", material(after, harmful=["a" * 20], harmless=["b"]))
    with pytest.raises(DataError, match="no harmful prompts"):
        take("activation_contrast", material(after, safety=encode(SAFETY, TOKENIZER)))
    with pytest.raises(DataError, match="no examples of safety"):
        take("snip", material(after, safety=[]))
    left = [name for name, _ in measures(material(after, utility=UTILITY[:1], harmless=["b"]))]
    assert left == [n for n, one in MEASURES.items() if not one.base and one.question != "carries"]


def test_a_base_of_another_shape_or_tokenizer_is_refused(llama, tmp_path):
    after, folder = llama
    wider = copy.deepcopy(after)
    wider.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(ArtifactError, match="in another shape"):
        take("change_length", material(after, base=save(wider, tmp_path / "wider")))
    other = tmp_path / "other"
    save(after, other)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: (place + 1) % 3 if place < 3 else place for token, place in TOKENIZER.get_vocab().items()}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(other)
    with pytest.raises(ModelError, match="another tokenizer than the model"):
        take("change_length", material(after, base=other))
    TOKENIZER.save_pretrained(other)
    take("change_length", material(after, base=other))
    adapted = adapt(with_bytes("llama"), scale=0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    through = take("change_length", material(after, base=tmp_path / "adapter"))
    for site, values in take("change_length", material(after, base=folder)).items():
        torch.testing.assert_close(values, through[site])
