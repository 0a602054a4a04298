"""Where things are: stores, how they are reached, and which Ray."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from gkd_dist.config.base import NonNegative, NotBool, Positive, PositiveFloat, Section


class Stores(Section):
    """Stores outside the run folder, so that several runs share them (any fsspec URL)."""

    graph: str | None = Field(None, description="URL of the graph store; null: <run>/graph")
    knowledge: str | None = Field(None, description="URL of the knowledge store; null: <run>/knowledge")


class StorageConfig(Section):
    """How object stores are reached. Credentials come from the environment, never from here."""

    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="fsspec options per protocol, e.g. {s3: {endpoint_url: http://store:9000}}"
    )
    retries: NonNegative = Field(4, description="attempts after the first one, with growing pauses and jitter")
    timeout_s: PositiveFloat = Field(30.0, description="seconds until one request counts as failed")
    upload_part_bytes: Annotated[int, Field(ge=5 << 20), NotBool] = Field(
        16 << 20, description="objects above this go to an object store in parts of it; at least 5 MiB"
    )
    uploads_at_once: Positive = Field(4, description="parts of one object on their way at a time, each held in memory")
    native_reads: bool = Field(True, description="read S3 objects through obstore where it is installed (extra `fast`)")


class RayConfig(Section):
    """Which Ray the run uses."""

    address: str = Field("local", description="`local` starts one, `auto` finds one, or host:port")
    timeout_s: PositiveFloat = Field(30.0, description="seconds to wait for the cluster to answer")
    num_cpus: Positive | None = Field(None, description="logical CPUs of a local Ray; null: what the run needs")
    object_store_bytes: Annotated[int, Field(ge=80_000_000), NotBool] = Field(120_000_000, description="of a local Ray")
