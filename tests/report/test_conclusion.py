"""The paragraph on interventions says what the runs show."""

from helpers.sentences import paragraph


def test_the_paragraph_says_what_the_runs_show():
    references = {"before": {"harmful": {"rate": 0.9}}, "after": {"harmful": {"rate": 0.5, "n": 20}}}

    def effect(what, value, null, p, direction, draws=20):
        measure = {"value": value, "null_mean": null, "p": p, "direction": direction, "p_floor": 1 / (1 + draws)}
        start, end = (0.9, 0.5) if what == "transplant" else (0.5, 0.9)
        share = {"group": (value - start) / (end - start), "null": (null - start) / (end - start)}
        return {
            "intervention": what, "group": "safety_top", "dose": 1, "draws": draws,
            "measures": {"harmful": measure}, "share": share,
        }  # fmt: skip

    strong = paragraph([effect("rewind", 0.8, 0.54, 1 / 21, "higher")], references)
    assert "from 0.90 to 0.50" in strong
    assert "brings 0.75 of the lost refusals back (matched random groups 0.10; p = 0.048, 20 draws)" in strong
    assert "is a cause of the loss" in strong
    weak = paragraph([effect("transplant", 0.86, 0.87, 0.5, "lower")], references)
    assert "loses 0.10 of them (matched random groups 0.08" in weak and "no evidence" in weak
    against = paragraph([effect("rewind", 0.3, 0.54, 1 / 21, "lower")], references)
    assert "worked against the loss" in against
    few = paragraph([effect("freeze", 0.8, 0.5, 0.33, "higher", draws=2)], references)
    assert "Too few draws" in few
    references["after"]["harmful"]["rate"] = 0.9
    assert "none were lost" in paragraph([effect("rewind", 0.9, 0.9, 1.0, "equal")], references)
