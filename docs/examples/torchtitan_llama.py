"""Train a small Llama of torchtitan's on real text, with its full attention and with Dynamic Mask Attention.

    python docs/examples/torchtitan_llama.py docs/results    # some minutes on one core

Every model has the same initial weights, batches, steps and learning rates, those of `python -m flexdma demo`.  Writes
torchtitan-losses.json and the picture of the losses, for a light and a dark page.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchtitan import __version__ as version
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm, ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.protocols.module import Module

from flexdma.integrations.torchtitan import DynamicMaskConverter, DynamicMaskInnerAttention
from flexdma.plots import loss_figure
from flexdma.tools.byte_models.text import load_text, training_windows, validation_windows
from flexdma.tools.demo.training import BITS, Hyperparameters, learning_rate_factor
from flexdma.tools.machine import machine

CONTEXT, WINDOW, WIDTH = 512, 64, 128
INK = {"light": "#1F2328", "dark": "#E6EDF3"}
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")


def small_llama(inner_attention: Module.Config) -> Llama3Model.Config:
    """The config of a byte model: 2 layers, 4 query and 2 KV heads."""
    linear, norm = {"weight": partial(nn.init.trunc_normal_, std=0.02)}, {"weight": nn.init.ones_}

    def block() -> Llama3TransformerBlock.Config:
        return Llama3TransformerBlock.Config(
            attention_norm=RMSNorm.Config(normalized_shape=WIDTH, param_init=norm),
            ffn_norm=RMSNorm.Config(normalized_shape=WIDTH, param_init=norm),
            attention=make_gqa_config(
                dim=WIDTH, n_heads=4, n_kv_heads=2, wqkv_param_init=linear, wo_param_init=linear, fuse_qkv=True,
                inner_attention=inner_attention, rope=ComplexRoPE.Config(dim=WIDTH // 4, max_seq_len=CONTEXT),
            ),
            feed_forward=make_ffn_config(
                dim=WIDTH, hidden_dim=3 * WIDTH, w1_param_init=linear, w2w3_param_init=linear
            ),
        )  # fmt: skip

    return Llama3Model.Config(
        dim=WIDTH,
        vocab_size=256,
        tok_embeddings=Embedding.Config(num_embeddings=256, embedding_dim=WIDTH, param_init=linear),
        norm=RMSNorm.Config(normalized_shape=WIDTH, param_init=norm),
        lm_head=Linear.Config(in_features=WIDTH, out_features=256, param_init=linear),
        layers=[block(), block()],
    )


def with_flexdma(window_size: int, **options: object) -> Llama3Model.Config:
    """The same model, whose inner attention is flexdma's."""
    inner = DynamicMaskInnerAttention.Config(window_size=window_size, **options)
    return DynamicMaskConverter.Config(inner_attention=inner).build().convert(small_llama(inner))


def bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Bits per byte of windows [rows, CONTEXT + 1]; each row is a document."""
    logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) * BITS


def train(config: Llama3Model.Config, weights: dict[str, Tensor], plan: Hyperparameters) -> dict[str, object]:
    """Train a model from these weights; those of the gate, which are not among them, are torchtitan's initial ones."""
    torch.manual_seed(plan.seed)
    model = config.build()
    model.init_states()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".inner_attention.gate." in name for name in missing)
    text = load_text(None, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, plan))
    generator, losses, start = torch.Generator().manual_seed(plan.seed), [], time.perf_counter()
    for step in range(plan.steps):
        loss = bits(model, training_windows(text, CONTEXT, plan.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(round(loss.item(), 4))
        if step % 50 == 49:
            print(
                f"  step {step + 1}: {loss.item():.3f} bits per byte, {time.perf_counter() - start:.0f} s", flush=True
            )
    with torch.no_grad():
        rows = [bits(model, windows).item() for windows in validation_windows(text, CONTEXT, 64).split(1)]
    return {
        "validation": sum(rows) / len(rows),
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
    }


def draw(record: dict, folder: Path) -> None:
    """Write the picture of a record."""
    import matplotlib
    from matplotlib.lines import Line2D

    losses = {label: model["losses"] for label, model in record["models"].items()}
    validation = {label: model["validation"] for label, model in record["models"].items()}
    for theme, ink in INK.items():
        with matplotlib.rc_context({**dict.fromkeys(INKED, ink), "legend.framealpha": 0}):
            figure = loss_figure(losses, validation, baseline="full attention")
            for line in figure.findobj(Line2D):
                if line.get_color() == "#444444":
                    line.set_color("#888888")  # seen on both pages
            figure.savefig(folder / f"torchtitan-losses-{theme}.png", dpi=90, transparent=True)


def main(folder: Path | None = None, steps: int = 400) -> dict[str, dict]:
    """Train the models, write record and pictures to the folder, and return what each model reached."""
    plan = Hyperparameters(steps=steps, context=CONTEXT)
    full = small_llama(ScaledDotProductAttention.Config())
    configs = {
        "full attention": full,
        "DMA": with_flexdma(WINDOW),
        "DMA + slope": with_flexdma(WINDOW, recency="slope"),
        "DMA + slope, all keys": with_flexdma(CONTEXT, recency="slope"),
    }
    torch.manual_seed(plan.seed)
    initial = full.build()
    initial.init_states()
    models = {}
    for label, config in configs.items():
        print(label)
        models[label] = train(config, initial.state_dict(), plan)
        print(f"  validation: {models[label]['validation']:.3f} bits per byte")
    if folder is not None:
        record = {
            "torchtitan": version,
            "machine": machine("cpu"),
            "plan": vars(plan),
            "window": WINDOW,
            "models": models,
        }
        (folder / "torchtitan-losses.json").write_text(json.dumps(record) + "\n")
        draw(record, folder)
    return models


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
