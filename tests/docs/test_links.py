"""Every link of every document leads somewhere: the file is there, and so is the heading; addresses are addresses."""

import pytest

from helpers.documents import DOCUMENTS, anchors, broken, links, name_of
from helpers.paths import REPOSITORY


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    assert broken(document, document.read_text()) == []


def test_there_is_something_to_check():
    assert len(DOCUMENTS) >= 20
    assert sum(len(links(document.read_text())) for document in DOCUMENTS) > 200


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](docs/methods.md)", []),
        ("[a](docs/method.md)", ["docs/method.md"]),
        ("[a](docs/methods.md#statistics)", []),
        ("[a](docs/methods.md#statistic)", ["docs/methods.md#statistic"]),
        ("# One\n\n[a](#one) [b](#two)", ["#two"]),
        ("# One\n\n# One\n\n[a](#one) [b](#one-1)", ["#one-1"]),
        ("[`a`](docs/none.md) and [b [c]](docs/none2.md)", ["docs/none.md", "docs/none2.md"]),
        ("![a](docs/none.png)", ["docs/none.png"]),
        ("`[a](docs/none.md)`\n\n```text\n[a](docs/none.md)\n```\n", []),
        ("[a](https://arxiv.org/abs/2402.05162)", []),
        ("[a](https://en.wikipedia.org/wiki/Power_(statistics))", []),
        ("[a](https://arxiv,org/abs)", ["https://arxiv,org/abs"]),
        ("[a](htps://arxiv.org)", ["htps://arxiv.org"]),
        ("<https://arxivorg>", ["https://arxivorg"]),
        ("[a]()", [""]),
    ],
)
def test_a_broken_link_is_found(text, wrong):
    assert broken(REPOSITORY / "README.md", text) == wrong


def test_anchors_are_those_of_github_and_of_the_site():
    text = "# Two words\n## `code`, and *more* – dashes\n### [A link](x.md)\n## Add …\n```bash\n# no heading\n```\n"
    assert anchors(text) == {"two-words", "code-and-more--dashes", "a-link"}
