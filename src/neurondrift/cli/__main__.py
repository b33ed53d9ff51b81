"""Entry point: every command, and the exit codes: 0 done; 2 a mistake of the user's; 1 a fault.

Importing a module of commands adds them to the application, in the order of `--help`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from cyclopts import CycloptsError

from neurondrift.base.errors import UserError
from neurondrift.base.files import storage_error
from neurondrift.base.processes import says
from neurondrift.base.progress import progress
from neurondrift.base.terminal import PlainFormatter, give_up_output, open_streams, plain
from neurondrift.cli.app import app

from neurondrift.cli import study, behaviour, drift  # noqa: F401  # isort: skip
from neurondrift.cli.questions import groups, interventions, plants  # noqa: F401  # isort: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and turns mistakes of the user's into one message and exit code 2.

    A disk that refuses is one of them. `arguments` default to those of the process.
    """
    open_streams()
    told = logging.StreamHandler()
    told.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=_log_level(), handlers=[told])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel of the hub, which no study needs
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")  # theirs to settle
    try:
        with progress(f"neurondrift {_command(sys.argv[1:] if arguments is None else arguments)}".rstrip()):
            app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
        sys.stdout.flush()
    except (UserError, CycloptsError) as error:
        _end_with(error)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        give_up_output()
    except KeyboardInterrupt:
        print("neurondrift: stopped; run the command again to go on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        place = None
        try:
            sys.stdout.flush()
        except OSError:
            give_up_output()
            place = "standard output"
        refused = storage_error(error, place)
        if refused is None:
            raise
        _end_with(refused)


def _end_with(error: Exception) -> NoReturn:
    if says(str(error)):
        print(f"neurondrift: {plain(str(error))}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def _command(arguments: Sequence[str]) -> str:
    """The command's name, for what is said while it works."""
    return next((word for word in arguments if word.isidentifier()), "")


def _log_level() -> str:
    level = os.environ.get("NEURONDRIFT_LOG", "WARNING").upper()
    return level if level in logging.getLevelNamesMapping() else "WARNING"


if __name__ == "__main__":
    main()
