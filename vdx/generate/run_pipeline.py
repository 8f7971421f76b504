"""Clips from the weights of a run of vdx.main."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vdx.config.build import ConfigError, fill
from vdx.generate.cache_calibration import (
    FILE,
    CacheCalibration,
    calibrate,
    check_calibration,
    read_calibration,
)
from vdx.generate.control_inputs import CONTROLS, read_controls
from vdx.generate.generator import Generator, Sampling
from vdx.generate.manifest import RunWeights, manifest_request, manifest_weights
from vdx.generate.pipeline import Pipeline
from vdx.generate.request import Request, check_settings
from vdx.models.adapters.lora import Adapted
from vdx.types import Params

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))


class LoadedWeights(NamedTuple):
    """Parameters on the mesh, and the checkpoint that they come from."""

    params: Params | Adapted
    record: RunWeights | None  # None: they are not of a checkpoint


@dataclasses.dataclass(frozen=True)
class ClipDefaults:
    """The clip that a model draws by default."""

    num_frames: int | None = None  # None: every request gives it
    fps: float | None = None  # frames per second; None: every request gives it
    flow_points: int = 0  # points of sparse optical flow; see ClipSampling


class RunPipeline(Pipeline[Request]):
    """Draws clips with a trained denoiser.

    Weights are read when the first clip is drawn, after everything that is wrong with a request
    has been reported.
    """

    def __init__(
        self,
        generator: Generator,
        mesh: Mesh,
        defaults: ClipDefaults,
        load_weights: Callable[[], LoadedWeights],
        workdir: Path | None = None,
    ):
        self.generator = generator
        self.mesh = mesh
        self.defaults = defaults
        self.workdir = workdir
        self.where = "memory" if workdir is None else str(workdir)
        self._load_weights = load_weights
        self._loaded: LoadedWeights | None = None
        # A generator a sampling: each keeps its compiled programs.
        self._generators: dict[str, Generator] = {}

    def with_params(self, params: Params | Adapted) -> "RunPipeline":
        """Return the pipeline with parameters in memory; it shares the compiled programs."""
        loaded = LoadedWeights(params, None)
        pipeline = RunPipeline(
            self.generator, self.mesh, self.defaults, lambda: loaded, self.workdir
        )
        pipeline._generators = self._generators
        return pipeline

    @property
    def loaded(self) -> LoadedWeights:
        """The weights, which are read once."""
        if self._loaded is None:
            with jax.set_mesh(self.mesh):
                self._loaded = self._load_weights()
        return self._loaded

    def weights(self) -> RunWeights | None:
        """Return the record of the checkpoint; reads it if it is not read yet."""
        return self.loaded.record

    def request(self, prompts: Sequence[str], *, seed: int = 0, **settings: Any) -> Request:
        """Complete a request with the run's defaults and check it; reads no weights.

        settings: num_frames, fps, the fields of Sampling, and controls by the names in
        vdx.generate.control_inputs. Raises ConfigError for what the model cannot draw.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        check_settings(given, ("num_frames", "fps", *SAMPLING, *CONTROLS), "A trained model")

        # The clip: as the model was trained.
        defaults = self.defaults
        num_frames = given.get("num_frames", defaults.num_frames)
        fps = given.get("fps", defaults.fps)
        if num_frames is None or fps is None:
            raise ConfigError("config.data.clip is not set: give num_frames and fps.")

        # The sampling: that of the run's config.
        sampling = dataclasses.asdict(self.generator.sampling)
        sampling |= {name: given[name] for name in SAMPLING if name in given}

        fields = {
            "prompts": tuple(prompts),
            "seed": seed,
            "num_frames": num_frames,
            "fps": fps,
            "sampling": sampling,
            "controls": {name: _json(given[name]) for name in CONTROLS if name in given},
        }
        request = fill(Request, fields, "request")
        self._check(request)
        return request.with_digests()

    def _check(self, request: Request) -> None:
        if not request.prompts:
            raise ConfigError("A request needs at least one prompt.")
        generator = self._generator(request)
        try:
            generator.check((request.num_frames, *generator.frame_shape))
        except ValueError as error:  # of the network, which has no config
            raise ConfigError(f"num_frames = {request.num_frames}: {error}") from error
        self._read_controls(request)

    def manifest_request(self, manifest: Mapping[str, Any], **moved: Any) -> Request:
        """Return the checked request of a manifest.

        moved: new paths of its input files.
        """
        request = manifest_request(manifest, Request).relocated(moved)
        request.check_files()
        self._check(request)
        return request

    def manifest_weights(self, manifest: Mapping[str, Any]) -> RunWeights:
        """Return the record of the weights. Raises ConfigError for pretrained weights."""
        return manifest_weights(manifest, RunWeights)

    def stream(self, request: Request, *, exact: bool = False) -> Iterator[Iterator[np.ndarray]]:
        """Yield the clips of a request, each one piece, float32 [t h w 3] in [-1, 1]."""
        count = len(request.prompts)
        controls = self._read_controls(request)
        repeated = {name: np.repeat(value, count, 0) for name, value in controls.items()}
        return (iter([video]) for video in self.draw_arrays(request, repeated))

    def draw_arrays(self, request: Request, controls: Mapping[str, np.ndarray]) -> np.ndarray:
        """Draw float32 [n t h w 3] in [-1, 1] with control signals of each clip as arrays.

        controls: entries of the batch, each [n ...], in place of the request's files.
        """
        with jax.set_mesh(self.mesh):
            return self._generator(request)(
                self.loaded.params,
                request.prompts,
                request.seeds,
                num_frames=request.num_frames,
                fps=request.fps,
                controls=controls,
            )

    def _read_controls(self, request: Request) -> dict[str, np.ndarray]:
        """Return the batch entries [1 ...] of the request's controls. Raises ConfigError."""
        generator = self.generator
        return read_controls(
            request.controls,
            generator.model.signals,
            (request.num_frames, *generator.frame_shape),
            request.fps,
            generator.mean,
            self.defaults.flow_points,
            generator.first_frame,
        )

    def _generator(self, request: Request) -> Generator:
        """Return the generator of the request's sampling. Raises ConfigError."""
        sampling = fill(Sampling, request.sampling, "sampling")
        key = json.dumps(dataclasses.asdict(sampling))
        if key not in self._generators:
            self._generators[key] = dataclasses.replace(self.generator, sampling=sampling)
        return self._generators[key]

    def calibrate_cache(
        self, request: Request, floor: float, log: Callable[[str], None]
    ) -> CacheCalibration:
        """Find the largest step-cache threshold whose clips stay near the exact ones.

        floor: least SSIM to the exact clips of the request. Raises ConfigError for a request with
        controls.
        """
        if request.controls:
            raise ConfigError(
                f"--calibrate_cache draws from words alone, not --{', --'.join(request.controls)}."
            )

        # The exact sampling is what the cached clips are compared with.
        exact = {**request.sampling, "cache_threshold": 0.0}
        generator = self._generator(dataclasses.replace(request, sampling=exact))

        with jax.set_mesh(self.mesh):
            record = self.weights()
            return calibrate(
                generator,
                self.loaded.params,
                request.prompts,
                seed=request.seed,
                num_frames=request.num_frames,
                fps=request.fps,
                floor=floor,
                weights="" if record is None else record.identity,
                log=log,
            )

    def with_calibrated_cache(self, request: Request) -> Request:
        """Return the request with the step-cache threshold that was calibrated for it.

        Raises ConfigError if there is no calibration, or one of other weights or settings.
        """
        record = self.weights()
        if self.workdir is None or record is None:
            raise ConfigError("A step cache is calibrated for the weights of a workdir.")
        calibration = read_calibration(self.workdir)
        check_calibration(
            calibration,
            record.identity,
            request.sampling,
            request.num_frames,
            request.fps,
            str(self.workdir / FILE),
        )
        sampling = {**request.sampling, "cache_threshold": calibration.threshold}
        return dataclasses.replace(request, sampling=sampling)


def _json(value: Any) -> Any:
    """Return a control as a JSON value: paths as text."""
    return str(value) if isinstance(value, Path) else value
