"""Slow tiers and peers, behind guards.

Values are sealed on their way there, and opened on the way back.
"""
