"""flexdma inside other people's models: one package per library, imported on its own."""
