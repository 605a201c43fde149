"""torchtitan 0.3 (extra `flexdma[torchtitan]`): Dynamic Mask Attention as its inner attention; see docs/torchtitan.md.

DynamicMaskInnerAttention   the inner attention of a `GQAttention`, which owns the gate and reads the value heads
DynamicMaskConverter        puts it into every attention of a model's config
"""

try:
    import torchtitan as _torchtitan  # noqa: F401
except ImportError as error:
    raise ImportError("torchtitan: expected to be installed, got none; pip install 'flexdma[torchtitan]'") from error

from flexdma.integrations.torchtitan.converter import DynamicMaskConverter
from flexdma.integrations.torchtitan.inner_attention import DynamicMaskInnerAttention

__all__ = ["DynamicMaskConverter", "DynamicMaskInnerAttention"]
