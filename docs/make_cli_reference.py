"""Write docs/cli.md from the commands' own help; with --print, to standard output."""

import sys
from pathlib import Path

from neurondrift.cli.__main__ import app


def reference() -> str:
    """The commands and their flags as Markdown."""
    text = app.generate_docs(output_format="markdown", recursive=True)
    return "<!-- made by docs/make_cli_reference.py from --help: do not edit -->\n\n" + text.strip() + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(reference())
    else:
        (Path(__file__).parent / "cli.md").write_text(reference())
