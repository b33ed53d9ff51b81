"""A study from the command line, with every experiment, that nothing has disturbed."""

import pytest

from helpers.faults import make_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Its folder, not to be changed by a test, and the seconds that its commands took."""
    work = tmp_path_factory.mktemp("faults")
    return work / "study", make_reference(work / "study", work)
