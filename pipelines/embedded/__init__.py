"""The embedded platform: object store, model server and MLflow page of one checkout, on one machine."""
