"""What is refused before anything is read: recipes and models that do not fit together."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from m2rl_core.merging.recipe import Recipe, known


def check_recipes(recipes: Sequence[Recipe], experts: Mapping) -> None:
    """ValueError for no experts, unknown or repeated ones, lists of the wrong length, weights that cancel."""
    if not experts:
        raise ValueError("no experts to merge: name at least one")
    for recipe in recipes:
        names = recipe.experts or tuple(experts)
        for name in names:
            known(name, experts, "expert")
        if len(set(names)) < len(names):
            raise ValueError(f"an expert is named twice in {', '.join(names)}: give it one entry and a weight")
        for name in ("weight", "density", "drop_rate"):
            if name in recipe.parameters:
                recipe.each(name, len(names))
        if recipe.parameters.get("normalize") and sum(recipe.each("weight", len(names))) == 0:
            raise ValueError("the weights add up to 0 and normalize divides by their sum: change a weight")


def check_shapes(base, experts: Mapping) -> None:
    """ValueError unless every expert has the base's tensor names and shapes; reads no weights."""
    shapes = {name: shape for name, (_, shape) in base.meta.items()}
    for expert, model in experts.items():
        theirs = {name: shape for name, (_, shape) in model.meta.items()}
        for names, words in ((shapes.keys() - theirs.keys(), "lacks {}, which the base has"),
                             (theirs.keys() - shapes.keys(), "has {}, which the base lacks")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{expert} {words.format(min(names) + more)}: merge models of one architecture only")
        for name in sorted(shapes):
            if shapes[name] != theirs[name]:
                raise ValueError(f"{expert}: {name} has shape {theirs[name]} and the base {shapes[name]}: "
                                 "merge models of one size and one vocabulary only")

