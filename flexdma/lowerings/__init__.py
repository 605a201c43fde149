"""Attention under lifespans, by packed FlexAttention or by gathered keys and plain attention."""
