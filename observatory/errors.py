"""Errors a user can meet.

Every message has three parts: what failed with its value, what was expected, what to do about it. The error
keeps them apart, so that no code has to take a message apart. The command line prints the message as one line
and ends with ``exit_code``.
"""

from typing import TypeVar

E = TypeVar("E", bound="ObservatoryError")


def alike(error: E) -> E:
    """Mark an error that every rank meets with the same words."""
    error.of_all_ranks = True
    return error


class ObservatoryError(Exception):
    """Root of all errors that this package raises on purpose; as text ``what; expected ..., remedy``.

    Attributes:
        what: what failed, with its value.
        expected: what was expected instead, as it follows the word "expected"; None where there is no choice.
        remedy: what to do about it, in the imperative; None when nothing can be done.
        exit_code: of a command that ends with it.
        of_all_ranks: every rank meets it with the same words, so rank 0 alone has to report it.
    """

    exit_code = 1
    of_all_ranks = False

    def __init__(self, what: str, *, expected: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.expected = expected
        self.remedy = remedy
        super().__init__(f"{what}; {self.advice}" if self.advice else what)

    @property
    def advice(self) -> str | None:
        """What was expected and what to do, as one clause; None when there is neither."""
        return ", ".join(filter(None, (self.expected and f"expected {self.expected}", self.remedy))) or None


class RunError(ObservatoryError):
    """A run directory cannot be opened or written."""


class PlaceTakenError(RunError):
    """Something is in the place of a result, and is replaced only where that is asked for."""

    def __init__(self, what: str) -> None:
        super().__init__(what, remedy="choose another place, or pass overwrite=True to replace it")


class RunFormatError(RunError):
    """A file of a run is damaged, of another format, or of a newer schema."""


class LoadError(ObservatoryError):
    """Loads are not what they must be: negative, NaN, of the wrong shape."""


class PlacementError(ObservatoryError):
    """An expert placement or expert-parallel degree that does not fit the model."""


class AdviceError(ObservatoryError):
    """Changes of a set-up cannot be judged on what is given."""


class ComparisonError(ObservatoryError):
    """Runs or saved results cannot be compared."""


class ThresholdError(ComparisonError):
    """A threshold is not one; wrong usage, so that it is not mistaken for a threshold that is passed."""

    exit_code = 2


class RulesError(ObservatoryError):
    """A file of rules is none; wrong usage, so that it is not mistaken for a broken rule."""

    exit_code = 2


class PlanError(ObservatoryError):
    """A plan cannot be made from what is given."""


class BatchError(ObservatoryError):
    """A campaign cannot be submitted, followed or collected, or its site or campaign file is not valid."""


class WaitInterruptedError(BatchError):
    """Someone no longer waits for jobs, which go on."""

    exit_code = 130


class ModelError(ObservatoryError):
    """A model cannot be loaded, or its MoE layers are not understood."""


class DataError(ObservatoryError):
    """Input text or token data cannot be used."""


class CaptureError(ObservatoryError):
    """A probe cannot be attached, or what it captured cannot be kept."""


class ExchangeError(ObservatoryError):
    """Ranks cannot exchange what they should: one is missing, or they do not agree on what is sent."""


class BenchmarkError(ObservatoryError):
    """A benchmark result or a network model cannot be read, or does not fit what it is asked."""


class InterchangeError(ObservatoryError):
    """A file of another tool cannot be read, or does not state what is needed."""


class DeviceError(ObservatoryError):
    """A power device cannot be found, opened or read."""


class DeviceLostError(DeviceError):
    """A device stopped answering and will not again."""


class EnergyError(ObservatoryError):
    """Samples do not yield the energy that is asked for."""


class ClockError(ObservatoryError):
    """A clock sweep, or a model of one, cannot be made, read or trusted."""


class LockRefusedError(ClockError):
    """The driver, the site or our own rules do not let this process lock clocks or set limits."""


class LeaseBusyError(LockRefusedError):
    """Another process is changing the GPU of a lease and does not come to an end."""


class LockNotPermittedError(LockRefusedError):
    """The driver wants a privilege that this process lacks; ``remedy`` has the other ways to get it done."""
