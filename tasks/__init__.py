"""Data sets as conversations, each with a way to grade an answer.

base.py says what a task is. recipes.py says which stage of training uses which tasks.
"""
