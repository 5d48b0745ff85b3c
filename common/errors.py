"""The exception tree.

::

    FedtopkError                everything a user can cause or must be told; the CLI prints it as one line
    ├── SettingsError           an unknown key, a value out of range, settings that contradict each other
    ├── DataError               a file or history that cannot be used as interactions
    ├── ModelError              weights or states that do not fit the model
    ├── PrivacyError            a guarantee that cannot be given
    │   └── BudgetExceeded      the next release would spend more than the budget
    ├── AggregationError        a round whose sum could not be formed; nothing was released
    │   ├── ProtocolError       a message that is malformed, forged or of another attempt; names the culprit if known
    │   └── Refusal             an offer that breaks the device's own policy
    ├── RunError                a run folder that cannot be written, read or resumed
    │   ├── CheckpointError     a checkpoint that is truncated, foreign or of another version
    │   ├── Conflict            a command that others were faster with, or that a run in this state cannot follow
    │   └── Aborted             the operator broke the round off; nothing was released
    └── MissingDependency       an optional package that the command needs

Messages name the value and what was expected: ``Expected privacy.clip_norm=-1 > 0.``
"""


class FedtopkError(Exception):
    """Base of every error that is the user's to mend; its message is one complete line."""


class SettingsError(FedtopkError):
    """A setting is unknown, out of range or at odds with another one."""


class DataError(FedtopkError):
    """A file or a history cannot be used as logged interactions."""


class ModelError(FedtopkError):
    """Weights or states do not fit the model they are meant for."""


class PrivacyError(FedtopkError):
    """A privacy guarantee cannot be given with these values."""


class BudgetExceeded(PrivacyError):
    """The next release would spend more than the budget; nothing was released."""


class AggregationError(FedtopkError):
    """A cohort's sum could not be formed; nothing was released."""


class ProtocolError(AggregationError):
    """A message of the secure aggregation cannot be what an honest party sent in this attempt.

    Attributes:
        culprit: number of the device that it can only come from, if that is known.
    """

    def __init__(self, message: str, culprit: int | None = None) -> None:
        super().__init__(message)
        self.culprit = culprit


class Refusal(AggregationError):
    """A device does not take part: the offer breaks its own policy."""


class RunError(FedtopkError):
    """A run folder cannot be written, read or resumed."""


class CheckpointError(RunError):
    """A checkpoint is truncated, damaged, foreign or of another version."""


class Conflict(RunError):
    """A command that is not accepted: another one came first, or the run's state does not allow it."""


class Aborted(RunError):
    """The operator broke the round off; nothing of it was released."""


class MissingDependency(FedtopkError):
    """An optional package is needed for what was asked."""
