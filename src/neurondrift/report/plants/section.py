"""The section of a report on which scores find what was planted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurondrift.report.blocks import Block, Paragraph, Section, table
from neurondrift.report.plants.tables import BOARD, board_rows, causality_table, curve_table


def localisation_section(found: Mapping[str, Any]) -> Section:
    """What `neurondrift locate` found, from the content of `localisation.json`."""
    about = found["about"]
    units, whole = about["units"], about["of"]
    blocks: list[Block] = [
        Paragraph(
            f"Refusals were trained into {units['planted']:,} of {whole:,} units of {about['model']} "
            f"({about['plant']}), and are shown to stand and fall with them. A score is good here if it ranks these "
            "units first within their site. It says where refusals were trained in this model; it says nothing of a "
            "model whose alignment every weight took part in."
        ),
        causality_table(about["causality"]),
        table(
            "Scores",
            BOARD,
            board_rows(found["board"]),
            "lllrrrrrr",
            notes=(
                "AUROC .5 is chance. Decoy: of the units that were trained on something else, against all that were "
                "not planted: far from .5, the score sees training and not refusals.",
                f"Precision at k is {next(iter(found['board']))['base_rate']:.3f} by chance.",
            ),
        ),
    ]
    for way in ("put back", "held"):
        if any(one["way"] == way for one in found["curves"]):
            blocks.append(curve_table(found["curves"], way))
    return Section(title="Which scores find what was planted", blocks=tuple(blocks), figures=("localisation",))
