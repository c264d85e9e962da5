"""Sample corpora and base models, by name: pinned, fetched once, verified, kept in the S3 store."""
