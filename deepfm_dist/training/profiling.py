"""Traces a few steps with torch's profiler."""

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural
from deepfm_dist.storage import atomic_write, write_errors_to_user


def profiler(
    steps: tuple[int, int] | None, done: int, folder: Path, world: World
) -> profile | None:
    """A profiler; call its ``step`` once per training step.

    Args:
        steps: first and last step to be traced; None: no trace.
        done: steps taken before the loop begins.
        folder: where ``profile_rank0.json`` (Chrome's trace format) goes, one for each rank.
        world: the ranks.
    """
    if steps is None or steps[1] <= done:
        return None
    first = max(steps[0], done + 1)
    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        schedule=schedule(wait=first - done - 1, warmup=0, active=steps[1] - first + 1, repeat=1),
        on_trace_ready=lambda p: _write(p, folder / f"profile_rank{world.rank}.json"),
    )


def check_profiled(steps: tuple[int, int] | None, last: int) -> None:
    """Checks that the run reaches the steps to trace.

    Args:
        steps: first and last step to be traced, or None.
        last: the last step of the run.

    Raises:
        ConfigError: the run ends before the first of them.
    """
    if steps is not None and steps[0] > last:
        raise ConfigError(
            f"trainer.profile_steps={[*steps]}: the run has {plural(last, 'step')}; "
            f"choose earlier ones"
        )


def _write(trace: profile, path: Path) -> None:
    with write_errors_to_user(path), atomic_write(path) as file:
        trace.export_chrome_trace(str(file))
