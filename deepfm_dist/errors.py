"""User errors as one line: what is wrong, the value, where, and a fix."""


class DeepFMError(Exception):
    """A mistake of the user's or the machine's; commands print it as one line and exit 2."""

    exit_code = 2


class ConfigError(DeepFMError):
    """A configuration that cannot work: an unknown field, a bad value, options at odds."""


class DataError(DeepFMError):
    """Input that cannot be used: a missing file or column, a bad cell, too few unseen items."""


class CheckpointError(DeepFMError):
    """A checkpoint that is missing, incomplete, or made for other data or another model."""


class InUse(DeepFMError):
    """A folder or file that another process is writing; says which process."""


class EnvironmentProblem(DeepFMError):
    """An installation that cannot run: incompatible versions, a missing driver or device."""


class RankLost(DeepFMError):
    """Other ranks were killed or hang; says which. Raised on one rank, nobody's mistake."""

    exit_code = 1


class OutOfMemory(DeepFMError):
    """Memory that cannot be allocated: the machine's, or a GPU's."""
