"""The number that hides a key from a query."""

# Added to the score of a hidden key.  Below every logit, and finite, so that a row that sees no key has a softmax without
# NaN and gradient 0.
HIDDEN = -1e30
