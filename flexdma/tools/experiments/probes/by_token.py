"""Answers computed token by token.  A choice of keys that reads later tokens has none to read there, as in decoding."""

import torch

from flexdma.tools.experiments.model import SequenceModel
from flexdma.tools.experiments.tasks import IGNORED, Batch


@torch.no_grad()
def parallel_and_by_token(model: SequenceModel, batch: Batch) -> dict[str, float]:
    """The accuracy over all questions in one pass, that where each is computed from the tokens up to it alone, and the
    share of questions with the same answer in both.

    Costs a pass over the prefix for each position that asks.
    """
    device = next(model.parameters()).device
    symbols, targets = batch.symbols.to(device), batch.targets.to(device)
    asked = targets != IGNORED
    in_parallel = model(symbols).argmax(-1)
    by_token = torch.full_like(in_parallel, IGNORED)
    for position in asked.any(0).nonzero().flatten().tolist():
        rows = asked[:, position]
        by_token[rows, position] = model(symbols[rows, : position + 1])[:, -1].argmax(-1)
    shares = {"parallel": in_parallel == targets, "by_token": by_token == targets, "same": in_parallel == by_token}
    return {name: right[asked].double().mean().item() for name, right in shares.items()}
