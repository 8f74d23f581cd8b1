"""The Trainer: one readable loop around a DeepSpeed engine."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import dump_yaml
from sparse_gpt.data.loader import (
    Batch,
    BatchStream,
    PackedDataset,
    TrainLoader,
    common_vocabulary,
)
from sparse_gpt.data.order import derive_key
from sparse_gpt.errors import EXIT_STOPPED, InUse, Stopped, UserError
from sparse_gpt.model.flops import FlopsLedger
from sparse_gpt.sparse_units import solve
from sparse_gpt.topology.interfaces import UpdateReport
from sparse_gpt.train import build, unfreezing
from sparse_gpt.train.assemble import assemble
from sparse_gpt.train.checkpoint import Checkpointer
from sparse_gpt.train.checkpoint_files import UNSURE
from sparse_gpt.train.drift import check_drift, conversion
from sparse_gpt.train.dry_run import dry_run
from sparse_gpt.train.engine import free_engine, init_ranks, resolve_precision
from sparse_gpt.train.evaluate import Evaluation, evaluate, to_device
from sparse_gpt.train.first_rank import on_first_rank
from sparse_gpt.train.guard import Diverged, StepHealth, clip_gradients, inspect_step
from sparse_gpt.train.init_masks import RewoundWeights
from sparse_gpt.train.metrics import Metrics
from sparse_gpt.train.nonfinite import describe_bad_step
from sparse_gpt.train.optim import learning_rate
from sparse_gpt.train.records import first_topology_record, step_record, update_record
from sparse_gpt.train.run_folder import WAIT_SECONDS, RunFolder
from sparse_gpt.train.signals import Command, StopRequests, code_of, deadline_of, describe
from sparse_gpt.train.spikes import spike_record
from sparse_gpt.train.state import TrainState
from sparse_gpt.train.throughput import Throughput
from sparse_gpt.train.watch import Watch


class Trainer:
    """Trains one model. `source`: where initial weights come from, if they are not random.

    `command`: what this run is a part of, if it is not all that was started. `watch`: the one that
    has been entered, if not only `fit` is to be watched.
    """

    def __init__(
        self,
        config: RunConfig,
        source: build.WeightSource | None = None,
        command: Command | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.config = config
        self.device = init_ranks(config.timeouts.exchange)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.precision = resolve_precision(config, self.device)
        command = command or Command(config.run_dir)
        deadline = deadline_of(
            config.checkpoint.deadline, config.checkpoint.deadline_margin, command.started
        )
        self.stop_requests = StopRequests(config.run_dir, deadline, self.rank == 0, command.run_dir)
        self.watch = watch or Watch(config.timeouts)
        self.total_steps = config.total_steps(self.world_size)
        self.warmup_steps = config.warmup_steps(self.world_size)
        self.run_dir = config.run_dir
        # While rank 0 waits for the folder the others wait in an exchange.
        self.folder = RunFolder(config.run_dir, min(WAIT_SECONDS, config.timeouts.exchange / 2))
        if in_use := on_first_rank(self.folder.claim, "output_dir"):
            raise InUse(f"output_dir: {in_use}")
        self.data = build.open_sources(config.data)
        self.vocab_size, self.eos_id = common_vocabulary([data for data, _ in self.data])
        self.solution = solve(config, self.vocab_size)
        self.gpt_config = config.gpt_config(self.vocab_size, self.solution.dims)
        self.train_data = self._dataset("train")
        self.schedule_steps = config.schedule_steps(self.world_size)
        build.check_schedules(config, self.schedule_steps, self.warmup_steps)
        self.has_validation = all("val" in data.splits for data, _ in self.data)
        if self.has_validation:
            self._dataset("val")  # too short a split must not show at the first validation
        elif config.evaluation.every or config.evaluation.patience:
            raise UserError(
                "evaluation: every or patience is set, but a data source has no val split; "
                "prepare it with --val-fraction, or set both to null"
            )
        self.state = TrainState()
        self.metrics = Metrics(
            self.run_dir, config.logging, config.name, self.total_steps, self.rank == 0
        )
        self._start(source)

    def _dataset(self, split: str) -> PackedDataset:
        c = self.config
        return PackedDataset(self.data, split, c.seq_len, c.seed, c.document_attention)

    def _start(self, source: build.WeightSource | None) -> None:
        """Model, engine, topology, and what counts and saves them."""
        config, lottery = self.config, self.config.sparsity.lottery
        if source is None and lottery is not None and lottery.rewind is not None:
            source = RewoundWeights(lottery.rewind)
        made = assemble(
            config,
            source,
            gpt_config=self.gpt_config,
            solution=self.solution,
            data=self.train_data,
            tokenizer_sha256=self.data[0][0].tokenizer_sha256,
            device=self.device,
            precision=self.precision,
        )
        self.engine, self.optimizer, self.shards = made.engine, made.optimizer, made.shards
        self.controller, self.state.flops_spent = made.controller, made.flops_spent
        masks = self.controller.masks
        active = {name: mask.active * mask.block_size for name, mask in masks.items()}
        self.ledger = FlopsLedger.of(
            self.solution.dims, config.seq_len, self.vocab_size, active, self.gpt_config.transform
        )
        self.checkpointer = Checkpointer(
            self.run_dir / "checkpoints",
            config.checkpoint.keep_last,
            self.shards,
            self.controller,
            self.gpt_config,
            {
                "config": json.loads(config.model_dump_json()),
                "data": [data.identity for data, _ in self.data],
                "global_batch_size": config.batch(self.world_size),
                "eos_id": self.eos_id,
                "tokenizer_sha256": self.data[0][0].tokenizer_sha256,
                "precision": self.precision,
                "source": source.identity if source is not None else None,
            },
            self.optimizer.young,
            self.watch.mark,
        )

    def fit(self) -> TrainState:
        """Train to the end, or to `stop_at`; resumes first, saves last. Returns the final state.

        Raises `Stopped` on every rank, after a save, where any rank was asked to stop.
        """
        with self.watch:
            return self._fit()

    def _fit(self) -> TrainState:
        config, state = self.config, self.state
        self._resume()
        self.checkpointer.check_space(best=config.evaluation.patience is not None)
        on_first_rank(self._open_run_dir, "output_dir")
        try:
            if state.step == 0 and config.sparsity.init_mask != "random":
                init_mask = config.sparsity.init_mask
                record = first_topology_record(init_mask, state, self.controller)
                self.metrics.log("topology", 0, record)
            if state.step >= self.total_steps or state.finished:
                self.metrics.say(f"nothing to do: the run ended at step {state.step}")
                return state
            self._dry_run()
            self._heed_stops()
            self._train_until(min(config.stop_at or self.total_steps, self.total_steps))
        finally:
            self.metrics.close()
        return state

    def _train_until(self, last_step: int) -> None:
        config, state = self.config, self.state
        batches = self._batches()
        self.throughput = Throughput(
            self.ledger,
            config.seq_len,
            self.device,
            self.precision,
            self.world_size,
            config.peak_tflops,
            masked=config.sparsity.storage == "masked",
        )
        saved = state.step
        stops: Sequence[float] = ()
        try:
            while state.step < last_step:
                step = state.step + 1
                lr = self._set_lr(step)
                self.watch.step = step
                self.stop_requests.begin(step)
                health, update = self._step(step, batches)
                self.watch.rest()
                flops = self._account(step, health)
                state.bad_steps = 0 if health.finite else state.bad_steps + 1
                self._log_numbers(step, health)
                if state.bad_steps >= config.optimizer.max_nonfinite_steps:
                    self._roll_back(
                        f"{state.bad_steps} steps in a row had a non-finite loss or gradient "
                        f"(last: step {step}, loss {health.loss}; {self._bad_step})",
                        step - state.bad_steps,
                    )
                    batches.close()
                    batches, saved = self._batches(), state.step
                    continue
                self.throughput.add(config.batch(self.world_size) * config.seq_len, flops)
                if update is not None:
                    self.metrics.log("topology", step, update_record(step, update, self.controller))
                if step % config.logging.every == 0 or step == last_step or not health.finite:
                    speed = self.throughput.read()
                    record = step_record(state, health, lr, speed, self.controller)
                    self.metrics.log("train", step, record)
                self.metrics.advance(step)
                if self._validation_due(step):
                    with self.throughput.paused():
                        self._validate(step)
                stops = health.stops
                if state.finished or any(stops):
                    break
                every = config.checkpoint.every
                # What a rollback goes back to: never in the middle of bad steps.
                if every and step % every == 0 and not state.bad_steps:
                    with self.throughput.paused():
                        self.save()
                    saved = step
        finally:
            batches.close()
        if saved != state.step:
            goes_on = state.step < self.total_steps and not state.finished
            rolls_back = config.optimizer.on_nonfinite == "rollback"
            self.save(UNSURE if state.bad_steps and goes_on and rolls_back else None)
        if any(stops) and not state.finished and state.step < last_step:
            self._stop(stops)

    def _batches(self) -> BatchStream:
        c = self.config
        accumulation = c.accumulation(self.world_size)
        loader = TrainLoader(
            self.train_data, c.micro_batch_size, self.rank, self.world_size, accumulation
        )
        return loader.batches(self.state.samples)

    def _log_numbers(self, step: int, health: StepHealth) -> None:
        if not health.finite:
            self.metrics.log("nonfinite", step, {"found": self._bad_step})
            self.metrics.say(f"skipped    step {step}  {self._bad_step}")
            return
        if spike := spike_record(health.loss, self.state.recent_losses):
            self.metrics.log("spike", step, spike)
        self.state.remember(health.loss)

    def _roll_back(self, what: str, good_step: int) -> None:
        """To the last checkpoint; the data since is skipped. `Diverged` where it may not."""
        settings, state = self.config.optimizer, self.state
        newest = self.checkpointer.newest() if settings.on_nonfinite == "rollback" else None
        if newest is None or state.rollbacks >= settings.max_rollbacks:
            tried = f" after {state.rollbacks} rollbacks" if state.rollbacks else ""
            self.metrics.log("diverged", state.step, {"because": f"{what}{tried}"})
            raise Diverged(
                f"{what}{tried}; the weights are those of step {good_step}. Lower optimizer.lr, or "
                "look at the data there"
            )
        manifest = self.checkpointer.load(newest)
        saved = TrainState()
        saved.restore(manifest["state"], newest)
        state.roll_back(saved)
        self.checkpointer.forget_unsure()
        values = {"because": what, "bad_steps": self.metrics.rewind(state.step)}
        skipped = state.samples - saved.samples
        values |= {"skipped_samples": skipped, "rollbacks": state.rollbacks}
        self.metrics.log("rollback", state.step, values)
        self.metrics.say(
            f"rolled back to step {state.step}  {newest}: {what}; {skipped} samples are skipped"
        )

    def _heed_stops(self) -> None:
        """`Stopped` where any rank was asked to stop; of what is trained all is saved."""
        stops = torch.tensor(self.stop_requests.flags(), device=self.device)
        dist.all_reduce(stops)
        if any(stops.tolist()):
            self._stop(stops.tolist())

    def _stop(self, stops: Sequence[float]) -> NoReturn:
        step = self.state.step
        code = code_of(stops, self.config.checkpoint.deadline)
        self.stop_requests.end(code)
        again = "; start it again to go on" if code == EXIT_STOPPED else ""
        self.metrics.say(
            f"stopped    step {step}  asked by {describe(stops, self.world_size)}{again}"
        )
        raise Stopped(f"asked to stop after step {step}", code)

    def _step(self, step: int, batches: Iterator[Batch]) -> tuple[StepHealth, UpdateReport | None]:
        """One optimizer step over the whole global batch."""
        accumulation = self.config.accumulation(self.world_size)
        loss_sum, losses = torch.zeros((), device=self.device), []
        self.engine.train()
        self.controller.begin_step(step)
        self._step_weights = self.controller.step_weights(step)
        for micro_step in range(accumulation):
            self.watch.mark()
            batch = to_device(next(batches), self.device)
            loss = self.engine(**batch)
            self.engine.backward(loss)
            losses.append(loss.detach())
            loss_sum += losses[-1]
            if micro_step < accumulation - 1:
                self.engine.step()
        self.watch.mark()
        finite = self.controller.before_step(step)
        self._freeze(step)
        health = inspect_step(
            self.shards,
            loss_sum / accumulation,
            finite,
            self.controller.square_sum,
            self.stop_requests.flags(),
        )
        self.optimizer.hold = not health.finite or self.controller.holds_step(step)
        if health.finite:
            clip_gradients(self.shards, health.grad_norm, self.config.optimizer.grad_clip)
        else:
            size = self.config.micro_batch_size
            self._bad_step = describe_bad_step(
                self.shards, losses, self.train_data, self.state.samples, size
            )
            self.shards.zero_gradients()
        self.controller.arm(step, health.finite, self.optimizer)
        self.engine.step()
        self.optimizer.hold = False
        return health, self.controller.after_step(self.optimizer)

    def _freeze(self, step: int) -> None:
        """Keep what gradual unfreezing has not reached yet out of step t."""
        settings, n_layer = self.config.unfreezing, self.gpt_config.n_layer
        if settings is None:
            return
        phase = self.optimizer.phase = unfreezing.phase_at(step, settings.every, n_layer)
        tied = settings.tied_embedding
        names = self.shards.parameters
        frozen = [n for n in names if unfreezing.phase_of(n, n_layer, tied) > phase]
        unfreezing.zero_gradients(self.shards, frozen)

    def _dry_run(self) -> None:
        self.controller.begin_step(0)
        accumulation = self.config.accumulation(self.world_size)
        dry_run(self.engine, self.optimizer, self.config, accumulation)

    def _set_lr(self, step: int) -> float:
        c = self.config
        length = self.schedule_steps
        place = (step - 1) % length + 1
        lr = learning_rate(c.schedule, c.optimizer.lr, place, self.warmup_steps, length)
        active, weights = self.controller.counts()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * weights / active if group.get("by_density") else lr
        return lr

    def _account(self, step: int, health: StepHealth) -> int:
        """Count the step; returns its FLOPs."""
        state, batch = self.state, self.config.batch(self.world_size)
        flops = batch * self.ledger.sequence(*self._step_weights)
        state.flops_spent += flops
        state.step = step
        state.samples += batch
        state.tokens += batch * self.config.seq_len
        state.skipped_steps += not health.finite
        return flops

    def evaluate(
        self, split: str, sequences: int | None = None, stoppable: bool = False
    ) -> Evaluation:
        """Mean loss over a split's whole windows of `seq_len`. A collective.

        `stoppable`: raises `Stopped` between two batches where any rank was asked to stop.
        """
        dataset = self._dataset(split)

        def on_batch() -> None:
            self.watch.mark()
            if stoppable:
                self._heed_stops()

        try:
            return evaluate(self.engine, dataset, self.config.micro_batch_size, sequences, on_batch)
        finally:
            self.watch.rest()

    def _validation_due(self, step: int) -> bool:
        # Never because of stop_at: a run that stops and goes on validates when any other does.
        every = self.config.evaluation.every
        return self.has_validation and (
            step == self.total_steps or bool(every and step % every == 0)
        )

    def _validate(self, step: int) -> None:
        """Validation loss; with `patience`, keeps the best checkpoint and stops early."""
        state, patience = self.state, self.config.evaluation.patience
        result = self.evaluate("val", self.config.evaluation.sequences)
        self.metrics.log(
            "validation",
            step,
            {
                "loss": result.loss,
                "perplexity": result.perplexity,
                "tokens": state.tokens,
                "flops_spent": state.flops_spent,
                "scored_tokens": result.tokens,
            },
        )
        if state.best_loss is None or result.loss < state.best_loss:
            state.best_loss, state.bad_validations = result.loss, 0
            if patience:
                self.save("best")
            return
        state.bad_validations += 1
        if patience and state.bad_validations >= patience:
            state.finished = True
            self.metrics.say(
                f"stopped early at step {step}: {patience} validations without a new best "
                f"(best loss {state.best_loss:.4f})"
            )

    def save(self, tag: str | None = None) -> Path:
        """Save now; first the log, a run that goes on repeats none of it. A collective."""
        self.watch.mark()
        on_first_rank(self.metrics.sync, "the log of the run")
        if shared := on_first_rank(self.folder.check, "output_dir"):
            raise InUse(f"output_dir: {shared}")
        path = self.checkpointer.save(self.state.step, asdict(self.state), tag)
        self.watch.rest()
        self.metrics.say(f"saved      step {self.state.step}  {path}")
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Restore everything from one checkpoint; returns its manifest. A collective."""
        manifest = self.checkpointer.load(path)
        self.state.restore(manifest["state"], path)
        return manifest

    def _resume(self) -> None:
        mode = self.config.checkpoint.resume
        newest = self.checkpointer.last()
        if mode == "never":
            if newest is not None:
                raise UserError(
                    f"checkpoint.resume is never, but {newest} exists; choose another output_dir "
                    "or name, or move it away"
                )
            return
        if newest is None:
            if mode == "required":
                raise UserError(f"checkpoint.resume: no checkpoint in {self.checkpointer.folder}")
            if on_first_rank(lambda: self.folder.lost(self.checkpointer.folder), "output_dir"):
                raise UserError(
                    f"{self.checkpointer.folder} is gone, but a run began in {self.folder.path} (a "
                    "file system that is not mounted?); bring it back, or begin anew with one "
                    "start with checkpoint.resume=never, which drops the log"
                )
            return
        check_drift(newest, self.checkpointer.identity, self.config.checkpoint.allow_changed)
        manifest = self.load(newest)
        self.watch.step = self.state.step
        self.metrics.say(f"resumed    step {self.state.step}  {newest}")
        converted = conversion(manifest, self.config.deepspeed.zero_stage, self.world_size)
        if converted:
            self.metrics.say(f"converted  {converted}")
        if manifest["world_size"] != self.world_size:
            # Not the generators the run began with: they would drop the same units again.
            key = derive_key(self.config.seed, "resumed", self.state.step, self.rank)
            torch.manual_seed(key % 2**63)

    def _open_run_dir(self) -> None:
        self.folder.describe(
            dump_yaml(self.config),
            self.data[0][0].tokenizer_path,
            self.checkpointer.folder,
            anew=self.state.step == 0,
        )
        self.metrics.start(self.state.step)

    def close(self) -> None:
        """Free the engine; the process group stays, for the next Trainer or the exit."""
        self.metrics.close()
        free_engine(self.engine)
        self.folder.release()
