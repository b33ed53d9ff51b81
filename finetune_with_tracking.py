"""Fine-tune with drift snapshots: `neurondrift finetune`, under the name that the study's users know."""

import sys

from neurondrift.cli.__main__ import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
