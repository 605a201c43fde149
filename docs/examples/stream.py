"""Read without end in memory that does not grow, then decode.

python docs/examples/stream.py
"""

import torch

from flexdma import DynamicMaskAttention


def main(chunks: int = 16, length: int = 1024) -> int:
    """Print the tokens read and the bytes kept after each chunk; returns the bytes."""
    torch.manual_seed(0)
    layer = DynamicMaskAttention(128, 4, 2, 32, window_size=256, sinks=4, recency="slope").eval()
    with torch.no_grad():
        state = layer.empty_state(batch_size=1)
        for _ in range(chunks):
            output, state = layer(torch.randn(1, length, 128), state=state, return_state=True)
            print(f"{int(state.length):7,} tokens read, {state.nbytes:,} bytes kept")
        token = output[:, -1:]
        for _ in range(32):
            token, state = layer(token, state=state, return_state=True)
    print(f"{int(state.length):7,} tokens after decoding, {state.nbytes:,} bytes kept")
    return state.nbytes


if __name__ == "__main__":
    main()
