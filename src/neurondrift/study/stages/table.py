"""What a stage of a study is, the table of those that every study has, and what enters their fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from neurondrift.base.files import sha256_of_file, sha256_of_value
from neurondrift.models.data import BUILTIN, DataReference
from neurondrift.study.folder import StudyFolder
from neurondrift.study.sections.attribute import AttributeSection
from neurondrift.study.settings import Section, Study
from neurondrift.study.stages import alignment, analysis, evaluation, finetuning, grouping, reporting, scoring
from neurondrift.study.stages.attribution import measuring


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: what it reads, how it is done, which files it makes; whatever is special about it is a field.

    `run` and `outputs` are called with the study and its folder, and the training seed where the stage is repeated for
    each; `run` also with what it `wants`, by name. It returns the line that sums the stage up.
    """

    name: str
    run: Callable[..., str]
    outputs: Callable[..., list[Path]]
    #: Stages above it. An optional one among them is read where it stands, and not missed where it does not.
    reads: tuple[str, ...] = ()
    #: Its table of the configuration, all of which is in its fingerprint but the settings that change no result.
    section: str | None = None
    no_result: frozenset[str] = frozenset()
    #: What its result depends on besides: other tables' settings, files that they name.
    extra_inputs: Callable[[Study], dict[str, Any]] = lambda study: {}
    #: Whether it is repeated for each training seed, and for (or from) which seeds it is done.
    per_seed: bool = False
    seeds: Callable[[Study], Sequence[int]] = lambda study: study.seeds
    #: Whether it is part of this study at all.
    when: Callable[[Study], bool] = lambda study: True
    #: Raises before any work begins where this machine lacks what it needs.
    checks: Callable[[Study], None] | None = None
    #: Raises, in words of its own, where what it reads is not there at all.
    lacks: Callable[[Study, StudyFolder], None] = lambda study, folder: None
    #: Done only where it is asked for, by a command or by `enabled` in its section.
    optional: bool = False
    #: What the paths in its manifest are relative to.
    root: Callable[[StudyFolder], Path] = lambda folder: folder.root
    #: Its files are scratch: they are deleted, and need not stand, once this stage is done.
    scratch_until: str | None = None
    #: Whether several processes do it together; otherwise the first does it, and the others wait.
    in_processes: bool = False
    #: Of `key` (its fingerprint, by which it knows what an interrupted run has left), `shared_key` (the same of what is
    #: one and the same for all seeds) and `say` (takes lines of text).
    wants: tuple[str, ...] = ()


def data_key(reference: DataReference) -> str:
    """What a data reference points to, by content where it is local."""
    if reference.mix is not None:
        own = reference.model_copy(update={"mix": None, "share": None})
        return sha256_of_value([data_key(own), data_key(reference.mix)])
    source = reference.source
    if source.startswith("builtin:"):
        file = BUILTIN.get(source.removeprefix("builtin:"), ("", ""))[0]
        if file:
            content = (resources.files("neurondrift.models") / "datasets" / file).read_bytes()
            return sha256_of_value([source, content.decode("utf-8")])
        return source
    path = Path(source.removeprefix("hf:")).expanduser()
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return sha256_of_value([source, *((str(each.relative_to(path)), sha256_of_file(each)) for each in files)])
    if not source.startswith("hf:") and path.is_file():
        return sha256_of_file(path)
    return source


def section_inputs(section: Section, no_result: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What a table of the configuration contributes to a fingerprint: its settings, and its data by content."""
    return {
        "settings": section.model_dump(mode="json", exclude=set(no_result)),
        "data": {name: data_key(value) for name, value in section if isinstance(value, DataReference)},
    }


def first_seed(study: Study) -> dict[str, Any]:
    """The first training seed, from which alignment, groups and resampling are drawn too."""
    return {"first seed": study.seed}


def _units(study: Study) -> dict[str, Any]:
    """The groups of hidden units are made only where one is to be frozen."""
    return {"units": True} if study.finetune.freeze_granularity == "unit" else {}


def _frozen_group(study: Study) -> dict[str, Any]:
    freeze = study.finetune.freeze
    return {"frozen group": data_key(DataReference(source=freeze))} if freeze else {}


def _suffixes(study: Study) -> dict[str, Any]:
    suffixes = study.evaluate.attack.suffixes
    return {"suffixes": data_key(DataReference(source=suffixes))} if suffixes else {}


def _openings(study: Study) -> dict[str, Any]:
    """What the margin of the snapshots is made with, where it is not the usual list."""
    named = study.attribute.openings
    if named == AttributeSection.model_fields["openings"].default:
        return {}
    is_file = isinstance(named, str) and named.endswith(".json")
    return {
        "openings": data_key(DataReference(source=str(named)))
        if is_file
        else section_inputs(named)
        if isinstance(named, Section)
        else named
    }


def known_base(study: Study) -> dict[str, Any]:
    """The model from before the alignment, where it is known: groups of its change are made then."""
    return {} if study.base is None else {"base": study.base}


def base_of_scores(study: Study) -> dict[str, Any]:
    """The same, where scores are of that change."""
    return known_base(study) if study.score.of_change else {}


def gradient_data(study: Study) -> dict[str, Any]:
    """The gradient scale is taken from fine-tuning examples, as long as fine-tuning sees them."""
    data, length = study.finetune.data, study.finetune.max_length
    return {"gradient data": [data.model_dump(mode="json"), data_key(data), length]}


STAGES = (
    Stage(
        name="align",
        section="align",
        run=alignment.align,
        outputs=alignment.outputs,
        when=lambda study: study.align.enabled,
        checks=alignment.check,
        in_processes=True,
        extra_inputs=first_seed,
    ),
    Stage(
        name="score",
        reads=("align",),
        section="score",
        no_result=frozenset({"checkpoint_activations"}),  # less memory, the same scores
        checks=scoring.check,
        run=scoring.score,
        outputs=scoring.outputs,
        extra_inputs=lambda study: first_seed(study) | gradient_data(study) | base_of_scores(study),
        root=lambda folder: folder.scratch,
        scratch_until="groups",
        in_processes=True,
    ),
    Stage(
        name="groups",
        reads=("score",),
        section="groups",
        run=grouping.groups,
        outputs=grouping.outputs,
        extra_inputs=lambda study: first_seed(study) | _units(study) | known_base(study),
    ),
    Stage(
        name="finetune",
        reads=("align", "groups"),
        section="finetune",
        no_result=frozenset({"report_to"}),
        checks=finetuning.check,
        per_seed=True,
        run=finetuning.finetune,
        in_processes=True,
        outputs=finetuning.outputs,
        extra_inputs=_frozen_group,
        wants=("key",),
    ),
    Stage(
        name="evaluate",
        reads=("finetune",),
        section="evaluate",
        per_seed=True,
        run=evaluation.evaluate,
        in_processes=True,
        outputs=evaluation.outputs,
        extra_inputs=lambda study: _suffixes(study) | _openings(study),
        wants=("key", "shared_key"),
    ),
    Stage(
        name="attribute",
        reads=("finetune", "evaluate"),
        section="attribute",
        no_result=frozenset({"enabled", "batch_size"}),
        per_seed=True,
        when=lambda study: study.attribute.enabled,
        run=measuring.attribute,
        in_processes=True,
        outputs=measuring.outputs,
        extra_inputs=_openings,
        wants=("say",),
    ),
    Stage(
        name="analyze",
        reads=("groups", "finetune", "evaluate", "attribute"),
        section="analyze",
        run=analysis.analyze,
        outputs=analysis.outputs,
        extra_inputs=first_seed,
    ),
    Stage(
        name="report",
        reads=("analyze", "intervene", "dose-response", "subspaces", "stability"),
        run=reporting.report,
        outputs=reporting.outputs,
    ),
)
