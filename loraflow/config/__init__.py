"""The recipe: what a run computes, as frozen values. All problems of a YAML file are reported at once."""

from loraflow.config.load import load_recipe, parse_recipe
from loraflow.config.recipe import Recipe
from loraflow.config.runtime import Runtime

__all__ = ["Recipe", "Runtime", "load_recipe", "parse_recipe"]
