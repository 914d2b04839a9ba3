"""State of a training run: models, optimiser, average, scaler, counters; and all of it to and from disk."""

from __future__ import annotations

import sys
from dataclasses import asdict

from torch import Tensor, nn

from models.weights import load_strictly, some
from utils.config.tokenizer import TokenizerTrainConfig
from utils.config.training import TrainConfig, check_changes
from utils.data.datasets import accumulation
from utils.runtime.checkpoint import (
    MODEL,
    Checkpoints,
    RunState,
    average_names,
    averages_of,
    invariants_of,
    read_checkpoint,
    read_manifest,
)
from utils.runtime.distributed import Ranks, data_parallel, gathered
from utils.runtime.files import as_json
from utils.runtime.numerics import Precision
from utils.training.log import Meter
from utils.training.nan_guard import FiniteGuard
from utils.training.optim import (
    MovingAverage,
    make_optimizer,
    restore_optimizer,
)

Config = TrainConfig | TokenizerTrainConfig
Metrics = dict[str, Tensor]


class TrainingState:
    """Parts of a run, beside its data: saved by `checkpoint`, and read back by `resume`."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        ranks: Ranks,
        total_steps: int,
        forward: nn.Module | None = None,
        auxiliary: dict[str, nn.Module] | None = None,
    ):
        """`model` is what is saved; `forward`, when given, wraps it as the module that training calls.

        `auxiliary` are saved beside it, each under its name. Those with parameters are trained along, and clipped by
        themselves.
        """
        optim = config.optim
        self.config, self.ranks, self.directory, self.total_steps = config, ranks, config.run.directory, total_steps
        self.model = model.to(ranks.device)
        self.auxiliary = {name: module.to(ranks.device) for name, module in (auxiliary or {}).items()}
        self.averages = {name: MovingAverage(self.model, decay) for name, decay in average_names(optim.ema).items()}
        self.network = (forward or model).to(ranks.device)
        self.precision = Precision(optim.precision, ranks.device)
        if ranks.world > 1:
            self.wrap_distributed()
        self.networks = [self.network]  # whose gradients are averaged over the ranks
        self.optimizer = make_optimizer([model, *self.auxiliary.values()], optim)
        self.micro_batch = optim.micro_batch or optim.bs // ranks.world
        self.accumulate = accumulation(optim.bs, self.micro_batch, ranks.world)
        self.checkpoints = Checkpoints(self.directory, config.run.keep)
        self.guard = FiniteGuard(ranks, config.run.max_skipped if config.run.on_nonfinite == "skip" else 0)
        self.meter = Meter()
        self.step = self.saved_step = 0

    def wrap_distributed(self) -> None:
        """Make the ranks train one model: DDP."""
        self.network = data_parallel(self.network)

    def invariants(self) -> dict[str, object]:
        """Facts, beside its flags, that a run depends on and cannot change."""
        return {}

    def beside_weights(self) -> dict[str, object]:
        """Settings by name that sampling needs, and that a file of the weights does not hold."""
        return {}

    @property
    def saved(self) -> dict[str, nn.Module]:
        """File name → module, of what a checkpoint holds."""
        average = {name: average.model for name, average in self.averages.items()}
        return {
            MODEL: self.model,
            **average,
            **{f"{name}.safetensors": other for name, other in self.auxiliary.items()},
        }

    def checkpoint(self, kept: bool) -> None:
        """Everything that `resume` needs, as it is now; the first rank writes it while training goes on."""
        self.saved_step = self.step
        self.checkpoints.finish()  # before the copy: one at a time in memory
        tensors = {name: module.state_dict() for name, module in self.saved.items()}
        weights, optimizer = gathered((tensors, self.optimizer.state_dict()), keep=self.ranks.first)
        meters = self.ranks.all_gather_object(self.meter.state())
        if self.ranks.first:
            scaler = self.precision.scaler.state_dict()
            state = RunState(self.step, optimizer, scaler, meters, self.guard.skipped)
            about = {
                "config": as_json(asdict(self.config)),
                "invariants": self.invariants(),
                "beside_weights": as_json(self.beside_weights()),
                "micro_batch": self.micro_batch,
            }
            self.checkpoints.submit(state, weights, about, kept)

    def resume(self) -> None:
        """Go on from the newest valid checkpoint of this run's directory, if there is one."""
        newest = self.checkpoints.newest() if self.ranks.first else 0
        step = int(self.ranks.all_reduce_max([newest])[0])
        if not step:
            return
        path = self.checkpoints.path(step)
        if not path.is_dir():
            raise ValueError(f"this rank sees no {path}: the run's directory must be one that all ranks share")
        manifest = read_manifest(path)
        self.compare(manifest)
        state, weights = read_checkpoint(path)
        kept = averages_of(manifest["config"]).items()
        averages = {decay: weights.pop(name) for name, decay in kept if name in weights}
        for name, average in self.averages.items():
            weights[name] = averages.get(
                average.decay, weights[MODEL]
            )  # a moving average can begin on the way, and end
        lost, new = weights.keys() - self.saved.keys(), self.saved.keys() - weights.keys()
        if lost or new:
            names = f"has {some(sorted(lost))}" if lost else f"lacks {some(sorted(new))}"
            raise ValueError(f"{path} {names}, unlike this run: use another --out_dir, and --init_ckpt for its weights")
        for name, module in self.saved.items():
            load_strictly(module, weights[name], path)
        restore_optimizer(self.optimizer, state.optimizer)
        if state.scaler:  # empty unless the run was in fp16
            self.precision.scaler.load_state_dict(state.scaler)
        self.meter.restore(state.meter, self.ranks)
        self.step, self.saved_step, self.guard.skipped = state.step, state.step, state.skipped
        self.ranks.barrier()  # every rank has read it
        if self.ranks.first:
            self.checkpoints.set_aside(after=self.step)

    def compare(self, manifest: dict) -> None:
        """Show what this run does otherwise than the checkpoint's. Raises ValueError for what cannot change."""
        now = {**as_json(asdict(self.config)), "invariants": as_json(self.invariants())}
        before = {**manifest["config"], "invariants": invariants_of(manifest)}
        if not isinstance(before["optim"]["ema"], list):  # runs of old have one decay, or 0
            before["optim"] = {**before["optim"], "ema": [before["optim"]["ema"]] if before["optim"]["ema"] else []}
        if not before.get("speed", {}).get("code_cache"):  # runs of old said it in their flags alone
            data = {name: before["data"][name] for name in ("dataset", "augment") if name in before["data"]}
            before["invariants"] = {**data, **before["invariants"]}
        for groups in (before, now):  # of a code cache the flags say nothing, the invariants all
            groups["data"] = {k: v for k, v in groups["data"].items() if k not in ("dataset", "augment")}
        lines = check_changes(before, now, self.directory, self.config.run.allow_change)
        if manifest["micro_batch"] != self.micro_batch:
            lines.append(f"images of a rank at a time {manifest['micro_batch']} → {self.micro_batch}: other draws")
        if self.ranks.first:
            for line in lines:
                print(f"resumed with another setting: {line}", file=sys.stderr)

    @property
    def ema_model(self) -> nn.Module | None:
        """The model with the first moving average of the weights."""
        return next((average.model for average in self.averages.values()), None)

    @property
    def sharded(self) -> bool:
        """True when each rank holds a share of the model: then all ranks must run whatever runs it."""
        return False
