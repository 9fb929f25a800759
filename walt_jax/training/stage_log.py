"""Where a stage's steps are reported: progress on the terminal, `metrics.jsonl`, TensorBoard."""

import dataclasses
import math
import pathlib
import statistics
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from walt_jax.clock import Clock
from walt_jax.diffusion.objective import Binned, level_names
from walt_jax.errors import UserError
from walt_jax.training.collapse import CollapseWatch
from walt_jax.training.metrics import MetricsLog
from walt_jax.training.progress import Progress

# Fetched after each step; all other metrics only where they are logged. A gradient that is not finite shows here.
EACH_STEP = ("loss", "gradient_norm", "parameter_norm", "loss_by_noise")


@dataclasses.dataclass(frozen=True)
class Peak:
    """What MFU is a fraction of.

    Attributes:
        flops_per_second: of a device.
        source: who states it.
    """

    flops_per_second: float
    source: str


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step did on this host.

    Attributes:
        clips: of its batch.
        tokens: of the clips, padding left out.
        waited: seconds that the batch took to come.
        flops: see `StepPrograms.flops`; of all hosts.
    """

    clips: int
    tokens: int
    waited: float
    flops: float


class StageLog:
    """Reports a stage's steps.

    Args:
        workdir: the run's folder.
        name: the stage's.
        steps: of the stage in all.
        start: steps done before.
        log_every: steps between lines.
        gone: the files that have vanished so far.
        mesh: of the devices.
        peak: see `Peak`; without one there is no MFU.
        scored: the metric that `mean_of_scored` is of.
        clock: of the run; steps are entered where they are logged.
        learning_rates: by name, each with a value a step.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        name: str,
        steps: int,
        start: int,
        log_every: int,
        gone: Callable[[], Sequence[str]],
        mesh: Mesh,
        peak: Peak | None,
        scored: str | None = None,
        clock: Clock | None = None,
        learning_rates: Mapping[str, Float[np.ndarray, " steps"]] = types.MappingProxyType({}),
    ):
        self._clocked, self._counted = clock or Clock(), start
        self._scored, self._scores = scored, []
        self._name, self._steps, self._every, self._gone, self._reported = name, steps, log_every, gone, 0
        self._mesh, self._peak, self._learning_rates = mesh, peak, learning_rates
        constant: dict[str, Any] = {"mesh": dict(mesh.shape)}
        if peak is not None:
            constant |= {"mfu_peak": peak.source}
        self._metrics = MetricsLog(workdir, name, start, constant)
        self._progress = Progress(name, start, steps)
        self._collapse = CollapseWatch()
        self._warnings: list[str] = []
        self._began = self._clock = time.perf_counter()
        self._paused = False
        # Since the last line: what steps did in how many seconds, and their losses by noise level.
        self._work: list[Work] = []
        self._seconds = 0.0
        self._by_noise: list[Binned] = []

    def report(self, step: int, work: Work, metrics: Any) -> None:
        """Reports a step; waits until it is done.

        Raises:
            UserError: if a metric is NaN or infinite.
        """
        logs = step % self._every == 0 or step == self._steps
        if self._scored is not None and self._scored not in (measured := set(metrics) - {"loss_by_noise"}):
            raise UserError(
                f"config.stages.{self._name}.keep_metric is {self._scored!r}, which the stage does not measure; choose "
                f"one of {', '.join(sorted(measured))}."
            )
        each = (*EACH_STEP, self._scored)
        fetched = jax.device_get(metrics if logs else {name: metrics[name] for name in each if name in metrics})
        if "loss_by_noise" in fetched:
            self._by_noise.append(fetched.pop("loss_by_noise"))
        values = finite(fetched, self._name, step)
        if self._scored is not None:
            self._scores.append(values[self._scored])
        now = time.perf_counter()
        if not self._paused:
            self._work.append(work)
            self._seconds += now - self._clock
        self._clock, self._paused = now, False
        rates = self._rates() if logs else {}
        self._progress.update(values["loss"], rates.get("mfu"))
        if logs:
            good = self._clocked.row("steps", stage=self._name, first=self._counted + 1, last=step)
            self._counted = step
            learning = {name: float(each[step - 1]) for name, each in self._learning_rates.items()}
            rates |= {"elapsed_seconds": now - self._began}
            self._write(step, {**values, **self._levels(), **learning, **rates, **good})
            self._work, self._seconds, self._by_noise = [], 0.0, []

    def validated(self, step: int, values: dict[str, float], protocols: dict[str, str]) -> None:
        """Writes what was measured on unseen clips after a step, with the protocol of each number.

        Raises:
            UserError: if a value is NaN or infinite.
        """
        self._metrics.write(step, finite(values, self._name, step), stated={"validation_protocols": protocols})
        self.paused()

    def mean_of_scored(self) -> float | None:
        """The mean of the scored metric since the last call; None where no metric is scored."""
        scores, self._scores = self._scores, []
        return statistics.fmean(scores) if scores else None

    def paused(self) -> None:
        """Leaves the step that is reported next out of the rates: it was held up by a compilation or a checkpoint."""
        self._paused = True

    def warn(self, step: int, sentence: str) -> None:
        """Shows a warning, and puts it into the next line."""
        self._warnings.append(sentence)
        self._progress.warn(f"Step {step} of {self._name}: {sentence}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        for sentence in self._collapse.update(values):
            self.warn(step, sentence)
        if gone := self._gone():
            values["files_gone"] = len(gone)
            if len(gone) > self._reported:
                self.warn(step, f"{len(gone)} files have vanished and are skipped, the last being {gone[-1]}.")
                self._reported = len(gone)
        self._metrics.write(step, values, self._warnings)
        self._warnings = []

    def _rates(self) -> dict[str, float]:
        """Means over the steps since the last line."""
        memory = device_memory(self._mesh)
        if not self._work:
            return memory
        count, seconds = len(self._work), self._seconds
        clips, tokens, waited, flops = (
            sum(getattr(work, field.name) for work in self._work) for field in dataclasses.fields(Work)
        )
        rates = {
            "step_seconds": seconds / count,
            "clips_per_second": clips / seconds,
            "tokens_per_second_per_device": tokens / seconds / len(self._mesh.local_devices),
            "data_wait_fraction": min(1.0, waited / seconds),  # at most this was felt by the device
            "model_flops": flops / count,
        }
        if self._peak is not None:
            most = self._peak.flops_per_second * self._mesh.size
            rates |= {"mfu": flops / seconds / most, "mfu_peak_flops_per_second": self._peak.flops_per_second}
        return rates | memory

    def _levels(self) -> dict[str, float]:
        """The mean loss of each part of diffusion time that had any."""
        if not self._by_noise:
            return {}
        total, count = (
            np.sum([getattr(binned, name) for binned in self._by_noise], axis=0, dtype=np.float64)
            for name in ("total", "count")
        )
        return {f"loss_{name}": float(t / c) for name, t, c in zip(level_names(), total, count, strict=True) if c}

    def remove(self, stage: str) -> str:
        """Takes another stage's lines out of `metrics.jsonl` and returns them."""
        return self._metrics.remove(stage)

    def close(self) -> None:
        self._progress.close()
        self._metrics.close()


def device_memory(mesh: Mesh) -> dict[str, float]:
    """Bytes in use on this host's fullest device, now and at most since the process began; {} where unknown (CPUs)."""
    stats = [found for device in mesh.local_devices if (found := device.memory_stats())]
    names = {"device_memory_bytes": "bytes_in_use", "device_memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: max(found[key] for found in stats)
        for name, key in names.items()
        if stats and all(key in found for found in stats)
    }


def finite(metrics: dict[str, Any], stage: str, step: int) -> dict[str, float]:
    """The metrics as floats.

    Raises:
        UserError: if one is NaN or infinite.
    """
    values = {name: float(value) for name, value in metrics.items()}
    bad = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
    if bad:
        raise UserError(
            f"Stage {stage} stopped at step {step}, where {bad}; the last good checkpoint is kept: lower the learning "
            f"rates in config.stages.{stage}.optimizer and start in a new workdir, or look for broken data."
        )
    return values
