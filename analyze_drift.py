"""Analyse the drift and write the report: `neurondrift analyze` and `report`, under the name that users know."""

import sys

from neurondrift.cli.__main__ import main

if __name__ == "__main__":
    main(["analyze", *sys.argv[1:]])
    main(["report", *(argument for argument in sys.argv[1:] if argument != "--force"), "--force"])
