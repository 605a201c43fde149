"""The number that hides a key from a query."""

# Added to a score: no logit reaches it, and finite, so that a row that sees nothing has a softmax, and gradient 0.
HIDDEN = -1e30
