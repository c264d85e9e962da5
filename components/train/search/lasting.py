"""A search in the store, for one whose disk may go before it ends: that of a pod.

`work/train/<key>/trial-search.json` has the journal and the best trial so far; both go when the stage has
committed. Trials that were being made are made again from their beginning.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from components.shared.manifest import Manifest
from components.shared.stage import Context
from components.train import keeping

# Kubeflow Pipelines sets it in each pod it starts.
_POD = "KFP_POD_NAME"


@dataclass
class Lasting:
    """What of a search outlasts its pod; outside one nothing is done, since the work folder stays.

    Args:
        context: of the stage.
        home: folder of the search.
        best: name of the folder of the best trial in the store, and the manifest of what it left.
    """

    context: Context
    home: Path
    best: tuple[str, str] = ("", "")

    @property
    def _name(self) -> str:
        return f"{keeping.folder(self.context.key)}/trial-search.json"

    def resume(self) -> None:
        """Lay what another pod left into the folder, unless an attempt on this disk left more."""
        journal = self.home / "journal.log"
        if not os.environ.get(_POD) or journal.exists():
            return
        found = self.context.store.read_json(self._name)
        if found is None:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        if found["best"]:
            manifest = Manifest.from_json(found["manifest"], self._name)
            self.context.store.get_tree(manifest, self.home / "trials" / found["best"])
            self.best = found["best"], found["manifest"]
        journal.write_text(found["journal"])

    def keep(self, best: Path | None) -> None:
        """Copy the journal, and the best trial where it is another one than before.

        Args:
            best: folder of the best complete trial.
        """
        if not os.environ.get(_POD):
            return
        if best is not None and best.name != self.best[0]:
            self.best = best.name, self.context.store.put_tree(best, "training").to_json()
        document = {"journal": (self.home / "journal.log").read_text()}
        document |= dict(zip(("best", "manifest"), self.best, strict=True))
        self.context.store.write_json(self._name, document)
