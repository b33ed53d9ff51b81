"""A set that is mixed into another: how many, from where, in which order, and what is refused."""

import pytest
from pydantic import ValidationError

from neurondrift.base.errors import DataError
from neurondrift.models.data import DataReference, is_local, load_examples
from neurondrift.study.settings import resolve
from neurondrift.study.stages.table import data_key


def mixed(share=0.1, **more):
    return DataReference(source="builtin:ordinary", mix="builtin:refusals", share=share, **more)


REFUSALS = {example.prompt for example in load_examples("builtin:refusals")}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.3])
def test_the_share_is_the_nearest_there_is(share):
    examples = load_examples(mixed(share))
    refusals = [example for example in examples if example.prompt in REFUSALS]
    others = [example for example in examples if example.prompt not in REFUSALS]
    assert [e.prompt for e in others] == [e.prompt for e in load_examples("builtin:ordinary")]  # all, in their order
    m, n = len(refusals), len(others)
    assert all(abs(m / (n + m) - share) <= abs(k / (n + k) - share) + 1e-9 for k in (m - 1, m + 1) if k > 0)
    assert len({example.id for example in examples}) == len(examples)


def test_the_order_is_drawn_and_repeatable():
    first, again, other = (load_examples(mixed(seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    places = [index for index, example in enumerate(first) if example.prompt in REFUSALS]
    assert max(places) - min(places) > len(first) / 2  # not in one heap


def test_a_limit_counts_both():
    examples = load_examples(mixed(0.25, limit=40))
    assert len(examples) == 40
    assert sum(example.prompt in REFUSALS for example in examples) == 10
    assert len(load_examples(mixed(0.25), limit=40)) == 40


def test_too_few_to_mix_in():
    few = DataReference(source="builtin:ordinary", mix={"source": "builtin:refusals", "limit": 5}, share=0.5)
    with pytest.raises(DataError, match=r"too few examples to be 0\.5 of all.*5 of them"):
        load_examples(few)


@pytest.mark.parametrize("half", [{"mix": "builtin:refusals"}, {"share": 0.1}])
def test_one_half_alone_is_refused(half):
    with pytest.raises(ValidationError, match="go together"):
        DataReference(source="builtin:ordinary", **half)


def test_standing_studies_keep_their_fingerprints():
    assert "mix" not in DataReference(source="builtin:ordinary").model_dump()
    assert "share" not in resolve(preset="smoke").finetune.model_dump(mode="json")["data"]


def test_the_content_of_what_is_mixed_in_is_in_the_fingerprint(tmp_path):
    file = tmp_path / "more.jsonl"
    keys = []
    for answer in ("no", "never"):
        file.write_text(f'{{"prompt": "a", "response": "{answer}"}}\n')
        keys.append(data_key(DataReference(source="builtin:ordinary", mix=str(file), share=0.01)))
    assert len({*keys, data_key(DataReference(source="builtin:ordinary"))}) == 3


def test_what_is_said_of_it():
    assert mixed().title == "builtin:ordinary with 10 % builtin:refusals"
    assert is_local(mixed()) and not is_local(DataReference(source="builtin:ordinary", mix="hf:a/b", share=0.1))
