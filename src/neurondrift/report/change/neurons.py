"""The section on the neurons that carry most of the lost margin."""

from __future__ import annotations

from neurondrift.report.blocks import Paragraph, Section, table
from neurondrift.report.change.deciding import nothing_to_share, percent
from neurondrift.report.change.tables import WAYS
from neurondrift.report.figures.maps import of_shares
from neurondrift.report.findings.statistical import Findings
from neurondrift.report.reading import analysis_of, attribution_of
from neurondrift.report.wording import clean, hundredths

TITLE = "Neurons that carry most of the lost margin"
NOT_LISTED = "Not listed: what the change does was not measured, or by a version that listed no neurons."
#: Seeds up to here have a column each.
FEW_SEEDS = 3
#: Why the list is to be read as a list of candidates.
WHAT_A_LIST_IS = (
    "These are the largest of many noisy parts, chosen on the prompts that measure them: on other prompts they will "
    "carry less, and others more. Parts have signs: other neurons gained margin. A list says where to look; whether "
    "refusals come back with these neurons is for neurondrift dose-response."
)


def section(results: Findings) -> Section:
    """The list, or why there is none."""
    found, analysis = attribution_of(results), analysis_of(results)
    if found is None or "neurons" not in found:
        return Section(title=TITLE, blocks=(Paragraph(NOT_LISTED),))
    neurons = found["neurons"]
    if why := nothing_to_share(results, found) or ("no neuron carries any" if not neurons else ""):
        return Section(title=TITLE, blocks=(Paragraph(f"Not listed: {why}."),))
    seeds = len(neurons[0]["per_seed"])
    each = seeds if 1 < seeds <= FEW_SEEDS else 0
    rows = [
        (
            str(rank),
            "–" if neuron["layer"] is None else str(neuron["layer"]),
            clean(neuron["module_type"]),
            str(neuron["row"]),
            hundredths(neuron["share"]),
            *(hundredths(share) for share in neuron["per_seed"][:each]),
            ", ".join(map(clean, neuron["groups"])) or "–",
        )
        for rank, neuron in enumerate(neurons, start=1)
    ]
    together = sum(neuron["share"] for neuron in neurons)
    of = f" of {analysis['n_neurons']:,} ({_small(len(neurons) / analysis['n_neurons'])})" if analysis else ""
    way = WAYS.get(found["way"], clean(found["way"]))
    made = table(
        f"Share of the lost refusal margin of harmful requests, along the {way}:",
        ("", "layer", "module", "row", "share", *(f"seed {i + 1} of {seeds}" for i in range(each)), "in the groups"),
        rows,
        "rrlrr" + "r" * each + "l",
        (
            f"together {len(neurons)} neurons{of} carry {percent(together)} of the lost margin"
            + (f"; shares are means over {seeds} seeds" if seeds > 1 else ""),
            "row: of the module's weight, counted from 0; all neurons are in attribution/neurons.parquet",
        ),
    )
    return Section(title=TITLE, blocks=(made, Paragraph(WHAT_A_LIST_IS)), maps=of_shares(found))


def _small(share: float) -> str:
    """A share of the neurons, which may be far below a percent."""
    return f"{100 * share:.2g} %"
