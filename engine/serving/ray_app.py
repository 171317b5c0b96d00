"""Replicas of the server on Ray Serve: on one machine for `stockade serve --ray`, on a cluster for `serve run`.

One deployment stands in front and forwards, one holds the engines, and one, where it is asked for, a detector.
Every engine's replica is the whole server of `openai_server`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import OwnerDiedError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from ..errors import BadInput, EngineStopped, PassError, ReplicaLost, StockadeError, Unavailable
from ..models.sources import ONNX
from ..named import EngineNames, guard_named, release_named
from .affinity import ranked
from .audit import read_key
from .forwarding import Asked, Head, answered
from .front import front_app
from .launch import Serving, make_service
from .openai_server import create_app
from .policy import Policy
from .remote_detector import Ask, RemoteDetector, Scorer

APP = "stockade"
LOST = (RayActorError, OwnerDiedError, WorkerCrashedError)
METRICS_SECONDS = 5.0
HEALTH_EVERY = 2.0  # seconds


@dataclass(frozen=True)
class Scale:
    """How many replicas, each with how much. queue: requests under way in one from which on another is started, where
    there may be more (max_…), and by which it may be busier than the idlest before its requests go elsewhere. cpus,
    gpus: that one has; the CPUs may be a fraction."""

    replicas: int = 1
    max_replicas: int | None = None
    detector_replicas: int = 0
    max_detector_replicas: int | None = None
    queue: int = 8
    cpus: float = 1.0
    gpus: float = 0.0
    detector_cpus: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("replicas", "max_replicas"), ("detector_replicas", "max_detector_replicas")):
            least, limit = getattr(self, name), getattr(self, most)
            if least < (name == "replicas") or (limit is not None and limit < max(1, least)):
                raise BadInput(f"{name} must be at least {int(name == 'replicas')}, and {most} no less")
        if self.queue < 1 or self.cpus <= 0 or self.detector_cpus <= 0 or self.gpus < 0:
            raise BadInput("queue must be at least 1, CPUs more than 0, GPUs at least 0")

    @classmethod
    def sharing(cls, cores: int, replicas: int, max_replicas: int | None, detector_replicas: int) -> Scale:
        """The cores of one machine, shared out among all. Raises `BadInput`."""
        # a detector's successor is there before it goes: without one, guards fail closed
        many = max(replicas, max_replicas or 0) + detector_replicas + bool(detector_replicas)
        share = cores / many
        share = int(share) if share >= 1 else int(share * 100) / 100
        if share <= 0:
            raise BadInput(f"{many} replicas are too many for {cores} cores")
        return cls(replicas, max_replicas, detector_replicas, cpus=share, detector_cpus=share)


class AppArgs(BaseModel):
    """What `serve run stockade.engine.serving.ray_app:app NAME=VALUE …` takes; as the options of `stockade serve`."""

    model_config = ConfigDict(extra="forbid")

    model: str = "smol"
    detector: str | None = None
    detoxifier: str | None = None
    device: str | None = None
    dtype: str | None = None
    weights: str | None = None
    kv_dtype: str | None = None
    guard: str = "protector"
    allow: list[str] = []
    threshold: float | None = None
    release: str = "verdict"
    allow_release: str | None = None
    keys: Path | None = None
    per_minute: float | None = None
    concurrent: int | None = None
    max_requests: int = 256
    deadline: float = 120.0
    max_tokens: int = 1024
    audit: Path | None = None
    audit_key: Path | None = None
    audit_texts: bool = False
    image_origins: list[str] = []
    origins: list[str] = []
    reveal: bool = False
    traces: bool = False
    drain: float = 30.0
    replicas: int = 1
    max_replicas: int | None = None
    detector_replicas: int = 0
    max_detector_replicas: int | None = None
    queue: int = 8
    cpus: float = 1.0
    gpus: float = 0.0
    detector_cpus: float = 1.0
    generation: int = 0  # of a configuration: another number is a change, which replaces every replica


def app(args: AppArgs) -> serve.Application:
    """The application of a configuration. Raises `BadInput` and `InvalidGuard`."""
    given = args.model_dump()
    names = [args.guard, *args.allow]
    guards = {name: guard_named(name, args.threshold if name == args.guard else None) for name in names}
    loosest = None if args.allow_release is None else release_named(args.allow_release)
    policy = Policy(guards, args.guard, release_named(args.release), loosest)
    settings = {name: given[name] for name in Serving.__dataclass_fields__ if name in given and name != "model"}
    return application(
        EngineNames(args.model, args.detector, args.detoxifier, args.device, args.dtype, args.weights, args.kv_dtype),
        Serving(Path(args.model).name, policy, **settings),
        Scale(**{name: given[name] for name in Scale.__dataclass_fields__}),
    )


def application(names: EngineNames, serving: Serving, scale: Scale) -> serve.Application:
    """Deploying it again replaces every replica, one after another. Raises `BadInput` for settings that make no
    server."""
    serving.door()
    if serving.audit is not None:
        read_key(serving.key_file, create=True)  # before there are several to make one
    detector = None
    if scale.detector_replicas:
        if names.detector is None or not names.detector.startswith(ONNX):
            raise BadInput("replicas of the detector run an exported one: --detector onnx:FOLDER")
        folder = names.detector.removeprefix(ONNX)
        many = _many(scale.detector_replicas, scale.max_detector_replicas, scale.queue)
        detector = _deployment(DetectorReplica, "detector", scale, serving, **many).bind(folder)
    many = _many(scale.replicas, scale.max_replicas, scale.queue)
    engines = _deployment(EngineReplica, "engine", scale, serving, **many)
    front = serve.deployment(serve.ingress()(FrontReplica)).options(
        name="front",
        num_replicas=1,  # the limits of a key are kept in one place
        max_surge_percent=100,  # of one alone a new one has to be there before it stops
        max_ongoing_requests=100_000,  # it refuses by its own limits
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=serving.drain,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return front.bind(engines.bind(names, serving, detector), serving)


def _many(least: int, most: int | None, queue: int) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": least}
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": queue}
    return {"autoscaling_config": scaling}


def _deployment(kind: type, name: str, scale: Scale, serving: Serving, **many: Any) -> serve.Deployment:
    engine = name == "engine"
    resources = {"num_cpus": scale.cpus, "num_gpus": scale.gpus} if engine else {"num_cpus": scale.detector_cpus}
    return serve.deployment(kind).options(
        name=name,
        # an engine says itself when it has enough, and this must not make its clients wait instead
        max_ongoing_requests=2 * serving.max_requests + 64,
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter, request_router_kwargs={"spill": scale.queue}
        ),
        ray_actor_options=resources,
        graceful_shutdown_timeout_s=serving.drain + 10,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_EVERY,
        max_surge_percent=0 if engine else 100,
        **many,
    )


class AffinityRouter(RequestRouter):
    """Sends calls with the same `key` to the same replica, unless that is busier by `spill` than the idlest."""

    def initialize_state(self, spill: int) -> None:
        self._spill = spill

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        key = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            key = pending_request.kwargs.get("key", "")
        found = {one.replica_id.unique_id: one for one in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(one.replica_id) or 0 for name, one in found.items()}
        return [[found[name]] for name in ranked(key, loads, self._spill)]


class FrontReplica:
    """Lets clients in and forwards what they ask."""

    def __init__(self, engines: DeploymentHandle, serving: Serving) -> None:
        self._engines = engines
        self._serving = serving

    def __serve_build_asgi_app__(self) -> Any:
        return front_app(RayReplicas(self._engines), self._serving.door(), self._serving.deadline)


class EngineReplica:
    """A whole server around one engine, without a port of its own."""

    def __init__(self, names: EngineNames, serving: Serving, detector: DeploymentHandle | None) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        inner = serving.of_replica(self._name)
        outside = None if detector is None else _remote(names, detector)
        self._service = make_service(names.engine(outside), inner)
        self._app = create_app(self._service, inner.door())
        self._drain = serving.drain

    async def answer(self, asked: Asked, *, key: str) -> AsyncIterator[Head | bytes]:
        """key: what the router has sent it here for."""
        async for message in answered(self._app, asked):
            yield message

    async def metrics(self) -> tuple[str, str]:
        return self._name, self._service.metrics.text().decode()

    def check_health(self) -> None:
        """Ray starts another one in place of one that raises."""
        if not self._service.ready:
            raise EngineStopped("the engine takes no more requests")

    async def __del__(self) -> None:
        await self._service.engine.drain(self._drain)
        if self._service.audit is not None:
            self._service.audit.close()


class DetectorReplica:
    """An exported detector for engines elsewhere."""

    def __init__(self, folder: str) -> None:
        from ...export.onnx_detector import OnnxDetector

        self._scorer = Scorer(OnnxDetector(folder))

    async def score(self, ids: list[int], pool_from: int, *, key: str) -> float:
        """key: the text's name."""
        return await self._scorer.score(key, ids, pool_from)

    def check_health(self) -> None:
        self._scorer.detector.check_alive()


class RayReplicas:
    """The engines behind a handle, as a server in front asks them."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines
        self._streaming = engines.options(stream=True)

    async def answer(self, asked: Asked, key: str) -> AsyncIterator[Head | bytes]:
        reply: Any = self._streaming.answer.remote(asked, key=key)
        try:
            async for message in reply:
                yield message
        except LOST:
            raise ReplicaLost("the replica that answered has died") from None
        except RayTaskError as error:
            raise _told(error) from None
        finally:
            reply.cancel()

    async def metrics(self) -> list[tuple[str, str]]:
        found = await self._engines.broadcast("metrics").results_async(
            timeout_s=METRICS_SECONDS, return_exceptions=True
        )
        return [one for one in found if isinstance(one, tuple)]


def _told(error: RayTaskError) -> StockadeError:
    cause = error.cause
    return cause if isinstance(cause, Unavailable | PassError) else EngineStopped("the replica failed")


def _remote(names: EngineNames, detector: DeploymentHandle) -> RemoteDetector:
    from ...export.detector_folder import load_folder

    assert names.detector is not None
    return RemoteDetector(load_folder(names.detector.removeprefix(ONNX)), asking(detector))


def asking(detector: DeploymentHandle) -> Ask:
    """Asks replicas of a detector."""

    async def ask(name: str, ids: list[int], pool_from: int) -> float:
        call: Any = detector.score.remote(ids, pool_from, key=name)
        try:
            return await call
        except LOST:
            raise ReplicaLost("the detector's replica has died") from None
        except RayTaskError as error:
            raise _told(error) from None

    return ask


def serve_on_ray(names: EngineNames, serving: Serving, scale: Scale, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP replaces every replica, one after another.

    Where RAY_ADDRESS names a cluster it serves there, else on a Ray of its own on this machine. Raises as `deploy`.
    """
    again: list[int] = []
    with running(serving):
        signal.signal(signal.SIGHUP, lambda number, _: again.append(number))
        for number in (signal.SIGINT, signal.SIGTERM):  # in place of Ray's own
            signal.signal(number, _stop)
        deploy(names, serving, scale)
        tell(f"stockade serves {serving.model} in {scale.replicas} replicas at http://{serving.host}:{serving.port}")
        while True:
            if again:
                again.clear()
                deploy(names, serving, scale)
                tell("every replica was replaced")
            time.sleep(0.2)


def _stop(*_: object) -> None:
    """Whatever is under way here, be it a replacement."""
    raise SystemExit(0)


@contextmanager
def running(serving: Serving) -> Iterator[None]:
    """Ray and Ray Serve until the block ends: of this machine, or the cluster that RAY_ADDRESS names."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    alone = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "address": "local"}
    ray.init(logging_level=logging.WARNING, log_to_driver=False, **alone)
    try:
        serve.start(
            http_options=HTTPOptions(host=serving.host, port=serving.port),
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),  # paths are texts of clients
        )
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(names: EngineNames, serving: Serving, scale: Scale) -> None:
    """Start the application, or replace the one that runs without losing a request; returns when all is there.

    Raises as `application`, and `EngineStopped` where a replica does not start.
    """
    found = application(names, serving, scale)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    try:
        serve.run(found, name=APP, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise EngineStopped(f"the replicas did not start: {error}") from None
