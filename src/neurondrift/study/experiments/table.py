"""The table of the optional stages: what a study may be asked beyond the stages that every study has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from neurondrift.interventions.outcomes import SCHEMA_VERSION
from neurondrift.models.data import DataReference
from neurondrift.study.experiments import dose_response, intervene, stability, subspaces
from neurondrift.study.settings import Study
from neurondrift.study.stages.table import (
    Stage,
    base_of_scores,
    data_key,
    first_seed,
    gradient_data,
    known_base,
    section_inputs,
)

ONLY_WHEN = frozenset({"enabled"})


def _trained_seed(section: str, study: Study) -> Sequence[int]:
    """The one training seed that is acted on; none where the study has no such seed, which the stage says itself."""
    seed = study.seed_of(getattr(study, section))
    return [seed] if seed in study.seeds else []


def _acted_on(study: Study) -> dict[str, Any]:
    """What interventions depend on besides: how answers are made and judged, and the files that are named."""
    asked = study.intervene
    files = [*asked.groups, *(str(path) for path in (asked.scores, asked.adapter) if path is not None)]
    return first_seed(study) | {
        "evaluate": section_inputs(study.evaluate),
        "resamples": study.analyze.resamples,
        "layout": SCHEMA_VERSION,
        "openings": study.attribute.model_dump(mode="json")["openings"],
        "files": [data_key(DataReference(source=file)) for file in files],
    }


def _dosed(study: Study) -> dict[str, Any]:
    """What the dose-response depends on besides: the prompts, and how neurons are scored for safety."""
    return (
        first_seed(study)
        | base_of_scores(study)
        | {
            "evaluate": section_inputs(study.evaluate),
            "score": section_inputs(study.score),
            "resamples": study.analyze.resamples,
            "layout": dose_response.SCHEMA_VERSION,
            "openings": study.attribute.model_dump(mode="json")["openings"],
        }
    )


def _directions(study: Study) -> dict[str, Any]:
    """What the rank level depends on besides: the data of the directions, and how refusals are measured."""
    return first_seed(study) | {
        "score": section_inputs(study.score),
        "evaluate": section_inputs(study.evaluate) if study.subspaces.draws else None,
        "layout": subspaces.SCHEMA_VERSION,
        "resamples": study.analyze.resamples,
    }


def _redrawn(study: Study) -> dict[str, Any]:
    """What the noise floor depends on besides: how scores and groups are made."""
    made = {"score": section_inputs(study.score), "groups": section_inputs(study.groups)}
    return first_seed(study) | made | gradient_data(study) | known_base(study)


OPTIONAL = (
    Stage(
        name="intervene",
        reads=("groups", "finetune"),
        section="intervene",
        no_result=ONLY_WHEN,
        optional=True,
        run=intervene.of_study,
        in_processes=True,
        outputs=intervene.outputs,
        seeds=partial(_trained_seed, "intervene"),
        lacks=intervene.lacks,
        extra_inputs=_acted_on,
        wants=("say",),
    ),
    Stage(
        name="dose-response",
        reads=("align", "finetune"),
        section="dose_response",
        no_result=ONLY_WHEN,
        optional=True,
        run=dose_response.of_study,
        outputs=dose_response.outputs,
        seeds=partial(_trained_seed, "dose_response"),
        lacks=dose_response.lacks,
        extra_inputs=_dosed,
        wants=("say",),
    ),
    Stage(
        name="subspaces",
        reads=("align", "finetune"),
        section="subspaces",
        no_result=ONLY_WHEN,
        optional=True,
        run=subspaces.of_study,
        outputs=subspaces.outputs,
        extra_inputs=_directions,
        lacks=subspaces.lacks,
    ),
    Stage(
        name="stability",
        reads=("align",),
        section="stability",
        no_result=ONLY_WHEN,
        optional=True,
        run=stability.of_study,
        in_processes=True,
        outputs=stability.outputs,
        extra_inputs=_redrawn,
    ),
)
