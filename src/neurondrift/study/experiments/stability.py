"""How stable groups are: the noise floor, from re-drawn calibration examples, and the overlap of two files beside it.

Owns the loop over draws and the table of `neurondrift overlap`; the recipe of the groups is that of the stage groups,
the figures come from `groups.overlap`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from neurondrift.base.errors import DataError
from neurondrift.base.files import json_safe, read_json, write_json
from neurondrift.base.processes import alone, from_all, from_first, in_step
from neurondrift.base.progress import progress
from neurondrift.groups.group import Group, load_group
from neurondrift.groups.overlap import as_rows, overlap, overlap_by, stability
from neurondrift.models.data import DataReference, encode, load_examples
from neurondrift.models.sites import Sites, magnitudes_of
from neurondrift.report.findings.stability import Stability, StabilityFigures
from neurondrift.study.base_model import change_of_alignment, load_base
from neurondrift.study.folder import StudyFolder
from neurondrift.study.settings import Study
from neurondrift.study.stages.attribution.alignment import of_alignment
from neurondrift.study.stages.grouping import granularities, scored_groups, scores_to_cut
from neurondrift.study.stages.scoring import purposes, scores_for

Say = Callable[[str], None]


def redraw(study: Study, folder: StudyFolder, *, draws: int) -> Stability:
    """Score on `draws` re-drawn sets of calibration examples of the study's size and compare the groups.

    Returns
    -------
    Stability
        `draws`; `pool` (examples that the sets are drawn from) and `examples` (in each draw) for each purpose; those of
        the style and the gradient may be all that there are, and are then the same in every draw; `groups`:
        name -> granularity -> `StabilityFigures`.

    Raises
    ------
    DataError
        Fewer than two draws, or a pool that is no larger than a draw.
    """
    if draws < 2:
        raise DataError("The noise floor needs at least two draws", received=draws)
    sizes = {name: len(purpose.examples) for name, purpose in purposes(study).items()}
    pools = {name: len(load_examples(_pool(study, name))) for name in sizes}
    for name in ("safety", "utility"):
        if pools[name] <= sizes[name]:
            raise DataError(
                f"The {name} set has no examples left to re-draw from",
                received=f"{sizes[name]} of {pools[name]} are used",
                fix=f"use fewer (limit) or a larger set: score.{name}",
            )
    model, tokenizer = load_base(study, folder)
    sites = Sites(model)
    norms = magnitudes_of(sites, "neuron")
    change = change_of_alignment(study, folder, sites, tokenizer) if study.score.of_change else None
    made: dict[tuple[str, str], list[Group]] = {}
    total = draws * sum(sizes.values())
    number, count = in_step()
    with alone(), progress("stability", -(-total // count)) as advance:
        for draw in range(number, draws, count):
            scores = {}
            wanted = purposes(_redrawn(study, sizes, draw), seed=study.seed + draw)
            for name, purpose in wanted.items():
                encoded = encode(purpose.examples, tokenizer, max_length=purpose.max_length)
                taken = scores_for(
                    name, wanted, study, sites, tokenizer, change, encoded, lambda batch: advance(len(batch.names))
                )
                scores[name] = dict(taken)
            for granularity in granularities(study):
                chosen, of_sites = scores_to_cut(study, scores, granularity, norms)
                for name, group in scored_groups(chosen, study.groups, granularity, **of_sites).items():
                    made.setdefault((name, granularity), []).append(group)
            # Those of the alignment's change, where they can be made; last, as the bar counts the scores' examples.
            of_change = of_alignment(
                study, folder, sites, tokenizer, *(wanted[n].examples for n in ("safety", "utility"))
            )
            for name, group in of_change.groups.items():
                made.setdefault((name, "neuron"), []).append(group)
    all_draws = _of_all(made, folder.parts("stability"))
    return {
        "model_fingerprint": sites.fingerprint,
        "draws": draws,
        "pool": pools,
        "examples": sizes,
        "groups": from_first(lambda: _figures(all_draws)),
    }


def _figures(made: Mapping[tuple[str, str], Sequence[Group]]) -> dict[str, dict[str, StabilityFigures]]:
    figures: dict[str, dict[str, StabilityFigures]] = {}
    for (name, kind), groups in made.items():
        figures.setdefault(name, {})[kind] = cast(StabilityFigures, stability(list(groups))._asdict())
    return figures


def _of_all(made: dict[tuple[str, str], list[Group]], kept: Path) -> dict[tuple[str, str], list[Group]]:
    """The groups of all draws, in their order: each process tells the first its own, by files in a folder `kept`."""
    number, count = in_step()
    if count == 1:
        return made
    from_first(lambda: shutil.rmtree(kept) if kept.is_dir() else None)
    files = {
        (name, kind): [kept / f"{name}.{kind}.{number + at * count}.parquet" for at in range(len(groups))]
        for (name, kind), groups in made.items()
    }
    for key, groups in made.items():
        for file, group in zip(files[key], groups, strict=True):
            group.save(file)
    told = from_all([[*key, [file.name for file in own]] for key, own in files.items()])
    found: dict[tuple[str, str], list[Group]] = {}
    for name, kind, _ in told[0]:
        names = [file for own in told for *key, own_files in own if key == [name, kind] for file in own_files]
        names.sort(key=lambda file: int(file.split(".")[-2]))
        found[name, kind] = [load_group(kept / file) for file in names] if number == 0 else made[name, kind]
    from_first(lambda: shutil.rmtree(kept))
    return found


def _pool(study: Study, purpose: str) -> DataReference:
    """The whole set that the examples of a purpose are drawn from; of the gradient, the fine-tuning examples."""
    if purpose == "gradient":
        return study.finetune.data
    reference: DataReference = getattr(study.score, purpose)
    return reference.model_copy(update={"limit": None})


def _redrawn(study: Study, sizes: Mapping[str, int], draw: int) -> Study:
    """The study with other examples of the same sets, as many."""
    drawn: dict[str, Any] = {
        name: _pool(study, name).model_copy(update={"limit": size, "seed": study.seed + draw})
        for name, size in sizes.items()
        if name != "gradient"
    }
    return study.model_copy(update={"score": study.score.model_copy(update=drawn)})


def of_study(study: Study, folder: StudyFolder) -> str:
    """The optional stage: `results/stability.json` as the study's section `stability` asks for it."""
    found = redraw(study, folder, draws=study.stability.draws)
    from_first(lambda: write_json(results_file(folder), json_safe(found)))
    return f"{study.stability.draws} draws"


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [results_file(folder)]


def results_file(folder: StudyFolder) -> Path:
    """Where the figures lie."""
    return folder.results / "stability.json"


def show(folder: StudyFolder, *, say: Say) -> None:
    """What `results/stability.json` holds, as a table on the screen."""
    figures = read_json(results_file(folder))
    say(
        f"overlap between {figures['draws']} draws of {figures['examples']} from {figures['pool']} examples, same model"
    )
    say(f"{'group':<24}{'of':<8}{'members':>10}{'Jaccard':>9}{'range':>16}{'chance':>8}{'overlap':>9}")
    for name, by_granularity in figures["groups"].items():
        for granularity, values in by_granularity.items():
            spread = f"{values['jaccard_low']:.3f}-{values['jaccard_high']:.3f}"
            say(
                f"{name:<24}{granularity:<8}{values['members']:>10,.0f}{values['jaccard']:>9.3f}{spread:>16}"
                f"{values['chance_jaccard']:>8.3f}{values['overlap']:>9.3f}"
            )
    say(f"written to {results_file(folder)}")


def compare_groups(first: Path, second: Path, *, floor: Path | None, say: Say) -> dict[str, Any]:
    """Overlap of two group files overall, by layer and by module type, with both floors beside it.

    `floor` is a `stability.json` of one of the models; the group's name in it is taken from the first file's name.
    """
    one, two = load_group(first), load_group(second)
    whole = overlap(one, two)
    result: dict[str, Any] = {
        "first": str(first),
        "second": str(second),
        "overall": whole._asdict(),
        "by_layer": as_rows(overlap_by(one, two, layer_of_name)),
        "by_module_type": as_rows(overlap_by(one, two, module_type_of_name)),
        "same_model_floor": _floor(floor, first, one.granularity) if floor else None,
    }
    say(f"{len(one):,} and {len(two):,} {one.granularity}s, {whole.shared:,} shared")
    say(f"Jaccard {whole.jaccard:.4f}, overlap {whole.overlap:.4f}")
    say(f"by chance: Jaccard {whole.chance_jaccard:.4f}, overlap {whole.chance_overlap:.4f}")
    if result["same_model_floor"]:
        same = result["same_model_floor"]
        spread = f"{same['jaccard_low']:.4f}-{same['jaccard_high']:.4f}"
        say(f"same model, re-drawn examples: Jaccard {same['jaccard']:.4f} ({spread})")
    else:
        say("same model, re-drawn examples: not given (neurondrift stability makes it; pass --floor FILE)")
    for title, rows in (("layer", result["by_layer"]), ("module type", result["by_module_type"])):
        say(f"\n{title:<16}{'first':>10}{'second':>10}{'shared':>10}{'Jaccard':>9}{'chance':>8}")
        for row in rows:
            say(
                f"{row['name']:<16}{row['first']:>10,}{row['second']:>10,}{row['shared']:>10,}"
                f"{row['jaccard']:>9.3f}{row['chance_jaccard']:>8.3f}"
            )
    return json_safe(result)


def _floor(path: Path, group_file: Path, granularity: str) -> StabilityFigures:
    content = read_json(path)
    name = group_file.name.split(".")[0]
    try:
        figures: StabilityFigures = content["groups"][name][granularity]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} has no figures for {granularity}s of {name}", fix="run neurondrift stability"
        ) from error
    return figures


def layer_of_name(site: str) -> int:
    """The decoder block in a site's name: its first number."""
    match = re.search(r"\.(\d+)\.", site)
    return int(match[1]) if match else -1


def module_type_of_name(site: str) -> str:
    """The module type in a site's name: its last part, without an expert's index."""
    return re.sub(r"\.\d+$", "", site).rsplit(".", 1)[-1]
