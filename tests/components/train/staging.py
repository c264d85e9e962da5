"""A stage run by itself, as the tests of whole lines over files want it."""

from __future__ import annotations

from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact, Context
from components.shared.store import Store


def stage(verb, config, inputs, folder):
    """Run a stage in `folder`. Returns its result and its artifacts by name."""
    context = Context(
        "run", "tiny", verb.__name__, verb.__name__[0] * 64, Store("s3://none", folder / "cache"),
        folder / verb.__name__, folder / f"{verb.__name__}-work",
    )  # fmt: skip
    context.out.mkdir(parents=True)
    result = verb(config, inputs, context)
    made = {
        n: Artifact(Manifest(k, describe(context.out / n)), context.out / n) for n, k in result.kinds.items()
    }
    for name, artifact in made.items():
        artifact.manifest.metadata.update(result.metadata.get(name, {}))
    return result, made
