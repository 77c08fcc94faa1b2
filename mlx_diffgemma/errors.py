"""The failures that users are told about in one sentence, as opposed to defects."""


class Error(Exception):
    """An expected failure (no such model, a damaged file, a prompt too long).

    Its message is one sentence for a user; the command line prints it and exits with 1.
    """


class CheckpointError(Error):
    """A checkpoint that cannot be found, fetched, read or trusted."""
