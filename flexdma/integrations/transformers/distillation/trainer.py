"""Distillation by transformers' Trainer."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from flexdma.integrations.transformers.distillation.distiller import Distiller, Recipe
from flexdma.integrations.transformers.distillation.record import Distillation


class DistillTrainer(Trainer):
    """transformers' Trainer with the losses of `distill`, and windows that shrink as there.

    model: as in `distill`.  args: of the Trainer; `learning_rate` is that of adapters.
    gates, lora, merge, anneal, far, seed, gate_lr: as in `distill`.  named: other arguments of the Trainer.
    The dataset has rows of "input_ids" of one length, without labels and padding.

    `distillation` has the losses of each batch.  `train` leaves the model as `distill` does, also after an exception or
    Ctrl-C; it can be called once.  Checkpoints and `resume_from_checkpoint` work as in the Trainer: windows go on from the
    step that the checkpoint has.
    Raises TypeError, ValueError or ImportError naming what cannot be distilled.
    """

    loss_is_scaled_for_ga = False
    optimizer: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        gates: bool = True,
        lora: Any = None,
        merge: bool = True,
        anneal: float = 0.5,
        far: int = 128,
        seed: int = 0,
        gate_lr: float = 1e-2,
        **named: Any,
    ) -> None:
        self.distiller = Distiller(model, Recipe(gates, lora, merge, anneal, far, seed))
        self.gate_lr = gate_lr
        try:
            super().__init__(self.distiller.trained, args, **named)
        except BaseException:
            self.distiller.end()
            raise
        # The loss is a mean over the batch, which the Trainer divides by the batches of a step.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Annealing(self.distiller))

    @property
    def distillation(self) -> Distillation:
        """The losses of each batch."""
        return self.distiller.record

    def train(self, *arguments: Any, **named: Any) -> Any:
        """As Trainer.train.  Afterwards `model` is the distilled model."""
        if self.distiller.ended:
            raise RuntimeError(
                "train: expected one call, because the distillation has ended; make a new DistillTrainer"
            )
        try:
            return super().train(*arguments, **named)
        finally:
            self.distiller.end()
            self.model = self.model_wrapped = self.distiller.trained

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `distill`."""
        with self.accelerator.autocast():  # the teacher's pass too, which the Trainer does not call
            loss = self.distiller.loss(inputs, model)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Mapping[str, Any], *_arguments: Any, **_named: Any) -> Any:
        """The loss of a batch of the evaluation, without predictions."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def create_optimizer(self, *_arguments: Any) -> torch.optim.Optimizer:
        """The optimizer of the arguments, without weight decay, in groups of adapters and gates."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self.distiller.parameter_groups(options.pop("lr"), self.gate_lr), **options)
        return self.optimizer

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """As Trainer.log, with the two losses of the latest batch."""
        latest = self.distiller.record.latest if "loss" in logs else {}
        super().log({**logs, **latest}, *arguments, **named)


class _Annealing(TrainerCallback):
    """Sets the windows at the start of each step."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def on_step_begin(self, args: Any, state: Any, control: Any, **_named: Any) -> None:
        self.distiller.annealing.start_step(state.global_step, state.max_steps)
