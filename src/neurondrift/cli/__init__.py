"""The command line: one thin function per command, in a module for each kind of thing that they are about."""
