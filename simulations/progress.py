"""Progress of a run for people, on standard error."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.console import stderr


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
