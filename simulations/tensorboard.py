"""A run's recorded events as TensorBoard files: ``tensorboard --logdir FOLDER`` then shows its course.

Needs the extra: pip install 'fedtopk[tensorboard]'.
"""

from pathlib import Path

from common.errors import MissingDependency, RunError
from server.durable import make_folder
from server.run_folder import RunFolder
from simulations.recorded import Histogram, recorded

try:
    from tensorboardX import SummaryWriter
except ImportError:
    hint = "pip install 'fedtopk[tensorboard]'"
    raise MissingDependency(f"Expected tensorboardX to write TensorBoard files ({hint}).") from None

_DISPLAYED = {"weights": "log10_weights", "norms": "log10_norms"}
"""TensorBoard has no logarithmic axis for histograms, and weights span factors of a million, norms of ten thousand."""


def write_tensorboard(run: RunFolder, to: Path) -> None:
    """Write what a run recorded into the folder `to`, in place of what was written there before.

    Tags are ``kind/figure``, such as ``simulation/policy_loss``; steps are rounds, and times those of the events.
    Raises :class:`RunError` where there is no run, and where the folder cannot be written to.
    """
    lines = recorded(run)
    make_folder(to)
    try:
        for earlier in to.glob("events.out.tfevents.*"):
            earlier.unlink()
        with SummaryWriter(str(to)) as writer:
            for line in lines:
                for name, value in line.figures.items():
                    writer.add_scalar(_tag(line.kind, name), value, line.round, line.time)
                for name, histogram in line.histograms.items():
                    tag = _tag(line.kind, _DISPLAYED.get(name, name))
                    writer.add_histogram_raw(tag, *_raw(histogram), line.round, line.time)
    except OSError as error:
        raise RunError(f"Expected {to} to be writable: {error.strerror}.") from None


def _tag(kind: str, name: str) -> str:
    return f"{kind}/{name.replace('@', '_at_')}"


def _raw(histogram: Histogram) -> tuple[float, float, float, float, float, list[float], list[float]]:
    """Least, highest, number, sum and sum of squares, upper bounds and counts."""
    counts, middles = histogram.counts, histogram.middles
    low, *upper = histogram.bounds.tolist()
    return low, upper[-1], counts.sum(), counts @ middles, counts @ middles**2, upper, counts.tolist()
