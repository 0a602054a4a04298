"""The whole run: all sections in flow order, and the checks between them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from gkd_dist.config.base import Integer, Section, unknown_name
from gkd_dist.config.graph import GraphConfig, PartitionConfig
from gkd_dist.config.losses import LAYER_LOSSES, FitnetLoss, KdLoss, LabelLoss, Loss, LspLoss
from gkd_dist.config.models import BUILT_IN_MODELS, ModelConfig, resolve_layer
from gkd_dist.config.stores import RayConfig, StorageConfig, Stores
from gkd_dist.config.training import DistillConfig, InferConfig, StudentConfig, TeacherConfig

ROWS = ("teacher", "ensemble", "distilled", "alone")  # what results call models that have no name of their own


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
    teachers: tuple[TeacherConfig, ...] = Field((), description="several teachers, in place of teacher")
    infer: InferConfig = InferConfig()
    student: StudentConfig
    losses: tuple[Loss, ...] = Field(min_length=1)
    distill: DistillConfig = DistillConfig()

    @model_validator(mode="before")
    @classmethod
    def _first_teacher(cls, data: Any) -> Any:
        """``teacher`` is the first of ``teachers`` where these are given, so that what asks for one finds it."""
        if isinstance(data, dict) and isinstance(data.get("teachers"), list | tuple) and data["teachers"]:
            return {"teacher": data["teachers"][0], **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_teachers()
        for index, loss in enumerate(self.losses):
            if isinstance(loss, LAYER_LOSSES):
                for teacher in self.readers_of(loss):
                    who = f"teacher {teacher.name}: " if self.teachers else ""
                    _check_layer(f"losses.{index}.teacher_layer: {who}", loss.teacher_layer, teacher.model)
                _check_layer(f"losses.{index}.student_layer: ", loss.student_layer, self.student.model)
        self._check_fan_out()
        self._check_features()
        self._check_elastic()
        self._check_exchange()
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

    def _check_elastic(self) -> None:
        """A group of changing size is started again for each change, which only Ray Train does."""
        distill = self.distill
        if isinstance(distill.num_workers, int):
            return
        given = list(distill.num_workers)
        if distill.launcher != "ray":
            raise ValueError(
                f"distill.num_workers {given} changes while the students train, which distill.launcher "
                f"{distill.launcher} cannot; give one number, or set distill.launcher=ray"
            )
        if distill.max_failures == 0:
            raise ValueError(
                f"distill.num_workers {given} needs restarts of the worker group, but distill.max_failures is 0; raise "
                "it, or give one number"
            )
        if not distill.cpus_per_worker and not distill.gpus_per_worker:
            raise ValueError(
                f"distill.num_workers {given} follows the room in the cluster, but workers without CPUs and GPUs take "
                "none; set distill.cpus_per_worker=1, or give one number"
            )

    def _check_fan_out(self) -> None:
        fan_out, model = self.distill.fan_out, self.student.model
        if fan_out is None:
            return
        if model.kind == "mlp":
            raise ValueError("distill.fan_out is for students that look at neighbours, not for an mlp; set it to null")
        if len(fan_out) != model.layers:
            raise ValueError(
                f"distill.fan_out has {len(fan_out)} numbers for a student of {model.layers} layers; give one for each "
                "layer, from the last to the first, -1 for all neighbours"
            )
        if self.distill.halo != "hops":
            raise ValueError(
                f"distill.fan_out needs distill.halo=hops (got {self.distill.halo}): with another halo a rank computes "
                "whole layers of what it owns; set one of them to its default"
            )

    def _check_teachers(self) -> None:
        names = [teacher.name for teacher in self.all_teachers()]
        if len(self.teachers) == 1 or (self.teachers and self.teacher != self.teachers[0]):
            raise ValueError(
                "teachers: give either teacher, or two or more under teachers; "
                "one of several is changed as teachers.0.<key>"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: every one needs a name of its own (got {', '.join(names)})")
        for index, teacher in enumerate(self.teachers):
            if teacher.name in ROWS:
                raise ValueError(
                    f"teachers.{index}.name: {teacher.name!r} is what results call something else; choose another name"
                )
        for index, loss in enumerate(self.losses):
            if not isinstance(loss, LabelLoss) and loss.teacher is not None and loss.teacher not in names:
                raise ValueError(f"losses.{index}.teacher: {unknown_name(loss.teacher, names, 'the run')}")
        if (
            self.teachers
            and self.infer.logits != "all"
            and any(isinstance(loss, KdLoss) and loss.teacher is None for loss in self.losses)
        ):
            raise ValueError(
                f"infer.logits is {self.infer.logits}, but a kd loss reads the mean logits of several teachers; "
                "set infer.logits=all, or name a teacher in every kd loss"
            )

    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        """Every teacher of the run, one or several."""
        return self.teachers or (self.teacher,)

    def readers_of(self, loss: Loss) -> tuple[TeacherConfig, ...]:
        """The teachers that a loss reads; none for the labels."""
        if isinstance(loss, LabelLoss):
            return ()
        return tuple(teacher for teacher in self.all_teachers() if loss.teacher in (None, teacher.name))

    def view_of(self, teacher: TeacherConfig) -> Config:
        """The run as a single teacher sees it: it alone, the losses that read it, the graph of the whole run."""
        losses = tuple(
            loss if isinstance(loss, LabelLoss) else loss.model_copy(update={"teacher": None})
            for loss in self.losses
            if isinstance(loss, LabelLoss) or teacher in self.readers_of(loss)
        )
        partition = self.partition.model_copy(update={"halo_hops": self.halo_hops()})
        return self.model_copy(update={"teacher": teacher, "teachers": (), "losses": losses, "partition": partition})

    def student_losses(self) -> tuple[Loss, ...]:
        """The losses of the student; against each of several teachers a layer loss, with a share of the weight."""
        if not self.teachers:
            return self.view_of(self.teacher).losses
        found: list[Loss] = []
        for loss in self.losses:
            if isinstance(loss, LAYER_LOSSES) and loss.teacher is None:
                share = loss.weight / len(self.teachers)
                found += [loss.model_copy(update={"teacher": t.name, "weight": share}) for t in self.teachers]
            else:
                found.append(loss)
        return tuple(found)

    def _in_memory(self) -> str | None:
        """What has a ``memory:`` URL, which other processes cannot see."""
        urls = {
            "run": self.run,
            "graph store (stores.graph)": self.stores.graph,
            "knowledge store (stores.knowledge)": self.stores.knowledge,
            **{f"checkpoint of {teacher.name}": teacher.checkpoint for teacher in self.all_teachers()},
        }
        if not self.teachers:
            urls["checkpoint (teacher.checkpoint)"] = urls.pop(f"checkpoint of {self.teacher.name}")
        return next((what for what, url in urls.items() if url and url.lower().startswith("memory:")), None)

    def _check_exchange(self) -> None:
        model = self.student.model
        by_unit = (
            model.kind in BUILT_IN_MODELS and model.dropout_mask == "unit" and (model.dropout or model.input_dropout)
        )
        if self.distill.halo == "exchange" and by_unit:
            raise ValueError(
                "student.model.dropout_mask: with distill.halo exchange, masks of a unit would depend on the number of "
                "workers; set dropout_mask=node"
            )

    def _check_features(self) -> None:
        teachers = [(f"teachers.{index}", teacher.features) for index, teacher in enumerate(self.teachers)]
        teachers = teachers or [("teacher", self.teacher.features)]
        for section, name in [*teachers, ("student", self.student.features)]:
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

    def embedding_layers(self) -> set[int]:
        """Teacher layers (positive numbers) whose output itself is read, by fitnet terms."""
        depth = self.teacher.model.layers
        return {resolve_layer(loss.teacher_layer, depth) for loss in self.losses if isinstance(loss, FitnetLoss)}

    def required_halo_hops(self) -> int:
        """Hops for which training is exact: depth for output terms, layer + 1 for LSP terms, layer for fitnet terms."""
        if self.distill.halo == "exchange":
            return self._exchanged_hops()
        depth = self.student.model.layers if self.student.model.kind != "mlp" else 0
        hops = depth  # labels, soft labels and validation read the output of every student
        for loss in self.losses:
            if isinstance(loss, LspLoss):
                layer = resolve_layer(loss.student_layer, self.student.model.layers)
                hops = max(hops, 1 + (layer if self.student.model.kind != "mlp" else 0))
        for teacher in self.all_teachers():
            if teacher.checkpoint is None and teacher.model.kind != "mlp":
                hops = max(hops, teacher.model.layers)
        return max(1, hops)

    def _exchanged_hops(self) -> int:
        """One for the student; more where a teacher is trained on units that are not the whole graph."""
        trained = [t for t in self.all_teachers() if t.checkpoint is None and t.model.kind != "mlp"]
        parts = [t for t in trained if t.train.parts_per_unit != "all" or t.model.kind not in BUILT_IN_MODELS]
        return max([1, *(teacher.model.layers for teacher in parts)])

    def halo_hops(self) -> int:
        """Hops that the graph store is built with."""
        wanted = self.partition.halo_hops
        return self.required_halo_hops() if wanted == "auto" else wanted


def _check_layer(where: str, layer: int, model: ModelConfig) -> None:
    try:
        resolve_layer(layer, model.layers)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
