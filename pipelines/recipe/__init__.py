"""Recipes: YAML and overrides in, validated frozen specs out. The only package that imports pydantic."""
