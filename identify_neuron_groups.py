"""Form the groups of neurons: `neurondrift groups`, under the name that the study's users know."""

import sys

from neurondrift.cli.__main__ import main

if __name__ == "__main__":
    main(["groups", *sys.argv[1:]])
