"""The commands of `ivl-kernels`, one a file; each has `add_arguments(parser)` and `run(args) -> int`."""


class CommandError(Exception):
    """Something the user can put right; its text is the one line that is printed."""
