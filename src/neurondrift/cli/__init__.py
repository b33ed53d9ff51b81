"""The command line: one thin function per command, in a module for each kind of thing that they are about.

Importing a module below adds its commands to the application, in the order of `--help`.
"""

from neurondrift.cli.app import app, main

from neurondrift.cli import study, behaviour, groups, interventions, subspaces, drift  # isort: skip

__all__ = ["app", "behaviour", "drift", "groups", "interventions", "main", "study", "subspaces"]
