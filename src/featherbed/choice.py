"""Which variant "auto" means."""

from __future__ import annotations

from featherbed.errors import OptionError
from featherbed.folder import Manifest

AUTO = "auto"
PREFERENCE = ("int8", "int8-block", "fp32")  # fastest first, among variants that passed their gates


def choose(manifest: Manifest, subject: str) -> str:
    """The variant "auto" means: of those whose gates did not fail, the first of PREFERENCE, else any.

    Raises OptionError when every variant failed; ``subject`` is the folder or id that it names.
    """
    sound = [v.name for v in manifest.variants.values() if v.passed is not False]
    for name in (*PREFERENCE, *sound):
        if name in sound:
            return name
    raise OptionError(
        f"variant auto of {subject}",
        expected="a variant that passed its gates",
        found=f"none of {', '.join(manifest.variants)}",
        remedy="name one to use it all the same, or build the folder again",
    )
