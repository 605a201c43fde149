"""Convert the arguments of pictures to one form: one head, or labelled rows of layers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flexdma import Lifespans

# One layer; the layers of a model; the layers of several models by label.
Layers = Lifespans | Sequence[Lifespans] | Mapping[str, Lifespans | Sequence[Lifespans]]


def one_head(lifespans: Lifespans, batch: int, head: int) -> Lifespans:
    """Birth and death [K] on the CPU, from [B, H, K] or already [K]."""
    birth, death = (_row("lifespans", part, batch, head) for part in lifespans)
    return Lifespans(birth, death)


def one_row(name: str, numbers: Tensor, batch: int, head: int, length: int) -> Tensor:
    """[K] float64 on the CPU, from [B, H, K] or already [K], where K = length."""
    row = _row(name, numbers, batch, head).double()
    if len(row) != length:
        raise ValueError(f"{name}: expected {length} keys, got {list(numbers.shape)}")
    return row


def labelled_layers(lifespans: Layers) -> dict[str, list[Lifespans]]:
    """One list of layers per label.  Raises ValueError unless all labels have as many layers of the same shape."""
    rows = lifespans if isinstance(lifespans, Mapping) else {"": lifespans}
    # A Lifespans is a tuple too, so check for it first.
    named = {label: [row] if isinstance(row, Lifespans) else list(row) for label, row in rows.items()}
    shapes = {(len(row), *(tuple(layer.birth.shape) for layer in row)) for row in named.values()}
    if len(shapes) != 1 or not next(iter(named.values())):
        raise ValueError(
            f"lifespans: expected the same number and shape of layers for each label, got {sorted(shapes)}"
        )
    return named


def head_name(layer: int, head: int, *, layers: int = 2) -> str:
    """The name of a head, counted from 0, without the layer if there is only one layer."""
    return f"layer {layer}, head {head}" if layers > 1 else f"head {head}"


def _row(name: str, numbers: Tensor, batch: int, head: int) -> Tensor:
    if numbers.dim() not in (1, 3):
        raise ValueError(f"{name}: expected [B, H, K] or [K], got {list(numbers.shape)}")
    return (numbers if numbers.dim() == 1 else numbers[batch, head]).detach().cpu()
