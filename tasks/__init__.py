"""Data sets as conversations, each with a way to grade an answer.

tasks/base.py says what a task is, tasks/recipes.py which stage of training uses which."""
