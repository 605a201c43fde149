"""flexdma in the models of other libraries, one package per library.  `import flexdma` imports none of them.

partial_logits stands beside the packages: it serves versions of transformers that its package does not support.
"""
