"""A config that no other model has, so that what one model's config gets does not reach others."""

from copy import deepcopy
from typing import Any

from transformers import PreTrainedModel


def own_config(model: PreTrainedModel) -> None:
    """Give the model a copy of its config, in all of its modules."""
    copies: dict[int, Any] = {}
    deepcopy(model.config, copies)  # and of the configs inside it, by the ids of the originals
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.config = copies[id(config)]
