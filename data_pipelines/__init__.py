"""The data plane: object storage, shards, their index and order, the stream, the feature store."""
