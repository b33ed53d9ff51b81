"""Where the repository, its source and the data that is shared with it lie."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
SOURCE = REPOSITORY / "src" / "neurondrift"
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
