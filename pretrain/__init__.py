"""The method and its training: models, objective, sampling, the loop, the engine, checkpoints."""
