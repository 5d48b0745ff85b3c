"""Progress of a run for people, on standard error."""

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.console import stderr, stopping

if TYPE_CHECKING:
    from simulations.simulate import Watch


class RoundsBar:
    """A bar over the rounds of a run, or over whatever `unit` says, with the time that is left."""

    def __init__(self, rounds: int, title: str, unit: str = "rounds") -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr,
        )
        self._task = self._progress.add_task(title, total=rounds, note="")

    def update(self, round_: int, note: str) -> None:
        self._progress.update(self._task, completed=round_, note=note)

    def advance(self) -> None:
        """One more is done."""
        self._progress.advance(self._task)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()


def watch(bars: ExitStack, title: str, rounds: int) -> "Watch":
    """A run's progress bar, which ends with the stack, and its notes on standard error."""
    from simulations.simulate import Watch

    bars.close()  # the bar of the run before
    bar = bars.enter_context(RoundsBar(rounds, title))
    return Watch(
        note=lambda sentence: stderr.print(sentence, highlight=False),
        on_round=lambda progress, remark: bar.update(progress.round, remark),
        patient=lambda: stopping("Stopping after this round; press Ctrl-C again to break it off."),
    )
