"""flexdma in the models of other libraries, one package per library.  `import flexdma` imports none of them."""
