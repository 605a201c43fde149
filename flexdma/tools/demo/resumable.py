"""Checkpoints of a training over several ranks, by torch.distributed.checkpoint: every rank writes its shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from flexdma.tools.demo.training import Training
from flexdma.tools.refusal import RefusedError

SETTINGS = "settings.json"


class ShardedCheckpoints:
    """The last checkpoint of a training, folder/step-N.

    every: steps between checkpoints; the last step has one too.
    settings: what the numbers depend on.  `load` refuses a checkpoint of others.

    A checkpoint is written beside its place and renamed when all ranks have finished, so an interruption leaves the one
    before.  Another number of ranks can load it, as each reads the shards that it needs.
    """

    def __init__(self, folder: Path, *, steps: int, every: int, settings: dict[str, Any], resume: bool) -> None:
        self.folder, self.steps, self.every, self.settings, self.resume = folder, steps, every, settings, resume

    def load(self, training: Training) -> None:
        """Bring a training to the last checkpoint, if there is one and `resume` is set; otherwise delete what is there."""
        found = sorted(self.folder.glob("step-*"))
        dist.barrier()  # all have looked
        if not self.resume:
            if dist.get_rank() == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            return
        if not found:
            return
        refuse_other_settings(found[-1], self.settings)
        state = self._state(training)
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(
            training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        training.generator.set_state(state["batches"])
        training.course.losses = state["losses"][: int(state["step"])].tolist()

    def save(self, training: Training) -> None:
        """Write a checkpoint if this step has one."""
        step = len(training.course.losses)
        if step % self.every and step != self.steps:
            return
        part, place = self.folder / f".step-{step:06}.part", self.folder / f"step-{step:06}"
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            (part / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        dist.barrier()
        dcp.save(self._state(training), checkpoint_id=part)
        if dist.get_rank() == 0:
            earlier = list(self.folder.glob("step-*"))
            part.rename(place)
            for folder in earlier:
                shutil.rmtree(folder)
        dist.barrier()

    def _state(self, training: Training) -> dict[str, Any]:
        model, optimizer = get_state_dict(training.model, training.optimizer)
        losses = torch.zeros(self.steps, dtype=torch.float64)
        done = len(training.course.losses)
        losses[:done] = torch.tensor(training.course.losses, dtype=torch.float64)
        return {
            "model": model,
            "optimizer": optimizer,
            "batches": training.generator.get_state(),
            "losses": losses,
            "step": torch.tensor(done),
        }


def refuse_other_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raise RefusedError unless the checkpoint was made with these settings."""
    before = json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise RefusedError(
                f"--{name}: expected {before.get(name)}, as in {checkpoint}, which --resume goes on from, got {value}"
            )
