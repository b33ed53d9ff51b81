"""Entry point: every command, and the exit codes: 0 done; 2 a mistake of the user's; 1 a fault.

Importing a module of commands adds them to the application, in the order of `--help`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from cyclopts import CycloptsError

from neurondrift.base.errors import UserError
from neurondrift.cli.app import app

from neurondrift.cli import study, behaviour, groups, interventions, subspaces, drift  # noqa: F401  # isort: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and turns mistakes of the user's into one message and exit code 2.

    `arguments` default to those of the process.
    """
    logging.basicConfig(
        level=os.environ.get("NEURONDRIFT_LOG", "WARNING").upper(), format="%(levelname)s %(name)s: %(message)s"
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")  # theirs to settle
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
    except (UserError, CycloptsError) as error:
        print(f"neurondrift: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("neurondrift: stopped; run the command again to go on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
