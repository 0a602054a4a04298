"""The whole run: all sections in flow order, and the checks between them."""

from __future__ import annotations

from pydantic import Field, model_validator

from gkd_dist.config.base import Integer, Section, unknown_name
from gkd_dist.config.graph import GraphConfig, PartitionConfig
from gkd_dist.config.losses import Loss, LspLoss
from gkd_dist.config.models import resolve_layer
from gkd_dist.config.stores import RayConfig, StorageConfig, Stores
from gkd_dist.config.training import DistillConfig, InferConfig, StudentConfig, TeacherConfig


class Config(Section):
    """One run, in flow order."""

    run: str = Field(description="any fsspec URL; relative paths are local")
    stores: Stores = Stores()
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()
    seed: Integer = 0
    graph: GraphConfig
    partition: PartitionConfig = PartitionConfig()
    teacher: TeacherConfig
    infer: InferConfig = InferConfig()
    student: StudentConfig
    losses: tuple[Loss, ...] = Field(min_length=1)
    distill: DistillConfig = DistillConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        for index, loss in enumerate(self.losses):
            if isinstance(loss, LspLoss):
                for side, model in (("teacher", self.teacher.model), ("student", self.student.model)):
                    layer = getattr(loss, f"{side}_layer")
                    try:
                        resolve_layer(layer, model.layers)
                    except ValueError as error:
                        raise ValueError(f"losses.{index}.{side}_layer: {error}") from None
        self._check_features()
        if self.distill.launcher == "inline" and self.distill.num_workers != 1:
            raise ValueError(
                f"distill.launcher inline is one process (got distill.num_workers {self.distill.num_workers}); "
                "set distill.num_workers=1 or distill.launcher=ray"
            )
        if self.distill.launcher == "inline" and self.distill.gpus_per_worker:
            raise ValueError(
                f"distill.launcher inline is for CPUs (got distill.gpus_per_worker {self.distill.gpus_per_worker}); "
                "set distill.gpus_per_worker=0 or distill.launcher=ray"
            )
        if (what := self._in_memory()) and (self.infer.num_actors > 0 or self.distill.launcher != "inline"):
            raise ValueError(
                f"a memory: {what} lives in one process; set infer.num_actors=0, distill.launcher=inline "
                "and distill.num_workers=1, or use a file or object store URL"
            )
        return self

    def _in_memory(self) -> str | None:
        """What has a ``memory:`` URL, which other processes cannot see."""
        urls = {
            "run": self.run,
            "graph store (stores.graph)": self.stores.graph,
            "knowledge store (stores.knowledge)": self.stores.knowledge,
            "checkpoint (teacher.checkpoint)": self.teacher.checkpoint,
        }
        return next((what for what, url in urls.items() if url and url.lower().startswith("memory:")), None)

    def _check_features(self) -> None:
        for section, name in (("teacher", self.teacher.features), ("student", self.student.features)):
            if name is not None and name not in self.graph.features:
                raise ValueError(f"{section}.features: {unknown_name(name, self.graph.features, 'graph.features')}")

    def knowledge_layers(self) -> dict[int, set[str]]:
        """Teacher layers (positive numbers) that LSP terms read, with the metrics they need."""
        needed: dict[int, set[str]] = {}
        for loss in self.losses:
            if isinstance(loss, LspLoss):
                layer = resolve_layer(loss.teacher_layer, self.teacher.model.layers)
                needed.setdefault(layer, set()).add(loss.metric)
        return needed

    def required_halo_hops(self) -> int:
        """Hops for which training is exact: depth for output terms, layer + 1 for LSP terms."""
        depth = self.student.model.layers if self.student.model.kind != "mlp" else 0
        hops = depth
        for loss in self.losses:
            if isinstance(loss, LspLoss):
                layer = resolve_layer(loss.student_layer, self.student.model.layers)
                hops = max(hops, 1 + (layer if self.student.model.kind != "mlp" else 0))
        if self.teacher.checkpoint is None and self.teacher.model.kind != "mlp":
            hops = max(hops, self.teacher.model.layers)
        return max(1, hops)

    def halo_hops(self) -> int:
        """Hops that the graph store is built with."""
        wanted = self.partition.halo_hops
        return self.required_halo_hops() if wanted == "auto" else wanted
