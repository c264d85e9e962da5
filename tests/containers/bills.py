"""What CycloneDX's own validator says of a bill of materials."""

from __future__ import annotations

import json
import subprocess
import sys

# A process of its own: the validator comes with cyclonedx-bom, which is a program, not a library of ours.
_PROGRAM = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
print(JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read()) or "")
"""


def fault(bill: dict) -> str:
    """The first fault of a bill; empty when it keeps to the schema."""
    answer = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(bill), capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()
