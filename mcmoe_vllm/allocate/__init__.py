"""Costs to widths."""
