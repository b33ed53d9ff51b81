"""The neurons that carry most of the lost margin: against the whole table, over seeds, and where there is no loss."""

import numpy as np
import pytest

from helpers.change import JUDGING, with_change
from helpers.results import groups_of, make_results, population
from neurondrift.report.blocks import Table
from neurondrift.report.change.deciding import percent
from neurondrift.report.change.neurons import TITLE, section
from neurondrift.report.page import render_page
from neurondrift.report.text import render_text
from neurondrift.report.wording import hundredths
from neurondrift.statistics.design.ratios import Rules
from neurondrift.study.population import Compared
from neurondrift.study.stages.attribution.placing import MOST_NEURONS, largest_neurons, shares_by_site


def people_and_parts(seeds: int):
    rng = np.random.default_rng(3)
    people = population(seeds, rng)
    groups = groups_of(people, rng)
    parts_SN = rng.normal(-1, 3, (seeds, len(people.site))) / len(people.site)
    compared = Compared(
        population=people, members=groups, roles={}, judging=(), on={}, rules=Rules(1.25, 20, 0), bins=4
    )
    return compared, parts_SN


@pytest.mark.parametrize("seeds", [1, 3])
def test_they_are_the_largest_of_all_neurons(seeds):
    """By sorting every neuron in plain Python."""
    compared, parts_SN = people_and_parts(seeds)
    changes_S = parts_SN.sum(axis=1)
    found = largest_neurons(parts_SN, changes_S, compared)
    people = compared.population
    plain = []
    for n in range(len(people.site)):
        each = [float(parts_SN[s, n]) / float(changes_S[s]) for s in range(seeds)]
        plain.append((-sum(each) / seeds, n, each))
    for one, (minus, n, each) in zip(found, sorted(plain)[:MOST_NEURONS], strict=True):
        assert one["share"] == pytest.approx(-minus) and one["per_seed"] == pytest.approx(each)
        assert (one["site"], one["row"]) == (people.site_names[people.site[n]], people.row[n])
        assert one["site"] == f"model.layers.{one['layer']}.{one['module_type']}"
        assert one["groups"] == [name for name, member_N in compared.members.items() if member_N[n]]
    by_site = shares_by_site(parts_SN, changes_S, compared)
    assert sum(site["share"] for site in by_site) == pytest.approx(1)
    assert sum(site["n"] for site in by_site) == len(people.site)
    third = by_site[3]
    own = [-minus for minus, n, _ in plain if people.site_names[people.site[n]] == third["site"]]
    assert third["share"] == pytest.approx(sum(own)) and third["n"] == len(own)


def test_ties_go_to_the_lower_index_and_gains_are_not_listed():
    compared, parts_SN = people_and_parts(1)
    parts_SN = np.zeros_like(parts_SN)
    parts_SN[0, [7, 5, 900]] = -1.0
    parts_SN[0, 11] = 0.5
    found = largest_neurons(parts_SN, np.array([-2.5]), compared)
    people = compared.population
    assert [(one["site"], one["row"]) for one in found] == [
        (people.site_names[people.site[n]], people.row[n]) for n in (5, 7, 900)
    ]


def test_where_one_seed_lost_nothing_there_is_no_list():
    compared, parts_SN = people_and_parts(2)
    assert largest_neurons(parts_SN, np.array([-1.0, 0.2]), compared) == []
    assert shares_by_site(parts_SN, np.array([-1.0, 0.2]), compared) == []


@pytest.mark.parametrize("seeds", [1, 3])
def test_text_and_page_list_them(seeds):
    results = with_change(seeds)
    (made,) = (block for block in section(results).blocks if isinstance(block, Table))
    neurons = results["attribution"]["neurons"]
    assert len(made.rows) == len(neurons) == MOST_NEURONS
    for row, neuron in zip(made.rows, neurons, strict=True):
        assert row[1:5] == (
            str(neuron["layer"]),
            neuron["module_type"],
            str(neuron["row"]),
            hundredths(neuron["share"]),
        )
        assert row[-1] == (", ".join(neuron["groups"]) or "–")
    assert len(made.headers) == (6 if seeds == 1 else 9)
    together = percent(sum(neuron["share"] for neuron in neurons))
    assert f"together 20 neurons of {results['analysis']['n_neurons']:,}" in made.notes[0] and together in made.notes[0]
    text = render_text(results)
    assert TITLE.upper() in text and max(map(len, text.splitlines())) <= 100
    assert made.title in render_page(results, [])
    assert "chosen on the prompts that measure them" in " ".join(text.split())


def test_where_there_is_none_the_section_says_why():
    def said(results):
        (paragraph,) = section(results).blocks
        return paragraph.text

    assert "was not measured" in said(make_results(1))
    older = with_change()
    del older["attribution"]["neurons"]
    assert "by a version that listed no neurons" in said(older)
    gained = with_change(times=1.0, mean=1.0, **dict.fromkeys(JUDGING, 1.0))
    assert gained["attribution"]["neurons"] == [] and "no refusal margin was lost" in said(gained)
