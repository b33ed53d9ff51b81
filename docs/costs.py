"""What a study took, stage by stage, beside what `neurondrift verify` foretold: from the file of benchmarks/demo.py."""

import re

UNITS = {"h": 3600, "m": 60, "s": 1}
#: Stage or stages and a duration, as `verify` says them: `score 10m42s, groups 4m40s, analyze, report 20.0s`.
FORETOLD = re.compile(r"([a-z]+(?:, [a-z]+)?) ((?:[\d.]+[hms])+)(?=,|$)")


def seconds(duration: str) -> float:
    """Of `20.0s`, `10m42s`, `1h02m`."""
    return sum(float(count) * UNITS[unit] for count, unit in re.findall(r"([\d.]+)([hms])", duration))


def foretold(said: str) -> dict[str, float]:
    """Stage (or stages, with commas) -> seconds; `estimate` is all of it."""
    return {stages: seconds(duration) for stages, duration in FORETOLD.findall(said)}


def table(costs: dict) -> list[str]:
    """Time and memory of each stage. Stages that are foretold together are one row; what was not foretold
    (interventions, attempts that were broken off) comes after the sum of what was."""
    before, busy = foretold(costs["foretold"]), costs.get("busy", {})
    rows: dict[str, list[dict]] = {}
    for attempt in costs["attempts"]:
        stage = attempt["stage"]
        name = next((stages for stages in before if stage in stages.split(", ")), stage)
        rows.setdefault(name if attempt["ended"] else f"{stage}, broken off", []).append(attempt)
    known = {name: attempts for name, attempts in rows.items() if name in before}
    other = {name: attempts for name, attempts in rows.items() if name not in before}
    lines = [
        f"| stage | seconds | foretold | taken / foretold | peak memory (GB) |{' one core busy |' * bool(busy)}",
        f"| --- | ---: | ---: | ---: | ---: |{' ---: |' * bool(busy)}",
        *(_row(name, attempts, before[name], busy) for name, attempts in known.items()),
        _row("**sum**", [each for attempts in known.values() for each in attempts], before.get("estimate"), busy),
        *(_row(name, attempts, None, busy) for name, attempts in other.items()),
    ]
    return lines + [_row("**all**", costs["attempts"], None, busy)] * bool(other)


def in_short(costs: dict) -> str:
    """Time, memory and machine in one sentence."""
    minutes = sum(attempt["seconds"] for attempt in costs["attempts"]) / 60
    peak = max(attempt["peak_gb"] for attempt in costs["attempts"] if attempt["peak_gb"])
    machine = costs["machine"]
    return f"It took {minutes:.0f} min and {peak:.0f} GB on {machine['cores']} cores ({machine['processor']})."


def _row(name: str, attempts: list[dict], expected: float | None, busy: dict[str, float]) -> str:
    took = sum(attempt["seconds"] for attempt in attempts)
    peaks = [attempt["peak_gb"] for attempt in attempts if attempt["peak_gb"]]
    cells = [
        name,
        f"{took:,.0f}",
        f"{expected:,.0f}" if expected else "–",
        f"{took / expected:.2f}" if expected else "–",
        f"{max(peaks):.1f}" if peaks else "–",
    ]
    if busy:
        cells.append(f"{busy[name]:,.0f} ({busy[name] / took:.2f} ×)" if name in busy else "")
    return f"| {' | '.join(cells)} |"
