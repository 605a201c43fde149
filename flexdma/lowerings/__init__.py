"""How attention under lifespans is computed: packed FlexAttention, or gathered keys and plain attention."""
