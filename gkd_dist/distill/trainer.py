"""The training loop of students and teachers: launcher-neutral, resumable, equal on all ranks.

One stream per rank delivers training units and, after every epoch that is evaluated, the units of a
validation pass. What happens depends on (seed, epoch, step, unit) alone, so a run that is resumed
goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from gkd_dist.config import DistillConfig
from gkd_dist.distill.checkpoint import TrainState, agree_on_checkpoint
from gkd_dist.distill.compiling import choose_compiled, edge_values
from gkd_dist.distill.gradients import measures_gradients
from gkd_dist.distill.heads import with_heads
from gkd_dist.distill.module import StudentModule, merge_running_statistics
from gkd_dist.distill.optimizer import lr_factor
from gkd_dist.distill.resident import (
    HOPS,
    ResidentShare,
    Stream,
    WholeGraphPlan,
    exchanges,
    shares_of,
)
from gkd_dist.distill.saving import CheckpointSaver, Claim, circumstances, say_changes
from gkd_dist.distill.step import Engine, StepReport, seeded, train_step
from gkd_dist.distill.task import TrainSummary, TrainTask, build_objective, heads_of, teacher_wants
from gkd_dist.distill.together import failed_together
from gkd_dist.distill.validation import Metrics, measure_medians, validate
from gkd_dist.distill.wishes import Agreed, Wishes
from gkd_dist.errors import StudentError, TerminatedError
from gkd_dist.graph import Batch, Task
from gkd_dist.models.build import build_model, resolve_model
from gkd_dist.models.io import ModelSpec
from gkd_dist.models.trainable import check_empty, refuse_untrainable, require_layers, sampler_for
from gkd_dist.stream.node_cache import through_cache
from gkd_dist.stream.order import Position, StreamPlan, micro_steps, plan_units
from gkd_dist.stream.prefetch import Prefetcher
from gkd_dist.stream.units import UnitLoader, part_costs
from gkd_dist.telemetry import peak_rss_bytes
from gkd_dist.world import World

log = logging.getLogger(__name__)
_INIT = -1  # counter of the random numbers that initialise a model


class TrainEngine(Engine, Protocol):
    """What the loop needs beyond a step."""

    @property
    def grad_norm(self) -> float | None: ...
    @property
    def module(self) -> StudentModule: ...
    def set_lr(self, lr: float) -> None: ...
    def train(self, mode: bool) -> None: ...
    def model_state(self) -> dict[str, Tensor]: ...
    def head_state(self) -> dict[str, Tensor]: ...
    def optimizer_state(self) -> dict[str, Tensor]: ...
    def load_optimizer_state(self, state: dict[str, Tensor], empty: Batch) -> None: ...
    def load_masters(self, state: dict[str, Tensor]) -> None: ...
    def close(self) -> None: ...


EngineFactory = Callable[[nn.Module, int], TrainEngine]  # (model, micro-steps per step)


class Watcher(Protocol):
    """Who is told how a run goes; called on rank 0 alone."""

    def step(self, step: int, report: StepReport, names: list[str], extra: dict[str, float]) -> None: ...
    def evaluation(self, step: int, epoch: int, metrics: Metrics, state: TrainState) -> None: ...


class Trainer:
    """Trains one model on this rank; all ranks run the same code."""

    def __init__(
        self,
        task: TrainTask,
        world: World,
        make_engine: EngineFactory,
        watcher: Watcher | None = None,
        wishes: Wishes | None = None,
        owns_run: Callable[[], None] | None = None,
    ) -> None:
        self.task, self.world, self.watcher = task, world, watcher if world.is_main else None
        self.wishes = wishes or Wishes()
        self.config, meta = task.train, task.graph.manifest.meta
        self.objective = build_objective(task)
        wants = teacher_wants(task.losses, task.teacher_layers)
        self.share: ResidentShare | None = None
        self.plan: StreamPlan | WholeGraphPlan
        graph, knowledge = through_cache(task.graph, task.knowledge, self.config.cache, self.config.reading_timeout_s)
        if exchanges(self.config):
            units = shares_of(task.graph, world.world_size)
            self.loader = UnitLoader(graph, knowledge, units, wants, HOPS, task.features)
            self.share, self.plan = ResidentShare(self.loader, world), WholeGraphPlan(len(units))
        else:
            units = plan_units(task.graph.num_parts, self.config.parts_per_unit, part_costs(task.graph.manifest))
            self.loader = UnitLoader(graph, knowledge, units, wants, features=task.features)
            per_step, shuffle = self.config.units_per_step, self.config.shuffle
            self.plan = StreamPlan(task.seed, len(units), per_step, shuffle, self.loader.costs)
        self.micro_steps = micro_steps(self.plan.full_step, world.world_size)
        self.my_units = list(range(len(units)))[world.rank :: world.world_size]
        self.task_kind: Task = meta["task"]
        model = resolve_model(task.model, meta)
        width, num_classes = self.loader.num_features, int(meta["num_classes"])
        self.spec = ModelSpec(model, width, num_classes, meta["task"], features=task.features)
        self.saver = self._claim(owns_run) if world.is_main else None
        self.state = agree_on_checkpoint(task.output, task.fingerprint, world)
        self.resumed_from = self.state.global_step
        self.objective.compiled = self.state.compiled = self._choose_compiled()
        now = circumstances(world.world_size)
        if world.is_main:
            say_changes(self.state.made_with, now)
        self.state.made_with = now
        self.engine = self._start_engine(make_engine)

    def _choose_compiled(self) -> bool:
        """Whether edge scores are compiled; all ranks must call."""
        if not self.objective.student_layers or not isinstance(self.config, DistillConfig):
            return False
        num_edges = sum(entry.counts["num_owned_edges"] for entry in self.task.graph.manifest.parts)
        values = edge_values(num_edges, self.task.model.hidden, self.config.epochs)
        return choose_compiled(self.config.compile, self.state.compiled, values, self.world)

    def _claim(self, owns_run: Callable[[], None] | None) -> CheckpointSaver:
        """From now on this process writes the checkpoints, and one that did so before does not."""
        claim = Claim(self.task.output, owns_run)
        claim.take()
        saver = CheckpointSaver(self.task.output, self.task.fingerprint, self.config.keep, claim)
        saver.tidy()
        return saver

    def _start_engine(self, make_engine: EngineFactory) -> TrainEngine:
        with seeded(torch.device("cpu"), self.task.seed, _INIT):
            model = build_model(self.spec.config, self.spec.in_channels, self.spec.out_channels)
        if self.share is not None:
            require_layers(model)
        if self.state.model:
            model.load_state_dict(self.state.model)
        refuse_untrainable(model)
        self.sampler = sampler_for(model, self.config.fan_out if isinstance(self.config, DistillConfig) else None)
        student = with_heads(model, heads_of(self.task, model, self.loader), self.task.seed, self.state.heads)
        self.num_head_params = sum(parameter.numel() for parameter in student.heads.parameters())
        empty = self.loader.empty()
        check_empty(student.model, empty, self.world.rank)
        engine = make_engine(student, self.micro_steps)
        engine.load_optimizer_state(self.state.optimizer, empty.to(self.world.device))
        if self.state.model:  # after the optimizer's state, whose room a step has made
            engine.load_masters(self.state.model | {f"heads.{name}": value for name, value in self.state.heads.items()})
        self.state.model, self.state.heads, self.state.optimizer = {}, {}, {}  # the engine has them now
        self.objective.student_sigma = self.state.sigmas
        return engine

    def run(self) -> TrainSummary:
        """Trains to the end, writes the best model (rank 0) and returns a summary.

        Raises `TerminatedError` where a rank was asked to stop, with a checkpoint of the last step kept.
        """
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.saver is not None:
                stack.enter_context(self.saver)
            stream = stack.enter_context(self._stream())
            stack.enter_context(self.world.facing_peers())
            try:
                self._measure_medians(stream)
                while not self.state.stopped and self.state.position[0] < self.config.epochs:
                    self._step(stream)
                wait_s = float(self.world.sum(torch.tensor([stream.wait_s]))[0]) / self.world.world_size
                self._settle()
            finally:
                self.engine.train(False)
        self._publish(time.perf_counter() - started, wait_s)
        self.engine.close()
        return self._summary(time.perf_counter() - started, wait_s)

    # --- the stream --------------------------------------------------------------------------

    def _stream(self) -> Stream:
        """What delivers the batches of this rank from where the run stands."""
        order = self._order(Position(*self.state.position), bool(self.objective.needs_student_median))
        if self.share is not None:
            return self.share.stream(order)
        config, loader = self.config, self.loader
        return Prefetcher(
            loader.load,
            order,
            config.prefetch_bytes,
            config.resident_bytes,
            loader.size_of,
            device=self.world.device,
            extra_of=loader.extra_of,
            timeout_s=config.reading_timeout_s,
            who=f"rank {self.world.rank} of {self.world.world_size}",
            name_of=loader.name_of,
        )

    def _order(self, start: Position, measure_first: bool) -> Iterator[tuple[Position, int | None]]:
        """Units of this rank: training micro-steps, and a validation pass where one is due."""
        if measure_first:
            yield from ((start, unit) for unit in self.my_units)
        for epoch in range(start.epoch, self.config.epochs):
            first = start if epoch == start.epoch else Position(epoch, 0)
            yield from self.plan.walk(first, epoch + 1, self.world.rank, self.world.world_size)
            if self._evaluates(epoch):
                yield from ((Position(epoch, self.plan.steps_per_epoch), unit) for unit in self.my_units)

    def _evaluates(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs

    # --- one step ----------------------------------------------------------------------------

    def _step(self, stream: Stream) -> None:
        started, waited = time.perf_counter(), stream.wait_s
        epoch, step = self.state.position
        self._at("reading")
        batches = stream.take(self.micro_steps)
        self._at("training")
        self.engine.train(True)
        lr = self.config.lr * lr_factor(self.config.lr_schedule, self.state.global_step, self._total_steps())
        self.engine.set_lr(lr)
        report = train_step(
            self.engine,
            self.objective,
            batches,
            self.world,
            seed=self.task.seed,
            epoch=epoch,
            step=self.state.global_step,
            wishes=self.wishes.flags(failed=self.saver is not None and self.saver.failed),
            sampler=self.sampler,
            measure_gradients=measures_gradients(epoch, step),
        )
        merge_running_statistics(self.engine.module, self.world)
        stream.settle()
        self.state.global_step += 1
        following = Position(epoch, step).next(self.plan.steps_per_epoch)
        self.state.position = (following.epoch, following.step)
        elapsed = time.perf_counter() - started
        self._tell_step(report, batches, elapsed, stream.wait_s - waited, lr)
        del batches  # an evaluation reads units of its own
        if following.step == 0 and self._evaluates(epoch):
            self._evaluate(stream, epoch)
        self._keep(report.agreed)

    def _at(self, doing: str) -> None:
        """For whoever waits for this rank, and for its own messages."""
        place = self.world.place
        place.doing, place.step, place.unit = f"{doing} {self.task.name}", self.state.global_step, None

    def _total_steps(self) -> int:
        return self.config.epochs * self.plan.steps_per_epoch

    def _tell_step(self, report: StepReport, batches: list[Batch], elapsed: float, waited: float, lr: float) -> None:
        if self.watcher is None:
            return
        norms = report.grad_norms(self.objective.names)
        for message in self.objective.check_inert(norms):
            log.warning("%s: %s", self.task.name, message)
        if self.state.global_step % self.config.log_every and not norms:
            return
        nodes = sum(batch.num_owned for batch in batches)
        extra = {
            "lr": lr,
            "time/step_s": elapsed,
            "throughput/nodes_per_s": nodes * self.world.world_size / max(elapsed, 1e-9),
            "stream/wait_s": waited,
            "stream/wait_fraction": waited / max(elapsed, 1e-9),
            **{f"grad_norm/{name}": norm for name, norm in norms.items()},
        }
        if self.engine.grad_norm is not None:
            extra["grad_norm"] = self.engine.grad_norm
        self.watcher.step(self.state.global_step, report, self.objective.names, extra)

    # --- evaluation --------------------------------------------------------------------------

    def _pass(self, stream: Stream) -> tuple[Iterator[Batch], int, Batch]:
        """Batches of an evaluation pass, how many forwards every rank takes, and the empty batch."""
        self._at("evaluating")
        self.engine.train(False)
        rounds = -(-len(self.loader.units) // self.world.world_size)
        return (next(stream)[1] for _ in self.my_units), rounds, self.loader.empty().to(self.world.device)

    def _evaluate(self, stream: Stream, epoch: int) -> None:
        metrics = validate(self.engine, *self._pass(stream), self.world, self.task_kind)
        state, value = self.state, metrics["val"]
        if value is None or value > state.best_metric:
            state.best_metric, state.best_epoch, state.bad_evals = -1.0 if value is None else value, epoch, 0
            state.best = self.engine.model_state()
        else:
            state.bad_evals += 1
        state.stopped = bool(self.config.patience) and state.bad_evals >= self.config.patience
        if self.watcher is not None:
            self.watcher.evaluation(state.global_step, epoch, metrics, state)

    def _measure_medians(self, stream: Stream) -> None:
        """The student's own medians, before its first step, where a term asks for them."""
        if self.objective.needs_student_median:
            measure_medians(self.engine, self.objective, *self._pass(stream), self.world)
            self.state.sigmas = dict(self.objective.student_sigma)

    # --- what is written ---------------------------------------------------------------------

    def _keep(self, agreed: Agreed) -> None:
        """A checkpoint where one is due or asked for; then the end, where that is asked for."""
        if agreed.fail:
            self._give_up()
        if self.state.stopped:
            return  # the model itself comes next
        ended = self.state.position[0] == self.config.epochs
        if self.state.global_step % self.config.checkpoint_every == 0 or (not ended and (agreed.save or agreed.stop)):
            self._save()
        if agreed.stop and not ended:
            self._stop()

    def _save(self) -> None:
        """All ranks gather; rank 0 keeps what was gathered, and its thread writes it."""
        self._at("keeping a checkpoint of")
        model, optimizer = self.engine.model_state(), self.engine.optimizer_state()
        state = replace(self.state, model=model, heads=self.engine.head_state(), optimizer=optimizer)
        self.wishes.saved()
        self._settle()
        if self.saver is not None:
            self.saver.save(replace(state, sigmas=dict(self.state.sigmas)))

    def _settle(self) -> None:
        """All ranks wait until what rank 0 writes is there; on all of them an error where that has failed."""
        if failed_together(self.world, self.saver):
            self._give_up()

    def _give_up(self) -> None:
        if self.saver is not None:
            self.saver.check()
        raise StudentError(
            f"rank 0 could not write what there was of {self.task.name} up to step {self.state.global_step}; its own "
            "error says why, run the same command again after it is mended"
        )

    def _stop(self) -> None:
        self._settle()
        raise TerminatedError(
            f"training of {self.task.name} was asked to stop (SIGTERM) and did so after step {self.state.global_step}, "
            "which is kept; run the same command again, it goes on from there"
        )

    def _publish(self, wall_s: float, wait_s: float) -> None:
        """Writes the best weights; ``model.json`` comes last and makes the model count."""
        weights = self.state.best or self.engine.model_state()
        if self.saver is not None:
            model = build_model(self.spec.config, self.spec.in_channels, self.spec.out_channels)
            model.load_state_dict(weights)
            summary = self._summary(wall_s, wait_s)
            spec = replace(self.spec, meta={"name": self.task.name, "seed": self.task.seed, "summary": vars(summary)})
            self.saver.publish(model, spec)
        self._settle()

    def _summary(self, wall_s: float, wait_s: float) -> TrainSummary:
        best = self.state.best_metric
        return TrainSummary(
            self.task.name,
            self.state.position[0],
            self.state.best_epoch,
            None if best < 0 else best,
            wall_s,
            peak_rss_bytes(),
            wait_s,
            self.resumed_from,
            {"sigmas": dict(self.state.sigmas), "num_head_params": self.num_head_params},
        )


def prepare_process(threads: int) -> None:
    """Fixed threads and deterministic algorithms: the same run gives the same bits."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
