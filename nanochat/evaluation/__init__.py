"""Evaluation of models: bits per byte (loss), CORE (core, core_bundle), chat tasks (chat)."""
