"""For which engine graphs are written: whose operators, and whether shapes are fixed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from featherbed.errors import OptionError
from featherbed.recipe import Recipe
from featherbed.steps import Standard, Static

FUSED, STANDARD = "fused", "standard"


@dataclass(frozen=True)
class Target:
    """``standard`` writes every variant in operators of the ONNX standard; ``static`` gives all fixed shapes."""

    standard: bool = False
    static: Static | None = None

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with the steps that the target asks for; what it did before by itself stays."""
        steps = recipe.steps
        if self.standard:
            steps = (*(step for step in steps if not isinstance(step, Standard)), Standard())
        if self.static is not None:
            steps = (*steps, self.static)
        return replace(recipe, steps=steps)

    def length(self, most: int) -> int:
        """The tokens a text may have, of ``most`` that the model takes. Raises OptionError where it takes fewer."""
        if self.static is None:
            return most
        if self.static.tokens > most:
            raise OptionError(
                f"--static {self.static.batch}x{self.static.tokens}",
                expected=f"at most {most} tokens, as many as the model takes",
                found=str(self.static.tokens),
                remedy="ask for fewer",
            )
        return self.static.tokens


def parse_target(operators: str, static: str) -> Target:
    """``("standard", "1x128")`` as a target; "" for no fixed shapes. Raises OptionError on other words."""
    if operators not in {FUSED, STANDARD}:
        raise OptionError(
            f"--operators {operators}",
            expected=f"{FUSED} or {STANDARD}",
            found="another word",
            remedy=f"{FUSED} is what onnxruntime runs fastest, {STANDARD} what every engine reads",
        )
    if not static:
        return Target(operators == STANDARD)
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,5})", static, re.ASCII)
    if found is None or int(found[2]) < 2:
        raise OptionError(
            f"--static {static}",
            expected="BATCHxTOKENS, texts and at least 2 tokens each",
            found="something else",
            remedy="for example --static 1x128",
        )
    return Target(operators == STANDARD, Static(int(found[1]), int(found[2])))
