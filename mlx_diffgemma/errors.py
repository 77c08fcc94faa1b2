"""Failures that are nobody's bug."""


class Error(Exception):
    """An expected failure (no such model, a damaged file, a prompt too long).

    Its message is one sentence for a user; the command line prints it and exits with 1.
    """


class CheckpointError(Error):
    """A checkpoint that cannot be found, fetched, read or trusted."""
