"""One distillation: the model made ready, the losses of a batch, and the model as it is left."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from flexdma import checks
from flexdma.annealing import check_share
from flexdma.integrations.partial_logits import body_of
from flexdma.integrations.transformers.distillation.adapters import add_adapters, merge_adapters, without_adapters
from flexdma.integrations.transformers.distillation.annealing import Annealing
from flexdma.integrations.transformers.distillation.divergence import divergence
from flexdma.integrations.transformers.distillation.passes import recorded, without_gradients
from flexdma.integrations.transformers.distillation.ranking import ranking_loss, start_constant_gates
from flexdma.integrations.transformers.distillation.record import Distillation
from flexdma.integrations.transformers.distillation.refusals import (
    check_model,
    check_tokens,
    token_ids,
)
from flexdma.integrations.transformers.eligibility import attention_calls, own_windows
from flexdma.integrations.transformers.full_attention import ObservedAttention, full_attention
from flexdma.integrations.transformers.future_peaks import future_peaks


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: the arguments of `distill` of the same names."""

    gates: bool = True
    lora: Any = None
    merge: bool = True
    anneal: float = 0.5
    far: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        checks.positive_int("far", self.far)
        check_share("anneal", self.anneal)
        if not self.gates and self.lora is None:
            raise ValueError("gates, lora: expected at least one to train, got gates=False and lora=None")


class Distiller:
    """A converted model while it is distilled.

    From construction to `end` the base is frozen and, with a Recipe's lora, the model is inside `adapted`, a PeftModel.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        """Raises TypeError, ValueError or ImportError naming what cannot be distilled, before it changes the model."""
        check_model(model, recipe.gates)
        self.model, self.recipe, self.record = model, recipe, Distillation(model=model)
        self.body, self.own_windows = body_of(model), own_windows(attention_calls(model))
        self.layers = list(self.own_windows)
        self.annealing = Annealing(self.own_windows, recipe.anneal)
        self.ended = False
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._modes = [(module, module.training) for module in model.modules()]
        try:
            self.adapted = None if recipe.lora is None else add_adapters(model, self.layers, recipe.lora, recipe.seed)
        except BaseException:
            self._restore_flags()
            raise
        self._choose_parameters()

    @property
    def trained(self) -> Any:
        """The module to train: the model, or the PeftModel around it."""
        return self.model if self.adapted is None else self.adapted

    def parameter_groups(self, lr: float, gate_lr: float) -> list[dict[str, Any]]:
        """The trained parameters for an optimizer: adapters at `lr` and gates at `gate_lr`, where there are any."""
        gates = {id(parameter) for parameter in self._gate_parameters()}
        trained = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if id(parameter) not in gates], "lr": lr},
            {"params": [parameter for parameter in trained if id(parameter) in gates], "lr": gate_lr},
        ]
        return [group for group in groups if group["params"]]

    def loss(self, batch: Tensor | Mapping[str, Any], student: Any = None) -> Tensor:
        """The loss of a batch: divergence plus the gates' ranking loss, which have no parameter in common.

        student: the module that computes the student's forward pass, where something wraps `trained`.
        Records both while gradients are enabled.  Raises FloatingPointError where the loss is not finite.
        """
        ids = token_ids(batch).to(self.model.device)
        check_tokens(ids, self.annealing.smallest, self.recipe.far if self.recipe.gates else None)
        self.annealing.set_windows(ids.shape[1])
        teacher, peaks = self._teacher(ids)
        output, values = self._student(ids, self.trained if student is None else student)
        # Without adapters nothing learns by the divergence.
        with torch.set_grad_enabled(self.adapted is not None and torch.is_grad_enabled()):
            apart = divergence(self.model, ids, teacher, output)
        ranking = [
            ranking_loss(layer.value_gate, values[layer], peaks[layer], self.recipe.far)
            for layer in (self.layers if self.recipe.gates else ())
        ]
        mean = torch.stack(ranking).mean() if ranking else None
        loss = apart if mean is None else mean if self.adapted is None else apart + mean
        if not loss.isfinite():
            raise FloatingPointError(f"loss: expected a finite number, got {loss.item()}")
        if torch.is_grad_enabled():
            self._note(ids, apart, mean)
        return loss

    def end(self) -> None:
        """Leave the model with its final windows, as trainable as before, and with adapters merged if the recipe says so."""
        if self.ended:
            return
        self.ended = True
        self.annealing.end()
        if self.adapted is not None and self.recipe.merge:
            merge_adapters(self.model, self.adapted)
            self.adapted = None
        self.record.model = self.trained
        if self.adapted is None:
            self._restore_flags()
        for module, training in self._modes:
            module.training = training
        for layer in self.layers:
            layer.value_gate.train(layer.training)
        if self.record.divergence:
            self.model.config.flexdma = {**self.model.config.flexdma, "distilled": True}

    def _restore_flags(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags[name])

    def _choose_parameters(self) -> None:
        if self.adapted is None:
            self.model.requires_grad_(False)
        for layer in self.layers:
            layer.value_gate.requires_grad_(False)
        for parameter in self._gate_parameters() if self.recipe.gates else ():
            parameter.requires_grad_(True)
        if self.recipe.gates:
            for layer in self.layers:
                start_constant_gates(layer.value_gate)

    def _gate_parameters(self) -> list[nn.Parameter]:
        return [layer.value_gate.dt_proj.weight for layer in self.layers]

    def _teacher(self, ids: Tensor) -> tuple[Any, dict[Any, Tensor]]:
        """The output of the body with full attention, and the peaks of each layer's keys."""
        peaks: dict[Any, Tensor] = {}

        def observe(seen: ObservedAttention) -> None:
            if self.recipe.gates:
                peaks[seen.layer] = future_peaks(seen, self.recipe.far)

        plain = nullcontext() if self.adapted is None else without_adapters(self.adapted)
        with plain, full_attention(self.model, observe, self.own_windows), without_gradients(self.model):
            output = self.body(input_ids=ids, use_cache=False)
        return output, peaks

    def _student(self, ids: Tensor, student: Any) -> tuple[Any, dict[Any, Tensor]]:
        """The output of the body, and for gates the values of each layer, without gradients."""
        kept: dict[Any, Any] = {}
        needs_gradients = self.adapted is not None and torch.is_grad_enabled()
        mode = nullcontext() if needs_gradients else without_gradients(self.model)
        with recorded(self.body, self.layers if self.recipe.gates else [], kept), mode:
            if student is self.trained:
                self.body(input_ids=ids, use_cache=False)
            else:  # a wrapper that must see the call
                student(input_ids=ids, use_cache=False, logits_to_keep=1)
        return kept.pop(None), kept

    def _note(self, ids: Tensor, apart: Tensor, ranking: Tensor | None) -> None:
        for name, number in (("divergence", apart), ("ranking", ranking)):
            if number is not None:
                getattr(self.record, name).append(number.item())
        windows = [layer.dynamic_mask_options["window_size"] for layer in self.layers]
        self.record.windows.append(fmean(fmean(w) if isinstance(w, tuple) else w for w in windows))
        self.record.tokens += ids.numel()
