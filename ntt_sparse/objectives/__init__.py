"""Objectives: what is minimised, as pure functions of pytrees."""
