"""User errors as one line: what is wrong, the value, where, and a fix."""


class DeepFMError(Exception):
    """An error of the user or the machine; commands print it on one line and exit with code 2."""

    exit_code = 2


class ConfigError(DeepFMError):
    """A configuration that cannot work: an unknown field, a bad value, contradicting options."""


class DataError(DeepFMError):
    """Input that cannot be used: a missing file or column, a bad cell, too few unseen items."""


class CheckpointError(DeepFMError):
    """A checkpoint that is missing, incomplete, or made for other data or another model."""


class InUse(DeepFMError):
    """A folder or file that another process is writing; names the process."""


class EnvironmentProblem(DeepFMError):
    """An installation that cannot run: incompatible versions, a missing driver or device."""


class RankLost(DeepFMError):
    """Other ranks were killed or hang; names them. Raised on one rank."""

    exit_code = 1


class OutOfMemory(DeepFMError):
    """Memory that cannot be allocated: the machine's, or a GPU's."""
